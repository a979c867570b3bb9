"""First step of training the model "default": encoder, projector and decoder learn the vectors of a larger model.

    python recipes/distil.py --data TRAIN --teacher all-mpnet-base-v2 --output distilled \\
        --dev eval/Cranfield eval/XQuAD-en

TRAIN holds NAME.parquet (columns query and positive; `pairs.SETS`). The target of a text: the vectors of the teacher
and of the untrained encoder, joined and rotated to their principal axes, so that the first columns carry most of it.
The Contextual half and EOS's half each regress the first D axes (LEAF, arXiv 2509.12539). Within batches of neighbours,
the similarities of queries to positives are compared with the target's, for each half and for the whole embedding (KL
divergence). That a query and a positive belong together is used for nothing else.

`c2v-rag train` trains any model on pairs. This script is for one GPU and one task: it packs texts without padding
(torch's varlen_attn). On a CPU it pads them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from bases import BASE, made, new_model
from packed import PackedModel, Ragged
from pairs import TEMPERATURE, Batches, DevSets, Texts, divergence, remembered, teacher_vectors
from torch import Tensor, nn
from torch.nn.functional import normalize

from c2v_rag import Causal2Vec, Causal2VecConfig
from c2v_rag.finetune.run import write_checkpoint
from c2v_rag.projector import INITIAL_TOKEN_SCALE, final_norm_weight, mean_token_norm

COLUMNS = 384  # of the saved model: the first of C, which score as all of C and EOS together
ENCODER_TOKENS, DECODER_TOKENS = 256, 320
REPORTED_SHARE = 1 / 8  # of the minutes, between two rows of the curve


def halves_of(packed: PackedModel, rows: np.ndarray, num_queries: int) -> tuple[Tensor, Tensor]:
    """(n, D) last states of the Contextual token and of EOS; the first `num_queries` rows are queries."""
    both = packed.pool(rows, num_queries, "context_eos")
    return both[:, 0::2], both[:, 1::2]


@torch.no_grad()
def targets_of(vectors: Sequence[Tensor], columns: int) -> Tensor:
    """(n, columns): `vectors`, (n, .) each and of length 1, joined and rotated to their principal axes; length 1."""
    width = sum(part.shape[1] for part in vectors)
    joined = [
        torch.cat([part[start : start + 65536].float() for part in vectors], dim=1)
        for start in range(0, len(vectors[0]), 65536)
    ]
    moment = torch.zeros(width, width, device=vectors[0].device, dtype=torch.float64)
    for part in joined:
        moment += (part.T @ part).double()
    values, axes = torch.linalg.eigh(moment)
    axes = axes.flip(1)[:, :columns].float()
    print(f"{columns} of {width} axes hold {float(values.flip(0)[:columns].sum() / values.sum()):.4f} of the teachers")
    return torch.cat([normalize(part @ axes, dim=1).half() for part in joined])


@torch.no_grad()
def fit_projector(model: Causal2Vec, encoded: Tensor, targets: Tensor) -> None:
    """Start the projector as the linear map from the encoder's vectors to the targets (least squares)."""
    width = encoded.shape[1]
    left = torch.zeros(width, width, device=encoded.device, dtype=torch.float64)
    right = torch.zeros(width, targets.shape[1], device=encoded.device, dtype=torch.float64)
    for start in range(0, len(encoded), 65536):
        x, y = encoded[start : start + 65536].double(), targets[start : start + 65536].double()
        left += x.T @ x
        right += x.T @ y
    ridge = 1e-4 * left.diagonal().mean() * torch.eye(width, device=left.device, dtype=left.dtype)
    solved = torch.linalg.solve(left + ridge, right).T.float()
    scale = INITIAL_TOKEN_SCALE * mean_token_norm(model.llm)
    solved = solved / final_norm_weight(model.llm, scale).to(solved).unsqueeze(1)
    model.projector.output.weight.copy_(torch.cat([solved, -solved], dim=1))


