"""Training on the kept questions: hard negatives from the hybrid ranking, a short recipe, and a time limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from c2v_rag.adapt.corpus import Corpus, Ranker
from c2v_rag.adapt.passages import Split
from c2v_rag.adapt.work import write_text
from c2v_rag.finetune import run
from c2v_rag.finetune.recipe import PACKAGED, BaseModels, Data, Dev, Recipe

TRAINING: Split = "training"
DEV: Split = "dev"
PAIRS = (TRAINING, DEV)  # the splits that training reads; a set of pairs has the name of its split
NUM_NEGATIVES = 4
MAX_EPOCHS = 8
SOFT_LABELS = 0.5  # weight of the hybrid scores as a target, beside the labels
MIN_DEV = 5  # kept dev questions; with fewer, nothing is scored while training
_RECIPE = PACKAGED / "adapt.yaml"
_SCORES = 4  # times that the dev questions are scored while training, besides once before it
_MAX_DEV_QUESTIONS, _MAX_DEV_PASSAGES = 100, 200
# A passage whose hybrid score, in standard deviations of the cosines, is at most this far below that of the right one
# may be an answer too.
_POSSIBLE_ANSWER = 0.25
_COST_OF_GRADIENT = 3.0  # seconds to train on a passage, in seconds to embed one
_LIST_TEMPERATURE = 0.67  # of the hybrid scores


def write_pairs(
    folder: Path, split: Split, corpus: Corpus, numbers: Sequence[int], ranker: Ranker, vectors: np.ndarray
) -> None:
    """Write the set of pairs SPLIT.jsonl: the questions `numbers`, their passages, hard negatives, and hybrid scores.

    Negatives are the best-ranked passages of other documents of the same split, without those that score as high as
    the right passage, which may be answers too. `vectors` (Q, D) are the embeddings of the questions.
    """
    in_split = np.array([passage.split == split for passage in corpus.passages])
    documents = np.array([passage.document for passage in corpus.passages])
    lines = []
    for number, vector in zip(numbers, vectors, strict=True):
        question, position = corpus.questions[number], corpus.positions[number]
        scores = ranker.hybrid(question.question, vector)
        usable = in_split & (documents != question.document)
        others = [int(row) for row in np.argsort(-scores, kind="stable") if usable[row]]
        best = [row for row in others if scores[row] < scores[position] - _POSSIBLE_ANSWER][:NUM_NEGATIVES]
        row: dict[str, Any] = {
            "query": question.question,
            "positive": corpus.passages[position].text,
            "negatives": [corpus.passages[one].text for one in best or others[-1:]],  # every pair needs one
            "document": question.document,
        }
        if best:
            row["positive_score"] = round(float(scores[position]), 4)
            row["negative_scores"] = [round(float(scores[one]), 4) for one in best]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(folder / f"{split}.jsonl", "".join(lines))


def steps_within(seconds: float, passages_per_second: float, num_questions: int) -> int:
    """How many steps fit into `seconds`, by the speed of embedding passages; at least one, at most eight epochs."""
    stage = Recipe.load(_RECIPE).stages[0]
    texts_per_step = stage.batch_size * (2 + stage.num_negatives)
    fitting = seconds * passages_per_second / (texts_per_step * _COST_OF_GRADIENT)
    return max(1, int(min(fitting, MAX_EPOCHS * num_questions / stage.batch_size)))


def texts_besides_training(num_questions: int, num_dev: int) -> int:
    """How many texts the training embeds without a gradient: the teacher's, and the dev questions with passages."""
    dev = min(num_dev, _MAX_DEV_QUESTIONS) + min(num_dev, _MAX_DEV_PASSAGES) if num_dev >= MIN_DEV else 0
    return 2 * num_questions + (1 + _SCORES) * dev


def recipe_for(
    checkpoint: str,
    *,
    steps: int,
    minutes: float | None,
    num_questions: int,
    num_dev: int,
    soft_labels: float = SOFT_LABELS,
) -> Recipe:
    """The packaged recipe "adapt" for the model `checkpoint`. Training ends after `steps` or `minutes`.

    The scores of the hybrid ranking are distilled too, with the weight `soft_labels`. The dev questions
    decide which weights are kept, if there are enough (`Dev.min_queries`).
    """
    packaged = Recipe.load(_RECIPE)
    (stage,) = packaged.stages
    stage = stage.model_copy(
        update={
            "steps": steps,
            "minutes": minutes,
            "batch_size": min(stage.batch_size, num_questions),
            "loss": stage.loss.model_copy(update={"list_distill": soft_labels, "list_temperature": _LIST_TEMPERATURE}),
        }
    )
    dev = Dev(
        pairs=[DEV],
        every=max(1, round(steps / _SCORES)),
        patience=None,
        max_queries=_MAX_DEV_QUESTIONS,
        max_documents=_MAX_DEV_PASSAGES,
    )
    return packaged.model_copy(
        update={
            "base": BaseModels(checkpoint=checkpoint),
            "data": Data(sets={TRAINING: 1.0}),
            "stages": [stage],
            "dev": dev if num_dev >= MIN_DEV else "none",
            "report_to": [],
        }
    )


def run_training(recipe: Recipe, data: Path, output: Path, device: str | None) -> None:
    """Train and save the model to `output`, which is complete when it exists. A run that was killed continues."""
    if not output.is_dir():
        run.train(recipe, data, output, device=device, resume=output.with_name(f"{output.name}.training").is_dir())


def losses(output: Path) -> list[float]:
    """The loss of every step of the training that wrote `output`."""
    log = json.loads((output.with_name(f"{output.name}.training") / "log.json").read_text(encoding="utf-8"))
    return [float(row["loss"]) for rows in log["steps"].values() for row in rows]
