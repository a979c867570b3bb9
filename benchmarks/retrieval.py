"""Dense, lexical and hybrid search through `VectorIndex`, for a model and for its encoder alone.

    python benchmarks/retrieval.py --data python-docs eval/SciFact eval/Cranfield eval/XQuAD-en \\
        --vectors build/vectors --output benchmarks/results/retrieval.json

A folder holds corpus.parquet, queries.parquet and qrels.parquet (columns as `c2v-rag evaluate` reads them).
"python-docs": the standard library's docstrings and the 60 questions beside this file. Documents are indexed in chunks
as `c2v-rag index` makes them, with and without chunk headers; the best chunk of a document counts.

The rows of the encoder, as it was published, are the baseline for what training and the decoder add. `--also` adds the
rows of other encoders with mean pooling, such as all-mpnet-base-v2, on the same chunks. "rank fusion" and
"0.7 z + 0.3 z" combine the same lists in other ways; z are the scores of a query at mean 0 and deviation 1. Intervals:
paired bootstrap over queries against the dense row of the same embedder without headers, and of the model against the
encoder. `--vectors` keeps the embeddings, so that a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shelve
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import made, questions
from costs import part_folder
from rich.console import Console
from rich.table import Table

from c2v_rag import Causal2Vec, Document, SearchMode, VectorIndex, __version__, shared_model
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.evaluate.folders import read_retrieval, retrieval_files
from c2v_rag.evaluate.intervals import difference_of_means
from c2v_rag.evaluate.metrics import mrr_at_k, ndcg_at_k, recall_at_k
from c2v_rag.fusion import reciprocal_rank_fusion
from c2v_rag.index import ChunkSettings
from c2v_rag.sources import PYTHON_DOCS, python_docs

MODES: tuple[SearchMode, ...] = ("dense", "lexical", "hybrid")
METRICS = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
FIXED_WEIGHTS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
TIMED = 60  # queries that are searched one by one for the milliseconds
SPLITS = 300
COMPARED = ("dense", "hybrid", "0.7 z + 0.3 z")  # the model with the encoder
FIRST_COLUMNS = (128, 256)

Gains = Mapping[str, float]


class KeptVectors:
    """An embedder that keeps the embeddings of documents, by the model's weights and the text."""

    def __init__(self, embedder: Any, kept: Any) -> None:
        self._embedder = embedder
        self._kept = kept
        self._prefix = f"{embedder.stamp['weights']}-{embedder.stamp.get('part', 'model')}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def encode_document(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        keys = [f"{self._prefix}:{hashlib.sha256(text.encode()).hexdigest()}" for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._kept}
        for key, vector in zip(missing, self._embedder.encode_document(list(missing.values()), **options), strict=True):
            self._kept[key] = vector
        return np.stack([self._kept[key] for key in keys])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help=f"folders, or {PYTHON_DOCS}")
    parser.add_argument("--model", default="default")
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], help="folders of other encoders; the name is the row's"
    )
    parser.add_argument("--queries", type=int, help="only the first so many queries, for a dry run")
    parser.add_argument("--documents", type=int, help="only the first so many documents, for a dry run")
    parser.add_argument("--vectors", type=Path, help="file that keeps the documents' embeddings")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    model = shared_model(arguments.model)
    result: dict[str, Any] = {
        **made(model.device, model.dtype),
        "version": __version__,
        "model": model.stamp,
        "sets": {},
    }
    scores: dict[str, dict[str, dict[str, np.ndarray]]] = {}  # by system, then set, then mode: (Q, 3)
    with ExitStack() as stack:
        kept: Any = stack.enter_context(shelve.open(str(arguments.vectors))) if arguments.vectors else {}
        embedders = {"encoder": KeptVectors(encoder_alone(model), kept), "model": KeptVectors(model, kept)}
        embedders |= {path.name: KeptVectors(encoder_alone(model, path), kept) for path in arguments.also}
        for data in arguments.data:
            name = Path(data).name
            corpus, queries, gains = read(data)
            corpus, queries = corpus[: arguments.documents], dict(list(queries.items())[: arguments.queries])
            dense = np.empty(0)
            found: dict[str, Any] = {"queries": len(queries), "documents": len(corpus), "rows": {}}
            for (label, embedder), header in product(embedders.items(), (False, True)):
                with tempfile.TemporaryDirectory() as store:
                    index = VectorIndex(store, embedder, chunking=ChunkSettings(header=header))
                    index.add(corpus, show_progress=True)
                    values, speed = score(index, embedder, queries, gains)
                    number = len(index)
                    size = sum(path.stat().st_size for path in Path(store).rglob("*") if path.is_file())
                headed = ", headers" if header else ""
                scores.setdefault(label + headed, {})[name] = values
                dense = dense if header else values["dense"]
                found["rows"] |= {
                    f"{label}, {mode}{headed}": row for mode, row in summary(values, speed, dense).items()
                }
                found[f"{label} index{headed}"] = {
                    "chunks": number,
                    "bytes": size,
                    "columns": embedder.embedding_dim,
                    "ms_to_embed": speed["embed"],
                }
            result["sets"][name] = found
            show(name, found)
    headed_model = scores["model, headers"]
    result["held-out halves"] = held_out({name: values for name, values in headed_model.items() if name != "SciFact"})
    result["against encoder"] = {
        mode + headed: leads(scores["model" + headed], scores["encoder" + headed], mode)
        for mode, headed in product(COMPARED, ("", ", headers"))
    }
    print(json.dumps({key: result[key] for key in ("held-out halves", "against encoder")}, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def encoder_alone(model: Causal2Vec, encoder: Path | None = None) -> EncoderEmbedder:
    """An encoder, unless given that of the model without the adapter on it. Its index has the same chunks."""
    folders = [encoder or part_folder(model, "encoder"), part_folder(model, "llm")]
    return EncoderEmbedder(Causal2Vec.from_parts(*folders, config=model.config, device=model.device, dtype=model.dtype))


def read(data: str) -> tuple[list[Document], dict[str, str], dict[str, Gains]]:
    """Documents (their id is the source), queries that have a relevant document, and gains by query.

    A question about Python has any of its accepted names as its answer, so the gain of each is 1.
    """
    if data == PYTHON_DOCS:
        rows = questions()
        queries = {str(i): row["question"] for i, row in enumerate(rows)}
        return (
            list(python_docs()),
            queries,
            {str(i): dict.fromkeys(row["answers"], 1.0) for i, row in enumerate(rows)},
        )
    files = retrieval_files(Path(data))
    if files is None:
        raise SystemExit(f"{data} has no corpus.parquet and no corpus.jsonl.")
    found = read_retrieval(files)
    corpus = [
        Document(f"{row['title']} {row['text']}".strip(), row["id"], title=row["title"]) for row in found.documents
    ]
    return corpus, {row["id"]: row["text"] for row in found.queries}, dict(found.qrels)


def score(
    index: VectorIndex, embedder: KeptVectors, queries: Mapping[str, str], gains: Mapping[str, Gains]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """For each mode and fusion the metrics of every query (Q, 3); milliseconds a query for each mode and "embed"."""
    ranked: dict[str, dict[str, list[str]]] = {}
    index.search("warm up", mode="hybrid")
    texts = list(queries.values())
    speed = {"embed": milliseconds(lambda text: embedder.encode_query([text]), texts)}
    for mode in MODES:
        found = index.search_many(texts, 10, mode=mode, group_by="source")
        ranked[mode] = {id: [hit.metadata["source"] for hit in hits] for id, hits in zip(queries, found, strict=True)}
        speed[mode] = milliseconds(partial(index.search, top_k=10, mode=mode, group_by="source"), texts)
    for fusion, scores, sources in other_fusions(index, embedder, texts):
        ranked[fusion] = {id: best_sources(row, sources) for id, row in zip(queries, scores, strict=True)}
    return {name: np.array([metrics(lists[id], gains[id]) for id in queries]) for name, lists in ranked.items()}, speed


def milliseconds(ask: Callable[[str], Any], texts: Sequence[str]) -> float:
    """The mean time of `ask` for one text after the other."""
    started = time.perf_counter()
    for text in texts[:TIMED]:
        ask(text)
    return 1000 * (time.perf_counter() - started) / len(texts[:TIMED])


def other_fusions(
    index: VectorIndex, embedder: KeptVectors, queries: list[str]
) -> Iterator[tuple[str, np.ndarray, list[str]]]:
    """(name, scores (Q, N), source of each of N chunks): fewer columns, fixed weights of both scores, rank fusion."""
    chunks = list(index.chunks(embeddings=True))
    sources = [str(chunk.metadata["source"]) for chunk in chunks]
    embeddings = np.stack([chunk.embedding for chunk in chunks if chunk.embedding is not None])
    vectors = embedder.encode_query(queries)
    cosines = vectors @ embeddings.T
    for columns in FIRST_COLUMNS:
        q, d = (
            side[:, :columns] / np.linalg.norm(side[:, :columns], axis=1, keepdims=True)
            for side in (vectors, embeddings)
        )
        yield f"dense, {columns} columns", q @ d.T, sources
    lexical = index.lexical_index()
    rows = [lexical.rows[chunk.id] for chunk in chunks]
    words = np.stack([lexical.scores(query)[rows] for query in queries])
    for weight in FIXED_WEIGHTS:
        yield f"{weight:g} z + {1 - weight:.2g} z", weight * standard(cosines) + (1 - weight) * standard(words), sources
    fused = np.zeros_like(cosines)
    for row, (dense, sparse) in enumerate(zip(cosines, words, strict=True)):
        lists = [[str(i) for i in np.argsort(-scores)[:100]] for scores in (dense, sparse)]
        for rank, i in enumerate(reciprocal_rank_fusion(lists)):
            fused[row, int(i)] = 1 / (1 + rank)
    yield "rank fusion", fused, sources


def standard(scores: np.ndarray) -> np.ndarray:
    """Rows shifted to mean 0 and scaled to standard deviation 1."""
    return (scores - scores.mean(axis=1, keepdims=True)) / np.maximum(scores.std(axis=1, keepdims=True), 1e-9)


def best_sources(scores: np.ndarray, sources: Sequence[str]) -> list[str]:
    """The ten sources with the best chunks."""
    best: dict[str, None] = {}
    for row in np.argsort(-scores, kind="stable"):
        best.setdefault(sources[row])
        if len(best) == 10:
            break
    return list(best)


def metrics(ranked: list[str], gains: Gains) -> list[float]:
    return [ndcg_at_k(ranked, gains, 10), recall_at_k(ranked, gains, 10), mrr_at_k(ranked, gains, 10)]


def summary(values: Mapping[str, np.ndarray], speed: Mapping[str, float], dense: np.ndarray) -> dict[str, Any]:
    """For each mode the means, the interval of its nDCG@10 against `dense` (Q, 3), and the milliseconds a query."""
    rows = {}
    for mode, by_query in values.items():
        difference = difference_of_means([by_query[:, 0]], [dense[:, 0]])
        rows[mode] = {
            **dict(zip(METRICS, by_query.mean(axis=0).tolist(), strict=True)),
            "against_dense": [difference.low, difference.high],
            "ms_per_query": speed.get(mode),
        }
    return rows


def leads(
    ours: Mapping[str, Mapping[str, np.ndarray]], theirs: Mapping[str, Mapping[str, np.ndarray]], mode: str
) -> dict[str, list[float]]:
    """nDCG@10 of the model minus that of the encoder in each set, and their mean without python-docs: with intervals.

    python-docs is left out of the mean because it has only 60 questions, and every set counts the same.
    """
    groups = {name: [name] for name in ours} | {"mean": [name for name in ours if name != PYTHON_DOCS]}
    found = {}
    for group, names in groups.items():
        if names:
            sides = [[side[name][mode][:, 0] for name in names] for side in (ours, theirs)]
            difference = difference_of_means(*sides)
            found[group] = [difference.difference, difference.low, difference.high]
    return found


def held_out(by_set: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Hybrid search against the fixed weight that is best on the held-out halves of the queries, over random halves.

    nDCG@10, mean over the sets. The fixed weight is chosen on the very halves that are scored, to its advantage.
    """
    rng = np.random.default_rng(0)
    fixed = ["dense", *(name for name in next(iter(by_set.values())) if name.endswith(" z"))]
    differences = []
    for _ in range(SPLITS):
        halves = {name: rng.permutation(len(values["dense"]))[::2] for name, values in by_set.items()}

        def mean_of(mode: str, halves: Mapping[str, np.ndarray] = halves) -> float:
            return float(np.mean([by_set[name][mode][half, 0].mean() for name, half in halves.items()]))

        differences.append(mean_of("hybrid") - max(mean_of(mode) for mode in fixed))
    return {
        "splits": SPLITS,
        "mean_difference": float(np.mean(differences)),
        "share_of_splits_won": float(np.mean(np.array(differences) > 0)),
    }


def show(name: str, found: dict[str, Any]) -> None:
    table = Table("", *METRICS, "against dense, 95 %", "ms a query", title=f"{name}, {found['queries']} queries")
    for row, values in found["rows"].items():
        if " z" in row and "0.7 z" not in row:
            continue  # only in the JSON
        low, high = values["against_dense"]
        interval = "" if row.endswith(", dense") else f"{100 * low:+.1f} to {100 * high:+.1f}"
        time_ms = "" if values["ms_per_query"] is None else f"{values['ms_per_query']:.0f}"
        table.add_row(row, *(f"{100 * values[metric]:.1f}" for metric in METRICS), interval, time_ms)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
