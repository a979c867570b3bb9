"""The training loss: InfoNCE and in-batch distillation, on the embedding and on each half, and words for EOS's half.

B queries, M documents of which the first B are the queries' positives, D and K columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, all_gather_with_grad, get_world_size
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax, normalize, softmax

_MASKED = -1e4  # a finite logit whose probability is 0: a row of -inf alone would give NaN


class LossWeights(BaseModel):
    """Weights of the loss terms; the loss is their sum.

    `distill` and `info_nce` act on the whole embedding. `halves` is the weight of the same two terms on the
    Contextual half and on the EOS half alone. For each number in `matryoshka_dims` the two terms are added on that
    many first columns, for embeddings that will be truncated.

    `words` is the weight of 1 - cosine between the EOS half and its target. The target is the sum of the mean EOS
    direction of all texts and, with the share `words_share` of the squared length, the text's lexical vector.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    distill: NonNegativeFloat = 1.0
    info_nce: NonNegativeFloat = 0.3
    halves: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 0.05
    matryoshka_dims: tuple[PositiveInt, ...] = ()
    words: NonNegativeFloat = 0.0
    words_share: Annotated[float, Field(gt=0, le=1)] = 0.4


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

    `queries` (B, D) and `documents` (M, D), a teacher's (B, K) and (M, K); all of unit length. Without a teacher there
    is no distillation.
    """

    def loss_on(columns: slice) -> Tensor:
        q, d = (normalize(side[:, columns], dim=1) for side in (queries, documents))
        loss = weights.info_nce * info_nce(q, d, weights.temperature)
        if teacher_queries is not None and teacher_documents is not None:
            distilled = in_batch_distillation(q, d, teacher_queries, teacher_documents, weights.temperature)
            loss = loss + weights.distill * distilled
        return loss

    loss = loss_on(slice(None))
    if weights.halves:
        loss = loss + weights.halves * sum(loss_on(slice(half, None, 2)) for half in (0, 1))
    for dim in weights.matryoshka_dims:
        loss = loss + loss_on(slice(0, dim))
    return loss


def words_loss(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Mean of 1 - cosine between the EOS half and its target; `embeddings` (N, 2 D) or, of EOS alone, (N, D)."""
    eos = embeddings[:, 1::2] if embeddings.shape[1] == 2 * targets.shape[1] else embeddings
    return (1 - cosine_similarity(eos, targets, dim=1)).mean()


class Causal2VecLoss(CachedLossMixin, nn.Module):
    """`combined_loss` for sentence-transformers' trainer: columns query, positive, and any number of negatives.

    With several processes the loss is the one of the whole step: each process gathers the embeddings of all, with
    gradient. DDP's mean over the processes is then the gradient of a single process with the whole batch.

    The teachers' vectors come as the feature "teacher" (B, K) of each column, the targets of `words_loss` as "target"
    (B, D). With `mini_batch_size`, activations of so many texts are alive at a time (GradCache, arXiv 2101.06983; the
    library's), whatever the batch size.
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
        targets: Any = [{name: column[name] for name in ("teacher", "target") if name in column} for column in features]
        if self.uses_gradient_cache:
            # Slices of texts with similar lengths have little padding.
            for i, column in enumerate(features):
                order = torch.argsort(column["attention_mask"].sum(dim=1), stable=True)
                features[i] = {name: tensor[order] for name, tensor in column.items()}
                targets[i]["places"] = torch.argsort(order)
            loss: Tensor = self.forward_cached(features, targets)
            return loss
        return self.calculate_loss([[self.model(column)["sentence_embedding"]] for column in features], targets)

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """From the embeddings of each column, in slices; `labels` are the columns' teacher vectors and targets.

        The mixin calls it too, and hands `labels` through as they are.
        """
        embeddings = [torch.cat(column).float() for column in reps]
        if labels and "places" in labels[0]:
            embeddings = [rows[column["places"]] for rows, column in zip(embeddings, labels, strict=True)]
        if get_world_size() > 1:
            embeddings = [all_gather_with_grad(rows) for rows in embeddings]
            labels = [
                {name: all_gather(rows) for name, rows in column.items() if name != "places"} for column in labels
            ]
        teachers = [column["teacher"] for column in labels if "teacher" in column]
        teacher_queries, teacher_documents = (teachers[0], torch.cat(teachers[1:])) if teachers else (None, None)
        # In half precision different candidates get equal similarities.
        with torch.autocast(embeddings[0].device.type, enabled=False):
            loss = combined_loss(
                embeddings[0], torch.cat(embeddings[1:]), teacher_queries, teacher_documents, self.weights
            )
            if self.weights.words:
                targets = torch.cat([column["target"] for column in labels])
                loss = loss + self.weights.words * words_loss(torch.cat(embeddings), targets)
        if with_backward:
            torch.autograd.backward(loss)
            return loss.detach()
        return loss
