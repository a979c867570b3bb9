"""Rankings of several methods made into one."""

from __future__ import annotations

from collections.abc import Sequence

RANK_CONSTANT = 60
FUSED_DEPTH = 100  # ranks of each method that are looked at


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], *, constant: int = RANK_CONSTANT) -> dict[str, float]:
    """Ids, best first, each with the sum of 1 / (constant + rank) over the rankings that hold it; ranks start at 1.

    Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009, whose constant is 60): it needs no scores, so
    cosine similarities and BM25 go together.
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, id in enumerate(ranking, start=1):
            scores[id] = scores.get(id, 0.0) + 1.0 / (constant + rank)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))
