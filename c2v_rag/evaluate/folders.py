"""Read folders of evaluation data: a retrieval set in parquet or in BEIR's JSONL."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from c2v_rag.sources.formats import read_jsonl


@dataclasses.dataclass(frozen=True)
class RetrievalFolder:
    """The rows of a retrieval set. `files`: where they were read from.

    `documents`: id, title, text. `queries`: id, text, of the queries that have a relevant document. `qrels`: query id
    to document id to gain.
    """

    files: tuple[Path, Path, Path]
    documents: list[dict[str, str]]
    queries: list[dict[str, str]]
    qrels: dict[str, dict[str, int]]


def retrieval_files(folder: Path) -> tuple[Path, Path, Path] | None:
    """The paths of corpus, queries and judgements in a folder; None where it has no corpus file."""
    if (corpus := folder / "corpus.parquet").is_file():
        return corpus, folder / "queries.parquet", folder / "qrels.parquet"
    if (corpus := folder / "corpus.jsonl").is_file():
        return corpus, folder / "queries.jsonl", folder / "qrels" / "test.tsv"
    return None


def read_retrieval(files: tuple[Path, Path, Path]) -> RetrievalFolder:
    """Read the three files of a retrieval set, whose columns `tasks.read_task` describes.

    Raises FileNotFoundError for a missing file, ValueError naming the file and a missing column or query, or a score
    that is no whole number.
    """
    corpus, queries, qrels = files
    gains: dict[str, dict[str, int]] = {}
    for row in read_rows(qrels, ("query-id", "corpus-id", "score")):
        gain = float(row["score"])
        if not gain.is_integer():
            raise ValueError(f"{qrels}: the scores of documents must be whole numbers, got {row['score']}.")
        if gain > 0:
            gains.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(gain)
    documents = [
        {"id": str(row["_id"]), "title": row.get("title") or "", "text": row["text"]}
        for row in read_rows(corpus, ("_id", "text"))
    ]
    judged = [
        {"id": str(row["_id"]), "text": row["text"]}
        for row in read_rows(queries, ("_id", "text"))
        if str(row["_id"]) in gains
    ]
    known = {row["id"] for row in judged}
    if missing := sorted(gains.keys() - known):
        raise ValueError(f"{qrels} judges queries that {queries} does not hold: {missing[:4]}.")
    return RetrievalFolder(files, documents, judged, gains)


def read_rows(path: Path, needed: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """The rows of a .parquet, .jsonl or .tsv file.

    ValueError, with the file's name, for a row that is no JSON object or lacks one of the `needed` columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, and the files beside it need it.")
    rows: Iterator[Mapping[str, Any]]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = iter(pq.read_table(path).to_pylist())
    elif path.suffix == ".tsv":
        with path.open(encoding="utf-8-sig", newline="") as text:
            rows = iter(list(csv.DictReader(text, delimiter="\t")))
    else:
        rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in needed if row.get(name) is None]:
            raise ValueError(f"{path}: row {number} lacks {missing}; it has {list(row)}.")
        yield row
