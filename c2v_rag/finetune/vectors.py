"""Cached vectors of the training texts: those of the frozen encoder, of a teacher, and lexical ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from c2v_rag import inference

_TEXTS_PER_FILE = 20_000  # an interrupted run keeps the files that it finished


class TextVectors:
    """A table of vectors, one row per text, each of length 1.

    `embed` computes the vectors that are missing in `folder`, where they are kept between runs. A folder belongs to
    one model and one maximum length. With None nothing is kept, for vectors that are fast to compute.
    """

    def __init__(self, folder: Path | None, embed: Callable[[Sequence[str]], np.ndarray]) -> None:
        self._folder = folder
        self._embed = embed
        self._vectors: dict[bytes, np.ndarray] = {}
        for path in sorted(folder.glob("*.npz")) if folder else []:
            with np.load(path) as kept:
                self._vectors.update(zip((bytes(key) for key in kept["keys"]), kept["vectors"], strict=True))
        self.texts: list[str] = []
        self._rows: dict[str, int] = {}
        self._table = torch.empty(0, 0)

    def prepare(self, texts: Iterable[str]) -> None:
        """Build the table for these texts; `rows` and `__call__` work afterwards. Computes missing vectors."""
        self.texts = list(dict.fromkeys(texts))
        self._rows = {text: row for row, text in enumerate(self.texts)}
        missing = [text for text in self.texts if _key(text) not in self._vectors]
        for start in range(0, len(missing), _TEXTS_PER_FILE):
            part = missing[start : start + _TEXTS_PER_FILE]
            vectors = self._embed(part)
            keys = [_key(text) for text in part]
            self._vectors.update(zip(keys, vectors, strict=True))
            if self._folder is None:
                continue
            self._folder.mkdir(parents=True, exist_ok=True)
            aside = self._folder / ".part.npz"
            np.savez(aside, keys=np.array([np.frombuffer(key, np.uint8) for key in keys]), vectors=vectors)
            aside.rename(self._folder / f"{len(list(self._folder.glob('*.npz'))):05d}-{keys[0].hex()[:8]}.npz")
        table = np.stack([self._vectors[_key(text)] for text in self.texts])
        self._table = torch.from_numpy(table.astype(np.float32))

    def rows(self, texts: Sequence[str]) -> Tensor:
        """(n,): the row of each text, its index in `self.texts`."""
        return torch.tensor([self._rows[text] for text in texts])

    def __call__(self, rows: Tensor) -> Tensor:
        """The vectors (n, K) of these rows (n,)."""
        return self._table[rows]


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


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def autocast(device: torch.device) -> torch.autocast:
    """A context that computes in bfloat16 where the hardware supports it, and in float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=inference.default_dtype(device) == torch.bfloat16)
