"""Vectors of the training texts, computed once and kept on disk: the frozen encoder's and a teacher's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PART = 20_000  # texts whose vectors are written at a time, so that an interrupted run keeps most of them


class TextVectors:
    """Texts to rows of unit length, and back.

    `folder` keeps them between runs, in files of a few thousand; `embed` computes what is not there. A folder belongs
    to one model and one way of cutting texts.
    """

    def __init__(self, folder: Path, embed: Callable[[Sequence[str]], np.ndarray]) -> None:
        self._folder = folder
        self._embed = embed
        self._known: dict[bytes, np.ndarray] = {}
        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as kept:
                self._known.update(zip((bytes(key) for key in kept["keys"]), kept["vectors"], strict=True))
        self.texts: list[str] = []
        self._rows: dict[str, int] = {}
        self._table = torch.empty(0, 0)

    def prepare(self, texts: Iterable[str]) -> None:
        """Make `rows` and `__call__` work for these texts, computing what is not known."""
        self.texts = list(dict.fromkeys(texts))
        self._rows = {text: row for row, text in enumerate(self.texts)}
        missing = [text for text in self.texts if _key(text) not in self._known]
        for start in range(0, len(missing), _PART):
            part = missing[start : start + _PART]
            vectors = self._embed(part)
            keys = [_key(text) for text in part]
            self._known.update(zip(keys, vectors, strict=True))
            self._folder.mkdir(parents=True, exist_ok=True)
            aside = self._folder / ".part.npz"
            np.savez(aside, keys=np.array([np.frombuffer(key, np.uint8) for key in keys]), vectors=vectors)
            aside.rename(self._folder / f"{len(list(self._folder.glob('*.npz'))):05d}-{keys[0].hex()[:8]}.npz")
        table = np.stack([self._known[_key(text)] for text in self.texts])
        self._table = torch.from_numpy(table.astype(np.float32))

    def rows(self, texts: Sequence[str]) -> Tensor:
        """(n,): the place of each text among `texts`."""
        return torch.tensor([self._rows[text] for text in texts])

    def __call__(self, rows: Tensor) -> Tensor:
        """(n,) -> (n, K)."""
        return self._table[rows]


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
