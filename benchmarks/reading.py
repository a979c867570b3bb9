"""How much of HTML pages each reader keeps: python benchmarks/reading.py PAGE.html ...

"text": share of the page's sequences of four words that the reader kept. The page is what is in <main>, <article> or
<body>, without navigation. "foreign": share of the reader's sequences that are not in the page, such as addresses of
links. "headings": kept as Markdown headings. Readers that are not installed are left out; docling needs pip install
docling in an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup

from c2v_rag.sources.formats import READERS


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def sequences(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + 4]) for start in range(len(found) - 3)}


def page_of(content: bytes) -> Any:
    page = BeautifulSoup(content, "html.parser")
    for element in page(["script", "style", "nav", "noscript", "header", "footer", "aside"]):
        element.decompose()
    return page.find("main") or page.find("article") or page.body or page


def readers() -> dict[str, Callable[[Path], str]]:
    found: dict[str, Callable[[Path], str]] = {"c2v-rag": lambda path: next(READERS[".html"](path)).text}
    if importlib.util.find_spec("trafilatura"):
        import trafilatura

        found["trafilatura"] = lambda path: trafilatura.extract(path.read_bytes(), output_format="markdown") or ""
    if importlib.util.find_spec("markitdown"):
        import markitdown

        found["markitdown"] = lambda path: markitdown.MarkItDown().convert_local(path).markdown
    if importlib.util.find_spec("docling"):
        from docling.document_converter import DocumentConverter

        converter = DocumentConverter()
        found["docling"] = lambda path: converter.convert(path).document.export_to_markdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+")
    arguments = parser.parse_args()
    for path in arguments.pages:
        page = page_of(path.read_bytes())
        expected = sequences(page.get_text(" "))
        headings = [" ".join(words(one.get_text())) for one in page.find_all(re.compile("^h[1-6]$"))]
        for name, read in readers().items():
            started = time.perf_counter()
            text = read(path)
            seconds = time.perf_counter() - started
            text = re.sub(r"\]\([^)]*\)", "]", text)
            got = sequences(text)
            kept = {" ".join(words(line)) for line in re.findall(r"^#+ (.*)", text, re.MULTILINE)}
            print(
                f"{path.name}, {name}: text {len(expected & got) / len(expected):.0%}, foreign "
                f"{len(got - expected) / max(1, len(got)):.0%}, headings {sum(one in kept for one in headings)} of "
                f"{len(headings)}, {seconds:.2f} s"
            )


if __name__ == "__main__":
    main()
