"""Score a model on development data while it is trained: best weights, early stopping, and a report of the difference.

Scores are nDCG@10, one per query.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from c2v_rag.evaluate.intervals import Difference, difference_of_means
from c2v_rag.evaluate.metrics import ndcg_at_k, top_k
from c2v_rag.finetune.dev import DevSet
from c2v_rag.finetune.recipe import Dev
from c2v_rag.finetune.vectors import autocast
from c2v_rag.model import Causal2Vec

logger = logging.getLogger(__name__)

CUT_OFF = 10
Scores = dict[str, list[float]]  # by the name of a development set: one score per query


def score(model: Causal2Vec, dev: DevSet) -> list[float]:
    """nDCG@10 of each query of `dev`, embedded as `encode_query` and `encode_document` embed."""
    with autocast(model.device):
        documents = model.encode_document(dev.documents, on_truncate="ignore")
        queries = model.encode_query(dev.queries, instruction=dev.instruction, on_truncate="ignore")
    ids = [str(row) for row in range(len(dev.documents))]
    ranked = top_k(queries, documents, ids, CUT_OFF)
    gains = [{str(row): gain for row, gain in one.items()} for one in dev.relevant]
    return [ndcg_at_k(found, wanted, CUT_OFF) for found, wanted in zip(ranked, gains, strict=True)]


def mean_score(scores: Mapping[str, Sequence[float]]) -> float:
    """The mean over the sets of the mean over their queries."""
    return float(np.mean([np.mean(one) for one in scores.values()]))


class DevCallback(TrainerCallback):
    """Scores the model before a stage, every `dev.every` steps and at its end; ends the stage as `dev` says.

    Scores are kept in `path`, a JSON file, so that a resumed stage goes on with them. `history`: the scores by step.
    `seconds`: the time that scoring took. `is_patience_over`: whether it ended the stage.
    Set before training: `save_best`, which is called with the best weights in memory; `log`, which gets the means;
    `applied`, a context in which the model has the weights that a stage would end with.
    """

    def __init__(self, model: Causal2Vec, sets: Sequence[DevSet], dev: Dev, path: Path) -> None:
        num_queries = sum(len(one.queries) for one in sets)
        if num_queries < dev.min_queries and (dev.keep_best or dev.patience is not None):
            logger.warning(
                "%d development questions are too few to choose weights by their scores (dev.min_queries is %d): the "
                "last weights are kept.", num_queries, dev.min_queries,
            )  # fmt: skip
            dev = dev.model_copy(update={"keep_best": False, "patience": None})
        self._model = model
        self._sets = sets
        self._dev = dev
        self._path = path
        self.save_best: Callable[[], None] = lambda: None
        self.log: Callable[[dict[str, float]], None] = lambda values: None
        self.applied: Callable[[], AbstractContextManager[None]] = nullcontext
        self.seconds = 0.0
        self.is_patience_over = False
        self.history: dict[int, Scores] = {}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.history = {int(step): scores for step, scores in kept.items()}

    @property
    def best_step(self) -> int:
        """The step of the best mean score, the earliest of equal ones."""
        return max(self.history, key=lambda step: (mean_score(self.history[step]), -step))

    @property
    def kept_step(self) -> int:
        """The step whose weights the stage ends with."""
        return self.best_step if self._dev.keep_best else max(self.history)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.history:
            self._score(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._dev.every == 0:
            self._score(state, control)
            # A resumed stage may repeat steps: scores of later ones are known, and do not count here.
            later = sum(self.best_step < step <= state.global_step for step in self.history)
            if self._dev.patience is not None and later >= self._dev.patience:
                logger.info("The development score has not risen %d times in a row: the stage ends.", later)
                self.is_patience_over = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.history:
            self._score(state, control)

    def _score(self, state: Any, control: Any) -> None:
        started = time.perf_counter()
        with self.applied():
            means = self._score_weights(state)
        self.seconds += time.perf_counter() - started
        log_this_step = control.should_log
        self.log(means)
        control.should_log = log_this_step  # logging resets it, and the loss of this step is not logged yet

    def _score_weights(self, state: Any) -> dict[str, float]:
        """Score the weights in memory, and save them if they are the best; returns the means to log."""
        # Every process computes the scores, because a sharded model needs all of them; those of process 0 count.
        scores = {dev.name: score(self._model, dev) for dev in self._sets}
        (scores,) = broadcast_object_list([scores])
        self.history[state.global_step] = scores
        if state.is_world_process_zero:
            if self.best_step == state.global_step:
                self.save_best()
            unfinished = self._path.with_suffix(".part")
            unfinished.write_text(json.dumps(self.history), encoding="utf-8")
            unfinished.replace(self._path)
        return {f"dev_{name}": float(np.mean(one)) for name, one in scores.items()} | {"dev": mean_score(scores)}


@dataclasses.dataclass(frozen=True)
class DevReport:
    """Development scores of a run: before its first stage, and of the weights it ended with.

    `sizes`: per set the number of queries and of documents. `before` and `after`: per set one nDCG@10 per query.
    `history`: one row per score: stage, step, the mean of each set under its name, and their mean under "mean".
    """

    sizes: dict[str, tuple[int, int]]
    before: Scores
    after: Scores
    history: list[dict[str, Any]]

    def difference(self, name: str | None = None) -> Difference:
        """After minus before with the 95 % interval of a paired bootstrap over queries; of one set, or of the mean."""
        names = [name] if name is not None else [*self.before]
        return difference_of_means(
            [np.array(self.after[one]) for one in names], [np.array(self.before[one]) for one in names]
        )

    def lines(self) -> list[str]:
        """One line per set, and one for the mean of several: before, after, difference and interval, x 100."""
        lines = [self._line(name, name) for name in self.before]
        return lines + ([self._line("mean", None)] if len(lines) > 1 else [])

    def _line(self, title: str, name: str | None) -> str:
        names = [name] if name is not None else [*self.before]
        before, after = (100 * mean_score({one: side[one] for one in names}) for side in (self.before, self.after))
        found = self.difference(name)
        queries, documents = (sum(self.sizes[one][i] for one in names) for i in (0, 1))
        return (
            f"{title}: nDCG@{CUT_OFF} x 100 before {before:.1f}, after {after:.1f}: {100 * found.difference:+.1f} "
            f"(95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}; {queries:,} queries, "
            f"{documents:,} documents)"
        )

    def save(self, path: Path) -> None:
        """Write the report as JSON, with the differences."""
        differences = {name: dataclasses.asdict(self.difference(name)) for name in self.before}
        values = dataclasses.asdict(self) | {
            "differences": differences | {"mean": dataclasses.asdict(self.difference())}
        }
        path.write_text(json.dumps(values, indent=1), encoding="utf-8")

    @classmethod
    def of_stages(cls, sets: Sequence[DevSet], stages: Mapping[str, DevCallback]) -> DevReport:
        """The report of a run whose stages, by name and in order, were scored on `sets`."""
        first, last = (list(stages.values())[i] for i in (0, -1))
        history = [
            {
                "stage": name,
                "step": step,
                **{one: float(np.mean(scores[one])) for one in scores},
                "mean": mean_score(scores),
            }
            for name, stage in stages.items()
            for step, scores in sorted(stage.history.items())
        ]
        sizes = {one.name: (len(one.queries), len(one.documents)) for one in sets}
        return cls(sizes, first.history[0], last.history[last.kept_step], history)

    @classmethod
    def load(cls, path: Path) -> DevReport:
        """Read a report that `save` wrote. FileNotFoundError for a run that has no development data."""
        values = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: (size[0], size[1]) for name, size in values["sizes"].items()}
        return cls(sizes, values["before"], values["after"], values["history"])
