"""Ranking metrics over lists of ids, best first."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy.stats import rankdata


def recall_at_k(ranked: Sequence[str], relevant: Collection[str], k: int) -> float:
    """Share of the relevant ids among the first `k`."""
    return len(set(ranked[:k]) & set(relevant)) / len(relevant)


def hit_at_k(ranked: Sequence[str], relevant: Collection[str], k: int) -> float:
    """1 if any relevant id is among the first `k`, else 0: for sets of equally good answers, of which one suffices."""
    return float(any(id in relevant for id in ranked[:k]))


def mrr_at_k(ranked: Sequence[str], relevant: Collection[str], k: int) -> float:
    """1 / rank of the first relevant id among the first `k`, else 0."""
    return next((1 / rank for rank, id in enumerate(ranked[:k], start=1) if id in relevant), 0.0)


def ndcg_at_k(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Normalised discounted cumulative gain with linear gains, as trec_eval and MTEB compute it."""
    found = sum(gains.get(id, 0.0) / math.log2(rank + 1) for rank, id in enumerate(ranked[:k], start=1))
    best = sorted(gains.values(), reverse=True)[:k]
    return found / sum(gain / math.log2(rank + 1) for rank, gain in enumerate(best, start=1))


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Rank correlation of two arrays (n,)."""
    return float(np.corrcoef(rankdata(left), rankdata(right))[0, 1])


def top_k(queries: np.ndarray, documents: np.ndarray, ids: Sequence[str], k: int) -> list[list[str]]:
    """For each query (n, D) the ids of the `k` documents (m, D) of the highest dot product, best first."""
    k = min(k, len(ids))
    ranked = []
    for row in queries @ documents.T:
        best = np.argpartition(-row, k - 1)[:k]
        ranked.append([ids[i] for i in best[np.argsort(-row[best], kind="stable")]])
    return ranked
