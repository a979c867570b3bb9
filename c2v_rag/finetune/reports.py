"""Where a run is reported while it goes on, and the plot of its losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

TENSORBOARD = "tensorboard"


def trackers(wanted: Sequence[str] | None) -> list[str]:
    """The trackers of a recipe's `report_to`, for the trainer; for None, tensorboard if it is installed.

    Raises ImportError for a tracker that the recipe names and that is not installed.
    """
    if wanted is None:
        return [TENSORBOARD] if importlib.util.find_spec(TENSORBOARD) else []
    if missing := [name for name in wanted if not importlib.util.find_spec(name)]:
        raise ImportError(f"report_to names {', '.join(missing)}, not installed here: pip install {' '.join(missing)}")
    return list(wanted)


def plot_losses(log: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Write an image of the loss at every step, one panel per stage, with its running mean."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(log), figsize=(5 * len(log), 3.5), squeeze=False, layout="constrained")
    for axis, (name, rows) in zip(axes[0], log.items(), strict=True):
        losses = np.array([row["loss"] for row in rows])
        window = max(1, len(losses) // 20)
        axis.plot(losses, linewidth=0.6, alpha=0.5, color="tab:blue", label="each step")
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axis.plot(np.arange(window - 1, len(losses)), smooth, color="tab:blue", label=f"mean of {window}")
        axis.set(title=f"stage {name}", xlabel="step", ylabel="loss")
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
