"""Ray, started or found, and what its workers need."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported; nothing is reported

import ray
from ray.data import ActorPoolStrategy, DataContext

from c2v_rag.embedders import load_embedder
from c2v_rag.protocols import Embedder, is_url

AUTO, LOCAL = "auto", "local"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """How many processes embed, and what each is given.

    `count`: how many; None takes one for each GPU of the cluster, or one where there is none. `gpus`: of each; None
    takes 1 where the cluster has any. `cpus`: of each; None takes an equal share.
    """

    count: int | None = None
    gpus: float | None = None
    cpus: float | None = None

    def of(self, resources: dict[str, float]) -> Workers:
        """With every number chosen, for a cluster of these resources."""
        has_gpu = resources.get("GPU", 0) > 0
        gpus = self.gpus if self.gpus is not None else float(has_gpu)
        count = self.count or (max(1, int(resources["GPU"] / gpus)) if gpus and has_gpu else 1)
        # A share is left for reading and cutting, which run beside the workers.
        cpus = self.cpus or max(0.5, (resources.get("CPU", 1) - 0.5) / count)
        return Workers(count=count, gpus=gpus, cpus=float(int(cpus)) if cpus > 1 else cpus)

    @property
    def options(self) -> dict[str, Any]:
        """For `map_batches`."""
        return {"compute": ActorPoolStrategy(size=self.count), "num_gpus": self.gpus, "num_cpus": self.cpus}


@contextmanager
def connected(address: str = AUTO) -> Iterator[dict[str, float]]:
    """The resources of the cluster at `address`; "local" starts one here, and "auto" where none runs yet.

    Raises ConnectionError when there is no cluster at another address.
    """
    here = not ray.is_initialized()
    with redirect_stdout(sys.stderr):  # Ray has things to say, and standard output is for results
        if here:
            _connect(address)
        DataContext.get_current().enable_progress_bars = False
        try:
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            yield resources
        finally:
            if here:
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


# What is wrong with the input or the settings: no second try helps. Workers report it in a row of their results, since
# an error that leaves a worker comes out of Ray as one of Ray's.
EXPECTED = (ValueError, TypeError, OSError, ImportError)
_BY_NAME = {kind.__name__: kind for kind in (*EXPECTED, ConnectionError, FileNotFoundError, PermissionError)}


def in_words(error: Exception) -> str:
    return json.dumps([type(error).__name__, str(error)])


def raise_reported(words: str) -> None:
    """In the driver: the error that a worker put `in_words`."""
    kind, message = json.loads(words)
    raise _BY_NAME.get(kind, ValueError)(message)


class Loaded:
    """An embedder that is loaded where it is first used: in a worker, not where the pipeline is described."""

    def __init__(self, name: str, dtype: str | None, threads: float | None) -> None:
        self._name = name
        self._dtype = dtype
        self._threads = threads
        self._embedder: Embedder | None = None

    def __call__(self) -> Embedder:
        if self._embedder is None:
            if not is_url(self._name) and self._threads:
                import torch

                torch.set_num_threads(max(1, int(self._threads)))  # Ray gives every process one
            self._embedder = load_embedder(self._name, dtype=self._dtype)
        return self._embedder
