"""Teach the encoder alone: all-MiniLM-L6-v2 learns the similarities of a larger model, and labels. Not the default.

    python recipes/teach.py --data TRAIN --teacher all-mpnet-base-v2 --dev eval/... --output default [--run NAME]
    python recipes/teach.py --data TRAIN --teacher all-mpnet-base-v2 --dev eval/... --try NAME... --table tried.json

TRAIN holds NAME.parquet (columns query and positive; `pairs.SETS`). A batch's teacher is the mean of the cosines of the
untrained encoder and of the larger model. Only a LoRA of the encoder's linear layers is trained. Its change can be
scaled down afterwards (`--keep`; WiSE-FT, arXiv 2109.01903), and the changes of several runs can be averaged. The
projector then turns the encoder's vectors to their principal axes, so that the first columns carry most of them, and
the decoder passes them through.

Three of the sets are held out, to choose by: HELD_OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bases import BASE, adapter, made, new_model
from bench import ENCODER_TOKENS, Bench
from pairs import TEMPERATURE, Batches, divergence, false_negatives, fused, info_nce, train
from torch import Tensor, nn
from torch.nn.functional import normalize

from c2v_rag import Causal2Vec, Causal2VecConfig
from c2v_rag.finetune.run import write_checkpoint
from c2v_rag.projector import INITIAL_TOKEN_SCALE, Projector, final_norm_weight, initialise, mean_token_norm

HELD_OUT = ("selqa", "stackexchange_qa", "textbook_questions")
KEPT = (0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Run:
    """Weights of the losses, and what else differs.

    `similarity`: KL divergence to the teacher's cosines of queries and documents, and half as much within the queries
    and within the documents. `labels`: InfoNCE. `fused`: the teacher's cosines and the student's, both fused with BM25.
    `mined`: batches have one mined negative for each pair. `head`: layers of the decoder that are trained too, behind a
    Contextual token of `scale` times a token's norm; 0 means that the encoder's vector is the embedding.
    """

    similarity: float = 1.0
    labels: float = 0.0
    fused: float = 0.0
    mined: bool = False
    head: int = 0
    scale: float = 32.0
    rate: float = 5e-4


RUNS = {
    "similarity": Run(),
    "similarity and labels": Run(labels=0.3, mined=True),
    "labels": Run(similarity=0.0, labels=1.0, mined=True),
    "fused": Run(fused=1.0, labels=0.1),
    "similarity, decoder of 3 layers": Run(head=3),
    "similarity, mined": Run(mined=True),
}


class Teaching(Bench):
    """`target` (N, E + K), of length 1: the vectors of the untrained encoder and of the larger model, joined."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(
            arguments.data,
            arguments.dev,
            Causal2VecConfig(pooling="context", num_llm_layers=3, encoder_max_length=ENCODER_TOKENS),
            arguments.device,
            encoder_rank=arguments.rank,
            llm_rank=arguments.rank,
            held_out=HELD_OUT,
            reads_texts=False,
        )
        larger = self.teacher(arguments.teacher, arguments.vectors)
        self.context = self.context[: len(larger)]
        self.target = normalize(torch.cat([self.context.float(), larger.float()], dim=1), dim=1).half()

    def embed(self, run: Run, rows: np.ndarray, num_queries: int) -> Tensor:
        """(n, .) the embeddings in training, not normalised."""
        return self.packed.pool(rows, num_queries, "context") if run.head else self.packed.encode(rows)

    def score(self, run: Run) -> dict[str, float]:
        def vectors(rows: np.ndarray, queries: bool) -> Tensor:
            return self.packed.in_parts(rows, lambda part: self.embed(run, part, len(part) if queries else 0))

        with torch.no_grad():
            return self.dev.scores(self.dev.items(vectors, self.bm25))

    def train(self, run: Run, steps: int, seed: int, curve: int = 0) -> dict[str, Any]:
        """Train from the untrained parts. `curve`: score so many times on the way."""
        model = self.model
        self.restart(run.head or 1, seed, run.scale)
        groups: list[tuple[list[Tensor], float]] = [(list(adapter(model.encoder)), run.rate)]
        if run.head:
            groups += [
                (list(adapter(model.llm)), 1e-3),
                (list(model.projector.requires_grad_(True).parameters()), 5e-4),
            ]
        batches = Batches(self.texts, self.context, seed)
        if run.mined:
            batches.mine(self.target)
        pairs = 0

        def loss() -> Tensor:
            nonlocal pairs
            name, queries, documents = batches.draw()
            size = len(queries)
            pairs += size
            x = normalize(self.embed(run, np.concatenate([queries, documents]), size), dim=1)
            teacher = self.target[torch.from_numpy(np.concatenate([queries, documents])).to(model.device)].float()
            (q, d), (tq, td) = ((one[:size], one[size:]) for one in (x, teacher))
            cosines, wanted = q @ d.T, tq @ td.T
            total = x.sum() * 0
            if run.similarity:
                both = ((q @ q.T, tq @ tq.T), (d[:size] @ d[:size].T, td[:size] @ td[:size].T))
                within = sum(divergence(_off_diagonal(ours), _off_diagonal(theirs)) for ours, theirs in both)
                total = total + run.similarity * (divergence(cosines / TEMPERATURE, wanted / TEMPERATURE) + within / 4)
            if run.labels:
                left_out = false_negatives(self.context, queries, documents)
                total = total + run.labels * info_nce(cosines / TEMPERATURE, left_out)
            if run.fused:
                bm25 = self.bm25.scores(queries, documents, name)
                total = total + run.fused * divergence(1.5 * fused(cosines, bm25), 1.5 * fused(wanted, bm25))
            return total

        rows: list[dict[str, Any]] = []
        started, paused = time.perf_counter(), 0.0

        def report(step: int, value: float) -> None:
            nonlocal paused
            if curve and (step * curve) // steps > len(rows):
                pause = time.perf_counter()
                row = {"step": step, "pairs": pairs, "minutes": (pause - started - paused) / 60, "loss": value}
                rows.append(row | self.score(run))
                paused += time.perf_counter() - pause
                print(json.dumps(rows[-1]), flush=True)

        losses = train(groups, loss, steps=steps, report=report)
        seconds = time.perf_counter() - started - paused
        return {"pairs": pairs, "seconds": round(seconds, 1), "losses": [losses[0], losses[-1]], "curve": rows}

    def change(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What the training changed: A and B of each of the encoder's linear layers."""
        return {
            name: (layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone())
            for name, layer in self.model.encoder.named_modules()
            if hasattr(layer, "lora_A")
        }

    def set_change(self, changes: list[dict[str, tuple[Tensor, Tensor]]], keep: float, rank: int | None = None) -> None:
        """The mean of the changes, times `keep`; `rank`: the nearest matrices of this rank (singular values)."""
        for name, layer in self.model.encoder.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            a = torch.cat([change[name][0] for change in changes])
            b = torch.cat([keep / len(changes) * change[name][1] for change in changes], dim=1)
            if rank is not None:
                u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
                root = s[:rank].sqrt()
                a, b = root[:, None] * v[:rank], u[:, :rank] * root
            layer.lora_A["default"].weight = nn.Parameter(a, requires_grad=False)
            layer.lora_B["default"].weight = nn.Parameter(b, requires_grad=False)


def _off_diagonal(cosines: Tensor) -> Tensor:
    return (cosines / TEMPERATURE).masked_fill(torch.eye(len(cosines), dtype=torch.bool, device=cosines.device), -1e4)


@torch.no_grad()
def rotate_projector(model: Causal2Vec, encoded: Tensor) -> None:
    """The projector turns the encoder's vectors to the principal axes of `encoded` (n, E); other columns are 0."""
    moment = torch.zeros(encoded.shape[1], encoded.shape[1], device=encoded.device, dtype=torch.float64)
    for part in encoded.split(65536):
        moment += (part.float().T @ part.float()).double()
    axes = torch.linalg.eigh(moment).eigenvectors.flip(1).T.float()
    model.projector = Projector(encoded.shape[1], model.llm.config.hidden_size).to(model.device)
    initialise(model.projector, model.llm, INITIAL_TOKEN_SCALE)
    scale = final_norm_weight(model.llm, INITIAL_TOKEN_SCALE * mean_token_norm(model.llm)).to(axes)
    rotation = torch.zeros(len(scale), encoded.shape[1], device=axes.device)
    rotation[: len(axes)] = axes
    rotation /= scale.unsqueeze(1)
    model.projector.output.weight.copy_(torch.cat([rotation, -rotation], dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files of the training sets")
    parser.add_argument("--teacher", required=True, help="a sentence-transformers model with mean pooling")
    parser.add_argument("--dev", type=Path, nargs="+", required=True, help="folders to score on")
    parser.add_argument("--vectors", type=Path, help="file that keeps the teacher's vectors for the next run")
    parser.add_argument("--try", dest="tried", nargs="+", choices=list(RUNS), help="runs to compare")
    parser.add_argument("--run", choices=list(RUNS), default="similarity and labels")
    parser.add_argument("--also", nargs="*", choices=list(RUNS), default=[], help="runs to average it with")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--keep", type=float, default=1.0, help="share of the change that is kept")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder of the model")
    parser.add_argument("--table", type=Path, help="JSON file of the scores of `--try`")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    started = time.time()

    def say(what: str) -> None:
        print(f"[{time.time() - started:6.1f} s] {what}", flush=True)

    bench = Teaching(arguments)
    model = bench.model
    about: dict[str, Any] = {
        **made("teach.py", model.device),
        "untrained": bench.score(Run()),
    }
    say(f"prepared, {len(bench.texts.all):,} texts; untrained {json.dumps(about['untrained'])}")
    if arguments.tried:
        rows, changes = {}, {}
        for name in arguments.tried:
            run = RUNS[name]
            row = bench.train(run, arguments.steps, arguments.seed)
            changes[name] = bench.change()
            row["kept"] = {}
            for keep in KEPT if not run.head else KEPT[-1:]:
                bench.set_change([changes[name]], keep)
                row["kept"][keep] = bench.score(run)
            rows[name] = dataclasses.asdict(run) | row
            say(f"{name}: {json.dumps(row)}")
        encoders = [name for name in arguments.tried if not RUNS[name].head]
        for count in range(2, len(encoders) + 1):
            row = {"kept": {}}
            for keep in KEPT:
                bench.set_change([changes[name] for name in encoders[:count]], keep)
                row["kept"][keep] = bench.score(Run())
            rows[" + ".join(encoders[:count])] = row
            say(f"mean of {encoders[:count]}: {json.dumps(row)}")
        if arguments.table:
            arguments.table.write_text(json.dumps(about | {"runs": rows}, indent=1) + "\n", encoding="utf-8")
        return

    names = [arguments.run, *arguments.also]
    changes_ = []
    for name in names:
        about.setdefault("runs", {})[name] = bench.train(RUNS[name], arguments.steps, arguments.seed, curve=8)
        changes_.append(bench.change())
        say(f"trained {name}")
    bench.set_change(changes_, arguments.keep)
    about["whole"] = bench.score(Run())
    bench.set_change(changes_, arguments.keep, arguments.rank)
    about["saved"] = bench.score(Run())
    say(json.dumps({key: about[key] for key in ("whole", "saved")}))
    with torch.no_grad():
        rows = np.arange(len(bench.context))
        rotate_projector(model, bench.packed.in_parts(rows, bench.packed.encode))
    config = dataclasses.replace(model.config, num_llm_layers=1, truncate_dim=model.encoder.config.hidden_size)
    saved = new_model(arguments.device, config, encoder_rank=arguments.rank)
    saved.encoder.load_state_dict(model.encoder.state_dict())
    saved.projector.load_state_dict(model.projector.state_dict())
    write_checkpoint(saved.eval(), BASE, arguments.output)
    (arguments.output / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    say(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
