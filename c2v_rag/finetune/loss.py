"""The training loss: InfoNCE and distillation, on the embedding and on each half.

B queries, M documents of which the first B are the queries' positives, D and K columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, all_gather_with_grad, get_world_size
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss, normalize, softmax

from c2v_rag.finetune.bm25 import BatchBM25
from c2v_rag.finetune.masks import batch_statistics, equal_answers, false_negatives

_TARGETS = ("teacher", "text_hash", "bm25_row")  # features that the loss reads
Texts = tuple[Tensor, Tensor]  # numbers of the queries (B,) and of the documents (M,), equal for equal texts
_COSINE_SHARE = 0.7  # in a fused score; BM25 has the rest
_EPSILON = 1e-8
_MASKED = -1e4  # a finite logit whose probability is 0: a row of -inf alone would give NaN


class LossWeights(BaseModel):
    """Weights of the loss terms; the loss is their sum.

    All terms act on the whole embedding. `halves` is the weight of the same terms on the Contextual half
    and on the EOS half alone. For each number in `matryoshka_dims` they are added on that many first columns, for
    embeddings that will be truncated.

    `symmetric`: InfoNCE is the mean of both directions, from queries to documents and from positives to queries.

    `mask_margin`, `mask_similar_documents` and `mask_similar_queries` leave candidates out of InfoNCE that probably
    answer the query, as `masks.false_negatives` describes. They are judged by the vectors of the recipe's teachers, or
    by the trained model's own with `mask_by: model`.

    `list_distill`: weight of the distillation from the scores that the data holds for positive and negatives:
    "kl" compares the distributions over each pair's list, the teacher's scores divided by `list_temperature` (unless
    given, `temperature`); "margin_mse" compares the differences between positive and negatives.

    `residual` and `fused_distill` use BM25 scores of the batch's documents. z are scores of one query at mean 0 and
    deviation 1 over these documents. `residual`: InfoNCE adds so much of z(BM25) to the logits, so that the embedding
    learns what lexical search does not find (CLEAR, arXiv 2004.13969). `fused_distill`: weight of the distillation from
    a fused ranking, 0.7 z(teachers' cosine) + 0.3 z(BM25), whose distribution over the documents is
    softmax(`fused_sharpness` x score). The student's score is z(cosine), or with `fused_student` 0.7 z(cosine) + 0.3
    z(BM25), so that the embedding is trained for a fused search.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    distill: NonNegativeFloat = 1.0
    info_nce: NonNegativeFloat = 0.3
    halves: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 0.05
    matryoshka_dims: tuple[PositiveInt, ...] = ()
    symmetric: bool = False
    mask_margin: NonNegativeFloat | None = None
    mask_similar_documents: Annotated[float, Field(gt=-1, lt=1)] | None = None
    mask_similar_queries: Annotated[float, Field(gt=-1, lt=1)] | None = None
    mask_by: Literal["teacher", "model"] = "teacher"
    list_distill: NonNegativeFloat = 0.0
    list_loss: Literal["kl", "margin_mse"] = "kl"
    list_temperature: PositiveFloat | None = None
    residual: NonNegativeFloat = 0.0
    fused_distill: NonNegativeFloat = 0.0
    fused_sharpness: PositiveFloat = 1.5
    fused_student: bool = False

    @property
    def masks(self) -> bool:
        """Whether candidates can be left out."""
        rules = (self.mask_margin, self.mask_similar_documents, self.mask_similar_queries)
        return any(rule is not None for rule in rules)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads the teachers' vectors."""
        return self.distill > 0 or self.fused_distill > 0 or (self.masks and self.mask_by == "teacher")

    @property
    def needs_bm25(self) -> bool:
        """Whether the loss reads BM25 scores."""
        return self.residual > 0 or self.fused_distill > 0


def info_nce(
    queries: Tensor,
    documents: Tensor,
    temperature: float,
    *,
    bias: Tensor | None = None,
    left_out: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """InfoNCE over in-batch and hard negatives; unit-length rows, so that scores are cosine similarities.

    `queries` (B, D); `documents` (M, D), the positive of query i at row i. `bias` (B, M) is added to the logits.
    `left_out` (B, M): candidates that do not count, never a positive. `symmetric`: the mean of this loss and of the one
    that ranks the queries for each positive.
    """
    scores = queries @ documents.T / temperature
    if bias is not None:
        scores = scores + bias
    if left_out is not None:
        scores = scores.masked_fill(left_out, _MASKED)
    labels = torch.arange(len(queries), device=queries.device)
    loss = cross_entropy(scores, labels)
    return (loss + cross_entropy(scores[:, : len(queries)].T, labels)) / 2 if symmetric else loss


def list_distillation(
    queries: Tensor,
    candidates: Tensor,
    teacher: Tensor,
    *,
    loss: Literal["kl", "margin_mse"],
    temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Match a teacher's scores over each query's own candidates, the positive first.

    `queries` (B, D), `candidates` (B, N, D), `teacher` (B, N); rows of `teacher` with NaN are left out, and without
    any row the loss is 0. "kl": divergence from softmax(teacher / teacher_temperature) to softmax(student /
    temperature). "margin_mse": mean squared difference of the margins between positive and negatives
    (arXiv 2010.02666).
    """
    known = ~teacher.isnan().any(dim=1)
    if not known.any():
        return queries.sum() * 0
    student = torch.einsum("bd,bnd->bn", queries, candidates)[known]
    teacher = teacher[known].to(student.dtype)
    if loss == "margin_mse":
        return mse_loss(student[:, :1] - student[:, 1:], teacher[:, :1] - teacher[:, 1:])
    target = log_softmax(teacher / teacher_temperature, dim=1)
    return kl_div(log_softmax(student / temperature, dim=1), target, log_target=True, reduction="batchmean")


def score_distillation(
    student: Tensor, teacher: Tensor, temperature: float, *, left_out: Tensor | None = None
) -> Tensor:
    """KL divergence from the teacher's to the student's distribution over each row of scores (B, M).

    `left_out` (B, M): scores that do not count.
    """
    student, teacher = student / temperature, teacher / temperature
    if left_out is not None:
        student, teacher = student.masked_fill(left_out, _MASKED), teacher.masked_fill(left_out, _MASKED)
    target = softmax(teacher, dim=1)
    return (target * (log_softmax(teacher, dim=1) - log_softmax(student, dim=1))).sum(dim=1).mean()


def in_batch_distillation(
    queries: Tensor,
    documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    temperature: float,
    texts: Texts | None = None,
) -> Tensor:
    """Match a teacher's query-document, query-query and document-document similarities within the batch (mean of 3).

    A text's similarity to itself is 1 for both and says nothing. It is left out, also where the text is in the batch
    more than once, which `texts` says.
    """
    query_ids, document_ids = texts or (torch.arange(len(side), device=side.device) for side in (queries, documents))
    pairs = (
        (queries, documents, teacher_queries, teacher_documents, None),
        (queries, queries, teacher_queries, teacher_queries, query_ids.unsqueeze(1) == query_ids),
        (documents, documents, teacher_documents, teacher_documents, document_ids.unsqueeze(1) == document_ids),
    )
    losses = [
        score_distillation(left @ right.T, t_left @ t_right.T, temperature, left_out=left_out)
        for left, right, t_left, t_right, left_out in pairs
    ]
    return torch.stack(losses).mean()


def standardize(scores: Tensor) -> Tensor:
    """The scores (B, M) at mean 0 and deviation 1 in each row; zeros where all scores of a row are equal."""
    centred = scores - scores.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + _EPSILON).sqrt()


def fused_distillation(
    student: Tensor, teacher: Tensor, bm25: Tensor, *, sharpness: float, fuse_student: bool
) -> Tensor:
    """KL divergence from a fused ranking to the student's; all scores (B, M), as `LossWeights` describes them."""

    def fuse(scores: Tensor) -> Tensor:
        return _COSINE_SHARE * standardize(scores) + (1 - _COSINE_SHARE) * standardize(bm25)

    scores = fuse(student) if fuse_student else standardize(student)
    return score_distillation(scores, fuse(teacher), 1 / sharpness)


def combined_loss(
    queries: Tensor,
    documents: Tensor,
    teacher_queries: Tensor | None,
    teacher_documents: Tensor | None,
    weights: LossWeights,
    *,
    list_scores: Tensor | None = None,
    texts: Texts | None = None,
    bm25: Tensor | None = None,
) -> Tensor:
    """The weighted sum over the embeddings and the parts of them that `weights` names; computed in float32.

    `queries` (B, D) and `documents` (M, D), a teacher's (B, K) and (M, K); all of unit length. Without a teacher there
    is no in-batch distillation. `list_scores` (B, M / B): the scores of each query's positive and negatives; M is then
    a multiple of B, and row i of every B documents belongs to query i. With `texts`, InfoNCE leaves out the candidates
    of `masks.equal_answers`. `bm25` (B, M): the scores that `residual` and `fused_distill` use.

    Raises ValueError when a term lacks its teachers' vectors or BM25 scores.
    """
    if weights.needs_bm25 and bm25 is None:
        raise ValueError("'residual' and 'fused_distill' need BM25 scores, and the batch has none.")
    if weights.fused_distill and teacher_queries is None:
        raise ValueError("'fused_distill' needs the teachers' vectors, and the batch has none.")
    bias = weights.residual * standardize(bm25) if bm25 is not None and weights.residual else None
    left_out = candidates_left_out(queries, documents, teacher_queries, teacher_documents, weights, texts)

    def loss_on(columns: slice) -> Tensor:
        q, d = (normalize(side[:, columns], dim=1) for side in (queries, documents))
        loss = weights.info_nce * info_nce(
            q, d, weights.temperature, bias=bias, left_out=left_out, symmetric=weights.symmetric
        )
        if teacher_queries is not None and teacher_documents is not None:
            if weights.distill:
                distilled = in_batch_distillation(q, d, teacher_queries, teacher_documents, weights.temperature, texts)
                loss = loss + weights.distill * distilled
            if weights.fused_distill and bm25 is not None:
                loss = loss + weights.fused_distill * fused_distillation(
                    q @ d.T,
                    teacher_queries @ teacher_documents.T,
                    bm25,
                    sharpness=weights.fused_sharpness,
                    fuse_student=weights.fused_student,
                )
        if list_scores is not None and weights.list_distill:
            loss = loss + weights.list_distill * list_distillation(
                q,
                d.view(-1, *q.shape).transpose(0, 1),
                list_scores,
                loss=weights.list_loss,
                temperature=weights.temperature,
                teacher_temperature=weights.list_temperature or weights.temperature,
            )
        return loss

    loss = loss_on(slice(None))
    if weights.halves:
        loss = loss + weights.halves * sum(loss_on(slice(half, None, 2)) for half in (0, 1))
    for dim in weights.matryoshka_dims:
        loss = loss + loss_on(slice(0, dim))
    return loss


@torch.no_grad()
def candidates_left_out(
    queries: Tensor,
    documents: Tensor,
    teacher_queries: Tensor | None,
    teacher_documents: Tensor | None,
    weights: LossWeights,
    texts: Texts | None = None,
) -> Tensor | None:
    """(B, M) bool, the candidates that InfoNCE leaves out; None if nothing names any. Shapes as in `combined_loss`.

    Raises ValueError when teachers shall judge and there are no teachers' vectors.
    """
    equal = equal_answers(*texts) if texts is not None else None
    if not weights.masks:
        return equal
    if weights.mask_by == "model":
        teacher_queries, teacher_documents = queries.detach(), documents.detach()
    if teacher_queries is None or teacher_documents is None:
        raise ValueError("mask_by is 'teacher', but the batch has no teachers' vectors.")
    probable = false_negatives(
        teacher_queries,
        teacher_documents,
        margin=weights.mask_margin,
        similar_documents=weights.mask_similar_documents,
        similar_queries=weights.mask_similar_queries,
    )
    return probable if equal is None else probable | equal


class Causal2VecLoss(CachedLossMixin, nn.Module):
    """`combined_loss` for sentence-transformers' trainer: columns query, positive, and any number of negatives.

    With several processes the loss is the one of the whole step: each process gathers the embeddings of all, with
    gradient. DDP's mean over the processes is then the gradient of a single process with the whole batch.

    The teachers' vectors come as the feature "teacher" (B, K) of each column, numbers that are equal for equal texts as
    "text_hash" (B,), the texts' numbers in `bm25` as "bm25_row" (B,), the scores of positive and negatives as the
    labels (B, 1 + negatives). With `bm25`, set `data_set` to the name of
    the batch's data set before each batch. `statistics` describes the last batch as `masks.batch_statistics` does. With
    `mini_batch_size`, activations of so many texts are in memory at a time (GradCache, arXiv 2101.06983; the
    library's), whatever the batch size.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        weights: LossWeights,
        mini_batch_size: int | None = None,
        bm25: BatchBM25 | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.weights = weights
        self.bm25 = bm25
        self.data_set = ""
        self.statistics: dict[str, float] = {}
        self.uses_gradient_cache = mini_batch_size is not None
        self.mini_batch_size = mini_batch_size or 0

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """The loss of one batch; `labels` are the scores of the pairs' positives and negatives, where they have any."""
        features = list(sentence_features)
        targets: Any = [{name: column[name] for name in _TARGETS if name in column} for column in features]
        if labels is not None:
            targets[0]["scores"] = labels
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
        """From the embeddings of each column, in slices; `labels`: the columns' teacher vectors and scores.

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
            queries, documents = embeddings[0], torch.cat(embeddings[1:])
            sides = (queries, documents, teacher_queries, teacher_documents)
            hashes = [column["text_hash"] for column in labels]
            texts = (hashes[0], torch.cat(hashes[1:]))
            scores = None
            if self.bm25 is not None:
                rows = [column["bm25_row"] for column in labels]
                scores = self.bm25.scores(rows[0], torch.cat(rows[1:]), self.data_set)
            loss = combined_loss(*sides, self.weights, list_scores=labels[0].get("scores"), texts=texts, bm25=scores)
            with torch.no_grad():
                left_out = candidates_left_out(*sides, self.weights, texts)
                self.statistics = batch_statistics(queries, documents, left_out)
        if with_backward:
            torch.autograd.backward(loss)
            return loss.detach()
        return loss
