"""The examples in the documentation run and print what it shows."""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
import re
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from llama_index.embeddings.c2v import C2VRetriever, Causal2VecEmbedding

from c2v_rag import Causal2Vec, VectorIndex
from chroma_c2v import Causal2VecEmbeddingFunction
from langchain_c2v import C2VRetriever as LangChainRetriever
from langchain_c2v import Causal2VecEmbeddings
from sentence_transformers_c2v import Causal2VecModule, load

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "shown",
    [
        Causal2Vec,
        VectorIndex,
        Causal2VecEmbeddingFunction,
        Causal2VecEmbedding,
        C2VRetriever,
        LangChainRetriever,
        Causal2VecModule,
        load,
    ],
)
def test_examples_in_docstrings_print_the_shown_output(
    shown: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (test for test in doctest.DocTestFinder(recurse=False).find(shown) if test.examples)
    output = StringIO()
    result = doctest.DocTestRunner().run(example, out=output.write)
    assert result.attempted >= 3
    assert result.failed == 0, output.getvalue()


def test_the_examples_in_the_langchain_docstring_print_the_shown_output() -> None:
    """The docstring follows LangChain's template: code blocks, some followed by a block with the printed output."""
    doc = inspect.getdoc(Causal2VecEmbeddings) or ""
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:[ ]{8,}.*\n|\n)+)", doc + "\n")
    blocks = [textwrap.dedent(block).strip() for block in blocks]
    names: dict[str, object] = {}
    checked = 0
    printed = ""
    for block in blocks:
        if block.isdigit():
            assert printed.strip() == block
            checked += 1
            continue
        output = StringIO()
        with redirect_stdout(output):
            code = compile(block, "docstring", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            waiting = eval(code, names)
            if inspect.iscoroutine(waiting):
                asyncio.run(waiting)
        printed = output.getvalue()
    assert checked == 2
    assert len(blocks) == 6


def test_the_first_example_of_the_readme_prints_the_shown_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    shown_output = re.search(r"^# (.*)$", code, re.MULTILINE)
    assert shown_output
    output = StringIO()
    with redirect_stdout(output):
        exec(code, {})
    number = re.compile(r"\d+\.?\d*")
    assert number.sub("#", output.getvalue().strip()) == number.sub("#", shown_output[1])
    printed = [float(found) for found in number.findall(output.getvalue())]
    assert printed == pytest.approx([float(found) for found in number.findall(shown_output[1])], abs=0.02)


def test_the_readmes_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"[`$ ]make ([\w-]+)", README))
    assert targets == {"demo", "demo-app", "docs", "test"}
    for target in targets:
        assert f"\n{target}:" in makefile
    assert "@@" not in README


def examples(page: Path) -> list[str]:
    """The Python examples of a page, without those that follow a comment "not run" with its reason."""
    blocks = re.finditer(r"(<!-- not run: .+ -->\n)?```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [block[2] for block in blocks if block[1] is None]


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_the_examples_in_the_documentation_print_the_shown_output(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page run in order; the last line of each is a comment with its output."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in examples(page):
        code, shown_output = re.fullmatch(r"(.*\n)# (.*)\n", block, re.DOTALL).groups()  # type: ignore[union-attr]
        output = StringIO()
        with redirect_stdout(output):
            exec(code, names)
        assert output.getvalue().strip() == shown_output


def test_the_tables_in_the_documentation_are_those_of_the_results() -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert check.returncode == 0, f"make docs writes them: {check.stdout}{check.stderr}"
    assert sum("<!-- table: " in page.read_text(encoding="utf-8") for page in PAGES) >= 4


def test_tables_mark_every_development_set() -> None:
    marked = 0
    for page in [ROOT / "README.md", *PAGES]:
        rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        cells = [cell.strip() for row in rows for cell in row.split("|")]
        for cell in cells:
            if re.match(r"(STSBenchmark[_ ]dev|XQuAD-en|Cranfield)\b", cell):
                assert " †" in cell, f"{page.name}: {cell}"
                marked += 1
    assert marked >= 6


@pytest.mark.parametrize(
    "readme", sorted((ROOT / "integrations").glob("*/README.md")), ids=lambda path: path.parent.name
)
def test_the_examples_in_the_integrations_readmes_print_the_shown_output(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each README has three code blocks. They run in order; the last line of each is a comment with its output."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        code, shown_output = re.fullmatch(r"(.*\n)# (.*)\n", block, re.DOTALL).groups()  # type: ignore[union-attr]
        output = StringIO()
        with redirect_stdout(output):
            exec(code, names)
        assert output.getvalue().strip() == shown_output
