"""Hash the values of weights, and detect cheaply that weights have changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_SAMPLED_ELEMENTS = 64


# Of each sampled module: the addresses of its tensors, and views of the sampled elements, one list for each device and
# dtype. A view is used again while its tensor has the same address; it keeps the tensor's memory, so that no other
# tensor can get that address.
_views: WeakKeyDictionary[nn.Module, tuple[list[tuple[object, ...]], list[list[Tensor]]]] = WeakKeyDictionary()


@torch.no_grad()
def sample_weights(module: nn.Module) -> bytes:
    """At least 64 evenly spaced elements, or all if there are fewer, of every parameter and buffer, as bytes.

    Other bytes mean that the weights have changed, even by a write through `tensor.data` (moving averages, sharded
    optimizers), which version counters do not show. A change of single elements can be missed: code that must notice
    every change compares or hashes whole tensors.
    """
    # Offloaded tensors (meta) have no values in memory.
    held = chain.from_iterable(chain(part._parameters.values(), part._buffers.values()) for part in walk(module))
    unique = {id(tensor): tensor for tensor in held if tensor is not None}
    tensors = [tensor for tensor in unique.values() if tensor.device.type != "meta"]
    addresses: list[tuple[object, ...]] = [
        (tensor.data_ptr(), tensor.dtype, *tensor.shape, *tensor.stride()) for tensor in tensors
    ]
    cached = _views.get(module)
    if cached is None or cached[0] != addresses:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            flat = _local(tensor).detach().reshape(-1)
            is_view = flat.data_ptr() == tensor.data_ptr()
            step = max(1, len(flat) // _SAMPLED_ELEMENTS)
            groups.setdefault((tensor.device, tensor.dtype), []).append(flat[::step])
            if not is_view:
                addresses = []  # reshape made a copy, which would not follow the tensor: no later call equals this
        cached = addresses, list(groups.values())
        _views[module] = cached
    return b"".join(_bytes(torch.cat(samples)) for samples in cached[1])


def _local(tensor: Tensor) -> Tensor:
    """The tensor, or of one that is divided over processes (a DTensor) this process's share."""
    share: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return share


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all modules in it, as `module.modules()`, in another order and in a fifth of its time."""
    seen: set[nn.Module] = set()
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if part not in seen:
            seen.add(part)
            yield part
            waiting.extend(child for child in part._modules.values() if child is not None)


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
