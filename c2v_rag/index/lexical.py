"""BM25 over the chunks of a collection, stored beside it and brought up to date with it.

bm25s computes the scores, with English stop words and the Snowball stemmer. Chinese, Japanese and Korean text is
indexed by pairs of neighbouring characters (as by Lucene's CJKAnalyzer), because spaces do not separate its words.
Chroma itself has no lexical index for a local store.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

_ABOUT_FILE = "c2v_lexical.json"
_FORMAT = 2
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+")


class LexicalIndex:
    """BM25 scores (Robertson and Zaragoza, 2009) of texts that are known by ids.

    `ids`: (N,) in the order of `scores`. Texts without a word get the score 0.
    """

    def __init__(self, ids: Sequence[str], model: Any) -> None:
        import Stemmer

        self.ids = list(ids)
        self._model = model  # None where no text has a word
        self._stemmer = Stemmer.Stemmer("english")

    @classmethod
    def build(cls, ids: Sequence[str], texts: Sequence[str]) -> Self:
        """Index `texts`, one for each id."""
        import bm25s

        index = cls(ids, None)
        tokens = index._tokenize(list(texts), return_ids=True)
        if tokens.vocab and any(len(text_ids) for text_ids in tokens.ids):
            index._model = bm25s.BM25(method="lucene")
            index._model.index(tokens, show_progress=False)
        return index

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """For each id its position in `ids` and in `scores`."""
        return {id: row for row, id in enumerate(self.ids)}

    def scores(self, query: str) -> np.ndarray:
        """(N,) float32; 0 for a text that shares no word with the query."""
        return self._scores(self._words(query))

    def max_score(self, query: str) -> float:
        """The limit of a text's score when it contains every word of the query arbitrarily often: the sum of their idf.

        A word that no text contains counts too, so that a query with unknown words has low scores for all texts.
        """
        return self._max_score(self._words(query))

    def scores_and_max(self, query: str) -> tuple[np.ndarray, float]:
        """`scores` and `max_score` of a query, which is tokenised once."""
        words = self._words(query)
        return self._scores(words), self._max_score(words)

    def _words(self, query: str) -> list[str]:
        if self._model is None:
            return []
        (words,) = self._tokenize([query], return_ids=False)
        return list(words)

    def _scores(self, words: list[str]) -> np.ndarray:
        known = [word for word in words if word in self._model.vocab_dict] if words else []
        if not known:
            return np.zeros(len(self.ids), dtype=np.float32)
        return np.asarray(self._model.get_scores(known), dtype=np.float32)

    def _max_score(self, words: list[str]) -> float:
        total = 0.0
        for word in words:
            row = self._model.vocab_dict.get(word)
            starts = self._model.scores["indptr"]
            texts = 0 if row is None else int(starts[row + 1] - starts[row])
            total += math.log(1 + (len(self.ids) - texts + 0.5) / (texts + 0.5))  # bm25s' idf for the method "lucene"
        return total

    def _tokenize(self, texts: list[str], *, return_ids: bool) -> Any:
        return tokenize_words(texts, self._stemmer, return_ids=return_ids)

    def save(self, folder: Path, version: str) -> None:
        """Write the index into `folder`, which is replaced; `version` is that of the collection."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".lexical-") as temporary:
            staging = Path(temporary) / folder.name
            staging.mkdir()
            if self._model is not None:
                self._model.save(staging / "bm25", show_progress=False)
            (staging / "ids.json").write_text(json.dumps(self.ids), encoding="utf-8")
            _write_about(staging, version, ids_hash(self.ids))
            shutil.rmtree(folder, ignore_errors=True)
            staging.rename(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open a saved index; its scores are memory-mapped."""
        import bm25s

        ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
        saved = folder / "bm25"
        return cls(ids, bm25s.BM25.load(saved, mmap=True) if saved.is_dir() else None)


def tokenize_words(texts: list[str], stemmer: Any, *, return_ids: bool) -> Any:
    """Stems of the words of texts, without English stop words: ids and their vocabulary, or a list for each text."""
    import bm25s

    words = [character_pairs(text) for text in texts]
    return bm25s.tokenize(words, stopwords="en", stemmer=stemmer, return_ids=return_ids, show_progress=False)


def character_pairs(text: str) -> str:
    """The text with each run of Chinese, Japanese and Korean characters ABC as its pairs of neighbours AB BC."""
    return text if text.isascii() else _CJK.sub(_pairs_of_run, text)


def _pairs_of_run(match: re.Match[str]) -> str:
    run = match.group()
    pairs = [run[start : start + 2] for start in range(len(run) - 1)]
    return f" {' '.join(pairs) or run} "


def ids_hash(ids: Iterable[str]) -> str:
    """Hash of a set of chunk ids. An id is the hash of its text, so equal sets have equal texts."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


class SavedState(NamedTuple):
    """The version of the collection that a saved index belongs to, and the hash of its chunks' ids."""

    version: str
    ids_hash: str


def saved_state(folder: Path) -> SavedState | None:
    """The state of a saved index; None where there is none that this version of c2v_rag can read."""
    try:
        about = json.loads((folder / _ABOUT_FILE).read_text(encoding="utf-8"))
        return SavedState(about["version"], about["ids_hash"]) if about["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def set_version(folder: Path, version: str) -> None:
    """Note that a saved index is up to date with this version of its collection."""
    if (state := saved_state(folder)) is not None:
        _write_about(folder, version, state.ids_hash)


def _write_about(folder: Path, version: str, ids: str) -> None:
    about = {"format": _FORMAT, "version": version, "ids_hash": ids}
    staging = folder / f".{_ABOUT_FILE}.part"
    staging.write_text(json.dumps(about), encoding="utf-8")
    staging.replace(folder / _ABOUT_FILE)
