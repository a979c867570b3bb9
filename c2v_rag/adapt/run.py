"""The whole chain: passages, questions, filter, training, report. Run as `c2v-rag adapt SOURCE --output FOLDER`."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from c2v_rag.adapt.corpus import Corpus, Ranker, assemble, embed_passages
from c2v_rag.adapt.filter import FOUND_AMONG, Filtered, filter_questions
from c2v_rag.adapt.options import Options, file_hash, model_name
from c2v_rag.adapt.passages import SPLITS, Passage, Split, chunks_of, draw_passages, split_documents
from c2v_rag.adapt.questions import read_questions, save_questions, write_questions
from c2v_rag.adapt.reindex import build_collection, open_stored
from c2v_rag.adapt.report import AdaptReport, compare_scores, describe, judge
from c2v_rag.adapt.scoring import ranks, read_general_sets, score_general
from c2v_rag.adapt.training import (
    PAIRS,
    SOFT_LABELS,
    losses,
    recipe_for,
    run_training,
    steps_within,
    texts_besides_training,
    write_pairs,
)
from c2v_rag.adapt.work import Work, write_text
from c2v_rag.adapt.writers import HEADINGS, can_be_asked, open_writer, writer_kinds
from c2v_rag.index import DEFAULT_COLLECTION, ChunkSettings, StoreAddress
from c2v_rag.model import Causal2Vec
from c2v_rag.sources import read_sources

logger = logging.getLogger(__name__)

MIN_TRAINING = 10  # kept questions
MIN_HELD_OUT = 6
_WRITING_SHARE = 0.5  # of the time, at most
_TRAINING_SHARE = 0.25  # of the time, at least


def adapt(
    sources: Sequence[str | Path] = (),
    *,
    output: str | Path,
    store: StoreAddress | None = None,
    collection: str = DEFAULT_COLLECTION,
    model: str | None = None,
    minutes: float = 20.0,
    questions: int = 2000,
    writer: str = HEADINGS,
    writer_model: str | None = None,
    prompts: str | Path | None = None,
    from_questions: str | Path | None = None,
    questions_only: bool = False,
    general: Sequence[str | Path] = (),
    reindex: bool = False,
    resume: bool = False,
    steps: int | None = None,
    found_among: int = FOUND_AMONG,
    soft_labels: float = SOFT_LABELS,
    seed: int = 0,
    text_column: str = "text",
    device: str | None = None,
    dtype: str | None = None,
    show_progress: bool = False,
) -> AdaptReport:
    """Adapt a model to documents, and report what it gained on documents that it was not trained on.

    The documents are those of `sources` (as for `read_sources`), or the chunks of a `collection` in a `store`. At most
    `questions` passages are drawn, evenly over the documents, and get a question each. `writer`: "headings" (no model),
    "default" (the model's own decoder), a folder or Hub id of a language model, or the URL of an OpenAI-compatible
    server, where `writer_model` names the model. `prompts`: a file in place of the package's. `from_questions`: a file
    of questions; none are written then. `questions_only`: stop when the questions are written.

    `minutes`: how long all of it may take, by an estimate; `steps` sets the number of training steps instead.
    `found_among`: a question is kept if its passage is among this many first hits. `soft_labels`: the weight of the
    hybrid search's scores as a target beside the labels; 0 trains with hard negatives alone. `general`: folders of
    retrieval sets that show what was forgotten. `reindex`: if there is a gain, embed the collection again into
    NAME-adapted. `resume`: continue the run in `output`.

    `output` then holds questions.jsonl, dropped.jsonl, model (a checkpoint), report.html, report.txt, report.json, and
    work (what `resume` needs, and the training's log).

    Raises ValueError for options, documents or questions that cannot be used, FileNotFoundError for missing sources,
    FileExistsError when `output` is in use and `resume` is false, and the errors of loading models. Nothing is written
    before the documents are read.
    """
    options = Options(
        sources=tuple(map(str, sources)), store=store, collection=collection, minutes=minutes, questions=questions,
        model=model_name(model, store, collection), writer=writer, writer_model=writer_model, prompts=_path(prompts),
        from_questions=_path(from_questions), general=tuple(map(Path, general)), steps=steps, found_among=found_among,
        soft_labels=soft_labels, seed=seed, text_column=text_column, device=device, dtype=dtype,
        show_progress=show_progress,
    )  # fmt: skip
    options.check(reindex=reindex)
    options.claim(Path(output), resume=resume)
    run = _Run(options, Path(output))
    corpus = run.write(limited=not questions_only)
    if questions_only:
        advice = f"Read and edit {run.questions_file}, then go on with --resume."
        return run.report(corpus, None, ending="questions written", advice=advice)
    report = run.train(corpus)
    return run.reindex(report) if reindex and report.ending.startswith("gain") else report


class _Run:
    """One run in a folder. Each step keeps its result in `output`, and is left out where that is there."""

    def __init__(self, options: Options, output: Path) -> None:
        self._options = options
        self._output = output
        self._work = Work(output / "work")
        self._kinds = writer_kinds(options.writer, options.prompts)
        self._general = read_general_sets(options.general)
        self.questions_file = output / "questions.jsonl"

    def write(self, *, limited: bool) -> Corpus:
        """Draw passages and get their questions: from the folder, from the given file, or from the writer.

        `limited`: writing ends when half of the minutes are over.
        """
        options = self._options
        given = read_questions(options.from_questions) if options.from_questions else []
        load = functools.cache(lambda: self._load(options.model))  # not every step needs the model
        drawn = self._work.read_json("passages") or self._draw(load)
        passages = [Passage(**row) for row in drawn["passages"]]
        if options.from_questions and not self.questions_file.is_file():
            given = assemble(passages, given, options.seed).questions  # raises an error before anything is written
        self._work.json("run", options.recorded)
        self._work.json("passages", lambda: drawn)
        if self.questions_file.is_file():
            return assemble(passages, read_questions(self.questions_file), options.seed)
        if not options.from_questions:
            spent = self._work.seconds.get("write", 0.0)
            with self._work.timed("write"):
                given = write_questions(
                    passages, options.questions, self._kinds,
                    lambda: open_writer(options.writer, options.writer_model, options.prompts, load), self._work,
                    seconds=60 * options.minutes * _WRITING_SHARE - spent if limited else math.inf,
                    show_progress=options.show_progress,
                )  # fmt: skip
        save_questions(self.questions_file, given)
        return assemble(passages, given, options.seed)

    def _draw(self, load: Callable[[], Causal2Vec]) -> dict[str, Any]:
        """The drawn passages with their splits, and the files that could not be read, as JSON values."""
        options = self._options
        unread: list[str] = []

        def leave_out(path: Path, error: Exception) -> None:
            logger.warning("Left out: %s", error)
            unread.append(str(path))

        if options.store is not None:
            index = open_stored(options.store, options.collection)
            chunks, settings = index.chunks(), index.chunking
        elif options.sources:
            documents = read_sources(options.sources, text_column=options.text_column, on_error=leave_out)
            chunks, settings = chunks_of(documents, load()), ChunkSettings()
        else:
            return {"passages": [], "unread": []}  # the file of questions has the passages
        usable = can_be_asked(None if options.from_questions else options.writer)
        drawn = draw_passages(chunks, options.questions, options.seed, settings, usable)
        passages = split_documents(drawn, options.seed)
        return {"passages": [dataclasses.asdict(passage) for passage in passages], "unread": unread}

    def train(self, corpus: Corpus) -> AdaptReport:
        """Filter the questions, train, and compare the model before and after."""
        self._check_unchanged()
        filtered, kept, before = self._prepare(corpus)
        if before is None:
            advice = (
                f"{len(kept['training'])} questions for training and {len(kept['held-out'])} held-out ones were kept; "
                f"at least {MIN_TRAINING} and {MIN_HELD_OUT} are needed. Nothing was trained. Give more documents, "
                "another writer, or your own questions (--from-questions)."
            )
            return self.report(corpus, filtered, ending="nothing to learn", advice=advice)
        trained, unfinished = self._output / "model", self._work.folder / "model"
        if not trained.is_dir():
            counts = {split: len(numbers) for split, numbers in kept.items()}
            steps, minutes = self._work.json("steps", lambda: self._plan(corpus, counts["training"], counts["dev"]))
            recipe = recipe_for(
                self._options.model, steps=steps, minutes=minutes,
                num_questions=counts["training"], num_dev=counts["dev"], soft_labels=self._options.soft_labels,
            )  # fmt: skip
            with self._work.timed("train"):
                run_training(recipe, self._work.folder / "data", unfinished, self._options.device)
            unfinished.rename(trained)
        with self._work.timed("score"):
            after = self._work.json("after", lambda: self._score_trained(trained, corpus, kept["held-out"]))
        scores = compare_scores([corpus.questions[number] for number in kept["held-out"]], before, after)
        ending, advice = judge(scores["held_out"], scores["general"])
        return self.report(
            corpus, filtered, ending=ending, advice=advice, model=str(trained), losses=losses(unfinished), **scores
        )

    def _prepare(self, corpus: Corpus) -> tuple[Filtered, dict[Split, list[int]], Any]:
        """The filtered questions, those kept by split, and the scores before training (None with too few questions).

        The sets of pairs are written into the work folder. The model is not in memory afterwards.
        """
        model = self._load(self._options.model)
        with self._work.timed("embed"):
            embeddings = embed_passages(model, corpus.texts, self._work, "before")
            vectors = _embed_questions(model, corpus, range(len(corpus.questions)))
        ranker = Ranker(corpus.texts, embeddings)
        filtered = filter_questions(corpus, ranker, vectors, found_among=self._options.found_among)
        _save_dropped(self._output / "dropped.jsonl", filtered)
        kept = {split: [n for n in filtered.kept if corpus.questions[n].split == split] for split in SPLITS}
        if len(kept["training"]) < MIN_TRAINING or len(kept["held-out"]) < MIN_HELD_OUT:
            return filtered, kept, None
        for split in PAIRS:
            write_pairs(self._work.folder / "data", split, corpus, kept[split], ranker, vectors[kept[split]])
        held_out = kept["held-out"]
        with self._work.timed("score"):
            before = self._work.json("before", lambda: self._score(model, corpus, held_out, ranker, vectors[held_out]))
        return filtered, kept, before

    def _check_unchanged(self) -> None:
        """Raise ValueError if the questions were edited after the steps that depend on them had begun."""
        digest = file_hash(self.questions_file)
        if self._work.json("questions", lambda: digest) != digest:
            raise ValueError(
                f"{self.questions_file} was changed after training had begun. Give it with --from-questions, and "
                "another folder as --output."
            )

    def _plan(self, corpus: Corpus, num_questions: int, num_dev: int) -> tuple[int, float | None]:
        """The number of training steps, and after how many minutes training ends at the latest."""
        options, seconds = self._options, self._work.seconds
        if options.steps is not None:
            return options.steps, None
        speed = len(corpus.passages) / seconds["embed"]
        left = 60 * options.minutes - sum(seconds.values()) - texts_besides_training(num_questions, num_dev) / speed
        left -= seconds["embed"] + seconds["score"]  # after training, for the new model
        available = max(left, 60 * options.minutes * _TRAINING_SHARE)
        return steps_within(available, speed, num_questions), available / 60

    def _score(
        self, model: Causal2Vec, corpus: Corpus, numbers: Sequence[int], ranker: Ranker, vectors: np.ndarray
    ) -> dict[str, Any]:
        """The ranks of the questions `numbers` with the embeddings `vectors`, and the scores on the general sets."""
        return {"ranks": ranks(corpus, numbers, ranker, vectors), "general": score_general(model, self._general)}

    def _score_trained(self, trained: Path, corpus: Corpus, numbers: Sequence[int]) -> dict[str, Any]:
        model = self._load(str(trained))
        ranker = Ranker(corpus.texts, embed_passages(model, corpus.texts, self._work, "after"))
        return self._score(model, corpus, numbers, ranker, _embed_questions(model, corpus, numbers))

    def report(self, corpus: Corpus, filtered: Filtered | None, **fields: Any) -> AdaptReport:
        """The report of the run, which is saved. `fields`: those that `describe` does not set."""
        options = self._options
        report = AdaptReport(
            output=str(self._output),
            base_model=options.model,
            writer=str(options.from_questions) if options.from_questions else options.writer,
            unread=(self._work.read_json("passages") or {"unread": []})["unread"],
            seconds=self._work.seconds,
            **describe(corpus, filtered),
            **{"model": None} | fields,
        )
        report.save(self._output)
        return report

    def reindex(self, report: AdaptReport) -> AdaptReport:
        """Build the new collection; the report with its name, which is saved."""
        options = self._options
        assert options.store is not None, "checked with the options"
        model = self._load(str(report.model))
        with self._work.timed("reindex"):
            name = build_collection(options.store, options.collection, model, show_progress=options.show_progress)
        report = dataclasses.replace(report, collection=name, seconds=self._work.seconds)
        report.save(self._output)
        return report

    def _load(self, name: str) -> Causal2Vec:
        return Causal2Vec.from_pretrained(name, device=self._options.device, dtype=self._options.dtype)


def _embed_questions(model: Causal2Vec, corpus: Corpus, numbers: Sequence[int]) -> np.ndarray:
    """(Q, D) embeddings of the questions `numbers`."""
    return model.encode_query([corpus.questions[number].question for number in numbers])


def _save_dropped(path: Path, filtered: Filtered) -> None:
    rows = ({"reason": reason, **dataclasses.asdict(question)} for question, reason in filtered.dropped)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
