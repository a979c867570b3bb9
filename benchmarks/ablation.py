"""What each part of Causal2Vec does: variants of one small model, trained alike and scored alike, on one GPU.

    python benchmarks/ablation.py --data TRAIN_FOLDER --eval EVAL_FOLDER... --work FOLDER
        [--only VARIANT...] [--seeds N] [--steps N] [--output FILE.json] [--plot FILE.png]

Every variant is SmolLM2-135M-Instruct (the first 10 layers where nothing else is said) with all-MiniLM-L6-v2 inside.
All get the same pairs in the same order and the same number of steps; encoder and decoder have an adapter of rank 16,
as the paper trains both. The teacher is not the encoder: labels (InfoNCE, batches of neighbours), or a fused ranking of
the untrained encoder and BM25 with a tenth of InfoNCE. "MiniLM, trained alike" has no decoder. The main variants are
trained with `--seeds` seeds, the others with one. A stopped run goes on with what `--work` does not hold yet.

Needs a GPU for more than a few steps: texts are packed without padding (recipes/packed.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from bases import adapter
from bench import ENCODER_TOKENS, Bench
from packed import PackedModel, Ragged
from pairs import SETS, TEMPERATURE, Batches, DevSets, Texts, divergence, false_negatives, fused, info_nce, train

from c2v_rag import Causal2VecConfig
from c2v_rag.config import ContextualTokenPlace, Pooling
from c2v_rag.finetune.loss import standardize
from c2v_rag.projector import INITIAL_TOKEN_SCALE

TRAINED_TOKENS, RANK = 128, 16
RATES = {"projector": 1e-3, "encoder": 3e-4, "llm": 1e-3}
ENCODER, PAPER = "MiniLM, trained alike", "Contextual token and EOS"
UNTRAINED = "MiniLM"


@dataclasses.dataclass(frozen=True)
class Variant:
    """`num_llm_layers` 0: the encoder alone."""

    group: str
    pooling: Pooling = "context_eos"
    token: ContextualTokenPlace = "after_instruction"
    scale: float = 1.0
    num_llm_layers: int = 10
    bidirectional: bool = False
    echo: bool = False
    teacher: Literal["labels", "fused ranking"] = "labels"
    is_main: bool = False


VARIANTS = {
    ENCODER: Variant("no decoder", num_llm_layers=0, is_main=True),
    PAPER: Variant("the paper's", is_main=True),
    "the same, token scale 1,024": Variant("token scale", scale=INITIAL_TOKEN_SCALE, is_main=True),
    "Contextual token": Variant("pooling", "context", is_main=True),
    "Contextual token, token scale 1,024": Variant("token scale", "context", scale=INITIAL_TOKEN_SCALE),
    "EOS": Variant("pooling", "eos", is_main=True),
    "mean": Variant("pooling", "mean"),
    "token before the instruction": Variant("place", token="before_instruction"),
    "no token, EOS": Variant("no token", "eos", "none", is_main=True),
    "no token, mean": Variant("no token", "mean", "none"),
    "no token, bidirectional, mean": Variant("no token", "mean", "none", bidirectional=True, is_main=True),
    "no token, Echo, EOS": Variant("no token", "eos", "none", echo=True, is_main=True),
    "6 layers": Variant("depth", num_llm_layers=6),
    "20 layers": Variant("depth", num_llm_layers=20),
    "30 layers": Variant("depth", num_llm_layers=30),
    "30 layers, no token, EOS": Variant("depth", "eos", "none", num_llm_layers=30),
    f"{ENCODER}, fused ranking": Variant("no decoder", num_llm_layers=0, teacher="fused ranking"),
    "Contextual token and EOS, fused ranking": Variant("fused ranking", teacher="fused ranking"),
}


def untrained(bench: Bench) -> dict[str, np.ndarray]:
    """Scores of the encoder as it is, item by item."""
    return bench.dev.items(lambda rows, _: bench.context[torch.from_numpy(rows).to(bench.model.device)], bench.bm25)


def run(bench: Bench, variant: Variant, steps: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The variant trained from the untrained parts: its items' scores, and what is known of the training."""
    model = bench.model
    has_token = variant.token != "none"
    model.config = dataclasses.replace(model.config, pooling=variant.pooling, contextual_token=variant.token)
    bench.restart(variant.num_llm_layers or 1, seed, variant.scale)
    groups: list[tuple[list[Tensor], float]] = []
    if has_token or not variant.num_llm_layers:
        groups.append((list(adapter(model.encoder)), RATES["encoder"]))
    if variant.num_llm_layers:
        groups.append((list(adapter(model.llm)), RATES["llm"]))
        if has_token:
            groups.append((list(model.projector.requires_grad_(True).parameters()), RATES["projector"]))

    def packed_model(encoder_ids: Ragged, llm_ids: Ragged) -> PackedModel:
        return PackedModel(model, encoder_ids, llm_ids, bidirectional=variant.bidirectional, echo=variant.echo)

    short = packed_model(bench.encoder_ids.shortened(TRAINED_TOKENS), bench.llm_ids.shortened(TRAINED_TOKENS))
    whole = packed_model(bench.encoder_ids, bench.llm_ids)
    batches = Batches(bench.texts, bench.context, seed)
    pairs = 0

    def compute(packed: PackedModel, rows: np.ndarray, num_queries: int) -> Tensor:
        if not variant.num_llm_layers:
            return packed.encode(rows)
        return packed.pool(rows, num_queries, variant.pooling)

    def loss() -> Tensor:
        nonlocal pairs
        name, queries, documents = batches.draw()
        pairs += len(queries)
        vectors = normalize(compute(short, np.concatenate([queries, documents]), len(queries)), dim=1)
        cosines = vectors[: len(queries)] @ vectors[len(queries) :].T
        left_out = false_negatives(bench.context, queries, documents)
        labels = info_nce(cosines / TEMPERATURE, left_out)
        if variant.teacher == "labels":
            return labels
        q, d = (bench.context[torch.from_numpy(rows).to(model.device)].float() for rows in (queries, documents))
        wanted = 1.5 * fused(q @ d.T, bench.bm25.scores(queries, documents, name))
        return divergence(1.5 * standardize(cosines), wanted) + 0.1 * labels

    started = time.perf_counter()
    losses = train(groups, loss, steps=steps)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        items = bench.dev.items(
            lambda rows, are_queries: whole.in_parts(
                rows, lambda part: compute(whole, part, len(part) if are_queries else 0)
            ),
            bench.bm25,
        )
    return items, {"losses": [losses[0], losses[-1]], "pairs": pairs, "seconds": round(seconds, 1)}


