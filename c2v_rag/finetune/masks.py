"""Candidates of a batch that probably answer the query although they are not marked as answers.

B queries, M documents of which the first B are the queries' positives, K columns of the judge's vectors. The judge is a
teacher or the trained model itself. All vectors have length 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def false_negatives(
    queries: Tensor,
    documents: Tensor,
    *,
    margin: float | None = None,
    similar_documents: float | None = None,
    similar_queries: float | None = None,
) -> Tensor:
    """(B, M) bool: the candidates to leave out. A query's own positive is never one of them.

    `queries` (B, K) and `documents` (M, K) are the judge's vectors. Left out is a candidate whose score is above the
    positive's minus `margin`, whose similarity to the positive is above `similar_documents`, or which is the positive
    of a query whose similarity to this one is above `similar_queries`. None switches a rule off.
    """
    size, positives = len(queries), documents[: len(queries)]
    left_out = torch.zeros(size, len(documents), dtype=torch.bool, device=documents.device)
    if margin is not None:
        scores = queries @ documents.T
        left_out |= scores > scores.diagonal().unsqueeze(1) - margin
    if similar_documents is not None:
        left_out |= positives @ documents.T > similar_documents
    if similar_queries is not None:
        left_out[:, :size] |= queries @ queries.T > similar_queries
    return left_out.scatter(1, torch.arange(size, device=left_out.device).unsqueeze(1), False)


def equal_answers(queries: Tensor, documents: Tensor) -> Tensor:
    """(B, M) bool: the candidates whose text is a known answer, or the query itself. A query's own positive is not one.

    `queries` (B,) and `documents` (M,) are numbers that are equal for equal texts. Known answers of a query are its
    positive and the positives of the same query elsewhere in the batch.
    """
    positives = documents[: len(queries)]
    same_query = (queries.unsqueeze(1) == queries).float()
    left_out = same_query @ (positives.unsqueeze(1) == documents).float() > 0
    left_out |= queries.unsqueeze(1) == documents
    left_out.fill_diagonal_(False)
    return left_out


def batch_statistics(queries: Tensor, documents: Tensor, left_out: Tensor | None) -> dict[str, float]:
    """`margin`: mean difference between the positive's score and the best other candidate's that is not left out.

    `masked`: the share of the candidates besides the positives that are left out. Queries without any other candidate
    count for neither.
    """
    scores = queries @ documents.T
    others = ~torch.eye(len(queries), len(documents), dtype=torch.bool, device=scores.device)
    used = others & ~left_out if left_out is not None else others
    margins = scores.diagonal() - scores.masked_fill(~used, -torch.inf).amax(dim=1)
    margins = margins[used.any(dim=1)]
    return {
        "margin": margins.mean().item() if len(margins) else 0.0,
        "masked": (others & ~used).sum().item() / max(1, int(others.sum())),
    }
