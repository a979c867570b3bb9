"""Folders on this machine as mteb tasks: retrieval in parquet or BEIR's JSONL, and sentence pairs with scores."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata


@dataclasses.dataclass(frozen=True)
class Task:
    """An mteb task, with the relevance judgements or gold scores that the bootstrap needs.

    `data`: SHA-256 over its files (mteb's revision for its own tasks). `qrels`: query id to document id to gain, for
    retrieval; `gold`: the pairs' scores, for similarity.
    """

    name: str
    mteb: AbsTask
    data: str
    qrels: dict[str, dict[str, int]] | None = None
    gold: list[float] | None = None

    @property
    def metric(self) -> str:
        """The name of the main metric."""
        return "ndcg_at_10" if self.qrels is not None else "cosine_spearman"


def read_task(folder: Path) -> Task:
    """A folder as a task of its name: any of

    - corpus, queries and qrels as .parquet: (_id, title, text), (_id, text), (query-id, corpus-id, score);
    - BEIR: corpus.jsonl, queries.jsonl and qrels/test.tsv, of the same columns;
    - pairs.parquet or pairs.jsonl: (sentence1, sentence2, score).

    Queries without a relevant document are left out, as mteb's own tasks leave them out. Raises FileNotFoundError
    when it is none of these, ValueError naming the file and the missing column.
    """
    for suffix in (".parquet", ".jsonl"):
        if (pairs := folder / f"pairs{suffix}").is_file():
            return _sts_task(folder.name, pairs)
        if (corpus := folder / f"corpus{suffix}").is_file():
            qrels = folder / ("qrels.parquet" if suffix == ".parquet" else "qrels/test.tsv")
            return _retrieval_task(folder.name, corpus, folder / f"queries{suffix}", qrels)
    raise FileNotFoundError(
        f"{folder} is no evaluation set: it has neither pairs.parquet (sentence pairs) nor corpus.parquet or "
        "corpus.jsonl (retrieval)."
    )


def mteb_task(name: str) -> Task:
    """A task of mteb's own, which it downloads. ValueError when it is of another kind or there is none."""
    try:
        task: AbsTask = mteb.get_task(name)
    except KeyError as error:
        raise ValueError(f"{name!r} is neither a folder here nor a task of mteb's.") from error
    if not isinstance(task, AbsTaskRetrieval | AbsTaskSTS) or task.metadata.eval_splits != ["test"]:
        raise ValueError(f"{name} is no retrieval or similarity task with a test split alone.")
    task.load_data()
    dataset: Any = task.dataset
    revision = str(task.metadata.dataset["revision"])
    if isinstance(task, AbsTaskSTS):
        return Task(name, task, revision, gold=list(dataset["test"]["score"]))
    return Task(name, task, revision, qrels=dataset["default"]["test"]["relevant_docs"])


def _retrieval_task(name: str, corpus: Path, queries: Path, qrels: Path) -> Task:
    gains: dict[str, dict[str, int]] = {}
    for row in _rows(qrels, ("query-id", "corpus-id", "score")):
        if float(row["score"]) > 0:
            gains.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(float(row["score"]))
    documents = [
        {"id": str(row["_id"]), "title": row.get("title") or "", "text": row["text"]}
        for row in _rows(corpus, ("_id", "text"))
    ]
    judged = [
        {"id": str(row["_id"]), "text": row["text"]}
        for row in _rows(queries, ("_id", "text"))
        if str(row["_id"]) in gains
    ]
    known = {row["id"] for row in judged}
    if missing := sorted(gains.keys() - known):
        raise ValueError(f"{qrels} judges queries that {queries} does not hold: {missing[:4]}.")

    revision = _hash(corpus, queries, qrels)

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = _metadata(name, "Retrieval", "ndcg_at_10", revision)

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": Dataset.from_list(documents),
                        "queries": Dataset.from_list(judged),
                        "relevant_docs": gains,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Task(name, LocalRetrieval(), revision, qrels=gains)


def _sts_task(name: str, pairs: Path) -> Task:
    rows = list(_rows(pairs, ("sentence1", "sentence2", "score")))
    scores = [float(row["score"]) for row in rows]

    revision = _hash(pairs)

    class LocalSTS(AbsTaskSTS):
        metadata = _metadata(name, "STS", "cosine_spearman", revision)
        min_score, max_score = math.floor(min(scores)), math.ceil(max(scores))

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            columns = {key: [row[key] for row in rows] for key in ("sentence1", "sentence2")}
            self.dataset = {"test": Dataset.from_dict(columns | {"score": scores})}
            self.data_loaded = True

    return Task(name, LocalSTS(), revision, gold=scores)


def _hash(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _metadata(name: str, task_type: Any, main_score: str, revision: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="read from files",
        type=task_type,
        dataset={"path": f"local/{name}", "revision": revision},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, and the files beside it need it.")
    rows: Iterator[Mapping[str, Any]]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = iter(pq.read_table(path).to_pylist())
    elif path.suffix == ".tsv":
        with path.open(encoding="utf-8", newline="") as text:
            rows = iter(list(csv.DictReader(text, delimiter="\t")))
    else:
        with path.open(encoding="utf-8") as text:
            rows = iter([json.loads(line) for line in text if line.strip()])
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in needed if row.get(name) is None]:
            raise ValueError(f"{path}: row {number} lacks {missing}; it has {list(row)}.")
        yield row
