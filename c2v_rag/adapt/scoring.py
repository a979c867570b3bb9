"""How well a model finds the passages of held-out questions and of general sets, and what two models differ by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from c2v_rag.adapt.corpus import Corpus, Ranker, rank_of
from c2v_rag.evaluate.folders import RetrievalFolder, read_retrieval, retrieval_files
from c2v_rag.evaluate.intervals import paired_bootstrap
from c2v_rag.evaluate.metrics import ndcg_at_k, top_k
from c2v_rag.protocols import Embedder

METRICS = ("recall@10", "nDCG@10", "MRR")
MODES = ("vectors", "hybrid")
GENERAL_SET = "everyday questions"  # the set that comes with this package


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A score before and after, as fractions, and the 95 % interval of the difference (a paired bootstrap)."""

    before: float
    after: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.after - self.before


def ranks(corpus: Corpus, numbers: Sequence[int], ranker: Ranker, vectors: np.ndarray) -> dict[str, list[int]]:
    """For each mode the ranks of the right passages; `vectors` (Q, D) of the questions `numbers`."""
    found: dict[str, list[int]] = {mode: [] for mode in MODES}
    for number, vector in zip(numbers, vectors, strict=True):
        position = corpus.positions[number]
        found["vectors"].append(rank_of(ranker.dense(vector), position))
        found["hybrid"].append(rank_of(ranker.hybrid(corpus.questions[number].question, vector), position))
    return found


def metric_values(metric: str, found: Sequence[int]) -> list[float]:
    """The metric of each question, which has one right passage, from its rank."""
    if metric == "recall@10":
        return [float(rank <= 10) for rank in found]
    if metric == "nDCG@10":
        return [1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in found]
    return [1 / rank for rank in found]


def compare(before: Sequence[float], after: Sequence[float], groups: Sequence[str]) -> Comparison:
    """Means before and after. The bootstrap draws whole groups: questions on one document resemble each other."""
    names = {name: row for row, name in enumerate(dict.fromkeys(groups))}
    sums, sizes = np.zeros(len(names)), np.zeros(len(names))
    for name, old, new in zip(groups, before, after, strict=True):
        sums[names[name]] += new - old
        sizes[names[name]] += 1
    interval = paired_bootstrap(len(names), lambda rows: float(sums[rows].sum() / sizes[rows].sum()))
    return Comparison(float(np.mean(before)), float(np.mean(after)), interval.low, interval.high)


def read_general_sets(folders: Sequence[Path]) -> dict[str, RetrievalFolder]:
    """The general sets by name: the one of this package, and a retrieval set in each folder.

    Raises FileNotFoundError for a folder that is no retrieval set, ValueError for damaged files and repeated names.
    """
    sets: dict[str, RetrievalFolder] = {}
    with resources.as_file(resources.files("c2v_rag.adapt") / "general") as own:
        for name, folder in [(GENERAL_SET, own), *((folder.name, folder) for folder in folders)]:
            files = retrieval_files(folder)
            if files is None:
                raise FileNotFoundError(
                    f"{folder} is no retrieval set: it has neither corpus.parquet nor corpus.jsonl."
                )
            if name in sets:
                raise ValueError(f"Two general sets are named {name!r}. Rename one of the folders.")
            sets[name] = read_retrieval(files)
    return sets


def score_general(model: Embedder, sets: Mapping[str, RetrievalFolder]) -> dict[str, list[float]]:
    """For each set the nDCG@10 of each of its queries, by vectors."""
    found: dict[str, list[float]] = {}
    for name, data in sets.items():
        texts = [f"{document['title']}\n\n{document['text']}".strip() for document in data.documents]
        ids = [document["id"] for document in data.documents]
        queries = model.encode_query([query["text"] for query in data.queries])
        ranked = top_k(queries, model.encode_document(texts), ids, 10)
        found[name] = [
            ndcg_at_k(row, data.qrels[query["id"]], 10) for query, row in zip(data.queries, ranked, strict=True)
        ]
    return found
