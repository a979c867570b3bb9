"""Hash the values of weights, and detect cheaply that weights have changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

_SAMPLED_ELEMENTS = 64


@torch.no_grad()
def sample_weights(module: nn.Module) -> bytes:
    """The bytes of evenly spaced elements, at least 64 if there are so many, of every parameter and buffer.

    Other bytes mean that the weights have changed, even by a write through `tensor.data` (moving averages, sharded
    optimizers), which version counters do not show. A change of single elements can be missed: code that must notice
    every change compares or hashes whole tensors.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.device.type != "meta":  # offloaded: no values in memory
            flat = tensor.detach().reshape(-1)
            step = max(1, len(flat) // _SAMPLED_ELEMENTS)
            groups.setdefault((tensor.device, tensor.dtype), []).append(flat[::step])
    return b"".join(_bytes(torch.cat(samples)) for samples in groups.values())


def hash_tensors(tensors: Mapping[str, Tensor], **settings: object) -> str:
    """SHA-256 over the names, shapes and values of tensors, and over `settings` (JSON values).

    Floating-point values are hashed as float32, so that a value has the same hash in every precision that can store it.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(_bytes(tensor.detach().float() if tensor.is_floating_point() else tensor.detach()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
