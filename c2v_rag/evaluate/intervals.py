"""Bootstrap intervals of the difference between two systems that were scored on the same items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two scores, and the ends of its 95 % interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(number: int, statistic: Callable[[np.ndarray], float]) -> Difference:
    """The interval of a paired bootstrap over `number` items.

    `statistic` returns the difference of both systems on the items at these positions (number,), which may repeat.
    The draws are the same in every call. Raises ValueError when there are no items.
    """
    if number < 1:
        raise ValueError("A bootstrap needs at least one item, got none.")
    rows = np.random.default_rng(0).integers(number, size=(DRAWS, number))
    draws = [statistic(row) for row in rows]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Difference(statistic(np.arange(number)), float(low), float(high))


def difference_of_means(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Difference:
    """The difference of the means over several sets, each of which has the same weight.

    `ours` and `theirs`: per set the items' scores (n,), in the same order. Items are drawn within their set. Raises
    ValueError for a set without items and for sets of different sizes.
    """
    differences = []
    for left, right in zip(ours, theirs, strict=True):
        if len(left) != len(right) or not len(left):
            raise ValueError(f"Both systems need a score for each item of a set, got {len(left)} and {len(right)}.")
        differences.append(np.asarray(left, dtype=np.float64) - np.asarray(right, dtype=np.float64))
    rng = np.random.default_rng(0)
    draws = [one[rng.integers(len(one), size=(DRAWS, len(one)))].mean(axis=1) for one in differences]
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return Difference(float(np.mean([one.mean() for one in differences])), float(low), float(high))
