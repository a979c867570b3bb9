"""`c2v-rag adapt`: the whole chain on tiny models, what it refuses, and that a run that was killed continues."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from c2v_rag import Causal2Vec, Document, VectorIndex
from c2v_rag.adapt import AdaptReport, adapt, questions, run
from c2v_rag.adapt.corpus import Corpus, Ranker, assemble, rank_of
from c2v_rag.adapt.filter import COPY, LANGUAGE, LOOP, NOT_FOUND, REPEATED, SHORT, UNSPECIFIC, filter_questions
from c2v_rag.adapt.headings import HeadingWriter, take_heading
from c2v_rag.adapt.passages import Passage, draw_passages, split_documents
from c2v_rag.adapt.prompts import Prompt, read_prompts
from c2v_rag.adapt.questions import Question, Written, clean, read_questions, save_questions, write_questions
from c2v_rag.adapt.reindex import build_collection
from c2v_rag.adapt.report import compare_scores, judge
from c2v_rag.adapt.scoring import Comparison, compare, metric_values
from c2v_rag.adapt.training import recipe_for, steps_within, write_pairs
from c2v_rag.adapt.work import Work
from c2v_rag.adapt.writers import DecoderWriter, EndpointWriter, can_be_asked
from c2v_rag.app.about import facts
from c2v_rag.finetune.recipe import Recipe
from c2v_rag.index import Chunk, ChunkSettings, stored_stamps
from tests.pairs import pairs
from tests.plain import Letters, QuietHandler, serving
from tests.test_cli import run as run_command
from tests.tiny import tiny_model, tiny_tokenizer

STEPS = 3
PLAIN = ChunkSettings(header=False)
SCRIPT = "<script>alert('no')</script>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model(encoder_max_length=256).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 Markdown files, each short enough to be one passage."""
    folder = tmp_path_factory.mktemp("documents")
    for number, (question, answer) in enumerate(pairs()[:30]):
        text = f"# {question} {SCRIPT}\n\n{answer} Then go on with part {number}.\n"
        (folder / f"{number:02}.md").write_text(text, encoding="utf-8")
    return folder


def start(documents: Path, checkpoint: str, output: Path, **changes: Any) -> AdaptReport:
    """`adapt` with as many steps as a test needs; the filter keeps every question that is in the corpus."""
    settings = {"model": checkpoint, "steps": STEPS, "found_among": 30, "device": "cpu", "dtype": "float32"} | changes
    return adapt([documents], output=output, **settings)