def table(work: Path, dev: DevSets) -> dict[str, Any]:
    """Of each variant: means over its seeds, and differences to the encoder trained alike and to the paper's."""
    found: dict[str, list[tuple[Mapping[str, np.ndarray], dict[str, Any]]]] = {}
    for name in (UNTRAINED, *VARIANTS):
        for seed in range(10):
            file = work / _file(name, seed)
            if file.is_file():
                about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
                found.setdefault(name, []).append((dict(np.load(file)), about))
    rows: dict[str, Any] = {}
    for name, runs in found.items():
        scores = [dev.scores(items) for items, _ in runs]
        mean = {task: float(np.mean([one[task] for one in scores])) for task in scores[0]}
        row: dict[str, Any] = {"seeds": len(runs), "scores": mean}
        if len(runs) > 1:
            row["range"] = {
                task: [min(one[task] for one in scores), max(one[task] for one in scores)] for task in scores[0]
            }
        for label, other in (("to the encoder trained alike", ENCODER), ("to the paper's", PAPER)):
            reference = found.get(other, [])
            if not reference or name == other:
                continue
            row[label] = {}
            for task in scores[0]:
                ours, theirs = (np.mean([items[task] for items, _ in group], axis=0) for group in (runs, reference))
                row[label][task] = dev.difference(task, ours, theirs)
        variant = VARIANTS.get(name)
        if variant is not None:
            row |= {"variant": dataclasses.asdict(variant), "training": [about for _, about in runs]}
        rows[name] = row
    return rows


