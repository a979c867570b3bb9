"""Average the weights after a stage with those before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from c2v_rag.model import Causal2Vec


class StartAverage:
    """Scales the change that training makes to a model's weights by `keep`: start + keep x (trained - start).

    Created before training; the parameters that require gradients then are the trained ones. A new LoRA adapter has
    lora_B = 0 and changes no weight. Its change is lora_B x lora_A, so that lora_B alone is scaled.
    """

    def __init__(self, model: Causal2Vec, keep: float) -> None:
        self._keep = keep
        self._trained = {name: one for name, one in model.named_parameters() if keep < 1 and one.requires_grad}
        new = {name for name, one in self._trained.items() if ".lora_B" in name and not one.any()}
        beside_new = {name.replace(".lora_B", ".lora_A") for name in new}
        self._start = {
            name: one.detach().clone().cpu() for name, one in self._trained.items() if name not in beside_new
        }

    @torch.no_grad()
    def apply(self) -> None:
        """Scale the change in place."""
        for name, start in self._start.items():
            parameter = self._trained[name]
            parameter.copy_(start.to(parameter.device).lerp(parameter, self._keep))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the scaled change inside of the context, and exactly its own weights again afterwards."""
        own: dict[str, Tensor] = {name: self._trained[name].detach().clone() for name in self._start}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in own.items():
                    self._trained[name].copy_(tensor)
