"""Masks, list distillation and both directions of InfoNCE equal loops; the run uses and logs them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from c2v_rag.finetune.loss import LossWeights, candidates_left_out, combined_loss, info_nce, list_distillation
from c2v_rag.finetune.masks import batch_statistics, false_negatives


def unit_vectors(rows: int, seed: int = 0, columns: int = 4) -> Tensor:
    return normalize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_masked_candidates_match_a_loop_and_a_positive_is_never_masked() -> None:
    queries, documents = unit_vectors(6), unit_vectors(18, seed=1)
    options: dict[str, Any] = {"margin": 0.1, "similar_documents": 0.4, "similar_queries": 0.5}
    for name in (*options, "all"):
        chosen = options if name == "all" else {name: options[name]}
        found = false_negatives(queries, documents, **chosen)
        expected = torch.zeros(6, 18, dtype=torch.bool)
        for i in range(6):
            for j in range(18):
                if i == j:
                    continue
                by_rule = {
                    "margin": queries[i] @ documents[j] > queries[i] @ documents[i] - 0.1,
                    "similar_documents": documents[i] @ documents[j] > 0.4,
                    "similar_queries": j < 6 and queries[i] @ queries[j] > 0.5,
                }
                expected[i, j] = any(bool(by_rule[rule]) for rule in chosen)
        assert torch.equal(found, expected)
        assert 0 < int(found.sum()) < found.numel() - 6
    assert not false_negatives(queries, documents).any()


def test_info_nce_leaves_out_masked_candidates_and_can_rank_in_both_directions() -> None:
    queries, documents = unit_vectors(3), unit_vectors(6, seed=1)
    left_out = torch.zeros(3, 6, dtype=torch.bool)
    left_out[0, 1] = left_out[0, 4] = left_out[2, 0] = True
    forward, backward = [], []
    for i in range(3):
        used = [j for j in range(6) if not left_out[i, j]]
        forward.append(-torch.log_softmax(queries[i] @ documents[used].T / 0.1, dim=0)[used.index(i)])
        rows = [j for j in range(3) if not left_out[j, i]]
        backward.append(-torch.log_softmax(documents[i] @ queries[rows].T / 0.1, dim=0)[rows.index(i)])
    one_way = info_nce(queries, documents, 0.1, left_out=left_out)
    torch.testing.assert_close(one_way, torch.stack(forward).mean())
    both = info_nce(queries, documents, 0.1, left_out=left_out, symmetric=True)
    torch.testing.assert_close(both, (torch.stack(forward).mean() + torch.stack(backward).mean()) / 2)


def test_list_distillation_matches_its_equations_and_leaves_out_pairs_without_scores() -> None:
    queries, candidates = unit_vectors(3), unit_vectors(12, seed=1).view(3, 4, 4)
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    teacher[1] = math.nan
    kl, mse = [], []
    for i in (0, 2):
        student = candidates[i] @ queries[i]
        p, q = torch.softmax(teacher[i] / 0.5, 0), torch.softmax(student / 0.1, 0)
        kl.append((p * (p / q).log()).sum())
        mse += [((student[0] - student[j]) - (teacher[i, 0] - teacher[i, j])) ** 2 for j in range(1, 4)]
    options: dict[str, Any] = {"temperature": 0.1, "teacher_temperature": 0.5}
    found = list_distillation(queries, candidates, teacher, loss="kl", **options)
    torch.testing.assert_close(found, torch.stack(kl).mean())
    found = list_distillation(queries, candidates, teacher, loss="margin_mse", **options)
    torch.testing.assert_close(found, torch.stack(mse).mean())
    unknown = torch.full((3, 4), math.nan)
    queries.requires_grad_()
    loss = list_distillation(queries, candidates, unknown, loss="kl", **options)
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert queries.grad is not None
    assert not queries.grad.any()


def test_the_combined_loss_masks_by_its_judge_and_adds_list_distillation() -> None:
    q, d, tq, td = unit_vectors(3), unit_vectors(9, 1), unit_vectors(3, 2), unit_vectors(9, 3)
    scores = torch.randn(3, 3, generator=torch.Generator().manual_seed(4))
    plain = {"distill": 0.0, "info_nce": 0.7, "temperature": 0.1, "mask_margin": 0.05}
    for judge, vectors in (("teacher", (tq, td)), ("model", (q, d))):
        weights = LossWeights.model_validate(plain | {"mask_by": judge, "list_distill": 0.4})
        left_out = false_negatives(*vectors, margin=0.05)
        assert left_out.any()
        lists = torch.stack([d[0:3], d[3:6], d[6:9]], dim=1)  # query i: rows i, 3 + i, 6 + i
        expected = 0.7 * info_nce(q, d, 0.1, left_out=left_out) + 0.4 * list_distillation(
            q, lists, scores, loss="kl", temperature=0.1, teacher_temperature=0.1
        )
        torch.testing.assert_close(combined_loss(q, d, tq, td, weights, list_scores=scores), expected)
    assert LossWeights.model_validate(plain).needs_teacher
    assert not LossWeights.model_validate(plain | {"mask_by": "model"}).needs_teacher
    with pytest.raises(ValueError, match="no teachers' vectors"):
        candidates_left_out(q, d, None, None, LossWeights.model_validate(plain))


def test_batch_statistics_are_the_margin_to_the_hardest_negative_and_the_masked_share() -> None:
    queries, documents = unit_vectors(3), unit_vectors(6, seed=1)
    left_out = torch.zeros(3, 6, dtype=torch.bool)
    left_out[0, 1:] = True  # no candidate is left for query 0
    left_out[1, 3] = True
    margins = []
    for i in (1, 2):
        others = [queries[i] @ documents[j] for j in range(6) if j != i and not left_out[i, j]]
        margins.append(queries[i] @ documents[i] - max(others))
    found = batch_statistics(queries, documents, left_out)
    assert found["margin"] == pytest.approx(float(sum(margins)) / 2, abs=1e-6)
    assert found["masked"] == pytest.approx(6 / 15)
    assert batch_statistics(queries, documents, None)["masked"] == 0
