"""Connect to Ray, choose the number of its workers, and load an embedder in each of them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported: ray sends no usage statistics

import ray
from ray.data import ActorPoolStrategy, DataContext

from c2v_rag.embedders import load_embedder
from c2v_rag.protocols import Embedder, is_url

AUTO, LOCAL = "auto", "local"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """The number of processes that embed, and the GPUs and CPUs of each.

    `count`: number of processes; None takes one for each GPU of the cluster, or one where there is no GPU. `gpus`: for
    each process; None takes 1 where the cluster has any. `cpus`: for each process; None takes an equal share.
    """

    count: int | None = None
    gpus: float | None = None
    cpus: float | None = None

    def of(self, resources: dict[str, float]) -> Workers:
        """The settings with a number for every None, for a cluster with these resources ("CPU", "GPU")."""
        has_gpu = resources.get("GPU", 0) > 0
        gpus = self.gpus if self.gpus is not None else float(has_gpu)
        count = self.count or (max(1, int(resources["GPU"] / gpus)) if gpus and has_gpu else 1)
        # Half a CPU is left for reading and splitting, which run at the same time.
        cpus = self.cpus or max(0.5, (resources.get("CPU", 1) - 0.5) / count)
        return Workers(count=count, gpus=gpus, cpus=float(int(cpus)) if cpus > 1 else cpus)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `map_batches`."""
        return {"compute": ActorPoolStrategy(size=self.count), "num_gpus": self.gpus, "num_cpus": self.cpus}


@contextmanager
def connected(address: str = AUTO) -> Iterator[dict[str, float]]:
    """Connect to the cluster at `address` inside the `with` block; yields its resources.

    "local" starts a cluster on this machine; "auto" uses a running one, or starts one if there is none.

    Raises ConnectionError if there is no cluster at another address.
    """
    connects_here = not ray.is_initialized()
    with redirect_stdout(sys.stderr):  # Ray prints messages, and standard output is for results
        if connects_here:
            _connect(address)
        DataContext.get_current().enable_progress_bars = False
        try:
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            yield resources
        finally:
            if connects_here:
                ray.shutdown()


def _connect(address: str) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address != LOCAL:
        try:
            ray.init(address=address, **options)
            return
        except ConnectionError as error:
            if address != AUTO:
                raise ConnectionError(f"No Ray cluster answers at {address}: {error}") from error
    ray.init(address=LOCAL, include_dashboard=False, **options)


# Errors of the input or the settings, which a retry would not solve. A worker returns them in a row of its results,
# because Ray wraps an exception that a worker raises into its own type.
EXPECTED = (ValueError, TypeError, OSError, ImportError)
_BY_NAME = {kind.__name__: kind for kind in (*EXPECTED, ConnectionError, FileNotFoundError, PermissionError)}


def in_words(error: Exception) -> str:
    """Type and message of an error, as JSON."""
    return json.dumps([type(error).__name__, str(error)])


def raise_reported(words: str) -> None:
    """Raise, in the driver, the error that a worker reported by `in_words`."""
    kind, message = json.loads(words)
    raise _BY_NAME.get(kind, ValueError)(message)


class Loaded:
    """A callable that returns an embedder. It is loaded at the first call: in a worker, not in the driver."""

    def __init__(self, name: str, dtype: str | None, threads: float | None) -> None:
        self._name = name
        self._dtype = dtype
        self._threads = threads
        self._embedder: Embedder | None = None

    def __call__(self) -> Embedder:
        if self._embedder is None:
            if not is_url(self._name) and self._threads:
                import torch

                torch.set_num_threads(max(1, int(self._threads)))  # Ray limits each process to one
            self._embedder = load_embedder(self._name, dtype=self._dtype)
        return self._embedder
