"""Documents from files, folders and tables, read as a stream: at most one file's text is in memory.

A file gives all of its documents or none: they are written to a temporary file before the first one is returned.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

from c2v_rag.sources.docstrings import PYTHON_DOCS, python_docs
from c2v_rag.sources.document import Document, Scalar
from c2v_rag.sources.formats import READERS, TABLES

_BYTES_IN_MEMORY = 2**22  # of the temporary file; a larger one is written to disk

OnError = Callable[[Path, Exception], None]


def read_sources(
    sources: Sequence[str | Path],
    *,
    limit: int | None = None,
    text_column: str = "text",
    on_error: OnError | None = None,
    skip: Collection[Path] = (),
) -> Iterator[Document]:
    """Documents of files, folders (with their subfolders) and "python-docs", in the order given.

    Files of these kinds are read: .txt .md .rst .html .py .docx .pptx .xlsx .epub; .pdf, one document per page; and
    .jsonl .csv .parquet, one document per row, with a column `text_column`. A document's source is its file's absolute
    path; the other columns of a table become metadata, and a column "title" the title.
    An empty file gives one empty document, so that an index deletes its earlier text. `limit`: stop after this many
    documents. `skip`: files that are not read, because an index knows them (`c2v_rag.index.KnownFiles`).

    A file that cannot be read to its end gives no document. `on_error` is called with its path and the error, and the
    next file is read. Without `on_error`, the error is raised: an OSError, an ImportError that names the missing
    package, or a ValueError with the file and the reason. Errors of other libraries become such a ValueError.

    Raises FileNotFoundError for a source that does not exist, ValueError for a file of another kind.
    """
    paths = [source for source in sources if str(source) != PYTHON_DOCS]
    for source in paths:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}. (Built in: {PYTHON_DOCS!r}.)")
        if path.is_file() and path.suffix.lower() not in READERS | TABLES:
            known = " ".join(sorted(READERS | TABLES))
            raise ValueError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; known: {known}.")
    return islice(_read(sources, text_column, on_error, skip), limit)


def files_below(path: Path) -> Iterator[Path]:
    """The readable files in a folder and its subfolders, without hidden ones; for a file, the file itself."""
    if path.is_file():
        yield path
        return
    for found in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in found.relative_to(path).parts)
        if found.is_file() and not hidden and found.suffix.lower() in READERS | TABLES:
            yield found


def source_of(path: Path) -> str:
    """The source of a file's documents: its absolute path."""
    # A file name may be invalid UTF-8, but stores accept only valid UTF-8.
    return path.resolve().as_posix().encode("utf-8", "replace").decode("utf-8")


def _read(
    sources: Sequence[str | Path], text_column: str, on_error: OnError | None, skip: Collection[Path]
) -> Iterator[Document]:
    read: set[str] = set()
    for source in sources:
        if str(source) == PYTHON_DOCS:
            yield from python_docs()
            continue
        for path in files_below(Path(source)):
            if path in skip or (name := source_of(path)) in read:  # a file may be reached by several paths
                continue
            read.add(name)
            with tempfile.SpooledTemporaryFile(_BYTES_IN_MEMORY) as copy:
                try:
                    for document in _read_file(path, text_column):
                        pickle.dump(document, copy)
                except Exception as error:
                    error_with_path = _with_path(path, error)
                    if on_error is None:
                        raise error_with_path from error
                    on_error(path, error_with_path)
                    continue
                end = copy.tell()
                copy.seek(0)
                while copy.tell() < end:
                    yield pickle.load(copy)


def _with_path(path: Path, error: Exception) -> Exception:
    """The error itself if it names the file or a missing package, else a ValueError with the file and the reason."""
    if isinstance(error, OSError | ImportError) or (isinstance(error, ValueError) and str(path) in str(error)):
        return error
    return ValueError(f"{path} cannot be read: {type(error).__name__}: {error}")


def _read_file(path: Path, text_column: str) -> Iterator[Document]:
    suffix, source = path.suffix.lower(), source_of(path)
    if suffix in READERS:
        part = None
        for part in READERS[suffix](path):
            yield Document(part.text, source, dict(part.metadata), part.title, part.format)
        if part is None:
            yield Document("", source)
        return
    row = -1
    for row, record in enumerate(TABLES[suffix](path)):
        text = record.get(text_column)
        if not isinstance(text, str):
            raise ValueError(
                f"{path}: row {row} has no string {text_column!r}; its columns are {sorted(map(str, record))}. "
                "Name the column that holds the text."
            )
        others = {str(key): value for key, value in record.items() if key != text_column and isinstance(value, Scalar)}
        title = others.get("title")
        yield Document(text, source, others | {"row": row}, title if isinstance(title, str) else "")
    if row < 0:
        yield Document("", source)
