"""Copies of a model on several devices, kept from call to call until the model's weights change."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from c2v_rag.identity import sample_weights

Model = TypeVar("Model", bound=nn.Module)


class Replicas:
    """Copies of one model, by device. A pickle or copy has none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copies: dict[tuple[torch.device, int], tuple[bytes, nn.Module]] = {}

    def __reduce__(self) -> tuple[type[Replicas], tuple[()]]:
        return Replicas, ()

    def get(self, model: Model, devices: Sequence[torch.device | str]) -> list[Model]:
        """A model for each device: `model` itself first for its own device, else a copy with the same weights.

        A device that is named twice has two copies. Raises ValueError without a device, and for a model that is spread
        over several devices.
        """
        if isinstance(devices, str) or not devices:
            raise ValueError(f"devices must be a list with at least one device, such as ['cuda:0']; got {devices!r}.")
        places = {parameter.device for parameter in model.parameters()}
        if len(places) != 1:
            raise ValueError(
                f"devices needs a model on one device, but its weights are on {sorted(map(str, places))}. "
                "Load it without device_map."
            )
        (home,) = places
        sample = sample_weights(model)
        found: list[Model] = []
        counts: dict[torch.device, int] = {home: -1}
        with self._lock:
            for device in map(_with_index, devices):
                number = counts[device] = counts.get(device, 0) + 1
                if number == 0:
                    found.append(model)
                    continue
                entry = self._copies.get((device, number))
                if entry is None or entry[0] != sample:
                    self._copies.pop((device, number), None)  # free its memory before the next copy is made
                    entry = self._copies[device, number] = sample, copy.deepcopy(model).to(device)
                replica = entry[1]
                assert isinstance(replica, type(model))
                found.append(replica)
        return found


def _with_index(device: torch.device | str) -> torch.device:
    """The device with its number, so that "cuda" and "cuda:0" are equal."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
