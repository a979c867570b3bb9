"""Training pairs: reads and checks the file of each set, and draws the datasets of a stage."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from c2v_rag.sources.formats import csv_reader

logger = logging.getLogger(__name__)

_FORMATS = (".parquet", ".jsonl", ".csv")
_LINES_SHOWN = 5
_COLUMNS = ("query", "positive", "negatives", "positive_score", "negative_scores", "document")
WITH_NEGATIVES = " with negatives"  # suffix of a dataset's name: the rows of a set that have enough negatives


@dataclasses.dataclass(frozen=True)
class Pair:
    """A query and a passage that answers it.

    `scores`: a teacher's score of the positive, then of each negative; empty without scores. `document`: the name of
    the document that the positive is a part of; "" if it is one of its own.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    document: str = ""

    def with_negatives(self, rows: Iterable[int]) -> Pair:
        """The pair with its negatives at these positions only, and their scores."""
        rows = list(rows)
        scores = (self.scores[0], *(self.scores[1 + row] for row in rows)) if self.scores else ()
        return dataclasses.replace(self, negatives=tuple(self.negatives[row] for row in rows), scores=scores)

    def without_negatives(self, texts: AbstractSet[str]) -> Pair:
        """The pair without those of its negatives that are in `texts`."""
        if texts.isdisjoint(self.negatives):
            return self
        return self.with_negatives(row for row, text in enumerate(self.negatives) if text not in texts)


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Pairs of one task. `left_out`: the lines that were skipped, by reason.

    `instruction` goes before its queries; None: the set names none, and gets the model's own.
    """

    name: str
    instruction: str | None
    pairs: list[Pair]
    left_out: dict[str, list[int]]


def read_pair_set(folder: Path, name: str, *, instruction: str | None = None, max_bad_rows: float = 0.05) -> PairSet:
    """Read NAME.parquet, NAME.jsonl or NAME.csv: query, positive, and optional columns.

    Optional: `negatives`, a list of texts; `positive_score` and `negative_scores`, a teacher's score of the positive
    and the list of the negatives' scores; `document`, the name of the positive's document. In CSV, lists are JSON.

    The instruction is the one in NAME.json unless given; None where there is neither. Rows that cannot be used are left
    out and counted: no JSON, a missing or empty text, a positive that is its query, a pair that came before.

    Raises FileNotFoundError; ValueError, with line numbers, when a column is missing altogether or more rows than
    the share `max_bad_rows` cannot be used.
    """
    found = [path for suffix in _FORMATS if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) != 1:
        raise FileNotFoundError(
            f"The recipe names the data set {name!r}, but {folder} holds {len(found) or 'none'} of "
            + ", ".join(f"{name}{suffix}" for suffix in _FORMATS)
        )
    (path,) = found
    pairs: dict[tuple[str, str], Pair] = {}
    left_out: dict[str, list[int]] = {}
    rows = 0
    for line, row in _rows(path):
        rows += 1
        pair = _pair(row)
        if isinstance(pair, Pair) and (pair.query, pair.positive) in pairs:
            pair = "the same pair as before"
        if isinstance(pair, Pair):
            pairs[pair.query, pair.positive] = pair
        else:
            left_out.setdefault(pair, []).append(line)
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    if left_out:
        bad = sum(map(len, left_out.values()))
        report = f"{path}: {bad} of {rows} rows cannot be used:\n" + "\n".join(
            f"- {reason}: {len(lines)}, line {', '.join(map(str, lines[:_LINES_SHOWN]))}"
            + (", ..." if len(lines) > _LINES_SHOWN else "")
            for reason, lines in left_out.items()
        )
        if bad > max_bad_rows * rows:
            raise ValueError(f"{report}\nMend them, or raise max_bad_rows (now {max_bad_rows}) in the recipe's data.")
        logger.warning(report)
    if instruction is None:
        about = folder / f"{name}.json"
        instruction = json.loads(about.read_text(encoding="utf-8")).get("instruction") if about.is_file() else None
    return PairSet(name, instruction, list(pairs.values()), left_out)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a file; a row of a JSONL file that is no JSON comes as None. Parquet rows are counted from 1."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names)
        names = [name for name in _COLUMNS if name in file.schema_arrow.names]
        line = 0
        for batch in file.iter_batches(columns=names):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as text:  # Excel begins the file with a byte order mark
            reader = csv_reader(text)
            _check_columns(path, reader.fieldnames or [])
            for row in reader:
                yield reader.line_num, row
    else:
        with path.open(encoding="utf-8-sig") as text:
            for line, content in enumerate(text, start=1):
                if not content.strip():
                    continue
                try:
                    yield line, json.loads(content)
                except json.JSONDecodeError:
                    yield line, None


def _check_columns(path: Path, names: Any) -> None:
    if missing := {"query", "positive"} - set(names):
        raise ValueError(f"{path} lacks the columns {sorted(missing)}; it has {list(names)}.")


def _pair(row: Any) -> Pair | str:
    """The row as a pair, or what is wrong with it."""
    if not isinstance(row, Mapping):
        return "not a JSON object"
    query, positive, negatives = row.get("query"), row.get("positive"), row.get("negatives")
    for name, value in (("query", query), ("positive", positive)):
        if not isinstance(value, str) or not value.strip():
            return f"no text in {name!r}"
    if query == positive:
        return "query and positive are the same"
    try:
        negatives = _list_of(negatives)
    except ValueError:
        return "'negatives' is not a JSON list"
    if not all(isinstance(text, str) and text.strip() for text in negatives):
        return "'negatives' is not a list of texts"
    scores: list[Any] = []
    if row.get("positive_score") not in (None, ""):
        try:
            scores = [float(row["positive_score"]), *map(float, _list_of(row.get("negative_scores")))]
        except (TypeError, ValueError):
            return "'positive_score' or 'negative_scores' holds no numbers"
        if len(scores) != 1 + len(negatives) or not np.isfinite(scores).all():
            return "'negative_scores' has not one finite score for each negative"
    document = row.get("document")
    whole = Pair(str(query), str(positive), tuple(negatives), tuple(scores), "" if document is None else str(document))
    return whole.without_negatives({whole.query, whole.positive})


def _list_of(value: Any) -> list[Any]:
    """A list given as such, as JSON text, or not at all (empty). ValueError for anything else."""
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"not a list: {value!r:.80}")
    return value


def draw_stage(
    sets: list[PairSet],
    weights: Mapping[str, float],
    *,
    batch_size: int,
    steps: int,
    num_negatives: int,
    seed: int,
    exponent: float = 0.5,
) -> dict[str, Dataset]:
    """Datasets that hold about `steps` batches, a set's share its weight times a power of its rows (the square root).

    The trainer makes every batch from one dataset and draws datasets in proportion to their rows. A set is gone
    through in a shuffled order, and again when it is used up. Columns: query, positive, and `num_negatives` more
    where a row has as many; rows that lack them make a dataset of their own, since a batch has one shape. If neither
    fills a batch, all rows go without negatives. The negatives are drawn from the row's, anew each time the row comes
    up. "scores" holds the teacher's scores of positive and negatives where a pair of the dataset has them; NaN for
    pairs without.
    """
    rng = np.random.default_rng(seed)
    share = np.array([weights[one.name] * len(one.pairs) ** exponent for one in sets])
    counts = rng.multinomial(steps, share / share.sum())
    drawn: dict[str, Dataset] = {}
    for one, num_batches in zip(sets, counts, strict=True):
        rows: list[Pair] = []
        while len(rows) < num_batches * batch_size:
            order = rng.permutation(len(one.pairs))[: num_batches * batch_size - len(rows)]
            rows += [one.pairs[i] for i in order]
        plain: list[Pair] = []
        full: list[Pair] = []
        for pair in rows:
            if num_negatives and len(pair.negatives) >= num_negatives:
                chosen = rng.choice(len(pair.negatives), size=num_negatives, replace=False)
                full.append(pair.with_negatives(chosen.tolist()))
            else:
                plain.append(pair)
        if max(len(plain), len(full)) < batch_size:  # neither fills a batch: no row gets negatives
            plain, full = rows, []
        for name, part, negatives in ((one.name, plain, 0), (one.name + WITH_NEGATIVES, full, num_negatives)):
            if len(part) >= batch_size:
                drawn[name] = _dataset(part, negatives)
            elif part:
                kind = f"with {negatives} negatives" if negatives else "without enough negatives"
                logger.warning(
                    "%s: %d pairs %s are left out of this stage: they are fewer than a batch of %d.",
                    one.name, len(part), kind, batch_size,
                )  # fmt: skip
    return drawn


def _dataset(pairs: list[Pair], num_negatives: int) -> Dataset:
    columns: dict[str, list[Any]] = {
        "query": [pair.query for pair in pairs],
        "positive": [pair.positive for pair in pairs],
    }
    for i in range(num_negatives):
        columns[f"negative_{i + 1}"] = [pair.negatives[i] for pair in pairs]
    if num_negatives and any(pair.scores for pair in pairs):
        unknown = [math.nan] * (1 + num_negatives)
        columns["scores"] = [list(pair.scores) or unknown for pair in pairs]
    return Dataset.from_dict(columns)
