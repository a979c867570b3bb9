"""Open the model that a recipe trains: dtypes of its parts, quantised weights, and new adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from c2v_rag import inference
from c2v_rag.config import Causal2VecConfig
from c2v_rag.finetune.recipe import BaseModels, Recipe
from c2v_rag.model import Causal2Vec
from c2v_rag.parts import adapted_layers, inject_adapter


def new_model(recipe: Recipe, *, device: str | None = None, model_class: type[Causal2Vec] = Causal2Vec) -> Causal2Vec:
    """The recipe's model before training, with a new LoRA adapter for each part that needs one.

    Frozen weights have `base.dtype`, trained ones are float32. A checkpoint's own adapter is trained further.

    Raises ValueError for a stage whose `max_length` is above the model's and for a decoder that `device_map` puts on
    several devices; and what `from_parts` and `from_pretrained` raise.
    """
    base = recipe.base
    dtype = frozen_dtype(base, inference.resolve_device(device))
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "encoder_dtype": torch.float32 if "encoder" in recipe.trained_parts else dtype,
        **llm_options(base),
    }
    if base.checkpoint is not None:
        model = model_class.from_pretrained(base.checkpoint, **options)
    else:
        config = Causal2VecConfig(
            num_llm_layers=base.num_llm_layers, encoder_max_length=base.encoder_max_length, **base.config
        )
        scale = base.initial_token_scale
        model = model_class.from_parts(
            str(base.encoder), str(base.llm), config=config, seed=recipe.seed, initial_token_scale=scale, **options
        )
    for stage in recipe.stages:
        if stage.max_length > model.config.max_length:
            raise ValueError(
                f"Stage {stage.name!r} has max_length {stage.max_length}, but the model cuts texts at "
                f"{model.config.max_length} tokens. Lower it, or raise max_length in the config of a new model."
            )
    if len({*getattr(model.llm, "hf_device_map", {}).values()}) > 1:
        raise ValueError(
            "base.llm_kwargs.device_map puts the decoder on several devices, which cannot be trained here. Leave it "
            "out: every process of torchrun holds a whole model, or its share of one with base.shard."
        )
    if getattr(model.llm, "is_quantized", False):
        # Checkpointing is a setting of each stage.
        prepare: Any = prepare_model_for_kbit_training  # it has no types
        prepare(model.llm, use_gradient_checkpointing=False)
    for part, module in (("llm", model.llm), ("encoder", model.encoder)):
        if f"{part}_adapter" not in recipe.trained_parts:
            continue
        if adapted_layers(module):
            model.unmerge_adapter(part)  # type: ignore[arg-type]
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            lora = LoraConfig(
                r=recipe.lora.rank,
                lora_alpha=recipe.lora.alpha,
                lora_dropout=recipe.lora.dropout,
                target_modules=recipe.lora.target_modules if part == "llm" else "all-linear",
            )
            inject_adapter(module, lora)
    return model


def frozen_dtype(base: BaseModels, device: torch.device) -> torch.dtype:
    """`base.dtype`; unless given, bfloat16 on a GPU that computes in it, and float32 elsewhere."""
    if base.dtype is not None:
        dtype: torch.dtype = getattr(torch, base.dtype)
        return dtype
    return torch.float32 if device.type == "cpu" else inference.default_dtype(device)


def llm_options(base: BaseModels) -> dict[str, Any]:
    """`base.llm_kwargs`, with a `quantization_config` of bitsandbytes as the object that transformers expects."""
    options = dict(base.llm_kwargs)
    quantization = options.get("quantization_config")
    if isinstance(quantization, dict) and "quant_method" not in quantization:
        config: Any = BitsAndBytesConfig  # its __init__ has no types
        options["quantization_config"] = config(**quantization)
    return options
