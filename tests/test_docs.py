"""What the documentation shows is what happens."""

from __future__ import annotations

import doctest
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from llama_index.embeddings.c2v import Causal2VecEmbedding

from c2v_rag import Causal2Vec, VectorIndex
from chroma_c2v import Causal2VecEmbeddingFunction

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shown", [Causal2Vec, VectorIndex, Causal2VecEmbeddingFunction, Causal2VecEmbedding])
def test_examples_in_docstrings_print_what_they_say(
    shown: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (test for test in doctest.DocTestFinder(recurse=False).find(shown) if test.examples)
    output = StringIO()
    result = doctest.DocTestRunner().run(example, out=output.write)
    assert result.attempted >= 3
    assert result.failed == 0, output.getvalue()


def test_the_readmes_first_example_prints_what_it_says() -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    said = re.search(r"^# (.*)$", code, re.MULTILINE)
    assert said
    output = StringIO()
    with redirect_stdout(output):
        exec(code, {})
    number = re.compile(r"\d+\.?\d*")
    assert number.sub("#", output.getvalue().strip()) == number.sub("#", said[1])
    printed = [float(found) for found in number.findall(output.getvalue())]
    assert printed == pytest.approx([float(found) for found in number.findall(said[1])], abs=0.02)


def test_the_readmes_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\$ make (\w+)", README, re.MULTILINE))
    assert targets == {"demo", "test"}
    for target in targets:
        assert f"\n{target}:" in makefile
    assert "@@" not in README
