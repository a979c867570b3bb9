"""Memory of a training step by part, computed from the models' configurations: no weights are loaded.

B texts of a slice (`mini_batch_size`), P prefix tokens, T tokens of a text, D decoder width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from c2v_rag.finetune.recipe import Recipe, Stage
from c2v_rag.parts import inject_adapter
from c2v_rag.projector import Projector

PREFIX_TOKENS = 32  # a usual instruction


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes that one process holds at the peak of a step. Not counted: the framework itself and fragmentation."""

    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def step_memory(
    recipe: Recipe, stage: Stage, encoder: PretrainedConfig, llm: PretrainedConfig, *, dtype: torch.dtype
) -> StepMemory:
    """The memory of a step of `stage`; `dtype` is that of frozen weights and of activations.

    Weights are counted on the meta device. Activations are the tensors that autograd keeps for the backward pass of
    one slice. With gradient checkpointing they are the inputs of all layers, and the activations of one layer. Texts
    have `stage.max_length` tokens. LoRA's rank and layers are the recipe's; 4-bit weights count half a byte.
    """
    if recipe.base.num_llm_layers is not None:
        llm.num_hidden_layers = recipe.base.num_llm_layers
    modules: dict[str, PreTrainedModel] = {}
    auto: Any = AutoModel  # its methods have no types
    for part, config in (("encoder", encoder), ("llm", llm)):
        with torch.device("meta"):
            modules[part] = auto.from_config(config, dtype=dtype)
        modules[part].requires_grad_(part in stage.train)
        if f"{part}_adapter" in stage.train:
            targets = recipe.lora.target_modules if part == "llm" else "all-linear"
            inject_adapter(modules[part], LoraConfig(r=recipe.lora.rank, target_modules=targets))
    with torch.device("meta"):
        projector = Projector(encoder.hidden_size, llm.hidden_size)
    projector.requires_grad_("projector" in stage.train)
    parameters = [p for module in (*modules.values(), projector) for p in module.parameters()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    is_4bit = bool(dict(recipe.base.llm_kwargs.get("quantization_config") or {}).get("load_in_4bit"))
    frozen = 0.0
    for name, module in modules.items():
        for layer in module.modules():
            size = 0.5 if is_4bit and name == "llm" and isinstance(layer, nn.Linear) else dtype.itemsize
            frozen += sum(p.numel() * size for p in layer.parameters(recurse=False) if not p.requires_grad)
    batch = stage.mini_batch_size or stage.batch_size
    tokens = PREFIX_TOKENS + 1 + (stage.max_length if stage.sequences == "full" else 0)
    activations = 0
    if {"llm_adapter", "projector", "encoder", "encoder_adapter"} & set(stage.train):
        activations += activation_bytes(modules["llm"], batch, tokens, dtype, stage.gradient_checkpointing)
    if {"encoder", "encoder_adapter"} & set(stage.train):
        length = min(stage.max_length, recipe.base.encoder_max_length)
        activations += activation_bytes(modules["encoder"], batch, length, dtype, stage.gradient_checkpointing)
    states = 2 if "8bit" in recipe.optimizer else 8  # bytes of a parameter's two moments
    return StepMemory(int(frozen), 4 * trained, 4 * trained, states * trained, activations)


def activation_bytes(module: PreTrainedModel, batch: int, tokens: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes of the activations of one slice (`batch` x `tokens`). It uses two layers of the module and scales them."""
    sizes = [_saved_bytes(module, batch, tokens, dtype, num_layers) for num_layers in (1, 2)]
    layer, rest = sizes[1] - sizes[0], 2 * sizes[0] - sizes[1]
    layers, width = int(module.config.num_hidden_layers), int(module.config.hidden_size)
    if not checkpointing:
        return rest + layers * layer
    return rest + layer + layers * batch * tokens * width * dtype.itemsize


def _saved_bytes(module: PreTrainedModel, batch: int, tokens: int, dtype: torch.dtype, num_layers: int) -> int:
    """Bytes of the tensors that autograd keeps for the module with its first `num_layers` layers, parameters left out.

    As under autocast, all is computed in `dtype`.
    """
    layers = next(child for child in module.modules() if isinstance(child, nn.ModuleList))
    kept = list(layers)
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no other tensor gets its address
        return tensor

    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    own |= {p.untyped_storage()._cdata for p in module.parameters()}
    # A mask with a row for each query is used as it is; from another one, a mask is made with values, which meta lacks.
    options: dict[str, Any] = {"attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="meta")}
    if module.config.model_type not in ("bert", "roberta", "xlm-roberta"):
        options["use_cache"] = False
    embeds = torch.zeros(batch, tokens, module.config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    try:
        del layers[num_layers:]
        module.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(inputs_embeds=embeds, **options)
    finally:
        layers.extend(kept[num_layers:])
    return sum(sizes.values())
