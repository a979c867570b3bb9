"""The training loss: InfoNCE and in-batch distillation, on the embedding and on each of its halves.

B queries, M documents of which the first B are the queries' positives.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize, softmax

_MASKED = -1e4  # a finite logit whose probability is 0: a row of -inf alone would give NaN


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """`distill` and `info_nce` are added; `halves` adds the same sum on the Contextual and the EOS half alone."""

    distill: float = 1.0
    info_nce: float = 0.3
    halves: float = 0.0
    temperature: float = 0.05


def info_nce(queries: Tensor, documents: Tensor, temperature: float, also_positive: Tensor | None = None) -> Tensor:
    """InfoNCE over in-batch and hard negatives; unit-length rows, so that scores are cosine similarities.

    `queries` (B, D); `documents` (M, D), the positive of query i at row i. `also_positive` (B, M) marks documents
    that answer a query too (equal texts in the batch); they are left out of its sum.
    """
    logits = queries @ documents.T / temperature
    labels = torch.arange(len(queries), device=queries.device)
    if also_positive is not None:
        others = also_positive.clone()
        others[labels, labels] = False
        logits = logits.masked_fill(others, _MASKED)
    return cross_entropy(logits, labels)


def score_distillation(student: Tensor, teacher: Tensor, temperature: float, *, leave_out_diagonal: bool) -> Tensor:
    """KL divergence from the teacher's to the student's distribution over each row of scores (B, M)."""
    student, teacher = student / temperature, teacher / temperature
    if leave_out_diagonal:  # a text's similarity to itself is 1 for both and says nothing
        diagonal = torch.eye(len(student), dtype=torch.bool, device=student.device)
        student, teacher = student.masked_fill(diagonal, _MASKED), teacher.masked_fill(diagonal, _MASKED)
    target = softmax(teacher, dim=1)
    return (target * (log_softmax(teacher, dim=1) - log_softmax(student, dim=1))).sum(dim=1).mean()


def in_batch_distillation(
    queries: Tensor, documents: Tensor, teacher_queries: Tensor, teacher_documents: Tensor, temperature: float
) -> Tensor:
    """Match a teacher's query-document, query-query and document-document similarities within the batch (mean of 3)."""
    pairs = (
        (queries, documents, teacher_queries, teacher_documents, False),
        (queries, queries, teacher_queries, teacher_queries, True),
        (documents, documents, teacher_documents, teacher_documents, True),
    )
    losses = [
        score_distillation(left @ right.T, t_left @ t_right.T, temperature, leave_out_diagonal=diagonal)
        for left, right, t_left, t_right, diagonal in pairs
    ]
    return torch.stack(losses).mean()


def combined_loss(
    queries: Tensor,
    documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    weights: LossWeights,
    also_positive: Tensor | None = None,
) -> Tensor:
    """The weighted sum, on the embeddings and, where `weights.halves` is not 0, on both interleaved halves."""

    def on(q: Tensor, d: Tensor) -> Tensor:
        distilled = in_batch_distillation(q, d, teacher_queries, teacher_documents, weights.temperature)
        contrasted = info_nce(q, d, weights.temperature, also_positive)
        return weights.distill * distilled + weights.info_nce * contrasted

    loss = on(queries, documents)
    if weights.halves:
        for half in (0, 1):
            loss = loss + weights.halves * on(
                normalize(queries[:, half::2], dim=1), normalize(documents[:, half::2], dim=1)
            )
    return loss
