"""Documents from files, folders, tables, and the Python standard library's own docstrings.

Read as a stream: nothing here holds more than one file's text (python-docs: one list of passages) at a time.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

PYTHON_DOCS = "python-docs"
Scalar = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to be found, where it came from, and what to show beside it (strings, numbers, booleans)."""

    text: str
    source: str
    metadata: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)


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
        if path.is_file() and path.suffix.lower() not in _READERS | _TABLES:
            raise ValueError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; known: {_known()}.")
    return islice(_read(sources, text_column, on_error), limit)


def _known() -> str:
    return " ".join(sorted(_READERS | _TABLES))


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
        if found.is_file() and not hidden and found.suffix.lower() in _READERS | _TABLES:
            yield found


def _read_file(path: Path, text_column: str) -> Iterator[Document]:
    # File names need not be UTF-8; what a store keeps must be.
    suffix, source = path.suffix.lower(), path.resolve().as_posix().encode("utf-8", "replace").decode("utf-8")
    if suffix in _READERS:
        yield Document(_READERS[suffix](path), source)
        return
    # Read through before the first row is given: a table that breaks off half-way must not pass for a shorter one.
    num_rows = 0
    for record in _TABLES[suffix](path):
        if not isinstance(record.get(text_column), str):
            raise ValueError(
                f"{path}: row {num_rows} has no string {text_column!r}; its columns are {sorted(map(str, record))}. "
                "Name the column that holds the text."
            )
        num_rows += 1
    if not num_rows:
        yield Document("", source)
    for row, record in enumerate(_TABLES[suffix](path)):
        others = {str(key): value for key, value in record.items() if key != text_column and isinstance(value, Scalar)}
        yield Document(record[text_column], source, others | {"row": row})


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
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise ImportError('Reading parquet needs pyarrow: pip install "c2v-rag[files]"') from error
    for batch in pq.ParquetFile(path).iter_batches(1024):
        yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], str]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".py": _read_text,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
}
_TABLES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

# python-docs

# Importing these opens a browser, prints, or starts a program; the rest are tests, or names nobody imports.
_LEFT_OUT = {"antigravity", "this", "idlelib", "turtledemo", "test", "tests", "lib2to3", "distutils", "__main__"}
# Where a public module takes its functions from: os.getpid is the name people know, posix.getpid is not.
_BEHIND = {
    "posix",
    "nt",
    "posixpath",
    "ntpath",
    "genericpath",
    "sre_compile",
    "sre_constants",
    "sre_parse",
    "pydoc_data",
}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@functools.cache
def python_docs() -> tuple[Document, ...]:
    """Docstrings of this Python's standard library: modules, classes, functions and methods, a document each.

    The source is the dotted name. An object that several modules re-export is named once, by the shortest name that a
    module lists in `__all__` (asyncio.gather, not asyncio.tasks.gather).

    They are collected in a process of its own: importing the whole library has effects, and packages imported here
    may have changed it (some add methods to logging.Logger).
    """
    command = [sys.executable, "-I", "-S", "-W", "ignore", __file__]
    collected = subprocess.run(command, check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL).stdout
    return tuple(Document(text, name, {"kind": kind}) for name, kind, text in json.loads(collected))


def _collect_docs() -> list[tuple[str, str, str]]:
    """(dotted name, kind, passage) of every documented public object, by name."""
    found: dict[int, tuple[tuple[bool, bool, bool, int, int, str], str, Any]] = {}
    for module in _standard_modules():
        for name, value, listed in _public_objects(module):
            # A class under another name (typing.Text is str) is a worse name than an unlisted one; a function's
            # alias that a module lists (getpass.getpass is unix_getpass) is a better one.
            renamed = not name.endswith(getattr(value, "__qualname__", ""))
            of_class = inspect.isclass(value) or "." in getattr(value, "__qualname__", "")
            rank = (renamed and of_class, not listed, renamed, name.count("."), len(name), name)
            if id(value) not in found or rank < found[id(value)][0]:
                found[id(value)] = (rank, name, value)
    passages = {}
    for _, full_name, value in found.values():
        name = full_name.removeprefix("builtins.")
        doc = inspect.cleandoc(value.__doc__)
        if len(doc.split()) >= 4:
            passages[name] = (name, _kind(value), f"{name}{_signature(value)}\n\n{doc}")
    return sorted(passages.values())


def _standard_modules() -> Iterator[ModuleType]:
    for name in sorted(sys.stdlib_module_names - _BEHIND):
        if name.startswith("_") or name in _LEFT_OUT:
            continue
        yield from _module_and_below(name)


def _module_and_below(name: str) -> Iterator[ModuleType]:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, AttributeError):  # built without it, or for another operating system
        return
    yield module
    for below in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not below.name.startswith("_") and below.name not in _LEFT_OUT:
            yield from _module_and_below(f"{name}.{below.name}")


def _public_objects(module: ModuleType) -> Iterator[tuple[str, Any, bool]]:
    """(dotted name, object, whether the module lists it) of what has a docstring of its own."""
    if module.__doc__:
        yield module.__name__, module, True
    listed = set(getattr(module, "__all__", ()))
    # Some listed names are loaded on first use and stand in no module's vars.
    lazy = {name: getattr(module, name, None) for name in listed - vars(module).keys()}
    for name, value in [*vars(module).items(), *lazy.items()]:
        if name.startswith("_") or not _is_described(value):
            continue
        home = getattr(value, "__module__", None) or ""
        if name not in listed and home.lstrip("_") != module.__name__.lstrip("_") and home not in _BEHIND:
            continue  # imported for the module's own use
        yield f"{module.__name__}.{name}", value, name in listed
        if inspect.isclass(value):
            for member, raw in vars(value).items():
                inner = getattr(raw, "__func__", raw)
                if not member.startswith("_") and _is_described(inner):
                    yield f"{module.__name__}.{name}.{member}", inner, name in listed
    if module.__name__ == "os":
        for name in module.path.__all__:
            value = getattr(module.path, name)
            if _is_described(value):
                yield f"os.path.{name}", value, True


def _is_described(value: Any) -> bool:
    described = (
        inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, property | functools.cached_property)
    )
    return described and isinstance(getattr(value, "__doc__", None), str) and bool(value.__doc__.strip())


def _signature(value: Any) -> str:
    if not callable(value):
        return ""
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):  # some built-ins have none
        return ""
    # A default may be anything, the whole process environment for one: shown is only what one would type.
    shown = [
        parameter
        if len(repr(parameter.default)) <= 30 and " at 0x" not in repr(parameter.default)
        else parameter.replace(default=...)
        for parameter in signature.parameters.values()
    ]
    return _ADDRESS.sub("", str(signature.replace(parameters=shown))).replace("Ellipsis", "...")


def _kind(value: Any) -> str:
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        return "class"
    return "property" if isinstance(value, property | functools.cached_property) else "function"


if __name__ == "__main__":
    json.dump(_collect_docs(), sys.stdout)
