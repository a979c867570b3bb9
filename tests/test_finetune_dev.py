"""Development data: it is not trained on, the best weights are kept, and the report compares with before."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing import event_accumulator
from typer.testing import CliRunner

from c2v_rag import Causal2Vec, inference
from c2v_rag.cli import app
from c2v_rag.evaluate.intervals import difference_of_means, paired_bootstrap
from c2v_rag.evaluate.metrics import ndcg_at_k
from c2v_rag.finetune import loss, monitor, scoring
from c2v_rag.finetune.data import Pair, PairSet, draw_stage, read_pair_set
from c2v_rag.finetune.dev import DevSet, hold_out, prepare_dev, read_dev_folder
from c2v_rag.finetune.loss import Causal2VecLoss, LossWeights
from c2v_rag.finetune.module import TrainingModule
from c2v_rag.finetune.monitor import Monitor
from c2v_rag.finetune.recipe import BaseModels, Dev, Recipe
from c2v_rag.finetune.run import train
from c2v_rag.finetune.scoring import DevCallback, DevReport, mean_score, score
from c2v_rag.finetune.start import StartVectors
from c2v_rag.finetune.trainer import part_of
from sentence_transformers_c2v import Causal2VecModule
from tests.pairs import pairs
from tests.tiny import passages, tiny_model

RATES = {"projector": 1e-3, "llm_adapter": 1e-3}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: str) -> Path:
    return Path(tiny_checkpoint)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"query": query, "positive": positive}) for query, positive in pairs()]
    (folder / "docs.jsonl").write_text("\n".join(rows[:150]))
    (folder / "other.jsonl").write_text("\n".join(rows[150:]))
    return folder


def recipe_for(folder: Path, *, steps: int = 4, **changes: Any) -> dict[str, Any]:
    stage = {
        "name": "full", "sequences": "full", "train": [*RATES], "learning_rate": RATES, "batch_size": 4,
        "max_length": 32, "steps": steps, "loss": {"distill": 0.0, "info_nce": 1.0},
    }  # fmt: skip
    return {
        "base": {"checkpoint": str(folder)},
        "data": {"sets": {"docs": 1.0}},
        "stages": [stage],
        "lora": {"rank": 4},
        "dev": {"every": 1, "max_queries": 5, "max_documents": 12, "min_queries": 1},
        "report_to": [],
    } | changes


def retrieval_folder(folder: Path, number: int = 30) -> Path:
    folder.mkdir(parents=True)
    texts = passages(number)
    tables = {
        "corpus": [{"_id": f"d{i}", "title": "t", "text": text} for i, text in enumerate(texts)],
        "queries": [{"_id": f"q{i}", "text": text[8:50]} for i, text in enumerate(texts[:10])],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{i + j}", "score": 2 - j} for i in range(9) for j in (0, 1)],
    }
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


def test_held_out_documents_and_queries_do_not_occur_in_training() -> None:
    # Each document has three passages, each passage two queries; one query has passages of two documents.
    rows = [
        Pair(f"query {d} {p} {q}", f"passage {d} {p}", (f"passage {d - 1} {p}", f"passage {(d + 1) % 30} {p}"),
             (1.0, 0.5, 0.25), f"doc {d}")
        for d in range(30) for p in range(3) for q in range(2)
    ]  # fmt: skip
    rows += [Pair("shared query", f"passage {d} 0", document=f"doc {d}") for d in range(0, 30, 2)]
    rows += [Pair(f"without a document name {d}", f"passage {d} 1") for d in range(30)]
    whole = PairSet("set", None, rows, {})
    kept, held = hold_out(whole, 0.2, max_queries=1000)
    documents = {pair.positive.split()[1] for pair in held.pairs}
    assert len(documents) == 6
    assert {pair.positive for pair in held.pairs} == {f"passage {d} {p}" for d in documents for p in range(3)}
    held_texts = {text for pair in held.pairs for text in (pair.query, pair.positive)}
    trained = {text for pair in kept.pairs for text in (pair.query, pair.positive, *pair.negatives)}
    assert held_texts.isdisjoint(trained)
    assert len(kept.pairs) > 100
    for pair in kept.pairs:  # a negative that was taken out took its score along
        for text, value in zip(pair.negatives, pair.scores[1:], strict=True):
            assert value == (0.5 if int(text.split()[1]) == int(pair.query.split()[1]) - 1 else 0.25)
    assert any(len(pair.negatives) < 2 for pair in kept.pairs if pair.document)
    assert hold_out(whole, 0.2, max_queries=1000) == (kept, held)
    few = PairSet("few", None, rows[:30], {})
    assert hold_out(few, 0.2, max_queries=10) == (few, PairSet("few", None, [], {}))


def test_caps_limit_queries_and_documents_and_keep_all_relevant_ones(tmp_path: Path) -> None:
    folder = retrieval_folder(tmp_path / "dev")
    dev = read_dev_folder(folder, max_queries=4, max_documents=12)
    assert (len(dev.queries), len(dev.documents), len(set(dev.documents))) == (4, 12, 12)
    texts = passages(30)
    for query, relevant in zip(dev.queries, dev.relevant, strict=True):
        (number,) = (i for i, text in enumerate(texts[:9]) if text[8:50] == query)
        assert {dev.documents[row]: gain for row, gain in relevant.items()} == {
            f"t {texts[number]}": 2.0, f"t {texts[number + 1]}": 1.0,
        }  # fmt: skip
    assert read_dev_folder(folder, max_queries=4, max_documents=12) == dev
    assert len(read_dev_folder(folder, max_queries=100, max_documents=100).queries) == 9
    with pytest.raises(FileNotFoundError, match=r"dev: .* has no corpus\.parquet"):
        read_dev_folder(tmp_path, max_queries=4, max_documents=12)

    sets = [PairSet(name, None, [Pair(f"{name} q{i}", f"{name} p{i}") for i in range(100)], {}) for name in "ab"]
    kept, found = prepare_dev(sets, Dev(max_queries=4, max_documents=20), {}, seed=0)
    assert [(len(one.queries), len(one.documents)) for one in found] == [(2, 10), (2, 10)]
    assert [len(one.pairs) for one in kept] == [98, 98]
    other = PairSet("c", None, [Pair("q", "p")], {})
    kept, found = prepare_dev(sets, Dev(folders=[folder], pairs=["c"]), {"c": other}, seed=0)
    assert kept == sets, "with data of its own, nothing is held out unless told"
    assert [one.name for one in found] == ["dev", "c"]


def test_development_data_that_is_trained_on_is_an_error_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = PairSet("a", None, [Pair(f"q{i}", f"p{i}") for i in range(100)], {})
    other = PairSet("b", None, [Pair(f"other {i}", f"p{i + 97}") for i in range(10)], {})
    with pytest.raises(ValueError, match=r"names sets that are trained on: \['a'\]"):
        prepare_dev([trained], Dev(pairs=["a"]), {"a": trained}, seed=0)
    prepare_dev([trained], Dev(pairs=["b"]), {"b": other}, seed=0)
    assert "dev: 3 of 10 answers of b are trained on." in caplog.text
    folder = retrieval_folder(tmp_path / "a")
    with pytest.raises(ValueError, match="more than one set of the name a"):
        prepare_dev([trained], Dev(folders=[folder], hold_out=0.1), {}, seed=0)


def test_a_score_is_ndcg_over_the_vectors_that_inference_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "default_dtype", lambda device: torch.float32)  # scoring computes in it
    model = tiny_model()
    dev = read_dev_folder(retrieval_folder(tmp_path / "dev"), max_queries=9, max_documents=30)
    scores = model.encode_query(dev.queries) @ model.encode_document(dev.documents).T
    by_hand = []
    for row, relevant in zip(scores, dev.relevant, strict=True):
        ranked = [str(i) for i in np.argsort(-row)]
        by_hand.append(ndcg_at_k(ranked, {str(i): gain for i, gain in relevant.items()}, 10))
    assert score(model, dev) == pytest.approx(by_hand, abs=1e-6)
    assert np.ptp(by_hand) > 0


def with_scores(monkeypatch: pytest.MonkeyPatch, means: list[float]) -> list[Causal2Vec]:
    """Let successive scores of the first set be `means`; returns a list of the models that were scored."""
    scored: list[Causal2Vec] = []

    def planned(model: Causal2Vec, dev: DevSet) -> list[float]:
        scored.append(model)
        return [means[len(scored) - 1]] * len(dev.queries)

    monkeypatch.setattr(scoring, "score", planned)
    return scored


def weights_at(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The projector's weights at every call of `score`."""
    seen: list[np.ndarray] = []
    inner: Callable[..., list[float]] = scoring.score

    def noting(model: Causal2Vec, dev: DevSet) -> list[float]:
        seen.append(model.projector.output.weight.detach().numpy().copy())
        return inner(model, dev)

    monkeypatch.setattr(scoring, "score", noting)
    return seen


