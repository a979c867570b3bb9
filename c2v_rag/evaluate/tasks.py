"""Folders on this machine as mteb tasks: retrieval in parquet or BEIR's JSONL, and sentence pairs with scores."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from c2v_rag.evaluate.folders import RetrievalFolder, read_retrieval, read_rows, retrieval_files


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
    if files := retrieval_files(folder):
        return _retrieval_task(folder.name, read_retrieval(files))
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
    if task.metadata.is_multilingual or getattr(task, "skip_first_result", False):
        raise ValueError(f"{name} has several languages, or leaves out each query's first hit: not supported.")
    task.load_data()
    dataset: Any = task.dataset
    revision = str(task.metadata.dataset["revision"])
    if isinstance(task, AbsTaskSTS):
        return Task(name, task, revision, gold=list(dataset["test"]["score"]))
    return Task(name, task, revision, qrels=dataset["default"]["test"]["relevant_docs"])


def _retrieval_task(name: str, data: RetrievalFolder) -> Task:
    revision = _hash(*data.files)

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = _metadata(name, "Retrieval", "ndcg_at_10", revision)

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": Dataset.from_list(data.documents),
                        "queries": Dataset.from_list(data.queries),
                        "relevant_docs": data.qrels,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Task(name, LocalRetrieval(), revision, qrels=data.qrels)


def _sts_task(name: str, pairs: Path) -> Task:
    rows = list(read_rows(pairs, ("sentence1", "sentence2", "score")))
    if not rows:
        raise ValueError(f"{pairs} holds no rows.")
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
