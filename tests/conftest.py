import os

# Nothing in the tests may reach for a hub; set before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
