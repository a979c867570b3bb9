"""Cached vectors of the training texts: those of the frozen encoder, of a teacher, and lexical ones."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from c2v_rag import inference

_TEXTS_PER_FILE = 20_000  # an interrupted run keeps the files that it finished
_KEYS = ".keys.npy"
_WAIT_SECONDS = 0.5


class TextVectors:
    """A table of vectors, one row per text, each of length 1.

    `embed` computes the vectors that are missing in `folder`, where they are kept between runs. A folder belongs to
    one model and one maximum length. Its files are memory-mapped, so that several processes share one copy. With None
    nothing is kept, for vectors that are fast to compute.

    Each of `num_processes` processes computes its share of the missing vectors, and reads the others' from the folder.
    """

    def __init__(
        self,
        folder: Path | None,
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
        share = [text for text in missing if self._folder is None or self._is_own(keys[text])]
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
        if self._folder is None:
            self._add(keys, vectors)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.blake2b(b"".join(keys), digest_size=8).hexdigest()
        np.save(self._folder / f"{name}.vectors.npy", vectors)
        aside = self._folder / f".{name}.part.npy"
        np.save(aside, np.array([np.frombuffer(key, np.uint8) for key in keys]))
        aside.rename(self._folder / f"{name}{_KEYS}")  # a file of keys exists only beside complete vectors
        self._read_files()

    def _read_files(self) -> None:
        for path in sorted(self._folder.glob(f"*{_KEYS}")) if self._folder else []:
            if path.name not in self._read:
                self._read.add(path.name)
                vectors = np.load(path.with_name(path.name.replace(_KEYS, ".vectors.npy")), mmap_mode="r")
                self._add([bytes(key) for key in np.load(path)], vectors)

    def _add(self, keys: list[bytes], vectors: np.ndarray) -> None:
        self._places.update((key, (len(self._arrays), row)) for row, key in enumerate(keys))
        self._arrays.append(vectors)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """(n,): the row of each text, its index in `self.texts`."""
        return torch.tensor([self._rows[text] for text in texts])

    def __call__(self, rows: Tensor) -> Tensor:
        """The vectors (n, K) of these rows (n,), float32."""
        places = self._array_and_row[rows.numpy()]
        return torch.from_numpy(np.stack([self._arrays[array][row] for array, row in places]))


class LexicalEmbedder:
    """Embeds a text by the words in it: a weighted sum of the decoder's whitened token embeddings.

    A token's weight is BM25's (Robertson and Zaragoza, 2009): its inverse document frequency in `corpus` times a count
    that saturates. Weighted sums of word vectors without their common directions: SIF, Arora et al., 2017. Texts are
    lower-cased and cut at `max_length` tokens. `table` (V, D) holds the token embeddings.
    """

    _SATURATION = 1.2  # BM25's k1

    def __init__(
        self, table: Tensor, tokenizer: PreTrainedTokenizerBase, corpus: Sequence[str], max_length: int
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        centred = table.detach().double().cpu().numpy()
        centred = centred - centred.mean(axis=0)
        values, directions = np.linalg.eigh(centred.T @ centred)
        white = centred @ (directions / np.sqrt(np.maximum(values, values.max() * 1e-6))) @ directions.T
        self._table = (white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-9)).astype(np.float32)
        holding = np.zeros(len(white))
        for ids, _ in self._counts(corpus):
            holding[ids] += 1
        self._idf = np.log1p((len(corpus) - holding + 0.5) / (holding + 0.5))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D), rows of length 1."""
        vectors = np.zeros((len(texts), self._table.shape[1]), dtype=np.float32)
        for row, (ids, counts) in enumerate(self._counts(texts)):
            weights = self._idf[ids] * counts * (1 + self._SATURATION) / (counts + self._SATURATION)
            vectors[row] = weights @ self._table[ids]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.maximum(lengths, 1e-9)
        return vectors

    def _counts(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for text in texts:
            # With a space in front, a text's first word has the same token as the same word elsewhere.
            ids = self._tokenizer(" " + text.lower(), add_special_tokens=False)["input_ids"]
            yield np.unique(np.array(ids[: self._max_length], dtype=np.int64), return_counts=True)


def text_hashes(texts: Sequence[str]) -> Tensor:
    """(n,) int64: equal for equal texts, in every process."""
    return torch.tensor([int.from_bytes(_key(text)[:8], "little", signed=True) for text in texts])


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def autocast(device: torch.device) -> torch.autocast:
    """A context that computes in bfloat16 where the hardware supports it, and in float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=inference.default_dtype(device) == torch.bfloat16)