def _file(name: str, seed: int) -> str:
    number = (UNTRAINED, *VARIANTS).index(name)
    return f"{number:02d}-{seed}.npz"


def plot(rows: Mapping[str, Any], path: Path) -> None:
    """Differences to the encoder trained alike, a panel a task, variants from top to bottom."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    label = "to the encoder trained alike"
    chosen = {name: row for name, row in rows.items() if label in row}
    tasks = list(next(iter(chosen.values()))["scores"])
    groups = list(dict.fromkeys(row.get("variant", {}).get("group", "untrained") for row in chosen.values()))
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(3.2 * len(tasks) + 3, 0.34 * len(chosen) + 1.2), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, task in zip(axes[0], tasks, strict=True):
        for place, row in enumerate(chosen.values()):
            lead = row[label][task]
            off = [[lead["difference"] - lead["low"]], [lead["high"] - lead["difference"]]]
            colour = f"C{groups.index(row.get('variant', {}).get('group', 'untrained')) % 10}"
            axis.errorbar(lead["difference"], place, xerr=off, fmt="o", color=colour, capsize=3, markersize=4)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(task, fontsize=9)
        axis.set_yticks(range(len(chosen)), list(chosen))
    axes[0][0].invert_yaxis()
    figure.supxlabel(f"points over {ENCODER}, 95 % interval", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Variants of one model, trained and scored alike.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files of the training sets")
    parser.add_argument("--eval", type=Path, nargs="+", required=True, help="folders as `c2v-rag evaluate` reads them")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is done already")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1, help="of the main variants")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no variant after so many minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the figures of what is done to this JSON file")
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG file")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")

    arguments.work.mkdir(parents=True, exist_ok=True)
    started = time.time()
    plan = [
        (name, seed)
        for seed in range(arguments.seeds)
        for name in (UNTRAINED, *arguments.only)
        if seed == 0 or (name in VARIANTS and VARIANTS[name].is_main)
    ]
    missing = [(name, seed) for name, seed in plan if not (arguments.work / _file(name, seed)).is_file()]
    if missing:
        config = Causal2VecConfig(encoder_max_length=ENCODER_TOKENS)
        bench = Bench(arguments.data, arguments.eval, config, arguments.device, encoder_rank=RANK, llm_rank=RANK)
        dev = bench.dev
        print(f"[{time.time() - started:6.1f} s] prepared, {len(bench.texts.all):,} texts", flush=True)
        device = torch.cuda.get_device_name() if bench.model.device.type == "cuda" else "CPU"
    else:
        dev = DevSets(arguments.eval, Texts())
    for name, seed in missing:
        if time.time() - started > 60 * arguments.minutes:
            print(f"left: {name}, seed {seed}")
            continue
        variant = VARIANTS.get(name)
        items, about = run(bench, variant, arguments.steps, seed) if variant else (untrained(bench), {})
        about |= {"device": device, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        file = arguments.work / _file(name, seed)
        file.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")
        np.savez_compressed(file, **items)
        scores = {task: round(score, 1) for task, score in dev.scores(items).items()}
        print(f"[{time.time() - started:6.1f} s] {name}, seed {seed}: {scores} {about}", flush=True)
    if arguments.output or arguments.plot:
        rows = table(arguments.work, dev)
        if arguments.plot:
            plot(rows, arguments.plot)
        if arguments.output:
            figures = {
                "command": shlex.join(["python", *sys.argv]),
                "device": rows[ENCODER]["training"][0]["device"],
                "date": rows[ENCODER]["training"][0]["date"],
                "training": {
                    "steps": arguments.steps, "tokens": TRAINED_TOKENS, "sets": list(SETS),
                    "learning rates": RATES, "adapter rank": RANK, "temperature": TEMPERATURE,
                },
                "variants": rows,
            }  # fmt: skip
            arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