def distillation(student: tuple[Tensor, Tensor], target: Tensor, num_queries: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts: 1 - cosine to the target of each half, and KL divergence of similarities.

    `student`: both halves (n, D) of queries, then positives. `target` (n, D), of length 1.
    """
    regression = [(1 - (normalize(half, dim=1) * target).sum(dim=1)).mean() for half in student]
    joined = torch.stack(student, dim=-1).flatten(1)
    wanted, *scores = (
        x[:num_queries] @ x[num_queries:].T / TEMPERATURE
        for x in (target, *(normalize(part, dim=1) for part in (joined, *student)))
    )
    similarity = torch.stack([divergence(s, wanted) for s in scores]).mean()
    parts = {"context": regression[0], "eos": regression[1], "similarity": similarity}
    return 5 * regression[0] + 5 * regression[1] + similarity, parts


def train(
    packed: PackedModel,
    texts: Texts,
    targets: Tensor,
    neighbours: Tensor,
    *,
    minutes: float,
    rates: dict[str, float],
    seed: int = 0,
    max_steps: int = 1_000_000,
    score: Callable[[], dict[str, float]],
) -> list[dict[str, float]]:
    """Train in place for `minutes`; the learning rate follows a cosine over them. Returns rows of the curve.

    `rates`: learning rates of "projector", "encoder" and "llm". `score` gives the scores to report.
    """
    model = packed.model
    groups = []
    for name, part in (("projector", model.projector), ("encoder", model.encoder), ("llm", model.llm)):
        trained = [p for key, p in part.named_parameters() if name == "projector" or "lora_" in key]
        for parameter in part.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        groups.append({"params": trained, "lr": rates[name], "rate": rates[name]})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98), fused=model.device.type == "cuda")
    batches = Batches(texts, neighbours, seed)
    curve: list[dict[str, float]] = []
    started, paused, pairs, step, reported = time.time(), 0.0, 0, 0, 0.0
    sums: dict[str, Tensor] = {}
    while True:
        done = max((time.time() - started - paused) / (60 * minutes), step / max_steps)
        if done >= reported + REPORTED_SHARE or done >= 1:
            reported = done
            pause = time.time()
            row = {
                name: float(total) / max(1, step - (curve[-1]["step"] if curve else 0)) for name, total in sums.items()
            }
            row |= {"step": step, "pairs": pairs, "minutes": (pause - started - paused) / 60}
            row |= score()
            curve.append(row)
            sums = {}
            print(json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)
            paused += time.time() - pause
        if done >= 1:
            return curve
        factor = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        _, queries, positives = batches.draw()
        rows = np.concatenate([queries, positives])
        loss, parts = distillation(
            halves_of(packed, rows, len(queries)),
            targets[torch.from_numpy(rows).to(packed.device)].float(),
            len(queries),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach()
        pairs += len(queries)
        step += 1


@torch.no_grad()
def scores_of(packed: PackedModel, dev: DevSets) -> dict[str, float]:
    """Scores of the whole embedding, of each half alone, and of the first columns."""
    columns = {"": slice(None), " context": slice(0, None, 2), " eos": slice(1, None, 2), " 384": slice(0, 384)}

    @remembered
    def embed(rows: np.ndarray, queries: bool) -> Tensor:
        return packed.embed(rows, queries=queries, pooling="context_eos").float()

    scores = {}
    for part, chosen in columns.items():
        items = dev.items(lambda rows, queries, chosen=chosen: normalize(embed(rows, queries)[:, chosen], dim=1))
        scores |= {name + part: score for name, score in dev.scores(items).items()}
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files of SETS")
    parser.add_argument("--teacher", nargs="+", required=True, help="sentence-transformers models with mean pooling")
    parser.add_argument("--dev", type=Path, nargs="*", default=[], help="retrieval folders, scored eight times")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.3)
    parser.add_argument("--steps", type=int, default=1_000_000, help="the most steps, for a dry run")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument(
        "--rates", type=float, nargs=3, default=[5e-4, 3e-4, 1.5e-3], help="projector, encoder, decoder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="folder that keeps tokens and vectors for the next run")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.set_float32_matmul_precision("high")

    started = time.time()

    def say(what: str) -> None:
        print(f"[{time.time() - started:6.1f} s] {what}", flush=True)

    texts = Texts()
    texts.read(arguments.data, arguments.seed)
    num_trained = len(texts.all)
    dev = DevSets(arguments.dev, texts)
    config = Causal2VecConfig(
        pooling="context",
        num_llm_layers=arguments.layers,
        encoder_max_length=ENCODER_TOKENS,
        truncate_dim=COLUMNS,
    )
    ranks = {"encoder_rank": arguments.rank, "llm_rank": arguments.rank}
    model = new_model(arguments.device, config, seed=arguments.seed, **ranks)
    device = model.device
    pairs = sum(len(queries) for queries, _ in texts.pairs.values())
    say(f"{pairs:,} pairs, {num_trained:,} different texts")
    kept = arguments.work / "prepared.pt" if arguments.work else None
    if kept is not None and kept.is_file():
        prepared = torch.load(kept)
        packed = PackedModel(model, *(Ragged(*prepared[name], device) for name in ("encoder", "llm")))
        teachers = [part.to(device) for part in prepared["teachers"]]
    else:
        tokenizer = model.tokenizer
        tables = [
            Ragged.tokenize(tokenizer.encoder, texts.all, device, most=ENCODER_TOKENS),
            Ragged.tokenize(tokenizer.llm, texts.all, device, most=DECODER_TOKENS, eos=tokenizer.eos),
        ]
        say(f"{sum(tables[0].lengths):,} and {sum(tables[1].lengths):,} tokens")
        packed = PackedModel(model, *tables)
        with torch.no_grad():
            teachers = [packed.in_parts(np.arange(len(texts.all)), packed.encode)]
        say("vectors of the encoder")
        for folder in arguments.teacher:
            teachers.append(teacher_vectors(folder, texts.all[:num_trained], device))
            say(f"vectors of {folder}")
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            tokens = {
                name: (table.flat.cpu(), torch.from_numpy(table.lengths))
                for name, table in zip(("encoder", "llm"), tables, strict=True)
            }
            torch.save({**tokens, "teachers": [part.cpu() for part in teachers]}, kept)
    encoded = teachers[0]
    width = int(model.llm.config.hidden_size)
    targets = targets_of([encoded[:num_trained], *teachers[1:]], width)
    fit_projector(model, encoded[:num_trained].float(), targets)
    say("training")
    curve = train(
        packed,
        texts,
        targets,
        encoded,
        minutes=arguments.minutes,
        rates=dict(zip(("projector", "encoder", "llm"), arguments.rates, strict=True)),
        seed=arguments.seed,
        max_steps=arguments.steps,
        score=lambda: scores_of(packed, dev),
    )
    write_checkpoint(model.eval(), BASE, arguments.output)
    about = {
        **made("distil.py", device),
        "pairs in the sets": pairs,
        "curve": curve,
    }
    (arguments.output / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    say(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
