"""Find the sections of a document: under headings, or the functions and classes of Python code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from c2v_rag.sources import Format

_LINE_END = re.compile(r"\r\n|\r|\n")  # of Python and Markdown; str.splitlines splits at form feeds and others too
_UNDERLINE = re.compile(r"([=\-`:.'\"~^_*+#])\1*[ \t]*")


class Section(NamedTuple):
    """The characters `start` to `end` of a text, and the headings above them, outermost first."""

    start: int
    end: int
    path: tuple[str, ...]


class _Heading(NamedTuple):
    start: int  # of the heading's first line
    body: int  # of the line after the heading
    level: int
    title: str


def title_and_sections(text: str, format: Format) -> tuple[str, list[Section]]:
    """The title of a text, and its sections in order and without gaps; a heading belongs to its section.

    The title is the first heading if it is above all others, else "". A heading without a text of its own is a part of
    the section that follows it. Text without structure is one section with an empty path, and so is Python code with a
    syntax error.
    """
    if format == "python":
        return "", _python_sections(text)
    if format == "text":
        return "", [Section(0, len(text), ())]
    headings = list(_markdown_headings(text) if format == "markdown" else _rst_headings(text))
    found: list[Section] = []
    path: list[_Heading] = []
    start = 0  # of the section that is not complete yet
    for heading in [*headings, None]:
        end = len(text) if heading is None else heading.start
        has_body = bool(text[path[-1].body if path else 0 : end].strip())
        if has_body or (heading is None and start < end):
            found.append(Section(start, end, tuple(above.title for above in path)))
            start = end
        if heading is not None:
            path = [*(above for above in path if above.level < heading.level), heading]
    is_title = bool(headings) and all(heading.level > headings[0].level for heading in headings[1:])
    return headings[0].title if is_title else "", found or [Section(0, len(text), ())]


def _markdown_headings(text: str) -> Iterator[_Heading]:
    from markdown_it import MarkdownIt

    lines = _line_starts(text)
    tokens = MarkdownIt("commonmark").parse(text)
    for token, inline in pairwise(tokens):
        if token.type == "heading_open" and token.map is not None and token.level == 0:
            title = "".join(child.content or " " * (child.type == "softbreak") for child in inline.children or ())
            yield _Heading(lines[token.map[0]], lines[token.map[1]], int(token.tag[1:]), title.strip())


def _rst_headings(text: str) -> Iterator[_Heading]:
    """Titles with an underline that is as long as they are, and perhaps an overline.

    docutils numbers the levels by the order in which the styles appear.
    """
    starts, lines = _line_starts(text), _LINE_END.split(text)
    styles: list[str] = []
    for number in range(1, len(lines)):
        title, underline = lines[number - 1].rstrip(), lines[number].rstrip()
        if not title or title[0].isspace() or _UNDERLINE.fullmatch(title) or not _UNDERLINE.fullmatch(underline):
            continue
        if len(underline) < len(title):
            continue
        above = lines[number - 2].rstrip() if number >= 2 else ""
        has_overline = above == underline
        if above and not has_overline:
            continue  # the last line of a paragraph, such as a table's
        style = underline[0] * (1 + has_overline)
        if style not in styles:
            styles.append(style)
        yield _Heading(starts[number - 1 - has_overline], starts[number + 1], styles.index(style), title)


def _python_sections(text: str) -> list[Section]:
    """One section for each function and class at the top level and each method; the rest is between them."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [Section(0, len(text), ())]
    starts = _line_starts(text)
    found: list[Section] = []

    def add(nodes: list[ast.stmt], start: int, end: int, path: tuple[str, ...]) -> None:
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            node_start, node_end = starts[first - 1], starts[node.end_lineno or node.lineno]
            if text[start:node_start].strip():
                found.append(Section(start, node_start, path))
                start = node_start
            inner = (*path, node.name)
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            if isinstance(node, ast.ClassDef) and methods:
                add(node.body, start, node_end, inner)
            else:
                found.append(Section(start, node_end, inner))
            start = node_end
        if text[start:end].strip():
            found.append(Section(start, end, path))

    add(tree.body, 0, len(text), ())
    return found or [Section(0, len(text), ())]


def _line_starts(text: str) -> list[int]:
    """The offset of each line, and the length of the text at the end, once more for a line that does not exist."""
    return [0, *(found.end() for found in _LINE_END.finditer(text)), len(text), len(text)]