def test_a_stage_ends_with_its_best_weights_and_stops_early(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scores(monkeypatch, [0.1, 0.3, 0.5, 0.4, 0.2, 0.9])
    seen = weights_at(monkeypatch)
    values = recipe_for(checkpoint, steps=9)
    values["dev"] |= {"patience": 2}
    trained = train(Recipe.model_validate(values), data, tmp_path / "out", device="cpu")
    assert len(seen) == 5, "scored before and after steps 1 to 4; two scores in a row below the best end the stage"
    assert not np.array_equal(seen[2], seen[4])
    np.testing.assert_array_equal(trained.projector.output.weight.detach().numpy(), seen[2])
    report = DevReport.load(tmp_path / "out.training" / "dev.json")
    assert [(row["step"], row["mean"]) for row in report.history] == [
        (step, pytest.approx(mean)) for step, mean in enumerate([0.1, 0.3, 0.5, 0.4, 0.2])
    ]
    found = report.difference()
    assert (found.difference, found.low, found.high) == pytest.approx((0.4, 0.4, 0.4))
    assert report.lines() == [
        "docs: nDCG@10 x 100 before 10.0, after 50.0: +40.0 (95 % interval +40.0 to +40.0; 5 queries, 12 documents)"
    ]


def test_without_keep_best_a_stage_ends_with_its_last_weights_and_a_worse_start_is_never_lost(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_for(checkpoint, steps=2)
    for keep_best, expected in ((False, -1), (True, 0)):
        with monkeypatch.context() as patched:
            with_scores(patched, [0.9, 0.3, 0.5])
            seen = weights_at(patched)
            values["dev"] |= {"keep_best": keep_best}
            trained = train(Recipe.model_validate(values), data, tmp_path / str(keep_best), device="cpu")
        np.testing.assert_array_equal(trained.projector.output.weight.detach().numpy(), seen[expected])
        report = DevReport.load(tmp_path / f"{keep_best}.training" / "dev.json")
        assert report.difference().difference == pytest.approx(0.0 if keep_best else -0.4)


def test_few_development_questions_neither_choose_weights_nor_end_a_stage(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_scores(monkeypatch, [0.9, 0.3, 0.2, 0.1])
    seen = weights_at(monkeypatch)
    values = recipe_for(checkpoint, steps=3)
    values["dev"] |= {"patience": 1, "min_queries": 6}
    trained = train(Recipe.model_validate(values), data, tmp_path / "out", device="cpu")
    assert len(seen) == 4
    assert not np.array_equal(seen[0], seen[3])
    np.testing.assert_array_equal(trained.projector.output.weight.detach().numpy(), seen[3])
    assert DevReport.load(tmp_path / "out.training" / "dev.json").difference().difference == pytest.approx(-0.8)
    assert "5 development questions are too few" in caplog.text
    assert "dev.min_queries is 6" in caplog.text


def test_a_finished_stage_is_not_scored_again_when_a_run_goes_on(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.model_validate(recipe_for(checkpoint, steps=2))
    train(recipe, data, tmp_path / "out", device="cpu")
    before = DevReport.load(tmp_path / "out.training" / "dev.json")
    assert len(before.history) == 3
    (tmp_path / "out.training" / "dev.json").unlink()
    scored = with_scores(monkeypatch, [])
    train(recipe, data, tmp_path / "out", device="cpu", resume=True)
    assert not scored
    assert DevReport.load(tmp_path / "out.training" / "dev.json") == before


def test_a_resumed_stage_goes_on_with_its_scores_and_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny_model(), tmp_path / "scores.json"
    sets = [DevSet("set", None, ("q",), ("d",), ({0: 1.0},))]
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[{"seconds": 80.0}, {"dev": 0.1}])
    control = SimpleNamespace(should_log=True, should_training_stop=False)

    def run_to(callback: DevCallback, steps: range) -> None:
        state.global_step = steps.start
        callback.on_train_begin(None, state, control)
        for state.global_step in range(steps.start + 1, steps.stop):
            callback.on_step_end(None, state, control)

    with_scores(monkeypatch, [0.1, 0.5, 0.4, 0.3])
    run_to(DevCallback(model, sets, Dev(every=1, patience=2, min_queries=1), path), range(4))
    assert control.should_training_stop
    control.should_training_stop = False
    scored = with_scores(monkeypatch, [0.4, 0.3])
    resumed = DevCallback(model, sets, Dev(every=1, patience=2, min_queries=1), path)
    run_to(resumed, range(1, 3))
    assert len(scored) == 1, "the step it begins with has its score"
    assert not control.should_training_stop, "the score of step 3 is known, but does not count before step 3"
    assert resumed.best_step == 1
    run_to(resumed, range(2, 4))
    assert control.should_training_stop
    assert [mean_score(scores) for scores in resumed.history.values()] == [0.1, 0.5, 0.4, 0.3]

    measured = Monitor(
        model, Causal2VecLoss(SentenceTransformer(modules=[Causal2VecModule(model)]), LossWeights()), part_of, minutes=1
    )
    measured.on_train_begin(None, state, control)
    assert 80 <= measured.seconds < 140
    control.should_training_stop = False
    measured.on_step_end(None, state, control)
    assert control.should_training_stop, "80 seconds of the minute were used before"


def test_the_train_command_ends_with_before_after_and_interval(
    checkpoint: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = recipe_for(checkpoint, steps=2)
    values["dev"] = {"folders": [str(retrieval_folder(tmp_path / "small"))], "pairs": ["other"], "every": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--data", str(data), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    *_, small, other, mean = result.output.strip().splitlines()
    assert small.startswith("small: nDCG@10 x 100 before ")
    assert "9 queries, 30 documents" in small
    assert "60 queries, 60 documents" in other
    assert mean.startswith("mean: ")
    assert " (95 % interval " in mean


def test_a_share_of_the_documents_is_held_out_unless_told_otherwise(
    checkpoint: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = recipe_for(checkpoint, steps=1)
    del values["dev"]
    with caplog.at_level(logging.INFO):
        train(Recipe.model_validate(values), data, tmp_path / "held", device="cpu")
    assert "8 pairs are not trained on: their documents are held out" in caplog.text
    assert DevReport.load(tmp_path / "held.training" / "dev.json").sizes == {"docs": (8, 150)}
    train(Recipe.model_validate(values | {"dev": "none"}), data, tmp_path / "none", device="cpu")
    assert not (tmp_path / "none.training" / "dev.json").exists()


def test_a_sets_instruction_is_the_models_own_or_the_run_says_so(
    checkpoint: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    preprocess = TrainingModule.preprocess

    def noting(self: TrainingModule, inputs: Any, prompt: str | None = None, **kwargs: Any) -> Any:
        prompts.append(prompt or "")
        return preprocess(self, inputs, prompt, **kwargs)

    monkeypatch.setattr(TrainingModule, "preprocess", noting)
    values = recipe_for(checkpoint, steps=1, dev="none")
    config = Causal2Vec.from_pretrained(checkpoint).config
    train(Recipe.model_validate(values), data, tmp_path / "own", device="cpu")
    assert prompts == [config.prompt(config.instruction), ""], "queries as encode_query embeds them, documents plain"
    assert "encode_query uses" not in caplog.text
    for instruction in ("find the guide", ""):
        prompts.clear()
        caplog.clear()
        values["data"] = {"sets": {"docs": {"instruction": instruction}}}
        train(Recipe.model_validate(values), data, tmp_path / f"other {instruction}", device="cpu")
        assert prompts == [config.prompt(instruction), ""]
        assert f"- docs: {instruction!r}" in caplog.text


def test_the_start_teacher_holds_the_vectors_of_queries_and_documents_before_training(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    model = Causal2Vec.from_pretrained(checkpoint, dtype="float32", device="cpu")
    prompt = model.config.prompt(model.config.instruction)
    start = StartVectors(model, model.tokenizer, dict(model.named_parameters()), tmp_path)
    texts = passages(6)
    start.prepare({prompt: texts[:3], "": texts[2:]})
    np.testing.assert_allclose(start(prompt, texts[:3]), model.encode_query(texts[:3]), atol=1e-2)
    np.testing.assert_allclose(start("", texts[2:]), model.encode_document(texts[2:]), atol=1e-2)
    assert not np.allclose(start(prompt, texts[2:3]), start("", texts[2:3]), atol=1e-2)

    values = recipe_for(checkpoint, steps=3, dev="none", teachers=["start"])
    values["stages"][0] |= {"learning_rate": dict.fromkeys(RATES, 1e-2)}
    values["stages"][0]["loss"] = {"distill": 1.0, "info_nce": 0.0, "temperature": 0.1}
    train(Recipe.model_validate(values), data, tmp_path / "out", device="cpu")
    log = json.loads((tmp_path / "out.training" / "log.json").read_text())["steps"]["full"]
    assert log[0]["loss"] == pytest.approx(0, abs=1e-3), "the model has its own similarities"


def test_workers_make_the_same_batches_with_the_same_cached_vectors(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: set[int] = set()
    preprocess = TrainingModule.preprocess

    def noting(self: TrainingModule, *args: Any, **kwargs: Any) -> dict[str, Any]:
        features = preprocess(self, *args, **kwargs)
        return features | {"process": torch.full((len(features["rows"]),), os.getpid())}

    def forward(self: TrainingModule, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        processes.update(features["process"].tolist())
        return original(self, features, **kwargs)

    original = TrainingModule.forward
    monkeypatch.setattr(TrainingModule, "preprocess", noting)
    monkeypatch.setattr(TrainingModule, "forward", forward)
    found = {}
    for workers in (0, 2):
        processes.clear()
        values = recipe_for(checkpoint, steps=3, dev="none", teachers=["encoder", "start"], workers=workers)
        values["stages"][0]["loss"] = {"info_nce": 1.0, "distill": 0.5, "residual": 0.5}
        train(Recipe.model_validate(values), data, tmp_path / str(workers), device="cpu")
        log = json.loads((tmp_path / f"{workers}.training" / "log.json").read_text())["steps"]["full"]
        found[workers] = [row["loss"] for row in log]
        assert (processes == {os.getpid()}) == (workers == 0)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_every_step_is_logged_with_parts_margin_and_masked_share(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    values = recipe_for(checkpoint, steps=2, dev={"every": 1, "max_queries": 3, "max_documents": 5})
    values |= {"report_to": ["tensorboard"]}
    values["stages"][0]["loss"] |= {"mask_similar_documents": -0.99, "mask_by": "model"}
    train(Recipe.model_validate(values), data, tmp_path / "out", device="cpu")
    log = json.loads((tmp_path / "out.training" / "log.json").read_text())["steps"]["full"]
    assert [row["step"] for row in log] == [1, 2]
    for row in log:
        assert row["masked"] == 1, "every candidate is similar enough to be masked"
        norms = [row[f"grad_norm/{part}"] for part in RATES]
        assert math.sqrt(sum(norm**2 for norm in norms)) == pytest.approx(row["grad_norm"], rel=1e-3)
        assert all(row[f"learning_rate/{part}"] >= 0 for part in RATES)
    assert log[1]["seconds"] > log[0]["seconds"] > 0
    assert log[1]["tokens"] > log[0]["tokens"] > 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "out.training" / "tensorboard" / "full"))
    events.Reload()
    logged = events.Tags()["scalars"]
    assert {"train/margin", "train/masked", "train/grad_norm/projector", "train/dev", "train/dev_docs"} <= {*logged}
    assert [event.step for event in events.Scalars("train/dev")] == [0, 1, 2]


def test_a_tracker_that_is_not_installed_is_named_with_the_pip_line(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    values = recipe_for(checkpoint, report_to=["tensorboard", "wandb"])
    with pytest.raises(ImportError, match="report_to names wandb, not installed here: pip install wandb"):
        train(Recipe.model_validate(values), data, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_stage_ends_after_its_minutes_and_its_learning_rates_follow_the_time(
    schedule: str, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(10_000))  # of each look at the clock
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: float(next(seconds)))
    values = recipe_for(checkpoint, steps=1000, dev="none")
    values["stages"][0] |= {"minutes": 1, "schedule": schedule}
    train(Recipe.model_validate(values), data, tmp_path / "out", device="cpu")
    log = json.loads((tmp_path / "out.training" / "log.json").read_text())["steps"]["full"]
    assert 5 < len(log) < 60, "it ends by the time, long before 1,000 steps"
    rates = [row["learning_rate/projector"] / RATES["projector"] for row in log]
    assert max(rates) > 0.9, "warm-up is over early"
    low, high = (0.999, 1.001) if schedule == "constant" else (0, 0.2)
    assert low <= rates[-1] <= high, "at the end it is where the schedule ends"


def test_scores_in_the_data_are_distilled_and_negatives_are_drawn_anew(tmp_path: Path) -> None:
    rows = [
        {"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i} {j}" for j in range(4)] + [f"q{i}"],
         "positive_score": 1.0, "negative_scores": [j / 10 for j in range(5)], "document": f"d{i}"}
        for i in range(8)
    ]  # fmt: skip
    rows[7] |= {"positive_score": None, "negative_scores": None}
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_pair_set(tmp_path, "set")
    assert read.pairs[0] == Pair("q0", "p0", ("n0 0", "n0 1", "n0 2", "n0 3"), (1.0, 0.0, 0.1, 0.2, 0.3), "d0")
    drawn = draw_stage([read], {"set": 1.0}, batch_size=4, steps=8, num_negatives=2, seed=0)["set with negatives"]
    seen: set[tuple[str, str]] = set()
    for row in drawn:
        chosen = (row["negative_1"], row["negative_2"])
        number = row["query"][1:]
        if number == "7":
            assert all(map(math.isnan, row["scores"]))
        else:
            assert row["scores"] == [1.0, *(int(text.split()[1]) / 10 for text in chosen)]
        if number == "0":
            seen.add(chosen)
    assert len(seen) > 1, "a pair that comes up again gets other negatives"
    again = draw_stage([read], {"set": 1.0}, batch_size=4, steps=8, num_negatives=2, seed=0)["set with negatives"]
    assert [row["negative_1"] for row in again] == [row["negative_1"] for row in drawn]
    for wrong in ({"negative_scores": [1.0]}, {"positive_score": "high"}):
        (tmp_path / "wrong.jsonl").write_text(json.dumps(rows[0] | wrong))
        with pytest.raises(ValueError, match="'negative_scores'"):
            read_pair_set(tmp_path, "wrong")


def test_list_scores_of_the_data_reach_the_loss(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"query": query, "positive": positive, "negatives": [f"nothing {i}"], "positive_score": float(i),
         "negative_scores": [-float(i)]}
        for i, (query, positive) in enumerate(pairs()[:12])
    ]  # fmt: skip
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen: list[Any] = []
    distill = loss.list_distillation

    def noting(queries: Any, candidates: Any, teacher: Any, **options: Any) -> Any:
        seen.append(teacher.tolist())
        return distill(queries, candidates, teacher, **options)

    monkeypatch.setattr(loss, "list_distillation", noting)
    values = recipe_for(checkpoint, steps=1, dev="none")
    values["stages"][0]["loss"] |= {"list_distill": 1.0, "list_loss": "margin_mse"}
    train(Recipe.model_validate(values), tmp_path, tmp_path / "out", device="cpu")
    assert np.shape(seen) == (1, 4, 2)
    assert all(positive == -negative for positive, negative in seen[0])
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"query": q, "positive": p}) for q, p in pairs()[:12]))
    with pytest.raises(ValueError, match=r"list_distill .* no set holds positive_score"):
        train(Recipe.model_validate(values), tmp_path, tmp_path / "other", device="cpu")


def test_the_packaged_recipe_adapts_a_model_by_name(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(Path("adapt"))
    assert recipe.base.checkpoint == "default"
    with pytest.raises(FileNotFoundError, match=r"no recipe adopt: give a YAML file, or one of adapt"):
        Recipe.load(Path("adopt"))
    (tmp_path / "pairs.jsonl").write_text((data / "docs.jsonl").read_text())
    tiny = recipe.model_copy(update={"base": BaseModels(checkpoint=str(checkpoint))})
    train(tiny, tmp_path, tmp_path / "out", device="cpu", max_steps=2)
    assert DevReport.load(tmp_path / "out.training" / "dev.json").sizes == {"pairs": (8, 150)}


def test_the_recipes_in_the_documentation_are_valid() -> None:
    page = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text(encoding="utf-8")
    recipes = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "stages:" in block]
    assert recipes
    for recipe in recipes:
        assert Recipe.model_validate(yaml.safe_load(recipe)).stages


def test_intervals_match_a_loop_over_draws() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = [rng.random(12), rng.random(30)], [rng.random(12), rng.random(30)]
    found = difference_of_means(ours, theirs)
    again = np.random.default_rng(0)
    rows = [again.integers(n, size=(2000, n)) for n in (12, 30)]
    draws = [np.mean([(ours[i][rows[i][k]] - theirs[i][rows[i][k]]).mean() for i in (0, 1)]) for k in range(2000)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert found.difference == pytest.approx(np.mean([(a - b).mean() for a, b in zip(ours, theirs, strict=True)]))
    one = paired_bootstrap(12, lambda rows: float((ours[0] - theirs[0])[rows].mean()))
    assert (one.low, one.high) == pytest.approx(
        (difference_of_means(ours[:1], theirs[:1]).low, difference_of_means(ours[:1], theirs[:1]).high)
    )
    with pytest.raises(ValueError, match="at least one item"):
        paired_bootstrap(0, lambda rows: 0.0)
