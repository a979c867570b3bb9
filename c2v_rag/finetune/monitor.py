"""Values that are logged at every step besides the trainer's own, and the time limit of a stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from c2v_rag.finetune.loss import Causal2VecLoss


class Monitor(TrainerCallback):
    """Measures a stage: per trained part the learning rate and the gradient's norm, batch statistics, and seconds.

    `part_of`: the part of a parameter by its name in `model`. `paused`: seconds that were spent on scoring; they do not
    count. After `minutes` of training the stage ends. A resumed stage goes on counting.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Causal2VecLoss,
        part_of: Callable[[str], str | None],
        *,
        paused: Callable[[], float] = lambda: 0.0,
        minutes: float | None = None,
    ) -> None:
        self._parts = {parameter: part_of(name) for name, parameter in model.named_parameters()}
        self._loss = loss
        self._paused = paused
        self._limit = math.inf if minutes is None else 60 * minutes
        self._start = 0.0
        self._norms: dict[str, Tensor] = {}  # on the device, so that it does not wait for each of them
        self._rates: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Seconds of training so far, without scoring."""
        return time.perf_counter() - self._paused() - self._start

    @property
    def time_share(self) -> float:
        """The share of `minutes` that is over; 0 without a limit."""
        return min(1.0, self.seconds / self._limit)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = max((row.get("seconds", 0.0) for row in state.log_history), default=0.0)
        self._start = time.perf_counter() - self._paused() - before

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients: dict[str, list[Tensor]] = {}
        for group in kwargs["optimizer"].param_groups:
            for parameter in group["params"]:
                part = self._parts.get(parameter)
                if part is not None and parameter.grad is not None:
                    gradients.setdefault(part, []).append(parameter.grad)
                    self._rates[part] = float(group["lr"])
        self._norms = {part: get_total_norm(tensors) for part, tensors in gradients.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._limit < math.inf:
            (is_over,) = broadcast_object_list([self.seconds >= self._limit])  # all processes stop at the same step
            control.should_training_stop |= is_over

    def values(self, grad_norm: float) -> dict[str, float]:
        """What to log for the last step, whose gradient had the norm `grad_norm` before clipping.

        "seconds"; "margin" and "masked" (`masks.batch_statistics`); for each trained part "learning_rate/PART" and
        "grad_norm/PART", the norm before clipping.
        """
        norms = {part: norm.item() for part, norm in self._norms.items()}
        clipped = math.hypot(*norms.values())
        scale = grad_norm / clipped if clipped > 0 else 0.0  # clipping multiplies all gradients by one factor
        return (
            {"seconds": round(self.seconds, 3), **self._loss.statistics}
            | {f"learning_rate/{part}": rate for part, rate in self._rates.items()}
            | {f"grad_norm/{part}": scale * norm for part, norm in norms.items()}
        )
