"""The page's messages for errors, and that no documents are lost. The tests call the handlers as Gradio does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import urllib.request
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from filelock import FileLock

from c2v_rag import Document, VectorIndex
from c2v_rag.app import render
from c2v_rag.app.access import read_logins
from c2v_rag.app.page import NO_COMPARISON, SearchApp
from c2v_rag.app.search import BM25, CAUSAL2VEC, ENCODER, Searcher
from c2v_rag.app.task import Stopped, Task
from c2v_rag.index import Chunk, Hit, stored_stamps
from c2v_rag.model import Causal2Vec
from c2v_rag.remote import ApiKeyError
from c2v_rag.sentences import Sentence
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Causal2Vec:
    return tiny_model()


@pytest.fixture
def app(tmp_path: Path, model: Causal2Vec) -> SearchApp:
    return SearchApp(tmp_path / "store", model)


def last(messages: Any) -> str:
    *_, end = messages
    return str(end)


def search(app: SearchApp, query: str, method: str = CAUSAL2VEC, other: str = NO_COMPARISON) -> str:
    return last(app.search(query, "documents", method, other, 3))


def add(
    app: SearchApp,
    files: list[Path],
    folder: str = "",
    *,
    session: str = "s",
    into: str = "documents",
    replace: bool = False,
) -> str:
    request: Any = SimpleNamespace(session_hash=session)
    return last(app.add([str(file) for file in files], folder, False, into, replace, request))


def test_an_empty_query_an_empty_store_and_an_empty_collection_say_what_to_do(app: SearchApp) -> None:
    assert app.collections() == []
    assert "Type a question" in search(app, "  ")
    assert "Nothing is indexed yet" in last(app.search("a", None, CAUSAL2VEC, NO_COMPARISON, 3))
    assert "Nothing is indexed yet" in app.map(None)
    assert "store" in app.about(None)
    VectorIndex(app.store, app.model).add([])
    assert "collection is empty" in search(app, "a")
    assert "Choose files" in add(app, [])


def test_a_very_long_query_is_answered_with_a_note_on_how_much_was_read(app: SearchApp, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Bread needs yeast.")
    add(app, [tmp_path / "a.txt"])
    answer = search(app, "yeast " * 8334)
    assert "the encoder reads its first 64, the decoder its first 256" in answer
    assert "a.txt" in answer
    assert "reads its first" not in search(app, "yeast")


def test_files_that_cannot_be_read_are_named_and_the_rest_is_found(app: SearchApp, tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("A heap keeps its smallest item first.")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 and then nothing")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("  \n")
    report = add(app, [tmp_path / name for name in ("good.md", "broken.pdf", "latin.txt", "blank.txt", "gone.txt")])
    assert "1 passages added" in report
    for name in ("broken.pdf", "latin.txt", "gone.txt"):
        assert name in report.partition("Left out: ")[2]
    assert str(tmp_path) not in report, "the temporary folder of an upload is not shown"
    assert "No text found in blank.txt" in report
    assert "good.md" in search(app, "heap", BM25)
    assert "no file or folder" in add(app, [], folder=str(tmp_path / "nowhere")).lower()
    assert len(VectorIndex(tmp_path / "store", app.model)) == 1


def test_a_folder_of_this_computer_is_indexed_only_by_a_local_page(app: SearchApp, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("Bread needs yeast.")
    (tmp_path / "notes" / "b.txt").write_text("A heap keeps its smallest item first.")
    assert "2 passages added" in add(app, [], folder=str(tmp_path / "notes"))
    (tmp_path / "notes" / "a.txt").unlink()
    assert "1 outdated" in add(app, [], folder=str(tmp_path / "notes"))
    open_to_all = SearchApp(tmp_path / "other", app.model, is_local=False)
    assert "Choose files" in add(open_to_all, [], folder=str(tmp_path / "notes"))


def test_uploads_of_the_same_name_are_all_kept_unless_earlier_ones_are_replaced(app: SearchApp, tmp_path: Path) -> None:
    files = []
    for folder, text in (("a", "Bread needs yeast."), ("b", "The moon is far."), ("c", "Copper conducts.")):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "notes.txt")
        files[-1].write_text(text)
    assert "2 passages added" in add(app, files[:2]), "two files in one run"
    assert "0 passages added, 2 were there, 0 outdated" in add(app, files[:2])
    report = add(app, files[2:])
    assert "1 passages added, 0 were there, 0 outdated" in report
    assert "Earlier uploads named notes.txt stay" in report
    index = VectorIndex(app.store, app.model)
    assert {chunk.text for chunk in index.chunks()} == {file.read_text() for file in files}
    assert {chunk.metadata["file_name"] for chunk in index.chunks()} == {"notes.txt"}
    assert ">notes.txt</span>" in search(app, "moon", BM25), "the page shows the file name"
    report = add(app, files[:1], replace=True)
    assert "0 passages added, 1 were there, 2 outdated ones deleted" in report
    assert "Earlier uploads" not in report
    assert [chunk.text for chunk in index.chunks()] == ["Bread needs yeast."]
    (tmp_path / "notes.txt").write_bytes("größer".encode("latin-1"))
    assert "Left out" in add(app, [tmp_path / "notes.txt"], replace=True)
    assert len(index) == 1, "a file that could not be read replaces nothing"


def test_reading_creates_no_collection(app: SearchApp) -> None:
    event: Any = SimpleNamespace(_data={"id": "x"})
    for shown in (
        last(app.search("a", "documents", CAUSAL2VEC, NO_COMPARISON, 3)),
        app.map("documents"),
        app.about("documents"),
        app.chosen("documents", event),
    ):
        assert "no collection &#x27;documents&#x27;" in shown
    app.choices("documents")
    assert stored_stamps(app.store) == {}


def test_the_encoders_collection_names_are_reserved(app: SearchApp, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Bread needs yeast.")
    assert "names that end in &#x27;.encoder&#x27;" in add(app, [tmp_path / "a.txt"], into="documents.encoder")
    with pytest.raises(ValueError, match="Choose another"):
        SearchApp(app.store, app.model, collection="documents.encoder")
    with pytest.raises(ValueError, match="Choose another"):
        Searcher(app.store, app.model, "documents.encoder")
    assert stored_stamps(app.store) == {}
    assert "1 passages added" in add(app, [tmp_path / "a.txt"])
    assert "a.txt" in search(app, "yeast", ENCODER)


def test_visitors_of_a_public_page_create_no_collections(app: SearchApp, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Bread needs yeast.")
    assert "1 passages added" in add(app, [tmp_path / "a.txt"], into="mine")
    public = SearchApp(app.store, app.model, is_local=False)
    refused = add(public, [tmp_path / "a.txt"], into="new")
    assert "There is no collection &#x27;new&#x27;" in refused
    assert "choose one of documents, mine" in refused
    for allowed in ("mine", "documents"):
        assert "Done in" in add(public, [tmp_path / "a.txt"], into=allowed)
    assert sorted(stored_stamps(app.store)) == ["documents", "mine"]


@pytest.mark.parametrize(
    "error", [ApiKeyError("answered 401"), PermissionError(13, "Permission denied"), ConnectionError("nobody there")]
)
def test_an_error_other_than_a_locked_store_ends_the_run(app: SearchApp, tmp_path: Path, error: Exception) -> None:
    (tmp_path / "a.txt").write_text("Bread needs yeast.")

    def failing(texts: list[str], **options: Any) -> np.ndarray:
        raise error

    app.model.encode_document = failing  # type: ignore[method-assign, assignment]
    try:
        assert str(error) in add(app, [tmp_path / "a.txt"])
    finally:
        del app.model.encode_document


def test_a_run_waits_while_the_store_is_locked_and_then_adds_everything(app: SearchApp, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Bread needs yeast.")
    store = tmp_path / "store"
    store.mkdir()
    request: Any = SimpleNamespace(session_hash="first")
    with FileLock(store / "c2v_writer.lock"):
        run = app.add([str(tmp_path / "a.txt")], "", False, "documents", False, request)
        shown = next(message for message in run if "Waiting" in message)
        assert "is being written by" in shown
        assert "adding documents already" in add(app, [tmp_path / "a.txt"], session="first")
    assert "1 passages added" in last(run)


def test_a_cancelled_run_that_is_started_again_adds_the_rest(
    app: SearchApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(120):
        (tmp_path / f"{i:03d}.txt").write_text(f"Passage number {i}.")
    files = sorted(tmp_path.glob("*.txt"))
    request: Any = SimpleNamespace(session_hash="s")
    encode, cancelled, calls = app.model.encode_document, threading.Event(), count()

    def wait_for_cancel(texts: list[str], **options: Any) -> np.ndarray:
        if next(calls) == 1:  # the second batch
            assert cancelled.wait(60)
        return encode(texts, **options)

    monkeypatch.setattr(app.model, "encode_document", wait_for_cancel)
    run = app.add([str(file) for file in files], "", False, "documents", False, request)
    shown = next(message for message in run if "documents read" in message)
    app.cancel(request)
    cancelled.set()
    assert "Cancelled" in last(run)
    assert "of 120 documents read" in shown
    assert "<progress value=" in shown
    kept = len(VectorIndex(app.store, app.model))
    assert 0 < kept < 120
    report = add(app, files)
    assert f"{120 - kept} passages added, {kept} were there, 0 outdated" in report


def test_an_error_in_a_search_method_is_shown_as_a_message(app: SearchApp, monkeypatch: pytest.MonkeyPatch) -> None:
    VectorIndex(app.store, app.model).add([Document("Bread.", "a.txt")])

    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no <words>")

    monkeypatch.setattr("bm25s.BM25.index", broken)
    assert "RuntimeError: no &lt;words&gt;" in search(app, "bread", BM25)
    assert "a.txt" in search(app, "bread")


def test_map_shows_every_passage_and_about_the_speed(app: SearchApp) -> None:
    index = VectorIndex(app.store, app.model)
    index.add([Document("Bread.", "a.txt")])
    assert "at least three" in app.map("documents")
    index.add([Document(f"Passage {i}.", f"/notes/{i}.txt") for i in range(30)])
    drawn = app.map("documents")
    assert drawn.count("<circle") == 31
    assert "<title>/notes/7.txt</title>" in drawn
    id = next(chunk.id for chunk in index.chunks() if chunk.text == "Passage 3.")
    event: Any = SimpleNamespace(_data={"id": id})
    assert "Passage 3." in app.chosen("documents", event)
    index.delete("/notes/3.txt")
    assert "no longer" in app.chosen("documents", event)
    about = app.about("documents")
    assert "tokens/s" in about
    assert "30" in about


def get(url: str, **headers: str) -> tuple[int, str]:
    answer = httpx.get(url, headers=headers, timeout=30)
    return answer.status_code, answer.text


def test_a_public_page_needs_a_login(app: SearchApp, tmp_path: Path) -> None:
    for refused in ({"host": "0.0.0.0"}, {"host": "192.168.1.2", "auth": []}, {"allowed_hosts": ["search.example"]}):
        with pytest.raises(ValueError, match="--auth-file"):
            app.launch(port=None, wait=False, **refused)  # type: ignore[arg-type]
    page, address = app.launch(host="0.0.0.0", port=None, wait=False, auth=[("ann", "secret"), ("bob", "word")])
    try:
        url = f"http://127.0.0.1:{address.rstrip('/').rpartition(':')[2]}"
        assert not app.is_local, "no folders of this computer, no new collections"
        for path in ("/config", "/gradio_api/info"):
            assert get(url + path)[0] == 401
        join = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert httpx.post(f"{url}/gradio_api/queue/join", json=join).status_code == 401
        assert httpx.post(f"{url}/gradio_api/upload", files={"files": b"x"}).status_code == 401
        with httpx.Client(base_url=url) as client:
            assert client.post("/login", data={"username": "ann", "password": "word"}).status_code == 400
            assert client.post("/login", data={"username": "ann", "password": "secret"}).status_code == 200
            assert client.get("/config").status_code == 200
    finally:
        page.close()


def test_other_hosts_and_other_sites_are_refused(app: SearchApp) -> None:
    logins = [("ann", "secret")]
    page, address = app.launch(port=None, wait=False, auth=logins, allowed_hosts=["search.example"])
    port = address.rstrip("/").rpartition(":")[2]
    try:
        assert get(address, Host="evil.example") == (400, get(address, Host="evil.example")[1])
        assert "--allowed-host evil.example" in get(address, Host=f"evil.example:{port}")[1]
        for host in ("localhost:1", "127.0.0.1", "search.example"):
            assert get(address, Host=host)[0] == 200
        own, proxied = f"http://127.0.0.1:{port}", "https://search.example"
        for origin, status in ((own, 200), (proxied, 200), ("http://evil.example", 403), ("null", 403)):
            assert get(address, Origin=origin)[0] == status, origin
    finally:
        page.close()


def test_logins_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.write_text("# logins\n\nann:a:b\n bob:word \n")
    assert read_logins(file) == [("ann", "a:b"), ("bob", "word")]
    for text, message in (("", "holds no login"), ("ann\n", "logins:1: expected USER:PASSWORD"), (":x", "expected")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_logins(file)


@pytest.mark.slow
def test_the_command_serves_the_page_until_it_is_stopped(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-m", "c2v_rag.cli", "app", "--store", str(tmp_path / "store"), "--port", "0"]
    process = subprocess.Popen([*command, "--model", str(tmp_path / "tiny")], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "The page is at" in line)
        address = line.split()[4]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=120) as page:
            assert b"Causal2Vec search" in page.read()
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)


def test_rank_changes_are_marked_and_texts_are_escaped() -> None:
    def hit(id: str) -> Hit:
        return Hit(id, 0.5, f"<b>{id}</b> text. More.", {"source": f"<i>{id}"})

    marked = [Sentence("", 0, 14)] * 3
    html = render.results(
        [
            ("M", "how", "1 ms", [hit("a"), hit("b"), hit("c")], marked),
            ("N", "how", "1 ms", [hit("b"), hit("a"), hit("d")], marked),
        ]
    )
    assert html.count("only here") == 2
    assert html.count("▲ 1") == 2
    assert html.count("▼ 1") == 2
    assert "<b>" not in html
    assert "<i>" not in html
    assert "<mark>&lt;b&gt;a&lt;/b&gt; text.</mark> More." in html
    assert "Nothing found" in render.results([("M", "how", "1 ms", [], [])])


def test_a_long_passage_is_cut_around_the_marked_sentence() -> None:
    text = "word " * 300 + "The answer." + " more" * 300
    shown, whole = render.passage(text, Sentence("The answer.", 1500, 1511)).split("<details")
    assert "<mark>The answer.</mark>" in shown
    assert "<mark>The answer.</mark>" in whole
    assert shown.count("word") < 60
    assert shown.count("…") == 2
    assert whole.count("word") == 300
    for span in ((0, 0), (0, 5), (len(text) - 5, len(text))):
        shown = render.passage(text, Sentence("", *span)).split("<details")[0]
        assert 500 < len(shown) < 700
        assert ("<mark>" in shown) == (span != (0, 0))


def test_sources_are_coloured_by_folder_module_or_file() -> None:
    assert render.source_group("/home/me/notes/a.txt") == "notes"
    assert render.source_group("asyncio.tasks.gather") == "asyncio"
    one_folder = [Chunk(str(i), "", {"source": f"/notes/{i}.txt"}) for i in range(12)]
    drawn = render.map_svg(one_folder, np.random.default_rng(0).normal(size=(12, 2)))
    assert "</i>0.txt</span>" in drawn
    assert "</i>other</span>" in drawn


def test_a_task_reports_progress_stops_and_raises_errors() -> None:
    def work(task: Task[int]) -> int:
        for i in range(1000):
            task.report(f"{i}")
            task.wait(0.01)
        return 7

    task = Task(work)
    for progress in task.watch():
        if progress.message:
            task.stop()
    with pytest.raises(Stopped):
        task.result()
    assert Task[int](lambda task: 7).result() == 7
    with pytest.raises(ZeroDivisionError):
        Task[float](lambda task: 1 / 0).result()
    abandoned = Task(work)
    watching = abandoned.watch()
    next(watching)
    watching.close()  # Gradio does so when the page is closed
    with pytest.raises(Stopped):
        abandoned.result()
