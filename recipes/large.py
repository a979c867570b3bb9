"""Train a model whose decoder keeps all of its layers, so that EOS adds what encoder and BM25 do not have. On one GPU.

    python recipes/large.py --data TRAIN --teacher all-mpnet-base-v2 --dev eval/Cranfield eval/XQuAD-en python-docs \\
        --output large [--encoder-rate 1e-4]

`benchmarks/decoder.py` found that the EOS state of all 30 layers of SmolLM2-135M adds to all-MiniLM-L6-v2, also beside
BM25, when both are trained as one score (its task "meaning"). This is that task for longer, with the embedding that the
package computes: the Contextual token passes the encoder's vector through, EOS reads it and the whole text. InfoNCE
with one mined negative for each pair, and the similarities of a larger model. The encoder stays as it is unless
`--encoder-rate` is given.

TRAIN holds NAME.parquet (columns query and positive; `pairs.SETS`). 200 steps took 75 s on one NVIDIA H200.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bases import BASE, adapter, made
from bench import ENCODER_TOKENS, Bench
from pairs import TEMPERATURE, Batches, divergence, false_negatives, info_nce, remembered, train
from torch import Tensor
from torch.nn.functional import normalize

from c2v_rag import Causal2VecConfig
from c2v_rag.finetune.run import write_checkpoint

LABEL_TEMPERATURE = 0.03
HALVES = {"": slice(None), " C": slice(0, None, 2), " EOS": slice(1, None, 2)}
CURVE = 8  # times that the development sets are scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files of the training sets")
    parser.add_argument("--teacher", required=True, help="a sentence-transformers model with mean pooling")
    parser.add_argument("--dev", type=Path, nargs="+", required=True, help="folders to score on")
    parser.add_argument("--vectors", type=Path, help="file that keeps the teacher's vectors for the next run")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=256, help="pairs")
    parser.add_argument("--layers", type=int, help="of the decoder; all unless given")
    parser.add_argument("--rank", type=int, default=32, help="of the decoder's adapter")
    parser.add_argument("--encoder-rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the decoder's adapter")
    parser.add_argument("--encoder-rate", type=float, default=0.0, help="of the encoder's and the projector's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {what}", flush=True)

    config = Causal2VecConfig(num_llm_layers=arguments.layers, encoder_max_length=ENCODER_TOKENS)
    trains_encoder = arguments.encoder_rate > 0
    bench = Bench(
        arguments.data,
        arguments.dev,
        config,
        arguments.device,
        encoder_rank=arguments.encoder_rank if trains_encoder else 0,
        llm_rank=arguments.rank,
        seed=arguments.seed,
    )
    model, packed, context = bench.model, bench.packed, bench.context
    device = model.device
    teacher = bench.teacher(arguments.teacher, arguments.vectors)

    groups: list[tuple[list[Tensor], float]] = [(list(adapter(model.llm)), arguments.rate)]
    if trains_encoder:
        model.projector.requires_grad_(True)
        groups.append(([*adapter(model.encoder), *model.projector.parameters()], arguments.encoder_rate))
    batches = Batches(bench.texts, context, arguments.seed, arguments.batch)
    batches.mine(context)
    pairs = 0

    def embed(rows: np.ndarray, num_queries: int) -> Tensor:
        """(n, 2 D): the embeddings, not normalised. The first `num_queries` rows are queries."""
        pooled = None if trains_encoder else context[torch.from_numpy(rows).to(device)].float()
        return packed.pool(rows, num_queries, "context_eos", pooled)

    def loss() -> Tensor:
        nonlocal pairs
        _, queries, documents = batches.draw()
        size = len(queries)
        pairs += size
        vectors = normalize(embed(np.concatenate([queries, documents]), size), dim=1)
        cosines = vectors[:size] @ vectors[size:].T
        q, d = (teacher[torch.from_numpy(rows).to(device)].float() for rows in (queries, documents))
        labels = info_nce(cosines / LABEL_TEMPERATURE, false_negatives(context, queries, documents))
        return labels + divergence(cosines / TEMPERATURE, q @ d.T / TEMPERATURE)

    @torch.no_grad()
    def score() -> dict[str, float]:
        """Of the whole embedding and of each half, alone and beside BM25."""

        @remembered
        def whole(rows: np.ndarray, queries: bool) -> Tensor:
            return packed.in_parts(rows, lambda part: embed(part, len(part) if queries else 0), 150_000)

        scores = {}
        for half, columns in HALVES.items():
            items = bench.dev.items(
                lambda rows, queries, columns=columns: normalize(whole(rows, queries)[:, columns].float(), dim=1),
                bench.bm25,
            )
            scores |= {f"{name}{half}": round(value, 2) for name, value in bench.dev.scores(items).items()}
        return scores

    curve: list[dict[str, Any]] = [{"step": 0, "pairs": 0, "minutes": 0.0, **score()}]
    say(f"{len(context):,} texts; untrained {json.dumps(curve[0])}")
    training_started, paused = time.perf_counter(), 0.0

    def report(step: int, value: float) -> None:
        nonlocal paused
        if step * CURVE // arguments.steps < len(curve):
            return
        pause = time.perf_counter()
        minutes = (pause - training_started - paused) / 60
        curve.append({"step": step, "pairs": pairs, "minutes": round(minutes, 2), "loss": round(value, 4), **score()})
        paused += time.perf_counter() - pause
        say(json.dumps(curve[-1]))

    train(groups, loss, steps=arguments.steps, report=report)
    write_checkpoint(model.eval(), BASE, arguments.output)
    about = {
        **made("large.py", device),
        "curve": curve,
    }
    (arguments.output / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    say(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
