"""Divide a decoder that is too large for one GPU over the processes of a run: torch's FSDP2, for frozen weights only.

Trained parameters stay whole in every process, and their gradients are averaged as without sharding (DDP). So the run,
its checkpoints and its results are the same; only the frozen weights are somewhere else.
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from c2v_rag.finetune.recipe import Recipe
from c2v_rag.finetune.trainer import part_of
from c2v_rag.model import Causal2Vec


def check_sharding(recipe: Recipe, num_processes: int) -> None:
    """Raise ValueError for a recipe with `base.shard` that cannot be trained by so many processes."""
    if num_processes < 2:
        raise ValueError(
            "base.shard divides the decoder over several processes, and this is one. Start with "
            "torchrun --nproc-per-node N -m c2v_rag.cli train ..., or leave it out."
        )
    if any(not stage.gradient_checkpointing for stage in recipe.stages):
        raise ValueError("base.shard needs gradient_checkpointing: true in every stage.")
    if "quantization_config" in recipe.base.llm_kwargs:
        raise ValueError("A quantised decoder cannot be divided: leave out base.shard or the quantization_config.")
    if "start" in recipe.teachers:
        raise ValueError(
            "The teacher 'start' cannot be used with base.shard: each process embeds its own share of the texts, and a "
            "divided decoder computes only if all processes take part."
        )


def shard_decoder(model: Causal2Vec, device: torch.device) -> None:
    """Move a model that is in the CPU's memory to `device`, each process with its share of the decoder's layers.

    A layer's weights are gathered when it computes, and freed afterwards.
    """
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    trainable = {parameter for name, parameter in model.named_parameters() if part_of(name) is not None}
    layers = next(module for module in model.llm.modules() if isinstance(module, nn.ModuleList))
    for layer in layers:
        whole = {parameter for parameter in layer.parameters() if parameter in trainable}
        divided = fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        # The tensors for gathered weights are made at the first use. In inference mode no training could write to them.
        divided.unshard()
        divided.reshard()
    model.to(device)


def sharded_names(module: nn.Module) -> list[str]:
    """The names of the parameters that are divided over the processes."""
    return [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
