from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from c2v_rag.embedders import shared_model
from c2v_rag.model import Causal2Vec
from c2v_rag.sources import python_docs
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint; integrations hold its name."""
    path: Path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(max_length=256, encoder_max_length=256).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def core(folder: str) -> Causal2Vec:
    """The model every integration of that name shares; float32, so that a batch's make-up does not show."""
    return shared_model(folder, dtype="float32")


@pytest.fixture(scope="session")
def passages() -> list[str]:
    """200 real passages."""
    documents = [document.text[:200] for document in python_docs() if len(document.text) > 60]
    return documents[:: len(documents) // 200][:200]


@pytest.fixture(scope="session")
def queries() -> list[str]:
    return [document.text.partition("\n\n")[2][:60] for document in python_docs()[100:2100:100]]


def top_10(queries: np.ndarray, documents: np.ndarray) -> list[list[int]]:
    return [np.argsort(-row, kind="stable")[:10].tolist() for row in queries @ documents.T]
