import os

# Nothing in the tests may reach for a hub; set before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker: two workers of two threads on two cores wait for each other most of the time.
    os.environ["OMP_NUM_THREADS"] = "1"
