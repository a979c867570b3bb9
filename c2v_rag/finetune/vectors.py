"""Cached vectors of the training texts: those of the frozen encoder and of a teacher."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from c2v_rag import inference

_TEXTS_PER_FILE = 20_000  # an interrupted run keeps the files that it finished
_KEYS = ".keys.npy"
_WAIT_SECONDS = 0.5


class TextVectors:
    """A table of vectors, one row per text, each of length 1.

    `embed` computes the vectors that are missing in `folder`, where they are kept between runs. A folder belongs to
    one model and one maximum length. Its files are memory-mapped, so that several processes share one copy.

    Each of `num_processes` processes computes its share of the missing vectors, and reads the others' from the folder.
    """

    def __init__(
        self,
        folder: Path,
        embed: Callable[[Sequence[str]], np.ndarray],
        *,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        self._folder = folder
        self._embed = embed
        self._process, self._num_processes = process, num_processes
        self._arrays: list[np.ndarray] = []  # of each file: (n, K)
        self._places: dict[bytes, tuple[int, int]] = {}  # key of a text -> its array, and the row in it
        self._read: set[str] = set()
        self.texts: list[str] = []
        self._rows: dict[str, int] = {}
        self._array_and_row = np.empty((0, 2), dtype=np.int64)

    def list_texts(self, texts: Iterable[str]) -> None:
        """Give each text a row, without any vector. `rows` works afterwards."""
        self.texts = list(dict.fromkeys(texts))
        self._rows = {text: row for row, text in enumerate(self.texts)}

    def prepare(self, texts: Iterable[str]) -> None:
        """Give each text a row and compute the missing vectors; `rows` and `__call__` work afterwards.

        Waits until the other processes have written theirs. It waits for files and not in a collective operation,
        because that would time out.
        """
        self.list_texts(texts)
        self._read_files()
        keys = {text: _key(text) for text in self.texts}
        missing = [text for text in self.texts if keys[text] not in self._places]
        # The share depends on the text alone: another process may have written its files already.
        share = [text for text in missing if self._is_own(keys[text])]
        for start in range(0, len(share), _TEXTS_PER_FILE):
            part = share[start : start + _TEXTS_PER_FILE]
            self._keep([keys[text] for text in part], np.asarray(self._embed(part), dtype=np.float32))
        while not all(key in self._places for key in keys.values()):
            time.sleep(_WAIT_SECONDS)
            self._read_files()
        self._array_and_row = np.array([self._places[keys[text]] for text in self.texts], dtype=np.int64)

    def _is_own(self, key: bytes) -> bool:
        return int.from_bytes(key[:8], "little") % self._num_processes == self._process

    def _keep(self, keys: list[bytes], vectors: np.ndarray) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.blake2b(b"".join(keys), digest_size=8).hexdigest()
        np.save(self._folder / f"{name}.vectors.npy", vectors)
        aside = self._folder / f".{name}.part.npy"
        np.save(aside, np.array([np.frombuffer(key, np.uint8) for key in keys]))
        aside.rename(self._folder / f"{name}{_KEYS}")  # a file of keys exists only beside complete vectors
        self._read_files()

    def _read_files(self) -> None:
        for path in sorted(self._folder.glob(f"*{_KEYS}")):
            if path.name not in self._read:
                self._read.add(path.name)
                vectors = np.load(path.with_name(path.name.replace(_KEYS, ".vectors.npy")), mmap_mode="r")
                self._places |= {bytes(key): (len(self._arrays), row) for row, key in enumerate(np.load(path))}
                self._arrays.append(vectors)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """(n,): the row of each text, its index in `self.texts`."""
        return torch.tensor([self._rows[text] for text in texts])

    def __call__(self, rows: Tensor) -> Tensor:
        """The vectors (n, K) of these rows (n,), float32."""
        places = self._array_and_row[rows.numpy()]
        return torch.from_numpy(np.stack([self._arrays[array][row] for array, row in places]))


def text_hashes(texts: Sequence[str]) -> Tensor:
    """(n,) int64: equal for equal texts, in every process."""
    return torch.tensor([int.from_bytes(_key(text)[:8], "little", signed=True) for text in texts])


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def autocast(device: torch.device) -> torch.autocast:
    """A context that computes in bfloat16 where the hardware supports it, and in float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=inference.default_dtype(device) == torch.bfloat16)
