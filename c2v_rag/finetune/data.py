"""Training pairs: parquet sets in a folder -> batches that each hold one set, drawn by a seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


@dataclasses.dataclass(frozen=True)
class Pair:
    query: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Pairs of one task; `instruction` stands before its queries."""

    name: str
    instruction: str
    pairs: list[Pair]


@dataclasses.dataclass(frozen=True)
class PairBatch:
    instruction: str
    queries: list[str]
    documents: list[str]  # the positives in the queries' order, then hard negatives
    also_positive: np.ndarray  # (B, M) bool: documents that answer a query too, by equality of texts


def read_pair_set(folder: Path, name: str) -> PairSet:
    """Read NAME.parquet (query, positive, optional negatives) and the instruction in NAME.json.

    Raises FileNotFoundError, or ValueError naming the file and the first row (from 0) that cannot be used.
    """
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"The recipe names the data set {name!r}, but there is no {path}.")
    table = pq.read_table(path)
    if missing := {"query", "positive"} - set(table.column_names):
        raise ValueError(f"{path} lacks the columns {sorted(missing)}; it has {table.column_names}.")
    columns = table.to_pydict()
    negatives = columns.get("negatives") or [[]] * table.num_rows
    pairs = []
    for row, (query, positive, others) in enumerate(zip(columns["query"], columns["positive"], negatives, strict=True)):
        if not (query and query.strip() and positive and positive.strip()):
            raise ValueError(f"{path}: row {row} has an empty query or positive.")
        pairs.append(Pair(query, positive, tuple(others or ())))
    about = folder / f"{name}.json"
    instruction = json.loads(about.read_text(encoding="utf-8")).get("instruction", "") if about.is_file() else ""
    return PairSet(name, instruction, pairs)


def draw_batches(
    sets: list[PairSet],
    weights: Mapping[str, float],
    *,
    batch_size: int,
    num_batches: int,
    num_negatives: int,
    seed: int,
) -> Iterator[PairBatch]:
    """`num_batches` batches, each from one set, drawn in proportion to weight times the square root of its rows.

    A set is gone through in a shuffled order, and again in another one when it is used up. The same arguments give
    the same batches.
    """
    rng = np.random.default_rng(seed)
    share = np.array([weights[one.name] * np.sqrt(len(one.pairs)) for one in sets])
    orders: list[np.ndarray] = [np.empty(0, dtype=np.int64) for _ in sets]
    for _ in range(num_batches):
        which = int(rng.choice(len(sets), p=share / share.sum()))
        pairs = sets[which].pairs
        while len(orders[which]) < min(batch_size, len(pairs)):
            orders[which] = np.concatenate([orders[which], rng.permutation(len(pairs))])
        rows, orders[which] = np.split(orders[which], [min(batch_size, len(pairs))])
        yield make_batch(sets[which].instruction, [pairs[row] for row in rows], num_negatives)


def make_batch(instruction: str, pairs: list[Pair], num_negatives: int) -> PairBatch:
    """Queries and documents of some pairs, and which documents must not count as negatives of which query."""
    positives = [pair.positive for pair in pairs]
    negatives = [text for pair in pairs for text in pair.negatives[:num_negatives]]
    documents = positives + negatives
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(pair.query, set()).add(pair.positive)
    also_positive = np.array([[document in answers[pair.query] for document in documents] for pair in pairs])
    return PairBatch(instruction, [pair.query for pair in pairs], documents, also_positive)
