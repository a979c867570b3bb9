"""The demos run from start to end, on a few modules of the standard library."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DEMOS = Path(__file__).parent.parent / "demos"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", ["langchain_rag", "llamaindex_rag"])
def test_the_rag_demos_answer_and_name_their_sources(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["How do I copy a whole folder tree?", "--one-model", "--modules", "shutil"]
    monkeypatch.syspath_prepend(DEMOS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--store", str(tmp_path / "store")])
    runpy.run_path(
        str(DEMOS / f"{name}.py"), run_name="__main__"
    )  # in this process, so that torch is not imported again
    done = capsys.readouterr()
    *answer, sources = done.out.strip().splitlines()
    assert " ".join(answer).strip(), "the model must answer; the quality of the answer is not tested"
    assert "How do I copy" not in done.out, "the answer must not contain the prompt"
    assert sources.startswith("Sources:")
    assert "shutil.copytree" in sources
    assert "MiB are in memory once" in done.err


def test_the_notebook_runs_from_its_first_cell_to_its_last() -> None:
    notebook = nbformat.read(DEMOS / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown), "the map"
