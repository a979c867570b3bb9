"""The fine-tuning benchmark: its halves share no question and no document, and it runs from end to end."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import passages, tiny_model

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "finetuning.py"


def retrieval_folder(folder: Path) -> Path:
    folder.mkdir()
    texts = passages(80)
    rng = np.random.default_rng(1)
    tables: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"_id": f"d{i}", "title": f"title {i}", "text": text} for i, text in enumerate(texts)],
        "queries": [{"_id": f"q{i}", "text": f"{i} {texts[i][:40]}"} for i in range(60)],
        "qrels": [
            {"query-id": f"q{i}", "corpus-id": f"d{d}", "score": 1}
            for i in range(60)
            for d in {i, *rng.integers(80, size=2).tolist()}
        ],
    }
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module; it imports others of its folder."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module(SCRIPT.stem)


def test_the_halves_share_no_question_and_no_document(script: Any, tmp_path: Path) -> None:
    sizes = script.write_split(retrieval_folder(tmp_path / "set"), tmp_path / "work")
    pairs = [json.loads(line) for line in (tmp_path / "work" / "pairs.jsonl").read_text().splitlines()]
    corpus, queries, qrels = (
        pq.read_table(tmp_path / "work" / "test" / f"{name}.parquet").to_pylist()
        for name in ("corpus", "queries", "qrels")
    )
    assert {pair["document"] for pair in pairs}.isdisjoint(row["_id"] for row in corpus)
    assert {pair["query"] for pair in pairs}.isdisjoint(row["text"] for row in queries)
    assert {row["corpus-id"] for row in qrels} <= {row["_id"] for row in corpus}
    assert {row["query-id"] for row in qrels} == {row["_id"] for row in queries}
    assert [*sizes.values()] == [len(pairs), len(queries), len(corpus)]
    assert len(corpus) == 40
    assert min(len(pairs), len(queries)) > 15


@pytest.mark.slow
def test_the_benchmark_runs_from_end_to_end_on_tiny_models(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "tiny")
    model.encoder.save_pretrained(tmp_path / "encoder")
    model.tokenizer.encoder.save_pretrained(tmp_path / "encoder")
    output = tmp_path / "result.json"
    arguments = ["--data", str(retrieval_folder(tmp_path / "set")), "--minutes", "0.01", "--output", str(output)]
    arguments += ["--model", str(tmp_path / "tiny"), "--sentence-transformer", str(tmp_path / "encoder")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    script.main()  # starts a process for each system
    assert "nDCG@10 x 100 on unseen questions" in capsys.readouterr().out
    result = json.loads(output.read_text())
    for system in result["systems"].values():
        assert len(system["before"]) == len(system["after"]) == result["sizes"]["test questions"]
        assert system["gain"]["low"] <= system["gain"]["difference"] <= system["gain"]["high"]
        assert all(system[key] > 0 for key in ("steps", "pairs", "tokens_per_second", "peak_mib", "seconds"))
    assert result["lead"].keys() == {"before", "after"}
