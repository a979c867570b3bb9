"""Does the decoder's EOS state add what the encoder, or BM25 beside it, does not have?

    python benchmarks/decoder.py --data TRAIN_FOLDER --eval EVAL_FOLDER... --teacher all-mpnet-base-v2
        [--layers 6 12 30] [--steps N] [--batch PAIRS] [--tokens N] [--rows N] [--vectors FILE] --output FILE.json

The Contextual half is all-MiniLM-L6-v2 as it is. A text's embedding is (C, sqrt(w) X), so that the cosine of two texts
is s_C + w s_X, where w is learned. X is the EOS state of SmolLM2-135M-Instruct with so many layers, which reads C and
the text; in the control X is a second, trained copy of the encoder. Three ways to train X, all with the same pairs, in
batches of neighbours:

- "meaning": InfoNCE on the whole score, one mined negative for each pair, and the similarities of a larger model;
- "lexical": X alone learns BM25's ranking of the batch (SPAR, arXiv 2110.06918), and w is tried;
- "residual": the BM25 score stands beside the whole score in InfoNCE (CLEAR, arXiv 2004.13969).

For one GPU. On a CPU, give fewer `--rows`, since every text gets its vectors first, a smaller `--batch` and `--tokens`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from bases import adapter
from bench import ENCODER_TOKENS, LLM_TOKENS, Bench
from packed import PackedModel
from pairs import MAX_ROWS, TEMPERATURE, Batches, divergence, false_negatives, info_nce, remembered, train

from c2v_rag import Causal2VecConfig
from c2v_rag.finetune.loss import standardize

RANK = 64
RATES = {"encoder": 3e-4, "llm": 1e-3, "weight": 1e-2}
TASKS = ("meaning", "lexical", "residual")
CONTROL = 0  # layers


def run(
    bench: Bench, teacher: Tensor, task: str, num_layers: int, *, steps: int, batch: int, tokens: int, seed: int = 0
) -> dict[str, Any]:
    """Scores of X alone, of both, and what is known of the training.

    `teacher`: vectors of the training sets' texts. `tokens`: the most that X reads of a text in training; C is of the
    whole text, and so are the scores.
    """
    model, device = bench.model, bench.model.device
    short = PackedModel(model, bench.encoder_ids.shortened(tokens), bench.llm_ids.shortened(tokens))
    bench.restart(num_layers or 1, seed)
    weight = torch.zeros((), device=device, requires_grad=True)  # softplus(0) = 0.69
    trained, rate = (model.llm, RATES["llm"]) if num_layers else (model.encoder, RATES["encoder"])
    groups: list[tuple[list[Tensor], float]] = [(list(adapter(trained)), rate)]
    if task != "lexical":
        groups.append(([weight], RATES["weight"]))
    batches = Batches(bench.texts, bench.context, seed, batch)
    if task != "lexical":
        batches.mine(bench.context)
    pairs = 0

    def second(packed: PackedModel, rows: np.ndarray, num_queries: int) -> Tensor:
        if not num_layers:
            return normalize(packed.encode(rows), dim=1)
        context = bench.context[torch.from_numpy(rows).to(device)].float()
        return normalize(packed.pool(rows, num_queries, "eos", context), dim=1)

    def loss() -> Tensor:
        nonlocal pairs
        name, queries, documents = batches.draw()
        size = len(queries)
        pairs += size
        x = second(short, np.concatenate([queries, documents]), size)
        scores = x[:size] @ x[size:].T
        if task == "lexical":
            return divergence(1.5 * standardize(scores), 1.5 * standardize(bench.bm25.scores(queries, documents, name)))
        rows = [torch.from_numpy(one).to(device) for one in (queries, documents)]
        q, d = (bench.context[one].float() for one in rows)
        both = q @ d.T + softplus(weight) * scores
        left_out = false_negatives(bench.context, queries, documents)
        if task == "residual":
            bm25 = standardize(bench.bm25.scores(queries, documents, name))
            return info_nce(both / TEMPERATURE + bm25, left_out)
        q, d = (teacher[one].float() for one in rows)
        cosines = both / (1 + softplus(weight))
        return info_nce(both / TEMPERATURE, left_out) + divergence(cosines / TEMPERATURE, q @ d.T / TEMPERATURE)

    started = time.perf_counter()
    losses = train(groups, loss, steps=steps)
    seconds = time.perf_counter() - started

    @remembered
    def alone(rows: np.ndarray, queries: bool) -> Tensor:
        packed = bench.packed
        return packed.in_parts(rows, lambda part: second(packed, part, len(part) if queries else 0), 150_000)

    def context(rows: np.ndarray, queries: bool) -> Tensor:
        return bench.context[torch.from_numpy(rows).to(device)]

    def joined(share: float) -> dict[str, np.ndarray]:
        def both(rows: np.ndarray, queries: bool) -> Tensor:
            halves = [context(rows, queries).float(), share**0.5 * alone(rows, queries).float()]
            return normalize(torch.cat(halves, dim=1), dim=1)

        return bench.dev.items(both, bench.bm25)

    with torch.no_grad():
        first, own = (bench.dev.items(vectors, bench.bm25) for vectors in (context, alone))
        weights = [0.1, 0.2, 0.4, 0.8] if task == "lexical" else [float(softplus(weight))]
        items = {one: joined(one) for one in weights}
    return {
        "task": task,
        "layers": num_layers,
        "pairs": pairs,
        "seconds": round(seconds, 1),
        "losses": [losses[0], losses[-1]],
        "C": bench.dev.scores(first),
        "X": bench.dev.scores(own),
        "both": [
            {
                "weight": one,
                "scores": bench.dev.scores(found),
                "difference to C": {name: bench.dev.difference(name, found[name], first[name]) for name in found},
            }
            for one, found in items.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What the decoder's EOS adds to the encoder and to BM25.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files of the training sets")
    parser.add_argument("--eval", type=Path, nargs="+", required=True, help="folders as `c2v-rag evaluate` reads them")
    parser.add_argument("--teacher", required=True, help="a sentence-transformers model with mean pooling")
    parser.add_argument("--vectors", type=Path, help="file that keeps the teacher's vectors for the next run")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 30])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=256, help="pairs")
    parser.add_argument("--tokens", type=int, default=LLM_TOKENS, help="the most that X reads of a text in training")
    parser.add_argument("--rows", type=int, default=MAX_ROWS, help="the most of each training set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; rows that it has are kept")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")

    started = time.time()
    config = Causal2VecConfig(encoder_max_length=ENCODER_TOKENS)
    bench = Bench(
        arguments.data,
        arguments.eval,
        config,
        arguments.device,
        encoder_rank=RANK,
        llm_rank=RANK,
        max_rows=arguments.rows,
    )
    teacher = bench.teacher(arguments.teacher, arguments.vectors)
    print(f"[{time.time() - started:6.1f} s] prepared, {len(bench.texts.all):,} texts", flush=True)
    rows: list[dict[str, Any]] = []
    if arguments.output.is_file():
        rows = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
    done = {(row["task"], row["layers"]) for row in rows}
    for num_layers in (CONTROL, *arguments.layers):
        for task in arguments.tasks:
            if (task, num_layers) in done:
                continue
            row = run(
                bench,
                teacher,
                task,
                num_layers,
                steps=arguments.steps,
                batch=arguments.batch,
                tokens=arguments.tokens,
            )
            rows.append(row)
            print(f"[{time.time() - started:6.1f} s] {json.dumps(row)}", flush=True)
            figures = {
                "command": shlex.join(["python", *sys.argv]),
                "device": torch.cuda.get_device_name() if bench.model.device.type == "cuda" else "CPU",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "batch": arguments.batch,
                "tokens": arguments.tokens,
                "most rows of a set": arguments.rows,
                "adapter rank": RANK,
                "rows": rows,
            }
            arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
