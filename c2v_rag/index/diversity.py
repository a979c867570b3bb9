"""Maximal marginal relevance (Carbonell and Goldstein, 1998): hits that are relevant and differ from each other."""

from __future__ import annotations

import numpy as np


def mmr_order(relevance: np.ndarray, embeddings: np.ndarray, weight: float, number: int) -> list[int]:
    """Positions of the `number` chosen candidates, in the order of the choice; all if there are fewer.

    Each next candidate has the largest `weight` x relevance - (1 - `weight`) x its largest cosine similarity to a
    chosen one. `relevance` (N,), `embeddings` (N, D), `weight` from 0 to 1. Of equals, the first is chosen.
    """
    unit = unit_rows(embeddings)
    chosen: list[int] = []
    redundancy = np.full(len(relevance), -np.inf)
    left = np.ones(len(relevance), dtype=bool)
    while len(chosen) < min(number, len(relevance)):
        gain = weight * relevance - (1 - weight) * redundancy if chosen else relevance
        best = int(np.argmax(np.where(left, gain, -np.inf)))
        chosen.append(best)
        left[best] = False
        redundancy = np.maximum(redundancy, unit @ unit[best])
    return chosen


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """The vectors (..., D) with length 1; those of length 0 stay."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1))


def scaled(scores: np.ndarray) -> np.ndarray:
    """(N,): the scores scaled to the range 0 to 1; all 1 if they are equal."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)
