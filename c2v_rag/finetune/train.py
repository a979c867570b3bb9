"""Training in stages: the Contextual token's half first, on sequences of one token; then whole texts.

Run as `python -m c2v_rag.finetune.train RECIPE.yaml --data FOLDER --output FOLDER`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from c2v_rag import inference
from c2v_rag.config import Causal2VecConfig
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.finetune.data import PairBatch, draw_batches, read_pair_set
from c2v_rag.finetune.loss import combined_loss
from c2v_rag.finetune.recipe import Recipe, Stage
from c2v_rag.model import Causal2Vec
from c2v_rag.tokenization import TextTokenizer, TokenBatch

logger = logging.getLogger(__name__)

WARM_UP = 0.05


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products over float32 weights, where the hardware has them."""
    dtype = inference.default_dtype(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


class EncoderVectors:
    """The frozen encoder's vectors of texts, computed once; the teacher's and the projector's input."""

    def __init__(self, embedder: EncoderEmbedder) -> None:
        self._embedder = embedder
        self._rows: dict[str, int] = {}
        self._vectors = np.empty((0, embedder.embedding_dim), dtype=np.float32)

    def add(self, texts: Sequence[str], *, show_progress: bool = False) -> None:
        """Compute what is not there yet."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        with half_precision(self._embedder.device):
            vectors = self._embedder.encode_document(new, on_truncate="ignore", show_progress=show_progress)
        self._rows.update({text: len(self._rows) + i for i, text in enumerate(new)})
        self._vectors = np.concatenate([self._vectors, vectors])

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, E), rows of length 1."""
        return torch.from_numpy(self._vectors[[self._rows[text] for text in texts]])


def new_model(recipe: Recipe, *, device: str | None = None) -> Causal2Vec:
    """The recipe's untrained model in float32, with a fresh LoRA on the decoder; all else frozen."""
    config = Causal2VecConfig(
        num_llm_layers=recipe.base.num_llm_layers, encoder_max_length=recipe.base.encoder_max_length
    )
    model = Causal2Vec.from_parts(
        recipe.base.encoder, recipe.base.llm, config=config, device=device, dtype=torch.float32, seed=recipe.seed
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        lora = LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules="all-linear")
        inject_adapter_in_model(lora, model.llm)
    return model


def trained_parameters(model: Causal2Vec, part: str) -> list[nn.Parameter]:
    if part == "projector":
        return list(model.projector.parameters())
    return [parameter for name, parameter in model.llm.named_parameters() if ".lora_" in name]


def run_stage(
    model: Causal2Vec, stage: Stage, batches: list[PairBatch], vectors: EncoderVectors
) -> list[dict[str, float]]:
    """Train one stage in place; returns a row a step: loss, learning rate as a share of the peak, seconds.

    Raises FloatingPointError when the loss is not finite.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    trained: list[nn.Parameter] = []
    for part in stage.train:
        parameters = trained_parameters(model, part)
        for parameter in parameters:
            parameter.requires_grad_(True)
        trained += parameters
        groups.append({"params": parameters, "lr": stage.learning_rate[part]})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm_up = max(1, round(stage.steps * WARM_UP))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warm_up
            if step < warm_up
            else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, stage.steps - warm_up)))
        ),
    )
    config = dataclasses.replace(model.config, max_length=stage.max_length)
    tokenizer = TextTokenizer(config, model.tokenizer.encoder, model.tokenizer.llm)
    pooling = "context" if stage.sequences == "context" else model.config.pooling

    def embed(texts: list[str], instruction: str) -> Tensor:
        # "context" sequences hold no text, so none is tokenised.
        tokenized = tokenizer(texts if pooling != "context" else [""] * len(texts), model.config.lead(instruction))
        batch: TokenBatch = tokenized.collate(range(len(texts))).to(model.device)
        with half_precision(model.device):
            embeddings: Tensor = model(batch, pooled=vectors(texts).to(model.device), pooling=pooling)
        return embeddings

    log: list[dict[str, float]] = []
    model.train()
    progress = tqdm(batches, desc=stage.name, unit="step", mininterval=10)
    for step, batch in enumerate(progress):
        started = time.perf_counter()
        weights = stage.loss if pooling == "context_eos" else dataclasses.replace(stage.loss, halves=0.0)
        loss = combined_loss(
            embed(batch.queries, batch.instruction),
            embed(batch.documents, ""),
            vectors(batch.queries).to(model.device),
            vectors(batch.documents).to(model.device),
            weights,
            torch.from_numpy(batch.also_positive).to(model.device),
        )
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss of stage {stage.name!r} is {loss.item()} at step {step}.")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        log.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - started, 2)})
        if step % 10 == 9:
            recent = sum(row["loss"] for row in log[-10:]) / 10
            progress.set_postfix(loss=f"{recent:.3f}")
    model.eval()
    return log


def train(
    recipe: Recipe, data: Path, output: Path, *, device: str | None = None, max_steps: int | None = None
) -> Causal2Vec:
    """Run every stage and save the checkpoint, with the loss of every step, after each. Returns the model.

    `max_steps` shortens each stage, for a dry run.
    """
    sets = [read_pair_set(data, name) for name in recipe.data.sets]
    model = new_model(recipe, device=device)
    log: dict[str, Any] = {"recipe": recipe.model_dump(), "stages": {}}
    for number, stage in enumerate(recipe.stages):
        if max_steps is not None:
            stage = stage.model_copy(update={"steps": min(stage.steps, max_steps)})
        batches = list(
            draw_batches(
                sets,
                recipe.data.sets,
                batch_size=stage.batch_size,
                num_batches=stage.steps,
                num_negatives=stage.num_negatives,
                seed=recipe.seed + number,
            )
        )
        config = dataclasses.replace(
            model.config, encoder_max_length=min(stage.max_length, model.config.encoder_max_length)
        )
        cutter = TextTokenizer(config, model.tokenizer.encoder, model.tokenizer.llm)
        vectors = EncoderVectors(EncoderEmbedder(model, cutter))
        started = time.perf_counter()
        vectors.add([text for batch in batches for text in batch.queries + batch.documents], show_progress=True)
        encoded = time.perf_counter() - started
        rows = run_stage(model, stage, batches, vectors)
        log["stages"][stage.name] = {
            "pairs": sum(len(batch.queries) for batch in batches),
            "encoder_seconds": round(encoded, 1),
            "seconds": round(time.perf_counter() - started, 1),
            "steps": rows,
        }
        save(model, recipe, output)
        (output.parent / f"{output.name}.log.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
    return model


def save(model: Causal2Vec, recipe: Recipe, folder: Path) -> None:
    """Save the checkpoint with half-precision trained parts, the recipe's further sources of the bases accepted."""
    model.save_pretrained(
        folder,
        trained_dtype=torch.float16,
        also_accepted={"encoder": recipe.base.encoder_also, "llm": recipe.base.llm_also},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.parquet and NAME.json files")
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--device")
    parser.add_argument("--max-steps", type=int, help="shorten every stage, for a dry run")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    train(
        Recipe.load(arguments.recipe),
        arguments.data,
        arguments.output,
        device=arguments.device,
        max_steps=arguments.max_steps,
    )


if __name__ == "__main__":
    main()
