"""Vectors of the training texts, computed once: the frozen encoder's, a teacher's, and lexical ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_PART = 20_000  # texts whose vectors are written at a time, so that an interrupted run keeps most of them


class TextVectors:
    """Texts to rows of unit length, and back.

    `folder` keeps them between runs, in files of a few thousand; `embed` computes what is not there. A folder belongs
    to one model and one way of cutting texts. None keeps nothing, for vectors that are as fast to compute.
    """

    def __init__(self, folder: Path | None, embed: Callable[[Sequence[str]], np.ndarray]) -> None:
        self._folder = folder
        self._embed = embed
        self._known: dict[bytes, np.ndarray] = {}
        for path in sorted(folder.glob("*.npz")) if folder else []:
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
            if self._folder is None:
                continue
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


class LexicalEmbedder:
    """Which words a text holds, as a vector: what a teacher of the EOS half knows and a sentence encoder blurs.

    The sum of the llm's own token embeddings, whitened, each weighted as BM25 weights a term (Robertson and Zaragoza,
    2009): by its inverse document frequency in `corpus` and by a count that saturates. Sums of weighted word vectors
    with the common directions taken out: SIF, Arora et al., 2017. Texts are lower-cased and cut at `max_length` tokens.
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
            # A blank in front: otherwise a text's first word is another token than the same word elsewhere.
            ids = self._tokenizer(" " + text.lower(), add_special_tokens=False)["input_ids"]
            yield np.unique(np.array(ids[: self._max_length], dtype=np.int64), return_counts=True)


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
