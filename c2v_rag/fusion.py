"""Combine the rankings of several search methods into one."""

from __future__ import annotations

from collections.abc import Sequence

RANK_CONSTANT = 60
FUSED_DEPTH = 100  # number of ranks of each method that are used


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], *, constant: int = RANK_CONSTANT) -> dict[str, float]:
    """Ids with their scores, best first: the sum of 1 / (constant + rank) over the rankings that contain the id.

    Ranks start at 1. The method is from Cormack, Clarke and Buettcher, SIGIR 2009, whose constant is 60. It uses no
    scores of the methods, so rankings by cosine similarity and by BM25 can be combined.
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, id in enumerate(ranking, start=1):
            scores[id] = scores.get(id, 0.0) + 1.0 / (constant + rank)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))
