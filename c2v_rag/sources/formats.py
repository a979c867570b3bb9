"""Read file formats: the text of a file with its title and structure, and the rows of a table."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from c2v_rag.sources.document import Format, Scalar

CSV_FIELD_CHARACTERS = 2**26
# HTML elements that are not read; and those that are read only inside <main> or <article>.
_NOT_READ = ["script", "style", "template", "noscript", "nav", "aside", "svg"]
_AROUND_TEXT = ["header", "footer"]
_OFFICE = {".docx": "DocxConverter", ".pptx": "PptxConverter", ".xlsx": "XlsxConverter", ".epub": "EpubConverter"}


class Part(NamedTuple):
    """A text of a file: the whole file, or one page of it."""

    text: str
    title: str = ""
    format: Format = "text"
    metadata: Mapping[str, Scalar] = MappingProxyType({})


def _read_plain(path: Path) -> Iterator[Part]:
    yield Part(_read_text(path))


def _read_markdown(path: Path) -> Iterator[Part]:
    yield Part(_read_text(path), format="markdown")


def _read_rst(path: Path) -> Iterator[Part]:
    yield Part(_read_text(path), format="rst")


def _read_python(path: Path) -> Iterator[Part]:
    yield Part(_read_text(path), path.stem, "python")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it first."
        ) from error


def _read_html(path: Path) -> Iterator[Part]:
    """The page as Markdown, without navigation, link targets and images: what is in <main>, <article> or <body>."""
    try:
        import markdownify
        from bs4 import BeautifulSoup
    except ModuleNotFoundError as error:
        if error.name not in ("bs4", "markdownify"):
            raise
        raise ImportError('Reading HTML needs markdownify: pip install "c2v-rag[files]"') from error
    page = BeautifulSoup(path.read_bytes(), "html.parser")
    title = page.title.get_text(" ", strip=True) if page.title else ""
    for element in page(_NOT_READ):
        element.decompose()
    articles = page("article")
    content = page.find("main") or (articles[0] if len(articles) == 1 else page.body or page)
    for element in content(_AROUND_TEXT):
        if element.find_parent(["article", "main"]) is None:
            element.decompose()
    # Without escapes, so that the passage has the characters of the page.
    text = markdownify.MarkdownConverter(
        heading_style="ATX", strip=["a", "img"], escape_asterisks=False, escape_underscores=False, escape_misc=False
    ).convert_soup(content)
    yield Part(re.sub(r"\n{3,}", "\n\n", text).strip(), " ".join(title.split()), "markdown")


def _read_pdf(path: Path) -> Iterator[Part]:
    """A part for each page that has text; "page" counts from 1."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ModuleNotFoundError as error:
        if error.name != "pypdf":
            raise
        raise ImportError('Reading PDF needs pypdf: pip install "c2v-rag[files]"') from error
    try:
        reader = PdfReader(path)
        title = str((reader.metadata and reader.metadata.title) or "").strip()
        for number, page in enumerate(reader.pages, start=1):
            if (text := page.extract_text()).strip():
                yield Part(text, title, metadata={"page": number})
    except PyPdfError as error:
        raise ValueError(f"{path} cannot be read as a PDF: {error}") from error


def _read_office(path: Path) -> Iterator[Part]:
    """Word, PowerPoint, Excel and EPUB files, converted to Markdown.

    The converter of the suffix is called, because MarkItDown itself would read a damaged file as plain text.
    """
    missing = f'Reading {path.suffix} needs markitdown: pip install "c2v-rag[office]"'
    try:
        from markitdown import MissingDependencyException, StreamInfo, converters
    except ModuleNotFoundError as error:
        if error.name != "markitdown":
            raise
        raise ImportError(missing) from error
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        try:
            converted = getattr(converters, _OFFICE[suffix])().convert(file, StreamInfo(extension=suffix))
        except MissingDependencyException as error:
            raise ImportError(missing) from error
    yield Part(converted.markdown, (converted.title or "").strip(), "markdown")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. ValueError, with the file's name and the line, for anything else."""
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


def csv_reader(file: Iterable[str]) -> csv.DictReader[str]:
    """The rows of a CSV file, opened with `newline=""`; fields of up to `CSV_FIELD_CHARACTERS` are read."""
    # The limit applies to the whole process, so it is never lowered here. Without a limit, an unclosed quote would read
    # the rest of a large file into one field.
    csv.field_size_limit(max(csv.field_size_limit(), CSV_FIELD_CHARACTERS))
    return csv.DictReader(file)


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv_reader(file)
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


READERS: dict[str, Callable[[Path], Iterator[Part]]] = {
    ".txt": _read_plain,
    ".md": _read_markdown,
    ".rst": _read_rst,
    ".py": _read_python,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
    **dict.fromkeys(_OFFICE, _read_office),
}
TABLES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
