"""`Task`: runs a function in a thread, reports its progress and can stop it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.2


class Stopped(Exception):
    """Raised in the task's function after `stop` was called."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a task. `done`: the finished share, 0 to 1; None if it is unknown."""

    message: str
    done: float | None


class Task(Generic[T]):
    """Runs `work(task)` in a thread. `work` calls `report`, which raises `Stopped` after `stop` was called."""

    def __init__(self, work: Callable[[Task[T]], T]) -> None:
        self._work = work
        self._progress = Progress("", None)
        self._stop_requested = threading.Event()
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
        """Set the progress that `watch` yields. Raises Stopped after `stop` was called."""
        self._progress = Progress(message, done)
        if self._stop_requested.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleep. Raises Stopped as soon as `stop` is called."""
        if self._stop_requested.wait(seconds):
            raise Stopped

    def stop(self) -> None:
        """Request the end of the work; it stops at its next `report` or `wait`."""
        self._stop_requested.set()

    def watch(self) -> Iterator[Progress]:
        """Yield the latest progress every 0.2 s until the work has ended. Closing the iterator stops the work."""
        try:
            while self._thread.is_alive():
                self._thread.join(_POLL_S)
                yield self._progress
        finally:
            self.stop()

    def result(self) -> T:
        """Wait for the end of the work, and return its result or raise its exception."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]
