"""Neighbour batches hold similar queries, the trainer keeps them, and equal texts in them are no negatives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize

from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.finetune import batches, run
from c2v_rag.finetune.batches import PreparedBatches, neighbour_order
from c2v_rag.finetune.data import Pair, PairSet, draw_stage
from c2v_rag.finetune.loss import LossWeights, candidates_left_out, combined_loss, in_batch_distillation, info_nce
from c2v_rag.finetune.masks import equal_answers, false_negatives
from c2v_rag.finetune.opening import new_model
from c2v_rag.finetune.recipe import Recipe
from c2v_rag.finetune.trainer import StageTrainer
from tests.pairs import pairs


def unit_vectors(rows: int, seed: int = 0, columns: int = 6) -> Tensor:
    return normalize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_share_of_each_batch_is_drawn_among_the_nearest_unused_queries_of_its_first() -> None:
    queries = unit_vectors(60)
    query_of = np.arange(60)
    options: dict[str, Any] = {"batch_size": 10, "share": 0.6, "pool": 2.0}
    order = neighbour_order(query_of, queries, seed=1, **options)
    assert sorted(order) == list(range(60)), "each pair once"
    unused = set(range(60))
    outside = 0
    for start in range(0, 60, 10):
        batch = order[start : start + 10].tolist()
        similarities = queries @ queries[batch[0]]
        nearest = sorted(unused, key=lambda row: -float(similarities[row]))[:20]
        assert set(batch[:6]) <= set(nearest)
        outside += len(set(batch[6:]) - set(nearest))
        unused -= set(batch)
    assert outside > 0, "the rest of a batch is drawn from all"
    np.testing.assert_array_equal(order, neighbour_order(query_of, queries, seed=1, **options))
    assert not np.array_equal(order, neighbour_order(query_of, queries, seed=2, **options))


def test_no_query_is_twice_in_a_neighbour_batch_while_others_are_left() -> None:
    query_of = np.repeat(np.arange(30), 4)  # a set that is drawn four times, or a query with four answers
    order = neighbour_order(query_of, unit_vectors(30), batch_size=10, share=0.6, pool=2.0, seed=0)
    assert sorted(order) == list(range(120))
    drawn = [query_of[order[start : start + 10]] for start in range(0, 120, 10)]
    assert all(len({*batch}) == 10 for batch in drawn[:4])
    few = neighbour_order(np.zeros(25, dtype=int), unit_vectors(1), batch_size=10, share=0.6, pool=2.0, seed=0)
    assert sorted(few) == list(range(25)), "a set of one query still gives whole batches"


def test_prepared_batches_are_consecutive_rows_in_an_order_that_changes_with_the_epoch() -> None:
    dataset = Dataset.from_dict({"query": [str(row) for row in range(25)]})
    sampler = PreparedBatches(dataset, batch_size=4, drop_last=False, seed=3)
    first = list(sampler)
    assert len(first) == len(sampler) == 7
    assert sorted(first) == [list(range(start, min(start + 4, 25))) for start in range(0, 25, 4)]
    assert first != sorted(first)
    assert first == list(sampler), "the same again, so that a resumed stage skips what it has seen"
    sampler.set_epoch(1)
    assert list(sampler) != first
    whole = list(PreparedBatches(dataset, batch_size=4, drop_last=True, seed=3))
    assert sorted(whole) == [list(range(start, start + 4)) for start in range(0, 24, 4)]


def recipe_for(checkpoint: str, rates: dict[str, float], **data: Any) -> Recipe:
    stage = {"name": "full", "sequences": "full", "steps": 5, "batch_size": 8, "max_length": 32}
    loss = {"distill": 0.0, "info_nce": 1.0}
    return Recipe.model_validate(
        {
            "base": {"checkpoint": checkpoint},
            "data": {"sets": {"docs": 1.0}, "batches": "neighbours", "neighbour_pool": 1.0} | data,
            "dev": "none",
            "report_to": [],
            "save_steps": 2,
            "stages": [stage | {"train": [*rates], "learning_rate": rates, "loss": loss}],
        }
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"query": query, "positive": positive} for query, positive in pairs()[:60]]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_trainer_keeps_prepared_batches_also_when_it_resumes(
    tiny_checkpoint: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a trained encoder, whose vectors before the stage are searched."""
    seen: list[list[str]] = []
    searched: list[Tensor] = []

    def compute_loss(self: StageTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(self._module.batch_texts(inputs["query_rows"]))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return original(self, model, inputs, *args, **kwargs)

    def by_text(query_of: np.ndarray, queries: Tensor, **options: Any) -> np.ndarray:
        assert (options["batch_size"], options["share"], options["pool"]) == (8, 0.6, 1.0)
        searched.append(queries)
        return np.argsort(query_of)

    original = StageTrainer.compute_loss
    monkeypatch.setattr(StageTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(batches, "neighbour_order", by_text)
    recipe = recipe_for(tiny_checkpoint, {"encoder": 1e-3})
    with pytest.raises(KeyboardInterrupt):
        run.train(recipe, data, data / "out", device="cpu")
    run.train(recipe, data, data / "out", device="cpu", resume=True)
    whole = seen[:2] + seen[4:]
    assert seen[2:4] == seen[4:6], "it goes on after the checkpoint of step 2"
    by_hand = EncoderEmbedder(new_model(recipe, device="cpu"))
    drawn = draw_stage(
        [PairSet("docs", None, [Pair(*pair) for pair in pairs()[:60]], {})],
        {"docs": 1.0}, batch_size=8, steps=5, num_negatives=0, seed=1,
    )["docs"]  # fmt: skip
    rows = {query: row for row, query in enumerate(dict.fromkeys(drawn["query"]))}
    ordered = sorted(drawn["query"], key=rows.__getitem__)
    assert sorted(whole) == sorted(ordered[start : start + 8] for start in range(0, 40, 8))
    expected = torch.from_numpy(by_hand.encode_query([*rows], on_truncate="ignore"))
    for vectors in searched:
        assert ((vectors * expected).sum(dim=1) > 0.99).all(), "autocast may compute in bfloat16"


def test_equal_texts_are_no_negatives_and_a_loop_agrees() -> None:
    queries = torch.tensor([1, 2, 1, 3, 11])
    documents = torch.tensor([11, 12, 13, 11, 14, 13, 2, 15, 16, 12])
    expected = torch.zeros(5, 10, dtype=torch.bool)
    for i in range(5):
        answers = {int(documents[k]) for k in range(5) if queries[k] == queries[i]} | {int(queries[i])}
        for j in range(10):
            expected[i, j] = i != j and int(documents[j]) in answers
    found = equal_answers(queries, documents)
    assert torch.equal(found, expected)
    assert found.any(dim=1).all()
    assert not equal_answers(torch.arange(3), torch.arange(3, 9)).any()


def test_the_loss_leaves_equal_texts_out_of_infonce_and_of_distillation() -> None:
    q, d, tq, td = unit_vectors(3), unit_vectors(6, 1), unit_vectors(3, 2), unit_vectors(6, 3)
    texts = (torch.tensor([1, 2, 1]), torch.tensor([7, 8, 9, 7, 8, 10]))
    left_out = equal_answers(*texts)
    weights = LossWeights(distill=0.0, info_nce=0.5, temperature=0.1)
    expected = 0.5 * info_nce(q, d, 0.1, left_out=left_out)
    torch.testing.assert_close(combined_loss(q, d, None, None, weights, texts=texts), expected)
    assert float(expected) < float(combined_loss(q, d, None, None, weights))
    margin = weights.model_copy(update={"mask_margin": 0.05})
    both = candidates_left_out(q, d, tq, td, margin, texts)
    assert both is not None
    assert torch.equal(both, left_out | false_negatives(tq, td, margin=0.05))

    def by_hand(left: Tensor, right: Tensor, t_left: Tensor, t_right: Tensor, ids: Tensor | None) -> Tensor:
        rows = []
        for i in range(len(left)):
            used = [j for j in range(len(right)) if ids is None or ids[i] != ids[j]]
            p, s = (torch.softmax(one[i] @ other[used].T / 0.1, 0) for one, other in ((t_left, t_right), (left, right)))
            rows.append((p * (p / s).log()).sum())
        return torch.stack(rows).mean()

    parts = [by_hand(q, d, tq, td, None), by_hand(q, q, tq, tq, texts[0]), by_hand(d, d, td, td, texts[1])]
    torch.testing.assert_close(in_batch_distillation(q, d, tq, td, 0.1, texts), torch.stack(parts).mean())


def test_a_pool_smaller_than_the_share_is_an_error() -> None:
    with pytest.raises(ValueError, match="'neighbour_pool' must be at least 'neighbour_share'"):
        recipe_for("x", {"projector": 1e-3}, neighbour_pool=0.5)
