"""BM25 of a batch equals bm25s' scores, and the losses that use it equal loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
import Stemmer
import torch
from torch import Tensor
from torch.nn.functional import normalize

from c2v_rag.finetune import run
from c2v_rag.finetune.bm25 import BatchBM25
from c2v_rag.finetune.loss import (
    LossWeights,
    combined_loss,
    fused_distillation,
    in_batch_distillation,
    info_nce,
    standardize,
)
from c2v_rag.finetune.recipe import Recipe
from c2v_rag.index import LexicalIndex
from tests.pairs import pairs

DOCUMENTS = [
    "The cat sat on the mat, and the cats were sitting there.",
    "Copying a folder: copy the folder tree with shutil.copytree.",
    "the of and",
    "A folder holds files. Files hold bytes; bytes are numbers in a file.",
    "Cats and dogs",
]
OTHERS = ["A folder of cats", "Numbers, numbers, numbers", *DOCUMENTS[3:]]
QUERIES = ["Where do cats sit?", "copy copy a folder", "unknownword", "the", "file numbers and unknownword", "folders"]


@pytest.fixture(scope="module")
def bm25() -> BatchBM25:
    # Documents come more than once in a stage; each counts once.
    return BatchBM25([*QUERIES, *DOCUMENTS, *OTHERS], {"a": DOCUMENTS + DOCUMENTS[:2], "b": OTHERS})


@pytest.mark.parametrize(("data_set", "documents"), [("a", DOCUMENTS), ("b", OTHERS)])
def test_scores_of_a_batch_equal_those_of_bm25s_and_of_the_index(
    bm25: BatchBM25, data_set: str, documents: list[str]
) -> None:
    found = bm25.scores(bm25.rows(QUERIES), bm25.rows(documents), data_set)
    options: dict[str, Any] = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False}
    by_bm25s = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    by_bm25s.index(bm25s.tokenize(documents, **options), show_progress=False)
    for row, words in enumerate(bm25s.tokenize(QUERIES, return_ids=False, **options)):
        known = [word for word in words if word in by_bm25s.vocab_dict]
        expected = by_bm25s.get_scores(known) if known else np.zeros(len(documents))
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-6)
    index = LexicalIndex.build([str(row) for row in range(len(documents))], documents)
    np.testing.assert_allclose(found, np.stack([index.scores(query) for query in QUERIES]), rtol=1e-5, atol=1e-6)
    assert (found[[0, 1, 5]] > 0).any(dim=1).all()
    some = [documents[3], documents[0], documents[3]]  # a batch holds some documents, in any order, also twice
    part = bm25.scores(bm25.rows(QUERIES[::-1]), bm25.rows(some), data_set)
    torch.testing.assert_close(part, found[:, [3, 0, 3]].flip(0))


def test_texts_without_words_have_the_score_zero() -> None:
    bm25 = BatchBM25(["the", "?", ""], {"a": ["?", ""]})
    assert bm25.scores(bm25.rows(["the", ""]), bm25.rows(["?", "", "the"]), "a").tolist() == [[0, 0, 0], [0, 0, 0]]


def z(scores: Tensor) -> Tensor:
    rows = [(row - row.mean()) / row.std(correction=0) if row.std() > 0 else 0 * row for row in scores]
    return torch.stack(rows)


def unit_vectors(rows: int, seed: int = 0, columns: int = 8) -> Tensor:
    return normalize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), dim=1)


def bm25_scores() -> Tensor:
    scores = 9 * torch.rand(3, 6, generator=torch.Generator().manual_seed(7))
    scores[1] = 0  # a query without any match
    return scores


def test_standardized_scores_have_mean_0_and_deviation_1_and_rows_without_a_match_are_zero() -> None:
    scores = bm25_scores().requires_grad_()
    found = standardize(scores)
    torch.testing.assert_close(found, z(scores), rtol=1e-4, atol=1e-6)
    assert found[1].tolist() == [0] * 6
    torch.autograd.backward(found[:, 0].sum())
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("fused_student", [False, True])
def test_residual_and_fused_distillation_match_their_equations_on_each_part(fused_student: bool) -> None:
    q, d, tq, td = unit_vectors(3), unit_vectors(6, 1), unit_vectors(3, 2, 5), unit_vectors(6, 3, 5)
    scores = bm25_scores()
    weights = LossWeights(
        distill=0.2, info_nce=0.5, temperature=0.1, halves=0.4, matryoshka_dims=(4,), symmetric=True,
        residual=0.7, fused_distill=0.3, fused_sharpness=2.0, fused_student=fused_student,
    )  # fmt: skip
    assert weights.needs_bm25
    assert weights.model_copy(update={"distill": 0.0}).needs_teacher

    def by_hand(columns: slice) -> Tensor:
        part_q, part_d = normalize(q[:, columns], dim=1), normalize(d[:, columns], dim=1)
        logits = part_q @ part_d.T / 0.1 + 0.7 * z(scores)
        forward = torch.stack([-torch.log_softmax(logits[i], 0)[i] for i in range(3)]).mean()
        backward = torch.stack([-torch.log_softmax(logits[:, i], 0)[i] for i in range(3)]).mean()
        student = z(part_q @ part_d.T)
        if fused_student:
            student = 0.7 * student + 0.3 * z(scores)
        fused = []
        for target, own in zip(0.7 * z(tq @ td.T) + 0.3 * z(scores), student, strict=True):
            p, s = torch.softmax(2.0 * target, 0), torch.softmax(2.0 * own, 0)
            fused.append((p * (p / s).log()).sum())
        distilled = in_batch_distillation(part_q, part_d, tq, td, 0.1)
        return 0.5 * (forward + backward) / 2 + 0.3 * torch.stack(fused).mean() + 0.2 * distilled

    expected = by_hand(slice(None)) + by_hand(slice(0, 4))
    expected = expected + 0.4 * (by_hand(slice(0, None, 2)) + by_hand(slice(1, None, 2)))
    torch.testing.assert_close(combined_loss(q, d, tq, td, weights, bm25=scores), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'residual' and 'fused_distill' need BM25 scores"):
        combined_loss(q, d, tq, td, weights)
    with pytest.raises(ValueError, match="'fused_distill' needs the teachers' vectors"):
        combined_loss(q, d, None, None, weights, bm25=scores)


def test_without_any_match_the_residual_changes_nothing_and_the_fused_teacher_itself_has_no_loss() -> None:
    q, d = unit_vectors(3), unit_vectors(6, 1)
    torch.testing.assert_close(info_nce(q, d, 0.1, bias=standardize(torch.zeros(3, 6))), info_nce(q, d, 0.1))
    loss = fused_distillation(q @ d.T, q @ d.T, bm25_scores(), sharpness=1.5, fuse_student=True)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(fused_distillation(q @ d.T, q @ d.T, bm25_scores(), sharpness=1.5, fuse_student=False)) > 0.01


def test_a_run_scores_each_batch_with_the_documents_of_its_own_set(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hard negatives, and mini batches; "plain" has no negatives."""
    rows: list[dict[str, Any]] = [{"query": query, "positive": positive + query} for query, positive in pairs()[:32]]
    hard = [row | {"negatives": [f"Not {row['positive']}"]} for row in rows]
    for name, lines in (("plain", rows), ("hard", hard)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batches: list[tuple[str, tuple[int, ...]]] = []
    given: dict[str, Any] = {}

    class Recorded(BatchBM25):
        def __init__(self, texts: Any, documents: Any) -> None:
            given.update(documents)
            super().__init__(texts, documents)

        def scores(self, queries: Tensor, documents: Tensor, data_set: str) -> Tensor:
            found = super().scores(queries, documents, data_set)
            batches.append((data_set, tuple(found.shape)))
            assert (found.diagonal() > 0).all(), "each query shares a word with its positive"
            return found

    monkeypatch.setattr(run, "BatchBM25", Recorded)
    stage = {"name": "full", "sequences": "full", "train": ["projector"], "learning_rate": {"projector": 1e-3}}
    loss = {"distill": 0.0, "info_nce": 0.3, "residual": 1.0, "fused_distill": 1.0}
    recipe = Recipe.model_validate(
        {
            "base": {"checkpoint": tiny_checkpoint},
            "data": {"sets": {"plain": 1.0, "hard": 1.0}},
            "dev": "none",
            "report_to": [],
            "stages": [stage | {"steps": 6, "batch_size": 4, "mini_batch_size": 3, "max_length": 32, "loss": loss}],
        }
    )
    run.train(recipe, tmp_path, tmp_path / "out", device="cpu")
    assert {*batches} == {("plain", (4, 4)), ("hard", (4, 8))}
    assert len(batches) == 6
    assert {name: {*texts} <= {row["positive"] for row in rows} for name, texts in given.items()} == {
        "plain": True,
        "hard": False,
    }
    log = json.loads((tmp_path / "out.training" / "log.json").read_text())["steps"]["full"]
    assert all(np.isfinite(row["loss"]) for row in log)
