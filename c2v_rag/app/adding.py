"""Files that someone gave -> documents -> the index, watched and stopped through a `Task`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from c2v_rag.app.task import Task
from c2v_rag.index import IndexReport, VectorIndex, remove_vanished
from c2v_rag.sources import PYTHON_DOCS, Document, files_below, python_docs, read_sources

WAIT_S = 2.0
WRITE_EVERY = 32  # chunks: a second or two on a CPU, so that stopping is quick


@dataclasses.dataclass(frozen=True)
class Added:
    """`left_out`: a line for each file that could not be read. `empty`: names of files that hold no text."""

    report: IndexReport
    left_out: list[str]
    empty: list[str]


def add(task: Task[Any], index: VectorIndex, uploads: Sequence[Path], sources: Sequence[str]) -> Added:
    """Index uploaded files under their names, and `sources` as `c2v-rag index` does.

    While someone else writes to the store, it waits. Raises FileNotFoundError for a source that does not exist.
    """
    left_out: list[str] = []
    empty: list[str] = []

    def leave_out(path: Path, error: Exception) -> None:
        shown = str(error).replace(str(path), path.name) if path in uploads else str(error)
        left_out.append(shown if path.name in shown else f"{path.name}: {shown}")

    def documents() -> Iterator[Document]:
        for path in uploads:
            task.report(f"Reading {path.name} …")
            try:
                for document in read_sources([path], on_error=leave_out):
                    yield dataclasses.replace(document, source=path.name)
            except (OSError, ValueError) as error:  # gone, or of a kind that is not read
                leave_out(path, error)
        yield from read_sources(sources, on_error=leave_out)

    def counted() -> Iterator[Document]:
        for document in documents():
            if not document.text.strip():
                empty.append(Path(document.source).name)
            yield document

    def report_progress(read: int, added: int) -> None:
        of = f" of {total:,}" if read <= total else ""  # a table holds more documents than one
        task.report(f"{read:,}{of} documents read, {added:,} passages embedded …", read / total if of else None)

    for source in sources:
        next(read_sources([source], limit=0), None)  # a wrong path is an error before anything is written
    total = len(uploads) + sum(
        len(python_docs()) if source == PYTHON_DOCS else sum(1 for _ in files_below(Path(source))) for source in sources
    )
    while True:
        try:
            report = index.add(counted(), on_progress=report_progress, write_every=WRITE_EVERY)
            break
        except PermissionError as error:
            task.report(f"Waiting for another run to end. {error}")
            task.wait(WAIT_S)
    removed = sum(remove_vanished(index, Path(source)) for source in sources if Path(source).is_dir())
    return Added(dataclasses.replace(report, removed=removed), left_out, empty)
