"""The demos run from start to end, on a few modules of the standard library."""

from __future__ import annotations

import re
import runpy
import subprocess
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
    run_demo(name, [*arguments, "--store", str(tmp_path / "store")], monkeypatch)
    done = capsys.readouterr()
    *answer, sources = done.out.strip().splitlines()
    assert " ".join(answer).strip(), "the model must answer; the quality of the answer is not tested"
    assert "How do I copy" not in done.out, "the answer must not contain the prompt"
    assert sources.startswith("Sources:")
    assert "shutil.copytree" in sources
    assert "MiB are in memory once" in done.err


def test_the_quickstart_shows_one_row_for_each_source(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    run_demo("quickstart", ["--store", store, "--model", tiny_checkpoint, "--modules", "shutil"], monkeypatch)
    tables = capsys.readouterr().out.split("┏")[1:]
    assert len(tables) == 5
    for table in tables:
        rows = re.findall(r"│ *-?\d+\.\d+ │ (shutil\S*) *│ (\S+)", table)
        assert len(rows) == len({source for source, _ in rows}) == 3
        assert all(passage for _, passage in rows)


def run_demo(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a demo in this process, so that torch is not imported again."""
    monkeypatch.syspath_prepend(DEMOS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(DEMOS / f"{name}.py"), run_name="__main__")


def test_the_ray_demo_embeds_a_table_and_finds_rows(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows"
    arguments = [
        "--rows",
        "40",
        "--output",
        str(output),
        "--model",
        tiny_checkpoint,
        "--ray",
        "local",
        "--workers",
        "1",
    ]
    run_demo("embed_with_ray", arguments, monkeypatch)
    shown = capsys.readouterr().out.strip().splitlines()
    assert len(shown) == 3
    scores = [float(line.split()[0]) for line in shown]
    assert scores == sorted(scores, reverse=True)
    assert all("Shop" in line for line in shown)
    assert list(output.glob("part-*.parquet"))


def test_the_openai_demo_asks_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "c2v_rag.cli", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            found = next(filter(None, (re.search(r"running on (http://\S+)", line) for line in server.stderr)))
            run_demo("openai_client", ["--url", found[1]], monkeypatch)
        finally:
            server.kill()
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 6
    assert "Returns are free" in shown[1]


def test_the_notebook_runs_from_its_first_cell_to_its_last() -> None:
    notebook = nbformat.read(DEMOS / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown), "the map"
