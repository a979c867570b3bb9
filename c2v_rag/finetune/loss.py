"""The training loss: InfoNCE and in-batch distillation, on the embedding and on each of its halves.

B queries, M documents of which the first B are the queries' positives, D and K columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize, softmax

_MASKED = -1e4  # a finite logit whose probability is 0: a row of -inf alone would give NaN


class LossWeights(BaseModel):
    """`distill` and `info_nce` are added; `halves` adds the same sum on the Contextual and the EOS half alone.

    `matryoshka_dims` adds it on the first so many columns too, for embeddings that are to be cut.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    distill: NonNegativeFloat = 1.0
    info_nce: NonNegativeFloat = 0.3
    halves: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 0.05
    matryoshka_dims: tuple[PositiveInt, ...] = ()


def info_nce(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """InfoNCE over in-batch and hard negatives; unit-length rows, so that scores are cosine similarities.

    `queries` (B, D); `documents` (M, D), the positive of query i at row i.
    """
    return cross_entropy(queries @ documents.T / temperature, torch.arange(len(queries), device=queries.device))


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
    teacher_queries: Tensor | None,
    teacher_documents: Tensor | None,
    weights: LossWeights,
) -> Tensor:
    """The weighted sum over the embeddings and the parts of them that `weights` names; computed in float32.

    `queries` (B, D) and `documents` (M, D) of unit length; a teacher's (B, 2, K) and (M, 2, K): the vector of unit
    length that the Contextual half is taught by, and the EOS half's. The whole embedding is taught the mean of their
    similarities. Without a teacher there is no distillation.
    """

    def on(columns: slice, half: slice) -> Tensor:
        q, d = (normalize(side[:, columns], dim=1) for side in (queries, documents))
        loss = weights.info_nce * info_nce(q, d, weights.temperature)
        if teacher_queries is not None and teacher_documents is not None:
            t_q, t_d = (normalize(side[:, half].flatten(1), dim=1) for side in (teacher_queries, teacher_documents))
            loss = loss + weights.distill * in_batch_distillation(q, d, t_q, t_d, weights.temperature)
        return loss

    whole = slice(None)
    loss = on(whole, whole)
    if weights.halves:
        loss = loss + weights.halves * sum(on(slice(half, None, 2), slice(half, half + 1)) for half in (0, 1))
    for dim in weights.matryoshka_dims:
        loss = loss + on(slice(0, dim), whole)
    return loss


class Causal2VecLoss(CachedLossMixin, nn.Module):
    """`combined_loss` for sentence-transformers' trainer: columns query, positive, and any number of negatives.

    The teachers' vectors come as the feature "teacher" (B, 2, K) of each column, as `combined_loss` takes them. With
    `mini_batch_size`, activations of so many texts are alive at a time (GradCache, arXiv 2101.06983; the library's),
    whatever the batch size.
    """

    def __init__(self, model: SentenceTransformer, weights: LossWeights, mini_batch_size: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.weights = weights
        self.uses_gradient_cache = mini_batch_size is not None
        self.mini_batch_size = mini_batch_size or 0

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """The loss of one batch; there are no labels."""
        features = list(sentence_features)
        teachers: Any = [column["teacher"] for column in features] if "teacher" in features[0] else None
        if self.uses_gradient_cache:
            loss: Tensor = self.forward_cached(features, teachers)
            return loss
        return self.calculate_loss([[self.model(column)["sentence_embedding"]] for column in features], teachers)

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """From the embeddings of each column, in slices; `labels` are the columns' teacher vectors, or None.

        The mixin calls it too, and hands `labels` through as they are.
        """
        queries, *documents = [torch.cat(column) for column in reps]
        teacher_queries, teacher_documents = (labels[0], torch.cat(list(labels[1:]))) if labels else (None, None)
        # Half-precision similarities tie candidates.
        with torch.autocast(queries.device.type, enabled=False):
            loss = combined_loss(
                queries.float(), torch.cat(documents).float(), teacher_queries, teacher_documents, self.weights
            )
        if with_backward:
            torch.autograd.backward(loss)
            return loss.detach()
        return loss
