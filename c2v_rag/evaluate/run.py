"""Score a model and its baselines on tasks: mteb's metrics, and a bootstrap interval on each difference."""

from __future__ import annotations

import dataclasses
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import torch

from c2v_rag.evaluate.intervals import difference_of_means, paired_bootstrap
from c2v_rag.evaluate.metrics import ndcg_at_k, spearman
from c2v_rag.evaluate.systems import BM25, HYBRID, SEARCH_ONLY, DenseSystem, HybridSystem, systems
from c2v_rag.evaluate.tasks import Task
from c2v_rag.model import Causal2Vec

RETRIEVAL_METRICS = ("ndcg_at_10", "map_at_10", "recall_at_10", "recall_at_100", "mrr_at_10")
STS_METRICS = ("cosine_spearman",)


def evaluate(
    model: Causal2Vec, tasks: Sequence[Task], baselines: Sequence[str] = (), *, command: str = ""
) -> dict[str, Any]:
    """A JSON-ready report: the model, the machine, every system's scores on every task, and the model's lead over each.

    Scores are fractions, as mteb gives them. A lead is the model minus the baseline in the main metric, with the
    95 % interval of a paired bootstrap over queries (or sentence pairs). BM25 and the hybrid have no scores on
    sentence pairs. `command` goes into the report unchanged: the command line that was typed.

    Raises ValueError for two tasks of one name, and the errors of `systems`.
    """
    names = [task.name for task in tasks]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"Two sets have the same name: {', '.join(sorted(repeated))}. Rename the folder of one.")
    scored = systems(model, baselines)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": _machine(model),
        "versions": {name: metadata.version(name) for name in ("c2v-rag", "mteb", "torch", "transformers")},
        "model": {**model.stamp, "dtype": str(model.dtype).removeprefix("torch.")},
        "tasks": {},
    }
    for task in tasks:
        scores: dict[str, dict[str, float]] = {}
        per_item: dict[str, np.ndarray] = {}
        for system in scored:
            name = _name(system)
            if name in SEARCH_ONLY and task.qrels is None:
                continue
            scores[name], per_item[name] = _score(system, task)
        first, *others = scores
        result["tasks"][task.name] = {
            "data": task.data,
            "items": len(per_item[first]),
            "metric": task.metric,
            "scores": scores,
            "lead": {name: _lead(task, per_item[first], per_item[name]) for name in others},
        }
        for system in scored:
            if isinstance(system, DenseSystem):
                system.clear_cache()
    result["systems"] = {
        system.name: {
            "weights": system.weights,
            "dimension": system.dimension,
            "tokens_per_second": round(system.tokens / system.seconds) if system.seconds else None,
        }
        for system in scored
        if isinstance(system, DenseSystem)
    }
    return result


def _name(system: Any) -> str:
    if isinstance(system, DenseSystem):
        return system.name
    return HYBRID if isinstance(system, HybridSystem) else BM25


def _machine(model: Causal2Vec) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _score(system: Any, task: Task) -> tuple[dict[str, float], np.ndarray]:
    """mteb's scores, and one number an item: nDCG@10 of each query, or the cosine of each pair."""
    with tempfile.TemporaryDirectory() as folder:
        done = mteb.evaluate(
            system, [task.mteb], cache=None, co2_tracker=False, prediction_folder=folder, show_progress_bar=False
        )
        predicted = json.loads((Path(folder) / task.mteb.prediction_file_name).read_text(encoding="utf-8"))
    row = done.task_results[0].scores["test"][0]
    names = STS_METRICS if task.qrels is None else RETRIEVAL_METRICS
    scores = {name: float(row[name]) for name in names}
    found = predicted["default"]["test"]
    if task.qrels is None:
        return scores, np.array(found["cosine_scores"])
    if getattr(task.mteb, "ignore_identical_ids", False):  # mteb leaves them out of its scores only
        found = {query: {id: score for id, score in hits.items() if id != query} for query, hits in found.items()}
    # mteb uses trec_eval, which sorts ids in descending order where scores are equal.
    ranked = {query: sorted(hits, key=lambda id: (hits[id], id), reverse=True) for query, hits in found.items()}
    return scores, np.array([ndcg_at_k(ranked.get(query, []), gains, 10) for query, gains in task.qrels.items()])


def _lead(task: Task, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    if task.gold is None:
        return dataclasses.asdict(difference_of_means([ours], [theirs]))
    gold = np.array(task.gold)
    return dataclasses.asdict(
        paired_bootstrap(len(gold), lambda rows: spearman(ours[rows], gold[rows]) - spearman(theirs[rows], gold[rows]))
    )


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """The result as a table: a header, then one row per task and metric; scores x 100, leads with their interval."""
    names = list(dict.fromkeys(name for task in result["tasks"].values() for name in task["scores"]))
    rows = [["task", "metric", *names, *(f"lead over {name}" for name in names[1:])]]
    for task_name, task in result["tasks"].items():
        for metric in task["scores"][names[0]]:
            row = [task_name, metric]
            row += [f"{100 * task['scores'][name][metric]:.1f}" if name in task["scores"] else "-" for name in names]
            for name in names[1:]:
                lead = task["lead"].get(name) if metric == task["metric"] else None
                row.append(
                    f"{100 * lead['difference']:+.1f} ({100 * lead['low']:+.1f} to {100 * lead['high']:+.1f})"
                    if lead
                    else ""
                )
            rows.append(row)
    return rows
