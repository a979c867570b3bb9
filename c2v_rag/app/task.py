"""Work in a thread that a page watches and can stop."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.2


class Stopped(Exception):
    """Raised inside the work when it was asked to stop."""


@dataclasses.dataclass(frozen=True)
class Progress:
    message: str
    done: float | None


class Task(Generic[T]):
    """Runs `work(task)` in a thread of its own; the work calls `report`, which raises `Stopped` once it shall stop."""

    def __init__(self, work: Callable[[Task[T]], T]) -> None:
        self._work = work
        self._progress = Progress("", None)
        self._shall_stop = threading.Event()
        self._result: T | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work(self)
        except Exception as error:
            self._error = error

    def report(self, message: str, done: float | None = None) -> None:
        """Say how far it is; `done` is the share from 0 to 1, where it is known. Raises Stopped where it shall stop."""
        self._progress = Progress(message, done)
        if self._shall_stop.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleep, unless it shall stop."""
        if self._shall_stop.wait(seconds):
            raise Stopped

    def stop(self) -> None:
        self._shall_stop.set()

    def watch(self) -> Iterator[Progress]:
        """The latest report, again and again until the work has ended. Closing the iterator stops the work."""
        try:
            while self._thread.is_alive():
                self._thread.join(_POLL_S)
                yield self._progress
        finally:
            self.stop()

    def result(self) -> T:
        """What the work returned, once it has ended; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]
