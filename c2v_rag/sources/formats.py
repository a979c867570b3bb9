"""Read file formats: the text of a text, HTML or PDF file, and the rows of a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CSV_FIELD_CHARACTERS = 2**26


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it first."
        ) from error


def _read_html(path: Path) -> str:
    try:
        import trafilatura
    except ModuleNotFoundError as error:
        if error.name != "trafilatura":
            raise
        raise ImportError('Reading HTML needs trafilatura: pip install "c2v-rag[files]"') from error
    return trafilatura.extract(path.read_bytes(), include_comments=False) or ""


def _read_pdf(path: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ModuleNotFoundError as error:
        if error.name != "pypdf":
            raise
        raise ImportError('Reading PDF needs pypdf: pip install "c2v-rag[files]"') from error
    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(path).pages)
    except PyPdfError as error:
        raise ValueError(f"{path} cannot be read as a PDF: {error}") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error.msg}).") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}.")
            yield record


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    # The limit applies to the whole process, so it is never lowered here. Without a limit, an unclosed quote would read
    # the rest of a large file into one field.
    csv.field_size_limit(max(csv.field_size_limit(), CSV_FIELD_CHARACTERS))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            yield from reader
        except csv.Error as error:
            raise ValueError(f"{path}: not valid CSV after line {reader.line_num} ({error}).") from error


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise ImportError('Reading parquet needs pyarrow: pip install "c2v-rag[files]"') from error
    for batch in pq.ParquetFile(path).iter_batches(1024):
        yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], str]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".py": _read_text,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
}
TABLES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