@pytest.fixture(scope="module")
def finished(documents: Path, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> AdaptReport:
    return start(documents, checkpoint, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def trained_already(finished: AdaptReport, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training takes the model of the finished run, for tests of what comes before and after it."""

    def copy(recipe: object, data: Path, output: Path, device: str | None) -> None:
        shutil.copytree(str(finished.model), output)
        shutil.copytree(Path(finished.output) / "work" / "model.training", f"{output}.training")

    monkeypatch.setattr(run, "run_training", copy)


# The whole chain


def test_a_run_ends_with_a_model_and_a_report_in_three_forms(finished: AdaptReport) -> None:
    output = Path(finished.output)
    assert {path.name for path in output.iterdir()} == {
        "questions.jsonl", "dropped.jsonl", "model", "report.html", "report.txt", "report.json", "work",
    }  # fmt: skip
    assert finished.ending == judge(finished.held_out, finished.general)[0]
    assert json.loads((output / "report.json").read_text(encoding="utf-8")) == dataclasses.asdict(finished)
    text = (output / "report.txt").read_text(encoding="utf-8")
    assert text.startswith(f"Result: {finished.ending}. ")
    for part in ("recall@10", "nDCG@10", "MRR", "everyday questions", "questions that changed most"):
        assert part in text
    assert len(finished.losses) == STEPS
    assert sum(finished.passages.values()) == sum(finished.documents.values()) == finished.written == 30
    assert finished.kept["held-out"] == len(finished.changed) == 6
    assert finished.model
    before, after = (Causal2Vec.from_pretrained(name, device="cpu") for name in (finished.base_model, finished.model))
    assert before.stamp["weights"] != after.stamp["weights"]


def test_the_scores_are_those_of_a_search_in_all_passages(finished: AdaptReport) -> None:
    rows = read_questions(Path(finished.output) / "questions.jsonl")
    held_out = [row for row in rows if row.split == "held-out"]
    for name, side in ((finished.base_model, "before"), (str(finished.model), "after")):
        model = Causal2Vec.from_pretrained(name, device="cpu", dtype="float32")
        scores = (
            model.encode_query([row.question for row in held_out])
            @ model.encode_document([row.passage for row in rows]).T
        )
        right = [rows.index(row) for row in held_out]
        by_hand = [int((row >= row[position]).sum()) for row, position in zip(scores, right, strict=True)]
        assert {one.question: getattr(one, side) for one in finished.changed} == {
            row.question: rank for row, rank in zip(held_out, by_hand, strict=True)
        }
        found = getattr(finished.held_out["vectors"]["MRR"], side)
        assert found == pytest.approx(np.mean([1 / rank for rank in by_hand]))


def test_held_out_documents_are_not_trained_on(finished: AdaptReport) -> None:
    output = Path(finished.output)
    rows = read_questions(output / "questions.jsonl")
    hidden = {text for row in rows if row.split != "training" for text in (row.question, row.passage)}
    assert len(hidden) >= 16
    lines = (output / "work" / "data" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        pair = json.loads(line)
        assert not {pair["query"], pair["positive"], *pair["negatives"]} & hidden
        assert pair["negatives"]
        for score in pair.get("negative_scores", []):
            assert score < pair["positive_score"]
    assert len(lines) == finished.kept["training"]


def test_html_in_documents_stays_text(finished: AdaptReport) -> None:
    page = (Path(finished.output) / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=[\"'](?!#)", re.sub(r"xlink:href=\"#", "", page))


def kill(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_was_killed_at_any_step_continues_to_the_same_result(
    documents: Path, checkpoint: str, finished: AdaptReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "BLOCK", 8)
    output, whole = tmp_path / "run", Path(finished.output)
    write, written = HeadingWriter.write, list[int]()

    def write_two_blocks(self: HeadingWriter, passages: Sequence[Passage], kinds: Sequence[str]) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(passages))
        return write(self, passages, kinds)

    for place, resume in (
        ((HeadingWriter, "write", write_two_blocks), False),
        ((run, "filter_questions", kill), True),
        ((run, "run_training", kill), True),
        ((run, "compare_scores", kill), True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*place)
            with pytest.raises(KeyboardInterrupt):
                start(documents, checkpoint, output, resume=resume)
        assert not (output / "report.json").exists()
    assert written == [8, 8]
    report = start(documents, checkpoint, output, resume=True)
    for name in ("questions.jsonl", "dropped.jsonl", "work/data/training.jsonl"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (dataclasses.asdict(one) for one in (report, finished))
    for one in (ours, theirs):
        for key in ("output", "model", "seconds"):
            del one[key]
    assert ours == theirs
    weights = [Causal2Vec.from_pretrained(str(one.model), device="cpu").stamp["weights"] for one in (report, finished)]
    assert weights[0] == weights[1]


# Runs the command line in a process that kills itself after the second training step.
KILLED_WHILE_TRAINING = """
import os, signal
from c2v_rag.finetune.trainer import ProgressCallback

on_step_end = ProgressCallback.on_step_end

def on_step_end_then_kill(self, args, state, control, **kwargs):
    on_step_end(self, args, state, control, **kwargs)
    if state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)

ProgressCallback.on_step_end = on_step_end_then_kill
from c2v_rag.cli import main
main()
"""


@pytest.mark.slow
def test_a_process_that_was_killed_while_training_continues_to_the_same_weights(
    documents: Path, checkpoint: str, finished: AdaptReport, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = [
        "adapt", documents, "--output", output, "--model", checkpoint, "--steps", STEPS, "--found-among", 30,
        "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_TRAINING, *map(str, arguments)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (output / "work" / "model.training").is_dir()
    assert not (output / "model").exists()
    report = start(documents, checkpoint, output, resume=True)
    assert report.losses == pytest.approx(finished.losses, abs=1e-3)
    resumed, whole = (Causal2Vec.from_pretrained(str(one.model), device="cpu") for one in (report, finished))
    np.testing.assert_allclose(resumed.encode(["A text."]), whole.encode(["A text."]), atol=1e-4)


def test_a_folder_in_use_and_other_options_are_refused(
    documents: Path, checkpoint: str, finished: AdaptReport, tmp_path: Path
) -> None:
    output = Path(finished.output)
    with pytest.raises(FileExistsError, match="--resume"):
        start(documents, checkpoint, output)
    with pytest.raises(ValueError, match=r"other options:\n- seed: 0 then, 7 now"):
        start(documents, checkpoint, output, resume=True, seed=7)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        start(documents, checkpoint, tmp_path)
    with pytest.raises(ValueError, match="needs --store"):
        start(documents, checkpoint, tmp_path / "new", reindex=True)
    VectorIndex(tmp_path / "store", Letters()).add([Document("A passage.", "source")])
    with pytest.raises(ValueError, match="not both"):
        start(documents, checkpoint, tmp_path / "new", store=tmp_path / "store")
    with pytest.raises(ValueError, match=r"must not be negative, got -1\."):
        start(documents, checkpoint, tmp_path / "new", soft_labels=-1)
    with pytest.raises(ValueError, match="needs the weights"):
        start(documents, "http://127.0.0.1:9", tmp_path / "new")


@pytest.mark.usefixtures("trained_already")
def test_questions_can_be_edited_before_training_and_not_afterwards(
    documents: Path, checkpoint: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    report = start(documents, checkpoint, output, questions_only=True)
    assert report.ending == "questions written"
    assert report.kept == {}
    assert not (output / "model").exists()
    rows = read_questions(output / "questions.jsonl")
    edited = [dataclasses.replace(row, question=f"Edited: {row.question}") for row in rows[1:]]
    save_questions(output / "questions.jsonl", edited)
    report = start(documents, checkpoint, output, resume=True)
    assert report.written == 29
    assert all(one.question.startswith("Edited: ") for one in report.changed)
    save_questions(output / "questions.jsonl", rows)
    with pytest.raises(ValueError, match="was changed after training had begun"):
        start(documents, checkpoint, output, resume=True)


@pytest.mark.usefixtures("trained_already")
def test_own_questions_need_no_other_documents(checkpoint: str, tmp_path: Path) -> None:
    own = [Question(question, f"{answer} Part {n}.", f"faq-{n}") for n, (question, answer) in enumerate(pairs()[30:60])]
    save_questions(tmp_path / "own.jsonl", own)
    report = adapt(
        output=tmp_path / "run", from_questions=tmp_path / "own.jsonl", model=checkpoint, steps=1, found_among=30,
        device="cpu",
    )  # fmt: skip
    assert (report.written, report.writer) == (30, str(tmp_path / "own.jsonl"))
    assert report.kept == report.passages
    assert report.kept["held-out"] == 6


# Nothing to learn


def test_too_few_passages_and_one_giant_file_are_errors_and_write_nothing(checkpoint: str, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for n, (question, answer) in enumerate(pairs()[:5]):
        (few / f"{n}.txt").write_text(f"{question} {answer}")
    giant = tmp_path / "giant"
    giant.mkdir()
    (giant / "all.txt").write_text("\n\n".join(f"{question} {answer}" for question, answer in pairs()))
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    (unreadable / "empty.txt").write_text("")
    (unreadable / "binary.txt").write_bytes(bytes(range(256)) * 40)
    for folder, message in (
        (few, "There are 5 passages of at least 5 words that a question can be written for"),
        (giant, r"passages are of 1 document\(s\): .*all.txt"),
        (unreadable, "There are 0 passages"),
    ):
        with pytest.raises(ValueError, match=message):
            start(folder, checkpoint, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_without_a_kept_question_nothing_is_trained_and_the_report_says_why(
    documents: Path, checkpoint: str, tmp_path: Path
) -> None:
    (documents / "binary.txt").write_bytes(b"\xff\xfe\x00")
    copies = tmp_path / "copies.jsonl"
    save_questions(copies, [
        Question(f"This sentence is number {n}", f"This sentence is number {n}. Here is more.", f"copy-{n}")
        for n in range(30)
    ])  # fmt: skip
    result = run_command(
        "adapt", documents, "--from-questions", copies, "--output", tmp_path / "run", "--model", checkpoint,
        "--device", "cpu", "--json",
    )  # fmt: skip
    (documents / "binary.txt").unlink()
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["ending"] == "nothing to learn"
    assert report["dropped"] == {COPY: 30}
    assert report["examples"][COPY] == [f"This sentence is number {n}" for n in range(3)]
    assert [Path(path).name for path in report["unread"]] == ["binary.txt"]
    assert report["model"] is None
    assert not (tmp_path / "run" / "model").exists()
    dropped = [json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in dropped] == [COPY] * 30
    assert "copies a sentence" in (tmp_path / "run" / "report.html").read_text()


def test_the_command_prints_the_report(documents: Path, checkpoint: str, tmp_path: Path) -> None:
    arguments = ["adapt", documents, "--output", tmp_path / "run", "--model", checkpoint, "--device", "cpu"]
    result = run_command(*arguments, "--questions-only", "--questions", "25")
    assert result.returncode == 0, result.stderr
    assert "25 questions by headings" in result.stdout
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in result.stdout
    assert "holds a run already" in run_command(*arguments).stderr


# A gain


GAIN, NONE, LOSS = (0.01, 0.2), (-0.1, 0.1), (-0.2, -0.01)


@pytest.mark.parametrize(
    ("hybrid", "vectors", "general", "ending", "advice"),
    [
        (GAIN, GAIN, 0.0, "gain", "Use it, and embed"),
        (GAIN, NONE, 0.0, "gain", "Use it, and embed"),
        (NONE, GAIN, 0.0, "gain by vectors only", "only if you search by vectors alone"),
        (GAIN, GAIN, -0.02, "gain, but forgets", "finds less in trivia"),
        (NONE, NONE, 0.0, "no gain", "No gain is proved"),
        (NONE, LOSS, 0.0, "no gain", "is worse"),
        (LOSS, GAIN, 0.0, "no gain", "is worse"),
    ],
)
def test_a_gain_is_only_what_the_interval_proves_and_forgetting_is_said(
    hybrid: tuple[float, float], vectors: tuple[float, float], general: float, ending: str, advice: str
) -> None:
    held_out = {
        mode: {"nDCG@10": Comparison(0.5, 0.5 + (low + high) / 2, low, high)}
        for mode, (low, high) in (("hybrid", hybrid), ("vectors", vectors))
    }
    found = judge(held_out, {"trivia": Comparison(0.5, 0.5 + general, -1, 1)})
    assert found[0] == ending
    assert advice in found[1]
    assert ("Keep the old model" in found[1]) == (ending == "no gain")


def test_with_few_documents_the_interval_is_over_questions() -> None:
    rows = [Question(f"question {n}", "passage", f"document-{n % 2}") for n in range(8)]
    ranks = {"ranks": {"vectors": [1] * 8, "hybrid": [4, 2] * 4}, "general": {}}
    better = {"ranks": {"vectors": [1] * 8, "hybrid": [1, 2] * 4}, "general": {}}
    found = compare_scores(rows, ranks, better)["held_out"]["hybrid"]["MRR"]
    assert found.low < found.difference < found.high


def test_the_interval_is_over_documents_not_over_questions() -> None:
    alone = compare([0.0] * 8, [1.0, 0.0] * 4, [str(n) for n in range(8)])
    together = compare([0.0] * 8, [1.0, 0.0] * 4, ["one"] * 8)
    assert alone.difference == together.difference == 0.5
    assert (together.low, together.high) == (0.5, 0.5)
    assert alone.low < 0.3 < 0.7 < alone.high
    assert metric_values("recall@10", [1, 10, 11]) == [1, 1, 0]
    assert metric_values("nDCG@10", [1, 3, 11]) == [1, 0.5, 0]
    assert metric_values("MRR", [1, 4]) == [1, 0.25]


def make_store(checkpoint: str, store: Path) -> Path:
    documents = [
        Document(f"# {question}\n\n{answer} Then go on with part {n}.", f"source-{n}")
        for n, (question, answer) in enumerate(pairs()[:30])
    ]
    VectorIndex(store, Causal2Vec.from_pretrained(checkpoint, device="cpu")).add(documents)
    return store


@pytest.mark.slow
@pytest.mark.usefixtures("trained_already")
def test_a_store_is_embedded_again_beside_the_old_collection_only_after_a_gain(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(checkpoint, tmp_path / "store")
    settings: dict[str, Any] = {"store": store, "steps": 1, "found_among": 30, "device": "cpu", "reindex": True}
    monkeypatch.setattr(run, "judge", lambda *_: ("no gain", "Keep the old model."))
    report = adapt(output=tmp_path / "run", **settings)
    assert report.collection is None
    assert report.base_model == checkpoint
    assert [*stored_stamps(store)] == ["documents"]
    monkeypatch.setattr(run, "judge", lambda *_: ("gain", "Use it."))
    report = adapt(output=tmp_path / "run", resume=True, **settings)
    assert report.collection == "documents-adapted"
    assert sorted(stored_stamps(store)) == ["documents", "documents-adapted"]
    new = VectorIndex(store, Causal2Vec.from_pretrained(str(report.model), device="cpu"), "documents-adapted")
    old = VectorIndex(store, Causal2Vec.from_pretrained(checkpoint, device="cpu"))
    assert {chunk.id for chunk in new.chunks()} == {chunk.id for chunk in old.chunks()}
    assert len(new) == 30
    shown = facts(Causal2Vec.from_pretrained(checkpoint, device="cpu"), store, old)
    assert "c2v-rag adapt --store" in shown["train it on these documents"]
    with pytest.raises(FileExistsError, match="documents-adapted"):
        adapt(output=tmp_path / "other", **settings)


def test_a_collection_that_is_not_complete_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(f"{n}: a passage", f"source-{n}") for n in range(600)]
    old = VectorIndex(tmp_path, Letters())
    old.add(documents)

    class Other(Letters):
        stamp = Letters.stamp | {"weights": "1"}

    write, blocks = VectorIndex.write, list[int]()

    def write_one_block(self: VectorIndex, chunks: Sequence[Chunk]) -> None:
        if blocks:
            raise KeyboardInterrupt
        blocks.append(len(chunks))
        write(self, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(VectorIndex, "write", write_one_block)
        with pytest.raises(KeyboardInterrupt):
            build_collection(tmp_path, "documents", Other())
    assert sorted(stored_stamps(tmp_path)) == ["documents", "documents-adapted.unfinished"]
    assert old.delete("source-0") == 1  # meanwhile
    assert build_collection(tmp_path, "documents", Other()) == "documents-adapted"
    assert sorted(stored_stamps(tmp_path)) == ["documents", "documents-adapted"]
    new = VectorIndex(tmp_path, Other(), "documents-adapted")
    assert {chunk.id for chunk in new.chunks()} == {chunk.id for chunk in old.chunks()}
    assert new.search("77: a passage", 1)[0].text == "77: a passage"


def test_what_a_killed_run_with_another_model_has_left_is_replaced(tmp_path: Path) -> None:
    class Killed(Letters):
        stamp = Letters.stamp | {"weights": "1"}

    class Other(Letters):
        stamp = Letters.stamp | {"weights": "2"}

    VectorIndex(tmp_path, Letters()).add([Document("a passage", "source")])
    VectorIndex(tmp_path, Killed(), "documents-adapted.unfinished").add([Document("an old passage", "source")])
    assert build_collection(tmp_path, "documents", Other()) == "documents-adapted"
    assert sorted(stored_stamps(tmp_path)) == ["documents", "documents-adapted"]
    assert [chunk.text for chunk in VectorIndex(tmp_path, Other(), "documents-adapted").chunks()] == ["a passage"]


# Passages


def chunk(document: str, number: int) -> Chunk:
    text = f"Document {document} has this part {number}."
    return Chunk(f"{document}-{number}", text, {"source": document})


def test_one_giant_document_does_not_crowd_out_the_others() -> None:
    sizes = {"giant": 500} | {f"small-{n}": 2 for n in range(9)}
    chunks = [chunk(document, number) for document, size in sizes.items() for number in range(size)]
    drawn = draw_passages(chunks, 40, 0, PLAIN)
    counts = Counter(passage.document for passage in drawn)
    assert counts == {"giant": 22} | {f"small-{n}": 2 for n in range(9)}
    assert drawn == draw_passages(iter(chunks), 40, 0, PLAIN)
    assert drawn != draw_passages(chunks, 40, 1, PLAIN)
    assert Counter(passage.document for passage in draw_passages(chunks, 10, 0, PLAIN)) == dict.fromkeys(sizes, 1)


def test_passages_are_embedded_behind_the_headers_of_their_collection() -> None:
    metadata = {"source": "a.md", "title": "Food", "section": "Food > Bread"}
    chunks = [Chunk("1", "Knead it for ten minutes.", metadata)]
    with_header, without = (draw_passages(chunks, 9, 0, settings)[0] for settings in (ChunkSettings(), PLAIN))
    assert (with_header.text, without.text) == (f"Food > Bread\n\n{chunks[0].text}", chunks[0].text)


def test_rows_of_a_table_are_documents_and_repeated_or_short_passages_are_left_out() -> None:
    rows = [Chunk(str(n), f"This row is the number {n // 2}.", {"source": "faq.csv", "row": n}) for n in range(40)]
    drawn = draw_passages([*rows, Chunk("short", "Too short.", {"source": "faq.csv", "row": 99})], 100, 0, PLAIN)
    assert len(drawn) == 20
    assert len({passage.document for passage in drawn}) == 20
    assert drawn[0].document.startswith("faq.csv#")


def test_the_control_draws_only_passages_that_have_a_heading_and_a_rest() -> None:
    """Of two thousand docstrings, half have a summary line alone: they would use up the number of questions."""
    chunks = [
        Chunk(str(n), f"Sentence {n} stands alone here." + " This is the rest of it." * (n % 2), {"source": str(n)})
        for n in range(40)
    ]
    assert len(draw_passages(chunks, 15, 0, PLAIN, can_be_asked("headings"))) == 15
    assert [int(one.id) % 2 for one in draw_passages(chunks, 40, 0, PLAIN, can_be_asked("headings"))] == [1] * 20
    for writer in ("default", None):
        assert len(draw_passages(chunks, 40, 0, PLAIN, can_be_asked(writer))) == 40


@pytest.mark.parametrize("sizes", [[10] * 3, [1, 1, 28], [2, 14, 14], [1] * 30, [1] * 4 + [26], [3] * 40])
def test_documents_not_passages_are_split(sizes: list[int]) -> None:
    passages = draw_passages([chunk(str(d), n) for d, size in enumerate(sizes) for n in range(size)], 1000, 0, PLAIN)
    split = split_documents(passages, seed=0)
    assert [dataclasses.replace(passage, split="training") for passage in split] == passages
    split_of = {passage.document: passage.split for passage in split}
    assert all(split_of[passage.document] == passage.split for passage in split)
    counts = Counter(passage.split for passage in split)
    assert {*counts} == {"training", "dev", "held-out"}
    if len(sizes) >= 30:
        assert counts["held-out"] == round(0.2 * len(passages))


# Questions


def test_the_file_of_questions_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        Question("Wie geht das? \u2028 zweite Zeile", "Text\nmit Zeilen <b>", "a", "question", "dev", "1"),
        Question("q", "p", "b"),
    ]
    save_questions(path, rows)
    assert read_questions(path) == rows
    path.write_text("\ufeff" + path.read_text(encoding="utf-8").replace("\n", "\r\n\r\n"), encoding="utf-8")
    assert read_questions(path) == rows


def test_a_line_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    good = {"question": "q", "passage": "p", "document": "d", "split": "dev"}
    lines = [
        json.dumps(good),
        "{broken",
        "",
        "[]",
        json.dumps(good | {"question": " "}),
        json.dumps(good | {"answer": "x"}),
        json.dumps(good | {"split": "held-out"}),
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"mine\.jsonl:2: not valid JSON") as raised:
        read_questions(path)
    for message in (
        "mine.jsonl:4: expected a JSON object, got list",
        "mine.jsonl:5: 'question' must be a text that is not empty",
        "mine.jsonl:6: unknown keys ['answer']",
        "mine.jsonl:7: the document 'd' has the split 'held-out' here and 'dev' in line 1",
    ):
        assert message in str(raised.value)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions(path)


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ('\n1. Question: "How do I bake bread?"\nBecause ...', "How do I bake bread?"),
        ("<think>The user wants\na question.</think>\nWhat rises?", "What rises?"),
        ("<think>never ends", ""),
        ("Question:\n  **What   rises?**", "What rises?"),
        ("- What rises?", "What rises?"),
        ("x" * 400, ""),
        ("What \x1b[31m\trises\x07?", "What [31m rises?"),
        ("", ""),
        ("3D printers: how do they work?", "3D printers: how do they work?"),
    ],
)
def test_an_answer_is_reduced_to_its_question(answer: str, question: str) -> None:
    assert clean(answer) == question


class Counting:
    """A writer that counts its passages."""

    name, kinds = "counting", ("question", "keywords", "problem")

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def write(self, passages: Sequence[Passage], kinds: Sequence[str]) -> list[Written | None]:
        self.asked += [(one.id, kind) for one, kind in zip(passages, kinds, strict=True)]
        return [Written(f"{kind} {one.id}", one.text) for one, kind in zip(passages, kinds, strict=True)]


def test_every_passage_gets_a_question_before_one_gets_two_and_the_kinds_take_turns(tmp_path: Path) -> None:
    writer = Counting()
    passages = [Passage(str(n), f"Passage {n}.", "document", {}) for n in range(10)]
    rows = write_questions(passages, 25, writer.kinds, lambda: writer, Work(tmp_path))
    assert [(row.passage_id, row.kind) for row in rows] == writer.asked
    assert len({*writer.asked}) == 25
    assert {id for id, _ in writer.asked[:10]} == {id for id, _ in writer.asked[10:20]} == {one.id for one in passages}
    assert Counter(kind for _, kind in writer.asked[:10]) == {"question": 4, "keywords": 3, "problem": 3}
    assert [id for id, _ in writer.asked[:10]] != [one.id for one in passages]
    assert len(write_questions(passages, 100, writer.kinds, lambda: writer, Work(tmp_path / "all"))) == 30


def test_writing_ends_with_its_time_and_a_resumed_run_has_the_same_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "BLOCK", 4)
    writer, clock = Counting(), iter(range(100))
    monkeypatch.setattr(questions.time, "perf_counter", lambda: float(next(clock)))
    passages = [Passage(str(n), f"Passage {n}.", "document", {}) for n in range(20)]
    rows = write_questions(passages, 20, writer.kinds, lambda: writer, Work(tmp_path), seconds=2.5)
    assert len(rows) == len(writer.asked) == 8
    assert write_questions(passages, 20, writer.kinds, lambda: pytest.fail("opened"), Work(tmp_path)) == rows


def test_as_many_steps_are_planned_as_fit_and_at_most_eight_epochs() -> None:
    stage = recipe_for("default", steps=1, minutes=None, num_questions=1000, num_dev=0).stages[0]
    texts = stage.batch_size * (2 + stage.num_negatives)
    assert steps_within(300, texts / 10, 1000) == 10  # ten seconds to embed a step's texts, thirty to train on them
    assert steps_within(1e9, 1.0, 100) == 8 * 100 // stage.batch_size
    assert steps_within(0.1, 1.0, 100) == 1


def test_the_recipe_fits_few_questions_and_scores_dev_questions_where_there_are_enough() -> None:
    few = recipe_for("mine", steps=40, minutes=3, num_questions=11, num_dev=4)
    assert (few.stages[0].batch_size, few.stages[0].minutes, few.dev) == (11, 3, "none")
    assert recipe_for("mine", steps=1, minutes=None, num_questions=11, num_dev=4, soft_labels=0).stages[0].loss == (
        few.stages[0].loss.model_copy(update={"list_distill": 0})
    )
    many = recipe_for("mine", steps=40, minutes=None, num_questions=1000, num_dev=50)
    assert (many.stages[0].steps, many.stages[0].batch_size, many.base.checkpoint) == (40, 16, "mine")
    assert many.dev != "none"
    assert (many.dev.pairs, many.dev.every) == (["dev"], 10)
    assert Recipe.model_validate(many.model_dump()) == many


def passage(body: str, header: str = "", **metadata: Any) -> Passage:
    return Passage("id", body, "document", metadata, header)


def test_the_heading_becomes_the_question_and_leaves_the_passage() -> None:
    rest = "Mix flour, water and yeast in a bowl."
    docstring = {"kind": "function"}
    for text, header, metadata, question, left in (
        (f"## Baking bread ##\n\n{rest}", "", {}, "Baking bread", rest),
        (f"## Baking bread\n\n{rest}", "Food > Baking bread", {}, "Baking bread", f"Food\n\n{rest}"),
        (f"Baking bread\n============\n\n{rest}", "Food", {}, "Baking bread", f"Food\n\n{rest}"),
        (f"This is about bread. {rest}", "", {}, "This is about bread.", rest),
        (rest, "Food > Baking bread", {}, "Baking bread", f"Food\n\n{rest}"),
        (rest, "Cook book", {}, "Cook book", rest),
        (f"bake(x)\n\nBake a bread.\n\n{rest}", "", docstring, "Bake a bread.", f"bake(x)\n\n{rest}"),
        (f"Do so. {rest}", "bake(x)", docstring | {"start": 900}, "Do so.", f"bake(x)\n\n{rest}"),
    ):
        written = take_heading(passage(text, header, **metadata))
        assert written is not None
        assert (written.question, written.passage) == (question, left)
    assert take_heading(passage("bread.bake(x)\n\nBake a bread.", kind="function")) is None
    assert take_heading(passage("One sentence and nothing else is here.")) is None


# Writers that use a model


class Echo:
    """Stands for a causal language model: it continues a prompt with the prompt's last tokens before the answer."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=2000))

    def __init__(self, tokenizer: Any) -> None:
        self.skipped = len(tokenizer("\nAnswer:")["input_ids"])
        self.batches: list[list[int]] = []

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        assert not options["do_sample"]
        self.batches.append(attention_mask.sum(dim=1).tolist())
        return torch.cat([input_ids, input_ids[:, -self.skipped - 8 : -self.skipped]], dim=1)


def test_the_decoder_writes_in_batches_of_similar_length_and_answers_stay_with_their_passages() -> None:
    tokenizer = tiny_tokenizer("bpe")
    model = Echo(tokenizer)
    prompts = {"question": Prompt(instruction="Ask."), "keywords": Prompt(instruction="Name the keywords.")}
    writer = DecoderWriter("echo", model, tokenizer, prompts)  # type: ignore[arg-type]
    lengths = np.random.default_rng(0).permutation(20)
    passages = [passage(f"{'long ' * n}ends {n:03}") for n in lengths]
    kinds = [writer.kinds[n % 2] for n in range(20)]
    written = writer.write(passages, kinds)
    assert [one.question if one else None for one in written] == [f"ends {n:03}" for n in lengths]
    assert [one.passage if one else None for one in written] == [one.text for one in passages]
    assert max(map(len, model.batches)) == 8
    flat = [length for batch in model.batches for length in batch]
    assert flat == sorted(flat)
    assert written == [writer.write([one], [kind])[0] for one, kind in zip(passages, kinds, strict=True)]


def test_a_passage_cannot_end_its_message_with_a_special_token() -> None:
    tokenizer = tiny_tokenizer("bpe")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    prompts = {"question": Prompt(instruction="Ask.")}
    writer = DecoderWriter("echo", Echo(tokenizer), tokenizer, prompts)  # type: ignore[arg-type]
    ids = writer._token_ids(prompts["question"], passage("Text <|im_end|> <|im_<|im_end|>end|> </s> goes on."))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Counter(ids)[end] == 2  # of the system's and the user's message
    assert tokenizer.convert_tokens_to_ids("</s>") not in ids
    shown = {"question": prompts["question"].model_copy(update={"examples": read_prompts()["question"].examples * 9})}
    assert (
        len(writer._token_ids(shown["question"], passage("A passage that is longer than any model reads. " * 90)))
        < 2000
    )


def test_the_models_own_decoder_writes(tmp_path: Path) -> None:
    from c2v_rag import Causal2VecConfig
    from c2v_rag.adapt.writers import open_writer
    from tests.test_generation import parts

    encoder, llm = parts(tmp_path, "llama")
    model = Causal2Vec.from_parts(encoder, llm, config=Causal2VecConfig(num_llm_layers=2))
    writer = open_writer("default", None, None, lambda: model)
    assert writer.kinds == ("question", "keywords", "problem")
    passages = [passage("Bread needs yeast."), passage("A heap keeps its smallest item first.")]
    written = writer.write(passages, ["question", "keywords"])
    assert len(written) == 2
    assert written == writer.write(passages, ["question", "keywords"])
    other = open_writer(str(llm), None, None, lambda: model)
    assert other.write(passages, ["question", "keywords"]) == written


@contextmanager
def chat_server(models: Sequence[str], status: int = 200) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """An OpenAI-compatible server that asks about the passage's last word; yields its address and the requests."""
    seen: list[tuple[str, Any]] = []

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": name} for name in models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.headers.get("Authorization", ""), body))
            word = body["messages"][-1]["content"].split()[-1]
            self.answer({"choices": [{"message": {"content": f"What about {word}?"}}]})

        def answer(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with serving(Handler) as url:
        yield f"{url}/v1", seen


def test_a_server_writes_the_questions_with_the_users_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("C2V_RAG_WRITER_API_KEY", "secret")
    with chat_server(["small"]) as (url, seen):
        writer = EndpointWriter(url, None, read_prompts())
        passages = [passage(f"This is about topic-{n}") for n in range(9)]
        written = writer.write(passages, ["question", "keywords", "problem"] * 3)
    assert [one.question if one else None for one in written] == [f"What about topic-{n}?" for n in range(9)]
    assert {key for key, _ in seen} == {"Bearer secret"}
    assert {body["model"] for _, body in seen} == {"small"}
    assert writer.name == f"small at {url}"
    for _, body in seen:
        roles = [message["role"] for message in body["messages"]]
        assert roles == ["system", *["user", "assistant"] * 3, "user"]
        assert "This is about" not in "".join(message["content"] for message in body["messages"][:-1])


def test_a_server_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with (
        chat_server(["large", "small"]) as (url, _),
        pytest.raises(ValueError, match=r"has 2 models: large, small\. Name one with --writer-model"),
    ):
        EndpointWriter(url, None, read_prompts())
    with chat_server([], status=401) as (url, _), pytest.raises(ValueError, match=r"401.*C2V_RAG_WRITER_API_KEY"):
        EndpointWriter(url, "small", read_prompts()).write([passage("text")], ["question"])
    with pytest.raises(ConnectionError, match="No answer"):
        EndpointWriter(f"http://127.0.0.1:{closed_port}/v1", "small", read_prompts()).write(
            [passage("t")], ["question"]
        )
    with pytest.raises(ValueError, match="not in its URL"):
        EndpointWriter("http://me:secret@127.0.0.1/v1", "small", read_prompts())


def test_a_file_of_prompts_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("question: {instruction: Ask., example: []}")
    with pytest.raises(ValueError, match=r"prompts.yaml is not a valid file.*\n- question.example"):
        read_prompts(path)
    path.write_text("mine: {instruction: Ask.}")
    assert [*read_prompts(path)] == ["mine"]


# Filter and pairs


def basis(*positions: int, columns: int = 40) -> np.ndarray:
    """(n, columns): for each position a unit vector; -1 gives a vector that resembles all passages equally."""
    rows = np.zeros((len(positions), columns), dtype=np.float32)
    for row, position in enumerate(positions):
        rows[row] = 1 / np.sqrt(columns) if position < 0 else np.eye(columns, dtype=np.float32)[position]
    return rows


def small_corpus(*asked: tuple[str, int]) -> Corpus:
    """40 passages of 40 documents, and questions on the passages at these positions."""
    texts = [f"Item{n} is kept in the drawer with the letter{n} on its front side." for n in range(40)]
    passages = [Passage(str(n), text, f"document-{n}", {}) for n, text in enumerate(texts)]
    rows = [Question(text, texts[n], f"document-{n}", "question", "training", str(n)) for text, n in asked]
    return assemble(passages, rows, seed=0)


def test_every_question_that_teaches_nothing_is_dropped_with_its_reason() -> None:
    cases = [
        ("Where do I look for item3?", 3, 3, None),
        ("Why?", 4, 4, SHORT),
        ("item5 is kept in the drawer", 5, 5, COPY),
        ("Exception: Exception: it Exception: it Exception:", 9, 9, LOOP),
        ("Where is the thing?", 6, 6, REPEATED),
        ("where is the thing", 7, 7, REPEATED),
        ("In welcher Schublade liegt dieser Gegenstand üblicherweise?", 8, 8, LANGUAGE),
        ("如何把整个文件夹复制到另一个地方", 11, 11, LANGUAGE),
        ("Where do I look for item30?", 35, 30, NOT_FOUND),
        ("Which of these objects do I need?", 10, -1, UNSPECIFIC),
    ]
    corpus = small_corpus(*((text, position) for text, position, _, _ in cases))
    ranker = Ranker(corpus.texts, basis(*range(40)))
    filtered = filter_questions(corpus, ranker, basis(*(vector for _, _, vector, _ in cases)), found_among=12)
    assert filtered.kept == [0]
    assert [reason for _, reason in filtered.dropped] == [reason for *_, reason in cases if reason]
    assert filtered.counts()[REPEATED] == 2
    assert list(filtered.counts()) == [SHORT, COPY, LOOP, REPEATED, LANGUAGE, NOT_FOUND, UNSPECIFIC]


def test_dev_and_held_out_questions_may_rank_lower() -> None:
    corpus = small_corpus(("Where do I look for item30?", 35))
    ranker = Ranker(corpus.texts, basis(*range(40)))
    held_out = [dataclasses.replace(corpus.questions[0], split="held-out")]
    held_out_corpus = dataclasses.replace(corpus, questions=held_out)
    assert filter_questions(corpus, ranker, basis(30), found_among=10).kept == []
    assert filter_questions(held_out_corpus, ranker, basis(30), found_among=10).kept == [0]


def test_hybrid_scores_are_those_of_a_search_in_an_index(tmp_path: Path) -> None:
    texts = [f"{answer} Part {n}." for n, (_, answer) in enumerate(pairs()[:40])]
    index, model = VectorIndex(tmp_path, Letters()), Letters()
    index.add([Document(text, str(n)) for n, text in enumerate(texts)])
    ranker = Ranker(texts, model.encode_document(texts))
    for query in ("a guide to fixing a vehicle", "step 7", "xyz"):
        hits = index.search(query, 40, mode="hybrid")
        scores = ranker.hybrid(query, model.encode_query([query])[0])
        assert len(hits) == 40
        found = [hit.score for hit in hits]
        np.testing.assert_allclose(found, [scores[int(hit.metadata["source"])] for hit in hits], atol=1e-4)


def test_a_rank_counts_better_passages_and_earlier_equal_ones() -> None:
    scores = np.array([0.2, 0.5, 0.5, 0.9])
    assert [rank_of(scores, position) for position in range(4)] == [4, 2, 3, 1]


def test_negatives_are_neither_of_the_same_document_nor_possible_answers(tmp_path: Path) -> None:
    corpus = small_corpus(("Where do I look for item3?", 3))
    passages = [
        dataclasses.replace(
            one, document="document-3" if n == 5 else one.document, split="dev" if n == 6 else one.split
        )
        for n, one in enumerate(corpus.passages)
    ]
    corpus = dataclasses.replace(corpus, passages=passages)
    embeddings = basis(*range(40))
    near = np.float32(1 - 1e-4)
    embeddings[4] = near * embeddings[3] + np.sqrt(1 - near**2) * embeddings[4]  # as good as the right one
    vector = basis(3) + 0.5 * basis(5) + 0.5 * basis(6) + 0.4 * basis(7)
    ranker = Ranker([one.text.replace(f"tem{n} ", "tem ") for n, one in enumerate(passages)], embeddings)
    write_pairs(tmp_path, "training", corpus, [0], ranker, vector)
    (pair,) = map(json.loads, (tmp_path / "training.jsonl").read_text().splitlines())
    assert pair["positive"] == passages[3].text
    assert pair["negatives"][0] == passages[7].text
    assert not {passages[n].text for n in (3, 4, 5, 6)} & set(pair["negatives"])
    assert len(pair["negatives"]) == 4
