"""The sentence of a passage that answers a query best: for the page, the command line and the server."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from unicodedata import category

import numpy as np

if TYPE_CHECKING:
    from c2v_rag.protocols import Embedder

_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+|(?<=[。！？])(?![」』）”’])\s*|\n\s*\n")


def one_line(text: str) -> str:
    """The text on one line with single spaces, without control characters, which could act on a terminal."""
    return " ".join("".join(letter for letter in text if category(letter) != "Cc" or letter.isspace()).split())


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence of a passage: `text` is passage[start:end]."""

    text: str
    start: int
    end: int


def best_sentences(query: str, texts: Sequence[str], model: Embedder | None) -> list[Sentence | None]:
    """For each text its sentence that is most similar to the query; None for a text without a sentence.

    By the cosine similarity of embeddings; of a Causal2Vec model only the encoder is used, because it is fast. With
    `model=None`, by words: BM25 over the sentences of all texts, which calls no model and needs bm25s (ImportError
    without it); a text that shares no word with the query gets None.
    """
    spans = [sentences(text) for text in texts]
    pieces = [text[start:end] for text, text_spans in zip(texts, spans, strict=True) for start, end in text_spans]
    if not pieces:
        return [None for _ in texts]
    scores = _by_words(query, pieces) if model is None else _by_embeddings(query, pieces, model)
    best: list[Sentence | None] = []
    first = 0
    for text, text_spans in zip(texts, spans, strict=True):
        own = scores[first : first + len(text_spans)]
        first += len(text_spans)
        if not text_spans or (model is None and own.max() <= 0):
            best.append(None)
            continue
        start, end = text_spans[int(np.argmax(own))]
        best.append(Sentence(text[start:end], start, end))
    return best


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans (start, end) of the sentences and paragraphs of a text, without white space around them."""
    spans, start = [], 0
    for end, following in [*((m.start(), m.end()) for m in _SENTENCE_END.finditer(text)), (len(text), len(text))]:
        piece = text[start:end]
        if piece.strip():
            first = start + len(piece) - len(piece.lstrip())
            spans.append((first, start + len(piece.rstrip())))
        start = following
    return spans


def _by_words(query: str, pieces: Sequence[str]) -> np.ndarray:
    """(N,) BM25 scores."""
    from c2v_rag.index import LexicalIndex

    return LexicalIndex.build([str(number) for number in range(len(pieces))], pieces).scores(query)


def _by_embeddings(query: str, pieces: list[str], model: Embedder) -> np.ndarray:
    """(N,) cosine similarities."""
    embedder: Any = model
    options: dict[str, Any] = {}
    if "c2v_rag.model" in sys.modules:  # otherwise the model is none of Causal2Vec, and torch need not be imported
        from c2v_rag.encoder import EncoderEmbedder
        from c2v_rag.model import Causal2Vec

        if isinstance(model, Causal2Vec):
            embedder, options = EncoderEmbedder(model), {"on_truncate": "ignore"}
    similarities: np.ndarray = (
        embedder.encode_document(pieces, **options) @ embedder.encode_query([query], **options)[0]
    )
    return similarities
