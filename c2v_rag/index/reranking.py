"""Score the first hits of a search again, with a cross-encoder or any function of query and texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from c2v_rag.index.query import Hit, PairScorer, Reranker, Scorer


def rerank(reranker: Reranker, query: str, hits: Sequence[Hit]) -> list[Hit]:
    """The hits, sorted by the reranker's scores, which become `score` and `scores["rerank"]`.

    `reranker`: a `CrossEncoder`, its name or folder, or a function `(query, texts) -> scores`, one number for each
    text. Raises ValueError for scores that are not so many finite numbers, TypeError for another kind of reranker,
    ImportError for a name without sentence-transformers.
    """
    if not hits:
        return []
    scores = np.asarray(_scorer(reranker)(query, [hit.text for hit in hits]), dtype=np.float64)
    if scores.shape != (len(hits),) or not np.isfinite(scores).all():
        raise ValueError(
            f"The reranker must return one finite number for each of {len(hits)} texts; got an array of shape "
            f"{scores.shape}. A cross-encoder must have one output (num_labels=1)."
        )
    scored = [
        dataclasses.replace(hit, score=float(score), scores={**hit.scores, "rerank": float(score)})
        for hit, score in zip(hits, scores, strict=True)
    ]
    return sorted(scored, key=lambda hit: -hit.score)


def _scorer(reranker: Reranker) -> Scorer:
    if isinstance(reranker, str):
        reranker = _load(reranker)
    if isinstance(reranker, PairScorer):
        predict = reranker.predict
        return lambda query, texts: predict([(query, text) for text in texts], show_progress_bar=False)
    if callable(reranker):
        return reranker
    raise TypeError(
        "rerank must be a CrossEncoder, its name, or a function (query, texts) -> scores; got "
        f"{type(reranker).__name__}."
    )


@functools.lru_cache(maxsize=2)
def _load(name: str) -> PairScorer:
    """The cross-encoder of this name or folder; it stays in memory."""
    try:
        from sentence_transformers import CrossEncoder
    except ModuleNotFoundError as error:
        if error.name != "sentence_transformers":
            raise
        raise ImportError('A reranker by name needs sentence-transformers: pip install "c2v-rag[rerank]"') from error
    loaded: PairScorer = CrossEncoder(name)
    return loaded
