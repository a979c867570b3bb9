from __future__ import annotations

from pathlib import Path

import pytest

from c2v_rag.embedders import shared_model
from c2v_rag.model import Causal2Vec
from tests import tiny
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny checkpoint, which the integrations open by name."""
    path: Path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(max_length=256, encoder_max_length=256).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def core(folder: str) -> Causal2Vec:
    """The model that every integration opens by this name. float32, so that batches of any texts give equal vectors."""
    return shared_model(folder, dtype="float32")


@pytest.fixture(scope="session")
def passages() -> list[str]:
    return tiny.passages(200)


@pytest.fixture(scope="session")
def queries() -> list[str]:
    return [passage[8:60] for passage in tiny.passages(280)[::14]]
