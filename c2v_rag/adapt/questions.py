"""Questions on passages: the file that a person reads and edits, and the steps from requests to this file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from tqdm.auto import tqdm

from c2v_rag.adapt.passages import SPLITS, Passage, Split
from c2v_rag.adapt.work import Work, write_text
from c2v_rag.sentences import one_line

BLOCK = 64  # passages whose questions are written at a time; a killed run loses at most one block
MAX_CHARACTERS = 300  # of a question
_ERRORS_SHOWN = 5
_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_OPENING = re.compile(r"^(?:\W*\d+[.)]\s+|[-*•]\s+|\W*(?:question|query|keywords?|problem|q)\W*:\W*)+", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Written:
    """A question and the passage that it is asked about, which may be shorter than the passage it was made from."""

    question: str
    passage: str


class Writer(Protocol):
    """Writes a question for each passage. `kinds`: the kinds of questions that it can write."""

    name: str
    kinds: tuple[str, ...]

    def write(self, passages: Sequence[Passage], kinds: Sequence[str]) -> list[Written | None]:
        """For each passage a question of the kind at the same position, or None where none came out."""
        ...


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of the questions' file. `document`: the document of the passage; `split`: None until it is known."""

    question: str
    passage: str
    document: str
    kind: str = "question"
    split: Split | None = None
    passage_id: str = ""


def write_questions(
    passages: Sequence[Passage],
    number: int,
    kinds: Sequence[str],
    open_writer: Callable[[], Writer],
    work: Work,
    *,
    seconds: float = math.inf,
    show_progress: bool = False,
) -> list[Question]:
    """At most `number` questions: one for each passage, then a second one of another kind, and so on.

    Finished blocks are read from `work`; the writer is opened only if a block is missing. No new block is begun after
    `seconds`; passages are in random order, so that the questions are on all documents then too.
    """
    shuffled = sorted(passages, key=lambda passage: hashlib.sha256(passage.id.encode()).digest())
    requests = [
        (passage, kinds[(position + turn) % len(kinds)])
        for turn in range(len(kinds))
        for position, passage in enumerate(shuffled)
    ][:number]
    started = time.perf_counter()
    writer: Writer | None = None

    def write(asked: Sequence[tuple[Passage, str]]) -> list[dict[str, str] | None]:
        nonlocal writer
        if time.perf_counter() - started > seconds:
            return []
        writer = writer or open_writer()
        found = writer.write([passage for passage, _ in asked], [kind for _, kind in asked])
        return [None if one is None else dataclasses.asdict(one) for one in found]

    questions: list[Question] = []
    with tqdm(total=len(requests), unit="question", disable=not show_progress) as progress:
        for start in range(0, len(requests), BLOCK):
            asked = requests[start : start + BLOCK]
            rows = work.json(f"written/{start // BLOCK:05d}", lambda asked=asked: write(asked))  # type: ignore[misc]
            progress.update(len(asked))
            questions += [
                Question(row["question"], row["passage"], passage.document, kind, passage.split, passage.id)
                for (passage, kind), row in zip(asked, rows, strict=False)  # no rows where the time was over
                if row is not None
            ]
    return questions


def clean(answer: str) -> str:
    """The first line of a writer's answer without numbering, label and quotes; "" where it is empty or too long."""
    lines = [_OPENING.sub("", line.strip()).strip("\"'“”«»*` ") for line in _THINKING.sub("", answer).splitlines()]
    question = one_line(next((line for line in lines if line), ""))
    return question if len(question) <= MAX_CHARACTERS else ""


def save_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write JSON lines, the question first, so that a person can read and edit them."""
    lines = [json.dumps(dataclasses.asdict(question), ensure_ascii=False) for question in questions]
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_questions(path: Path) -> list[Question]:
    """Read JSON lines with "question", "passage", "document" and optional "kind", "split" and "passage_id".

    Raises FileNotFoundError; ValueError with the numbers of the lines that cannot be used, for a document in two
    splits, and for a file without questions.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split at U+2028
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it first."
        ) from error
    questions: list[Question] = []
    errors: list[str] = []
    split_of: dict[str, tuple[Split | None, int]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _question(line)
        if isinstance(question, str):
            errors.append(f"{path}:{number}: {question}")
            continue
        split, earlier = split_of.setdefault(question.document, (question.split, number))
        if split != question.split:
            errors.append(
                f"{path}:{number}: the document {question.document!r} has the split {question.split!r} here and "
                f"{split!r} in line {earlier}; a document must be in one split."
            )
        questions.append(question)
    if errors:
        more = f"\n... and {len(errors) - _ERRORS_SHOWN} more" if len(errors) > _ERRORS_SHOWN else ""
        raise ValueError("\n".join(errors[:_ERRORS_SHOWN]) + more)
    if not questions:
        raise ValueError(f"{path} holds no questions.")
    return questions


def _question(line: str) -> Question | str:
    """The row of a line, or what is wrong with it."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not valid JSON ({error.msg} at column {error.colno})."
    if not isinstance(row, dict):
        return f"expected a JSON object, got {type(row).__name__}."
    known = {field.name for field in dataclasses.fields(Question)}
    if unknown := sorted(row.keys() - known):
        return f"unknown keys {unknown}; known are {sorted(known)}."
    for name in ("question", "passage", "document"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"{name!r} must be a text that is not empty, got {row.get(name)!r}."
    if row.get("split") not in (None, *SPLITS):
        return f"'split' must be one of {list(SPLITS)}, got {row['split']!r}."
    for name in ("kind", "passage_id"):
        if not isinstance(row.get(name, ""), str):
            return f"{name!r} must be a text, got {row[name]!r}."
    return Question(**cast(dict[str, Any], row))
