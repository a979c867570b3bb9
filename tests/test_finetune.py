"""Losses equal their equations, data is drawn as promised, and a stage of training makes retrieval better."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn.functional import normalize

from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.evaluate.metrics import hit_at_k, mrr_at_k, ndcg_at_k, recall_at_k, top_k
from c2v_rag.finetune.data import Pair, PairSet, draw_batches, make_batch, read_pair_set
from c2v_rag.finetune.loss import LossWeights, combined_loss, in_batch_distillation, info_nce, score_distillation
from c2v_rag.finetune.recipe import Recipe, Stage
from c2v_rag.finetune.train import EncoderVectors, run_stage
from tests.tiny import TEXTS, tiny_model

RECIPES = Path(__file__).parent.parent / "recipes"


def unit_vectors(rows: int, seed: int = 0, columns: int = 8) -> Tensor:
    return normalize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_info_nce_matches_a_loop() -> None:
    queries, documents = unit_vectors(3), unit_vectors(5, seed=1)  # two hard negatives behind the positives
    by_hand = [-torch.log_softmax(queries[i] @ documents.T / 0.05, dim=0)[i] for i in range(3)]
    torch.testing.assert_close(info_nce(queries, documents, temperature=0.05), torch.stack(by_hand).mean())


def test_info_nce_leaves_other_positives_out_of_the_sum() -> None:
    queries, documents = unit_vectors(3), unit_vectors(4, seed=1)
    also = torch.zeros(3, 4, dtype=torch.bool)
    also[0, 2] = also[0, 0] = True
    kept = [0, 1, 3]
    first = -torch.log_softmax(queries[0] @ documents[kept].T / 0.05, dim=0)[0]
    others = [-torch.log_softmax(queries[i] @ documents.T / 0.05, dim=0)[i] for i in (1, 2)]
    expected = torch.stack([first, *others]).mean()
    torch.testing.assert_close(info_nce(queries, documents, 0.05, also), expected)
    assert also.sum() == 2, "the mask must not be edited in place"


def test_distillation_is_the_kl_divergence_and_zero_for_the_teacher_itself() -> None:
    student, teacher = unit_vectors(3) @ unit_vectors(4, 1).T, unit_vectors(3, 2) @ unit_vectors(4, 3).T
    by_hand = []
    for i in range(3):
        p, q = torch.softmax(teacher[i] / 0.1, 0), torch.softmax(student[i] / 0.1, 0)
        by_hand.append((p * (p / q).log()).sum())
    found = score_distillation(student, teacher, 0.1, leave_out_diagonal=False)
    torch.testing.assert_close(found, torch.stack(by_hand).mean())
    q, d = unit_vectors(3), unit_vectors(4, 1)
    assert float(in_batch_distillation(q, d, q, d, 0.05)) == pytest.approx(0, abs=1e-6)
    assert float(in_batch_distillation(q, d, unit_vectors(3, 5), d, 0.05)) > 0.1


def test_halves_add_the_same_loss_on_the_interleaved_halves() -> None:
    q, d, tq, td = unit_vectors(3), unit_vectors(4, 1), unit_vectors(3, 2, 5), unit_vectors(4, 3, 5)
    plain = LossWeights(distill=0.7, info_nce=0.2, temperature=0.1)
    with_halves = combined_loss(q, d, tq, td, dataclasses.replace(plain, halves=0.5))
    halves = [
        combined_loss(normalize(q[:, half::2], dim=1), normalize(d[:, half::2], dim=1), tq, td, plain)
        for half in (0, 1)
    ]
    torch.testing.assert_close(with_halves, combined_loss(q, d, tq, td, plain) + 0.5 * (halves[0] + halves[1]))


def test_batches_hold_one_set_each_mark_equal_texts_and_repeat_for_a_seed() -> None:
    sets = [
        PairSet("a", "find a", [Pair(f"a{i}", f"answer a{i}", ("wrong",)) for i in range(10)]),
        PairSet("b", "find b", [Pair(f"b{i // 2}", f"answer b{i}") for i in range(40)]),
    ]
    arguments = {"batch_size": 4, "num_batches": 60, "num_negatives": 1, "seed": 3}
    batches = list(draw_batches(sets, {"a": 1.0, "b": 1.0}, **arguments))
    assert len(batches) == 60
    for batch in batches:
        assert len({query[0] for query in batch.queries}) == 1
        assert batch.instruction == f"find {batch.queries[0][0]}"
        assert batch.documents[:4] != batch.queries
    of_a = [batch for batch in batches if batch.instruction == "find a"]
    assert 10 < len(of_a) < 30, "the share of a set is its weight times the root of its rows: 1/3 here"
    first_round = [query for batch in of_a[:2] for query in batch.queries]
    assert len(set(first_round)) == 8, "a set is gone through before a pair comes again"
    again = list(draw_batches(sets, {"a": 1.0, "b": 1.0}, **arguments))
    assert [batch.queries for batch in again] == [batch.queries for batch in batches]

    batch = make_batch("", [Pair("q", "d1", ("n",)), Pair("q", "d2"), Pair("r", "d1")], num_negatives=1)
    assert batch.documents == ["d1", "d2", "d1", "n"]
    assert batch.also_positive.tolist() == [
        [True, True, True, False],
        [True, True, True, False],
        [True, False, True, False],
    ]


def test_data_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(FileNotFoundError, match="names the data set 'none'"):
        read_pair_set(tmp_path, "none")
    pq.write_table(pa.table({"query": ["q", "r"], "answer": ["a", "b"]}), tmp_path / "wrong.parquet")
    with pytest.raises(ValueError, match=r"wrong.parquet lacks the columns \['positive'\]"):
        read_pair_set(tmp_path, "wrong")
    pq.write_table(pa.table({"query": ["q", " "], "positive": ["a", "b"]}), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="row 1 has an empty query or positive"):
        read_pair_set(tmp_path, "empty")
    (tmp_path / "good.json").write_text(json.dumps({"instruction": "find"}))
    pq.write_table(pa.table({"query": ["q"], "positive": ["a"], "negatives": [["n"]]}), tmp_path / "good.parquet")
    assert read_pair_set(tmp_path, "good") == PairSet("good", "find", [Pair("q", "a", ("n",))])


def test_recipes_are_valid_and_unknown_keys_are_errors(tmp_path: Path) -> None:
    assert sorted(RECIPES.glob("*.yaml"))
    for path in RECIPES.glob("*.yaml"):
        assert Recipe.load(path).stages
    text = (RECIPES / "default-smollm2-135m.yaml").read_text()
    (tmp_path / "typo.yaml").write_text(text.replace("batch_size: 64", "batchsize: 64").replace("rank: 16", "rank: 0"))
    with pytest.raises(
        ValueError, match=r"(?s)not a valid recipe:.*stages.1.batch_size.*stages.1.batchsize.*lora.rank"
    ):
        Recipe.load(tmp_path / "typo.yaml")


def test_training_in_two_stages_lowers_the_loss_and_finds_more() -> None:
    topics = (
        "bread heap museum river music garden engine winter letter market castle doctor island pepper mirror silver "
        "window camera planet bridge".split()
    )
    pairs = [Pair(f"what about the {topic}", f"all that is known of {topic}s") for topic in topics]
    one = PairSet("topics", "find", pairs)
    model = tiny_model()
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model.llm)
    texts = [text for pair in pairs for text in (pair.query, pair.positive)]
    vectors = EncoderVectors(EncoderEmbedder(model))
    vectors.add(texts)
    np.testing.assert_allclose(vectors(texts[:2]), EncoderEmbedder(model).encode_document(texts[:2]), atol=5e-3)

    def found() -> float:
        queries = model.encode_query([pair.query for pair in pairs], instruction="find")
        documents = model.encode_document([pair.positive for pair in pairs])
        ranked = top_k(queries, documents, [pair.positive for pair in pairs], 1)
        return float(np.mean([recall_at_k(ids, {pair.positive}, 1) for ids, pair in zip(ranked, pairs, strict=True)]))

    frozen = {
        name: weights.clone()
        for name, weights in model.named_parameters()
        if "lora_" not in name and "projector" not in name
    }
    assert found() < 0.3
    common = {"steps": 30, "batch_size": 20, "max_length": 64, "train": ["projector", "llm_adapter"]}
    rates = {"learning_rate": {"projector": 1e-2, "llm_adapter": 1e-2}}
    for sequences, halves in (("context", 0.0), ("full", 0.5)):
        weights = LossWeights(distill=0.0, info_nce=1.0, halves=halves, temperature=0.1)
        stage = Stage(name=sequences, sequences=sequences, loss=weights, **common, **rates)
        batches = list(draw_batches([one], {"topics": 1.0}, batch_size=20, num_batches=30, num_negatives=0, seed=0))
        losses = [row["loss"] for row in run_stage(model, stage, batches, vectors)]
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]), sequences
    assert found() > 0.8
    assert not model.training
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), f"{name} is frozen and has changed"


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    model = tiny_model()
    pairs = [Pair(text or "x", text + "!") for text in TEXTS]
    vectors = EncoderVectors(EncoderEmbedder(model))
    vectors.add([text for pair in pairs for text in (pair.query, pair.positive)])
    with torch.no_grad():
        model.projector.hidden.weight.fill_(float("nan"))
    stage = Stage(
        name="broken",
        sequences="context",
        train=["projector"],
        steps=1,
        batch_size=4,
        max_length=64,
        learning_rate={"projector": 1e-3},
    )
    batches = [make_batch("", pairs, 0)]
    with pytest.raises(FloatingPointError, match="stage 'broken' is nan at step 0"):
        run_stage(model, stage, batches, vectors)


def test_metrics_match_their_definitions() -> None:
    ranked = ["a", "b", "c", "d"]
    assert recall_at_k(ranked, {"b", "x"}, 2) == 0.5
    assert hit_at_k(ranked, {"c"}, 2) == 0
    assert hit_at_k(ranked, {"c"}, 3) == 1
    assert mrr_at_k(ranked, {"c", "d"}, 10) == pytest.approx(1 / 3)
    assert mrr_at_k(ranked, {"d"}, 3) == 0
    gains = {"a": 1.0, "c": 3.0, "x": 2.0}
    by_hand = (1 / np.log2(2) + 3 / np.log2(4)) / (3 / np.log2(2) + 2 / np.log2(3) + 1 / np.log2(4))
    assert ndcg_at_k(ranked, gains, 10) == pytest.approx(by_hand)
    assert ndcg_at_k(["c", "x", "a"], gains, 10) == 1
    documents = unit_vectors(20).numpy()
    assert top_k(documents[:3], documents, [str(i) for i in range(20)], 5)[2][0] == "2"
