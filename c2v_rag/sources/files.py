"""Documents from files, folders and tables, read as a stream: no more than one file's text is held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from c2v_rag.sources.docstrings import PYTHON_DOCS, python_docs
from c2v_rag.sources.document import Document, Scalar
from c2v_rag.sources.formats import READERS, TABLES


def read_sources(
    sources: Sequence[str | Path],
    *,
    limit: int | None = None,
    text_column: str = "text",
    on_error: Callable[[Path, Exception], None] | None = None,
) -> Iterator[Document]:
    """Documents of files, folders (searched through) and "python-docs", in the order given.

    Read are .txt .md .rst .html .pdf .py and, a document a row, .jsonl .csv .parquet with a column `text_column`.
    A document's source is its file's absolute path; other columns of a table become metadata. An empty file gives an
    empty document, so that an index learns that its text is gone. `limit` stops after so
    many documents. `on_error` is told of a file that cannot be read, which is then left out; without it, the error
    is raised.

    Raises FileNotFoundError for a source that does not exist, ValueError for a file of another kind.
    """
    paths = [source for source in sources if str(source) != PYTHON_DOCS]
    for source in paths:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}. (Built in: {PYTHON_DOCS!r}.)")
        if path.is_file() and path.suffix.lower() not in READERS | TABLES:
            raise ValueError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; known: {_known()}.")
    return islice(_read(sources, text_column, on_error), limit)


def _known() -> str:
    return " ".join(sorted(READERS | TABLES))


def _read(
    sources: Sequence[str | Path], text_column: str, on_error: Callable[[Path, Exception], None] | None
) -> Iterator[Document]:
    for source in sources:
        if str(source) == PYTHON_DOCS:
            yield from python_docs()
            continue
        for path in files_below(Path(source)):
            try:
                yield from _read_file(path, text_column)
            except (OSError, ValueError) as error:
                if on_error is None:
                    raise
                on_error(path, error)


def files_below(path: Path) -> Iterator[Path]:
    """The files that can be read in a folder and below it, hidden ones left out; a file is its own only one."""
    if path.is_file():
        yield path
        return
    for found in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in found.relative_to(path).parts)
        if found.is_file() and not hidden and found.suffix.lower() in READERS | TABLES:
            yield found


def _read_file(path: Path, text_column: str) -> Iterator[Document]:
    # File names need not be UTF-8; what a store keeps must be.
    suffix, source = path.suffix.lower(), path.resolve().as_posix().encode("utf-8", "replace").decode("utf-8")
    if suffix in READERS:
        yield Document(READERS[suffix](path), source)
        return
    # Read through before the first row is given: a table that breaks off half-way must not pass for a shorter one.
    num_rows = 0
    for record in TABLES[suffix](path):
        if not isinstance(record.get(text_column), str):
            raise ValueError(
                f"{path}: row {num_rows} has no string {text_column!r}; its columns are {sorted(map(str, record))}. "
                "Name the column that holds the text."
            )
        num_rows += 1
    if not num_rows:
        yield Document("", source)
    for row, record in enumerate(TABLES[suffix](path)):
        others = {str(key): value for key, value in record.items() if key != text_column and isinstance(value, Scalar)}
        yield Document(record[text_column], source, others | {"row": row})
