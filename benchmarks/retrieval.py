"""Dense, lexical and hybrid search through `VectorIndex`, for the default model and for its encoder alone.

    python benchmarks/retrieval.py --data eval/SciFact eval/Cranfield --output benchmarks/results/retrieval.json

Each folder holds corpus.parquet, queries.parquet and qrels.parquet (columns as `c2v-rag evaluate` reads them).
Documents are indexed as title and text, in chunks as `c2v-rag index` makes them; the best chunk of a document counts.
The rows "encoder" show what the encoder alone finds, with and without BM25: the baseline for what the decoder adds.
Reciprocal rank fusion of the same lists is printed beside the weighted sum. Intervals: paired bootstrap over queries
against the dense row of the same embedder.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from c2v_rag import Document, SearchMode, VectorIndex, __version__, shared_model
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.evaluate.metrics import mrr_at_k, ndcg_at_k, recall_at_k
from c2v_rag.fusion import FUSED_DEPTH, reciprocal_rank_fusion

MODES: tuple[SearchMode, ...] = ("dense", "lexical", "hybrid")
METRICS = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
DRAWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--queries", type=int, help="Only the first so many queries, for a dry run.")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    model = shared_model(arguments.model)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "version": __version__,
        "machine": f"{platform.processor() or platform.machine()}, {model.device}, {model.dtype}",
        "model": model.stamp,
        "sets": {},
    }
    for folder in arguments.data:
        corpus, queries, gains = read(folder, arguments.queries)
        rows: dict[str, Any] = {}
        for name, embedder in (("encoder", EncoderEmbedder(model)), ("model", model)):
            with tempfile.TemporaryDirectory() as store:
                index = VectorIndex(store, embedder)
                started = time.perf_counter()
                index.add(corpus, show_progress=True)
                indexing_s = time.perf_counter() - started
                rows |= score(name, index, queries, gains, indexing_s)
        result["sets"][folder.name] = {"queries": len(queries), "documents": len(corpus), "rows": rows}
        show(folder.name, result["sets"][folder.name])
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, limit: int | None) -> tuple[list[Document], dict[str, str], dict[str, dict[str, float]]]:
    """Documents (their id is the source), queries that have a relevant document, and gains by query."""
    gains: dict[str, dict[str, float]] = {}
    for row in pq.read_table(folder / "qrels.parquet").to_pylist():
        if row["score"] > 0:
            gains.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = float(row["score"])
    queries = {str(row["_id"]): row["text"] for row in pq.read_table(folder / "queries.parquet").to_pylist()}
    queries = {id: text for id, text in queries.items() if id in gains}
    corpus = [
        Document(f"{row.get('title') or ''} {row['text']}".strip(), str(row["_id"]))
        for row in pq.read_table(folder / "corpus.parquet").to_pylist()
    ]
    return corpus, dict(list(queries.items())[:limit]), gains


def score(
    name: str,
    index: VectorIndex,
    queries: dict[str, str],
    gains: dict[str, dict[str, float]],
    indexing_s: float,
) -> dict[str, Any]:
    """A row for each mode and for rank fusion: means of the metrics, interval against dense, ms a query."""
    ranked: dict[str, dict[str, list[str]]] = {}
    milliseconds: dict[str, float] = {}
    index.search("warm up", mode="hybrid")
    for mode in MODES:
        started = time.perf_counter()
        ranked[mode] = {
            id: [hit.metadata["source"] for hit in index.search(text, FUSED_DEPTH, mode=mode, group_by="source")]
            for id, text in queries.items()
        }
        milliseconds[mode] = 1000 * (time.perf_counter() - started) / len(queries)
    ranked["rank fusion"] = {
        id: list(reciprocal_rank_fusion([ranked["dense"][id], ranked["lexical"][id]])) for id in queries
    }
    per_query = {mode: np.array([_metrics(lists[id], gains[id]) for id in queries]) for mode, lists in ranked.items()}
    draws = np.random.default_rng(0).integers(0, len(queries), size=(DRAWS, len(queries)))
    rows = {}
    for mode, values in per_query.items():
        difference = (values[:, 0] - per_query["dense"][:, 0])[draws].mean(axis=1)
        rows[f"{name}, {mode}"] = {
            **dict(zip(METRICS, values.mean(axis=0).tolist(), strict=True)),
            "against_dense": [float(np.quantile(difference, q)) for q in (0.025, 0.975)],
            "ms_per_query": milliseconds.get(mode),
            "indexing_s": indexing_s,
            "chunks": len(index),
        }
    return rows


def _metrics(ranked: list[str], gains: dict[str, float]) -> list[float]:
    return [ndcg_at_k(ranked, gains, 10), recall_at_k(ranked, gains, 10), mrr_at_k(ranked, gains, 10)]


def show(name: str, found: dict[str, Any]) -> None:
    table = Table("", *METRICS, "against dense, 95 %", "ms a query", title=f"{name}, {found['queries']} queries")
    for row, values in found["rows"].items():
        low, high = values["against_dense"]
        interval = "" if row.endswith("dense") else f"{100 * low:+.1f} to {100 * high:+.1f}"
        time_ms = "" if values["ms_per_query"] is None else f"{values['ms_per_query']:.0f}"
        table.add_row(row, *(f"{100 * values[metric]:.1f}" for metric in METRICS), interval, time_ms)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
