import os
from pathlib import Path

import pytest

# Nothing in the tests may reach for a hub; set before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker: two workers of two threads on two cores wait for each other most of the time.
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder, "tiny", for processes to load."""
    from tests.tiny import tiny_model  # imports transformers

    path: Path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model().save_pretrained(path)
    return str(path)
