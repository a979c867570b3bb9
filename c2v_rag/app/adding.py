"""Adds uploaded files and sources to an index. A `Task` shows the progress and can stop the run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from c2v_rag.app.task import Task
from c2v_rag.index import IndexReport, KnownFiles, VectorIndex, remove_vanished
from c2v_rag.sources import PYTHON_DOCS, Document, files_below, python_docs, read_sources

UPLOAD = "upload/"  # prefix of an upload's source
FILE_NAME = "file_name"  # metadata key of an upload
WAIT_S = 2.0
WRITE_EVERY = 32  # chunks; one or two seconds of work on a CPU, so that stopping is quick


@dataclasses.dataclass(frozen=True)
class Added:
    """The result of `add`.

    `left_out`: a message for each file that could not be read. `empty`: names of files without text. `kept`: names of
    uploads whose earlier versions are still in the collection.
    """

    report: IndexReport
    left_out: list[str]
    empty: list[str]
    kept: list[str]


def add(
    task: Task[Any],
    index: VectorIndex,
    uploads: Sequence[Path],
    sources: Sequence[str],
    *,
    replace_uploads: bool = False,
) -> Added:
    """Index uploaded files, and `sources` as `c2v-rag index` does.

    An upload's source is `upload/HASH/NAME`, with the hash of its content; its metadata has `file_name`. If the same
    file is uploaded again, nothing changes; another file of the same name is added, and both stay. With
    `replace_uploads`, earlier uploads of the same names are deleted after the new ones were read.

    The call waits while another process writes to the store. Raises FileNotFoundError for a source that does not exist.
    """
    left_out: list[str] = []
    empty: list[str] = []
    read_uploads: dict[str, str] = {}  # source -> file name

    unread: list[Path] = []

    def leave_out(path: Path, error: Exception) -> None:
        unread.append(path)
        # Visitors need not know in which temporary folder an upload is.
        message = str(error).replace(str(path), path.name) if path in uploads else str(error)
        left_out.append(message if path.name in message else f"{path.name}: {message}")

    def documents() -> Iterator[Document]:
        for path in uploads:
            task.report(f"Reading {path.name} …")
            try:
                source = upload_source(path)
                for document in read_sources([path], on_error=leave_out):
                    name = source.rpartition("/")[2]
                    read_uploads[source] = name
                    yield dataclasses.replace(document, source=source, metadata={**document.metadata, FILE_NAME: name})
            except (OSError, ValueError) as error:  # the file was deleted, or its type cannot be read
                leave_out(path, error)
        yield from read_sources(sources, on_error=leave_out, skip=known.paths)

    def documents_with_empty_noted() -> Iterator[Document]:
        for document in documents():
            if not document.text.strip():
                empty.append(Path(document.source).name)
            yield document

    def report_progress(read: int, added: int) -> None:
        of = f" of {total:,}" if read <= total else ""  # a table has many documents: `total` counts it as one
        task.report(f"{read:,}{of} documents read, {added:,} passages embedded …", read / total if of else None)

    for source in sources:
        next(read_sources([source], limit=0), None)  # a wrong path is reported before anything is written
    total = len(uploads) + sum(
        len(python_docs()) if source == PYTHON_DOCS else sum(1 for _ in files_below(Path(source))) for source in sources
    )
    task.report("Looking for files that have changed …")
    known = KnownFiles(index, sources)
    while True:
        try:
            report = index.add(documents_with_empty_noted(), on_progress=report_progress, write_every=WRITE_EVERY)
            break
        except PermissionError as error:
            if error.errno is not None:  # an error of the operating system, not the store's lock: waiting does not help
                raise
            task.report(f"Waiting for another run to end. {error}")
            task.wait(WAIT_S)
    known.save(unread)
    removed = sum(remove_vanished(index, Path(source)) for source in sources if Path(source).is_dir())
    earlier = _earlier_uploads(index, read_uploads)
    if replace_uploads:
        removed += sum(index.delete(source) for source in earlier)
    kept = [] if replace_uploads else sorted({source.rpartition("/")[2] for source in earlier})
    report = dataclasses.replace(report, removed=removed, unchanged=report.unchanged + known.num_chunks)
    return Added(report, left_out, empty, kept)


def upload_source(path: Path) -> str:
    """The source `upload/HASH/NAME` of an uploaded file. Files with different content have different sources."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    name = path.name.encode("utf-8", "replace").decode("utf-8")  # Chroma needs valid UTF-8
    return f"{UPLOAD}{digest}/{name}"


def _earlier_uploads(index: VectorIndex, read_uploads: dict[str, str]) -> list[str]:
    """Sources of earlier uploads with other content and the same file names as `read_uploads`."""
    if not read_uploads:
        return []
    names = set(read_uploads.values())
    return [
        source
        for source in index.sources() - read_uploads.keys()
        if source.startswith(UPLOAD) and source.rpartition("/")[2] in names
    ]
