"""Memory of a training step by part, for the recipes in recipes/ and for decoders of 135M, 1B and 7B parameters.

    python benchmarks/training_memory.py            # prints the table of docs/finetuning.md; no weights are loaded
    python benchmarks/training_memory.py --measure  # also runs a step of a 135M decoder on this CPU, in a new process

The measured figure is the growth of the process's largest resident memory over that step.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, BertConfig, LlamaConfig, MistralConfig, PretrainedConfig

from c2v_rag.finetune.memory import StepMemory, step_memory
from c2v_rag.finetune.recipe import Recipe

RECIPES = Path(__file__).parent.parent / "recipes"
MINILM = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
E5_BASE = BertConfig()
MEASURED = (4, 192)  # texts, tokens


def smollm2(layers: int = 30) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64,
    )  # fmt: skip


def llama_1b() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip


def load(name: str, **changes: Any) -> Recipe:
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    return recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update=changes)]})


def estimates() -> dict[str, StepMemory]:
    bf16, f32 = torch.bfloat16, torch.float32
    large, plain = load("mistral-7b-e5"), load("mistral-7b-e5", gradient_checkpointing=False)
    four_bits = {"llm_kwargs": {"quantization_config": {"load_in_4bit": True}}}
    qlora = large.model_copy(update={"base": large.base.model_copy(update=four_bits), "optimizer": "adamw_8bit"})
    rows: list[tuple[str, Recipe, PretrainedConfig, PretrainedConfig, torch.dtype]] = [
        ("laptop-smollm2-135m (3 layers)", load("laptop-smollm2-135m"), MINILM, smollm2(3), f32),
        ("135M, settings of mistral-7b-e5", large, E5_BASE, smollm2(), bf16),
        ("1B, settings of mistral-7b-e5", large, E5_BASE, llama_1b(), bf16),
        ("mistral-7b-e5, and each of eight GPUs", large, E5_BASE, MistralConfig(), bf16),
        ("the same without gradient checkpointing", plain, E5_BASE, MistralConfig(), bf16),
        ("the same in 4 bits with adamw_8bit", qlora, E5_BASE, MistralConfig(), bf16),
    ]
    return {
        name: step_memory(recipe, recipe.stages[0], encoder, llm, dtype=dtype)
        for name, recipe, encoder, llm, dtype in rows
    }


def measured_activations() -> float:
    """Bytes by which this process grows in the forward pass of `MEASURED` texts."""
    model = AutoModel.from_config(smollm2()).train()
    model.requires_grad_(False)
    batch, tokens = MEASURED
    model(inputs_embeds=torch.randn(1, 8, 576), use_cache=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    embeds = torch.randn(batch, tokens, 576, requires_grad=True)
    states = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0
    states.sum().backward()
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_this_process:
        print(measured_activations())
        return
    print("| GB | frozen weights | trained weights | gradients | optimizer | activations | sum |")
    print("|" + "---|" * 7)
    for name, memory in estimates().items():
        values = [*vars(memory).values(), memory.total]
        print(f"| {name} | " + " | ".join(f"{value / 1e9:.2f}" for value in values) + " |")
    if arguments.measure:
        from c2v_rag.finetune.memory import activation_bytes

        with torch.device("meta"):
            module = AutoModel.from_config(smollm2()).requires_grad_(False)
        expected = activation_bytes(module, *MEASURED, torch.float32, False)
        done = subprocess.run(
            [sys.executable, __file__, "--in-this-process"], capture_output=True, text=True, check=True
        )
        print(f"\nActivations of 135M, {MEASURED[0]} texts of {MEASURED[1]} tokens in float32, without an adapter: "
              f"{expected / 1e6:.0f} MB computed, {float(done.stdout) / 1e6:.0f} MB measured")  # fmt: skip


if __name__ == "__main__":
    main()
