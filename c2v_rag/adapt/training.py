"""Training on the kept questions: hard negatives from the hybrid ranking, a short recipe, and a time limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from c2v_rag.adapt.corpus import Corpus, Ranker
from c2v_rag.adapt.passages import Split
from c2v_rag.adapt.work import write_text
from c2v_rag.config import Causal2VecConfig
from c2v_rag.finetune import run
from c2v_rag.finetune.recipe import Recipe

TRAINING: Split = "training"
DEV: Split = "dev"
PAIRS = (TRAINING, DEV)  # the splits that training reads; a set of pairs has the name of its split
NUM_NEGATIVES = 4
MAX_EPOCHS = 8
MIN_DEV = 5  # kept dev questions; with fewer, nothing is scored while training
_SCORES = 4  # times that the dev questions are scored while training
_MAX_DEV_TEXTS = {"max_queries": 100, "max_documents": 200}
_POSSIBLE_ANSWER = 0.25  # a passage whose hybrid score is at most this far below the right one's may be an answer too
# Seconds that a training text takes, in seconds that embedding one takes: a gradient costs three times a forward pass,
# but in the stage "context" the decoder reads one token per text.
_COST = {"context": 1.0, "full": 3.0}


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
        best = best or others[-1:]  # every pair needs one, since a batch has one shape
        row = {
            "query": question.question,
            "positive": corpus.passages[position].text,
            "negatives": [corpus.passages[one].text for one in best],
            "positive_score": round(float(scores[position]), 4),
            "negative_scores": [round(float(scores[one]), 4) for one in best],
            "document": question.document,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(folder / f"{split}.jsonl", "".join(lines))


def steps_within(seconds: float, texts_per_second: float, num_questions: int, config: Causal2VecConfig) -> int:
    """How many steps fit into `seconds`, by the speed of embedding passages; at least one, at most eight epochs."""
    stage = _template()[_stage_name(config)]
    texts_per_step = stage["batch_size"] * (2 + stage["num_negatives"])
    fitting = seconds * texts_per_second / (texts_per_step * _COST[_stage_name(config)])
    longest = MAX_EPOCHS * num_questions / stage["batch_size"]
    return max(1, int(min(fitting, longest)))


def recipe_for(
    checkpoint: str, config: Causal2VecConfig, *, steps: int, minutes: float | None, num_questions: int, num_dev: int
) -> Recipe:
    """The recipe of this package for the model `checkpoint`. Training ends after `steps` or `minutes`."""
    template = _template()
    stage = template[_stage_name(config)]
    stage |= {"steps": steps, "minutes": minutes, "batch_size": min(stage["batch_size"], num_questions)}
    every = max(1, round(steps / _SCORES))
    dev: Any = {"pairs": [DEV], "every": every, "patience": None, **_MAX_DEV_TEXTS}
    return Recipe.model_validate(
        {
            "base": {"checkpoint": checkpoint},
            "data": {"sets": {TRAINING: 1.0}},
            "stages": [stage],
            "dev": dev if num_dev >= MIN_DEV else "none",
            "report_to": [],
            "lora": template["lora"],
            "save_steps": template["save_steps"],
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


def _stage_name(config: Causal2VecConfig) -> str:
    return "context" if config.pooling in ("context", "context_eos") else "full"


def _template() -> dict[str, Any]:
    text = (resources.files("c2v_rag.adapt") / "recipe.yaml").read_text(encoding="utf-8")
    template: dict[str, Any] = yaml.safe_load(text)
    return template
