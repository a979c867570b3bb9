"""The demos run from start to end, on a few modules of the standard library."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from c2v_rag import shared_model
from c2v_rag.finetune import run
from c2v_rag.finetune.recipe import Recipe
from c2v_rag.model import Causal2Vec
from c2v_rag.server.api import create_app
from tests.plain import QuietHandler, serving
from tests.server.serving import serving as serving_app

DEMOS = Path(__file__).parent.parent / "demos"
GALLERY = (DEMOS.parent / "docs" / "gallery.md").read_text(encoding="utf-8")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an index that the RAG demos share: the second one finds its documents unchanged."""
    return tmp_path_factory.mktemp("rag") / "store"


@pytest.mark.xdist_group("rag")
@pytest.mark.parametrize("name", ["langchain_rag", "llamaindex_rag"])
def test_the_rag_demos_answer_and_name_their_sources(
    name: str, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["How do I copy a whole folder tree?", "--one-model", "--modules", "shutil"]
    run_demo(name, [*arguments, "--store", str(store)], monkeypatch)
    done = capsys.readouterr()
    *answer, sources = done.out.strip().splitlines()
    assert " ".join(answer).strip(), "the model must answer; the quality of the answer is not tested"
    assert "How do I copy" not in done.out, "the answer must not contain the prompt"
    found = re.findall(r"\[(\d)\] (\S+)", sources.removeprefix("Sources:"))
    assert [number for number, _ in found] == ["1", "2", "3"]
    assert "shutil.copytree" in [source for _, source in found]
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


def test_the_pdf_chat_prints_what_the_gallery_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((question, output),) = re.findall(r'chat_with_pdfs.py --question "([^"]+)"\n(.*?)```', GALLERY, re.DOTALL)
    run_demo("chat_with_pdfs", ["--question", question, "--store", str(tmp_path / "store")], monkeypatch)
    assert capsys.readouterr().out == output


def test_the_pdf_chat_lists_the_passages_that_a_server_cites(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            message = {"role": "assistant", "content": "Once a week [2]."}
            body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    arguments = ["--question", "Clean?", "--store", str(tmp_path / "store"), "--model", tiny_checkpoint]
    with serving(Handler) as url:
        run_demo("chat_with_pdfs", [*arguments, "--server", f"{url}/v1"], monkeypatch)
    answer, source = capsys.readouterr().out.strip().splitlines()[-2:]
    assert answer == "Once a week [2]."
    assert re.fullmatch(r"  \[2\] (coffee-machine|travel-rules)\.pdf, page [123]", source)
    (sent,) = (json.loads(text) for text in asked)
    assert all(f"[{number}]" in sent["messages"][-1]["content"] for number in (1, 2, 3))


def test_the_faq_demo_trains_and_does_not_train_on_the_questions_that_measure(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_on: list[str] = []
    train = run.train

    def recorded(recipe: Recipe, data: Path, output: Path) -> Causal2Vec:
        trained_on.append((data / "pairs.jsonl").read_text())
        return train(recipe, data, output)

    monkeypatch.setattr(run, "train", recorded)
    arguments = ["--model", tiny_checkpoint, "--steps", "2", "--output", str(tmp_path / "model")]
    run_demo("support_faq", arguments, monkeypatch)
    shown = capsys.readouterr().out
    assert re.search(r"Of 36 new questions, .*\n  \d+ before and \d+ after training on 108 pairs\.", shown)
    assert len(re.findall(r"place \d+ -> \d+: ", shown)) == 3
    assert (tmp_path / "model" / "projector.safetensors").is_file()
    rows = [json.loads(line) for line in (DEMOS / "data" / "bike_faq.jsonl").read_text().splitlines()]
    (text,) = trained_on
    queries = {json.loads(line)["query"] for line in text.splitlines()}
    assert len(queries) == 108
    assert not queries & {row["questions"][-1] for row in rows}


def run_demo(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a demo in this process, so that torch is not imported again."""
    monkeypatch.syspath_prepend(DEMOS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(DEMOS / f"{name}.py"), run_name="__main__")


def test_the_ray_demo_embeds_a_table_and_finds_rows(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows"
    arguments = ["--rows", "40", "--output", str(output), "--model", tiny_checkpoint]
    run_demo("embed_with_ray", [*arguments, "--ray", "local", "--workers", "1"], monkeypatch)
    shown = capsys.readouterr().out.strip().splitlines()
    assert len(shown) == 3
    scores = [float(line.split()[0]) for line in shown]
    assert scores == sorted(scores, reverse=True)
    assert all("Shop" in line for line in shown)
    assert list(output.glob("part-*.parquet"))


def test_the_openai_demo_asks_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with serving_app(create_app(shared_model(), name="default")) as url:
        run_demo("openai_client", ["--url", url], monkeypatch)
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"openai_client\.py\n(.*?)```", GALLERY, re.DOTALL)
    score = re.compile(r"\d\.\d\d")
    assert score.sub("#", printed) == score.sub("#", shown)
    numbers = [[float(found) for found in score.findall(text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02)


def test_the_gallery_shows_the_scripts_that_it_names() -> None:
    names = re.findall(r'example "(.+)"', GALLERY)
    assert names
    assert [f'--8<-- "{name}"' for name in names] == re.findall("--8.*", GALLERY)


def test_the_notebook_runs_from_its_first_cell_to_its_last() -> None:
    notebook = nbformat.read(DEMOS / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown), "the map"
