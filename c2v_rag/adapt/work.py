"""The results of finished steps in a folder, so that a run that was killed continues after the last of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
_SECONDS = "seconds"


class Work:
    """A folder of results: a result that is there is read, another one is computed and written completely or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def json(self, name: str, compute: Callable[[], T]) -> T:
        """The JSON value `name`."""
        if (self.folder / f"{name}.json").is_file():
            value: T = self.read_json(name)
            return value
        write_text(self.folder / f"{name}.json", json.dumps(compute(), ensure_ascii=False))
        return self.json(name, compute)

    def read_json(self, name: str) -> Any:
        """The JSON value `name`; None if there is none."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def array(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array `name`."""
        path = self.folder / f"{name}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}")
            with unfinished.open("wb") as file:
                np.save(file, compute())
            unfinished.replace(path)
        array: np.ndarray = np.load(path)
        return array

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of the block to `seconds[step]`, also where the block raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.seconds
            seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - started
            write_text(self.folder / f"{_SECONDS}.json", json.dumps(seconds))

    @property
    def seconds(self) -> dict[str, float]:
        """How long each step took so far, over all runs in this folder."""
        seconds: dict[str, float] = self.read_json(_SECONDS) or {}
        return seconds


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file completely or not at all; characters that UTF-8 cannot hold become question marks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text, encoding="utf-8", errors="replace")
    unfinished.replace(path)
