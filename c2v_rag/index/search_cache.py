"""What searching a collection needs beside it, for one version of the collection: BM25, and a sample of embeddings."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from c2v_rag.index.chunking import Chunk
from c2v_rag.index.diversity import unit_rows
from c2v_rag.index.lexical import LexicalIndex, ids_hash, saved_state, set_version

logger = logging.getLogger(__name__)

_SAMPLED = 512


class SearchCache:
    """The latest lexical index and sample of a collection, in memory; the lexical index on disk too."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._lexical: tuple[str, LexicalIndex] | None = None
        self._sample: tuple[str, np.ndarray] | None = None

    def lexical(self, version: str, folder: Path, ids: Iterable[str], chunks: Iterable[Chunk]) -> LexicalIndex:
        """The lexical index of this version: from memory, from `folder`, or built of `chunks` and stored there.

        `ids` are those of the chunks: they tell whether a stored index of another version still has the same texts.
        """
        with self._lock:
            if self._lexical is None or self._lexical[0] != version:
                self._lexical = version, _load(version, folder, ids) or _build(version, folder, chunks)
            return self._lexical[1]

    def sample(self, version: str, draw: Callable[[int], list[Chunk]]) -> np.ndarray:
        """(S, D), rows of length 1: embeddings of at most 512 random chunks of this version."""
        with self._lock:
            if self._sample is None or self._sample[0] != version:
                rows = [chunk.embedding for chunk in draw(_SAMPLED) if chunk.embedding is not None]
                self._sample = version, unit_rows(np.stack(rows)) if rows else np.empty((0, 0))
            return self._sample[1]


def _load(version: str, folder: Path, ids: Iterable[str]) -> LexicalIndex | None:
    """The stored index; None where there is none of these chunks, or it is damaged."""
    saved = saved_state(folder)
    if saved is None:
        return None
    with suppress(OSError, ValueError, KeyError):
        if saved.version != version:
            if ids_hash(ids) != saved.ids_hash:
                return None
            set_version(folder, version)  # another collection of the store was written
        return LexicalIndex.load(folder)
    return None


def _build(version: str, folder: Path, chunks: Iterable[Chunk]) -> LexicalIndex:
    pairs = [(chunk.id, chunk.text) for chunk in chunks]
    lexical = LexicalIndex.build([id for id, _ in pairs], [text for _, text in pairs])
    if not pairs:
        return lexical  # perhaps there is no store to write into
    try:
        lexical.save(folder, version)
    except OSError as error:  # a reader may not be allowed to write
        logger.warning("The lexical index cannot be stored in %s and stays in memory: %s", folder, error)
    return lexical
