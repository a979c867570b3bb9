"""The index: chunks are added, skipped, replaced and removed; killed runs resume; other models are refused."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import httpx
import numpy as np
import pytest
from chromadb.api.models.Collection import Collection

from c2v_rag import Document, VectorIndex
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.index import (
    Chunk,
    ChunkSettings,
    HnswSettings,
    KnownFiles,
    open_store,
    remove_vanished,
    stored_stamp,
    stored_stamps,
)
from c2v_rag.model import Causal2Vec
from c2v_rag.protocols import Embedder
from c2v_rag.sources import read_sources
from tests.plain import Letters, numbered
from tests.tiny import assert_ranked, tiny_model

DOCUMENTS = numbered(30)


class Counting:
    """A tiny model that counts the texts that it embeds."""

    def __init__(self, model: Causal2Vec) -> None:
        self.model, self.embedded = model, 0
        self.embedding_dim, self.stamp = model.embedding_dim, model.stamp
        self.count_tokens, self.max_tokens = model.count_tokens, model.max_tokens

    def encode_query(self, texts: Iterable[str]) -> np.ndarray:
        return self.model.encode_query(texts)

    def encode_document(self, texts: Iterable[str]) -> np.ndarray:
        texts = list(texts)
        self.embedded += len(texts)
        return self.model.encode_document(texts)


@pytest.fixture(scope="module")
def tiny() -> Causal2Vec:
    return tiny_model()


@pytest.fixture
def model(tiny: Causal2Vec) -> Counting:
    return Counting(tiny)


def ids(index: VectorIndex) -> set[str]:
    return {chunk.id for chunk in index.chunks()}


def test_search_equals_brute_force(tmp_path: Path, model: Counting) -> None:
    index = VectorIndex(tmp_path, model)
    report = index.add(DOCUMENTS)
    assert (report.added, report.unchanged, report.replaced, report.removed) == (30, 0, 0, 0)
    assert len(index) == model.embedded == 30
    queries = ["topic 3", "12: a passage"]
    scores = model.encode_query(queries) @ model.encode_document([d.text for d in DOCUMENTS]).T
    for query, row, hits in zip(queries, scores, index.search_many(queries, top_k=4, mode="dense"), strict=True):
        found = [int(hit.metadata["n"]) for hit in hits]
        assert len(found) == 4
        assert_ranked(found, row)
        np.testing.assert_allclose([hit.score for hit in hits], row[found], atol=1e-5)
        for i, hit in zip(found, hits, strict=True):
            assert (hit.text, hit.metadata) == (
                DOCUMENTS[i].text,
                {"n": i, "source": DOCUMENTS[i].source, "start": 0, "end": len(DOCUMENTS[i].text)},
            )
        alone = index.search(query, top_k=4, mode="dense")
        np.testing.assert_allclose([hit.score for hit in alone], [hit.score for hit in hits], atol=1e-5)
    assert len(index.search("anything", top_k=100)) == 30
    assert index.search_many([]) == []


def test_an_empty_index_finds_nothing_and_bad_queries_are_named(tmp_path: Path, model: Counting) -> None:
    index = VectorIndex(tmp_path, model)
    index.add([])
    assert index.search("anything") == []
    assert len(index) == 0
    with pytest.raises(TypeError, match="search_many"):
        index.search(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bare string"):
        index.search_many("a")
    with pytest.raises(ValueError, match="top_k must be at least 1; got 0"):
        index.search("a", top_k=0)
    with pytest.raises(TypeError, match=r"must be c2v_rag.Document objects, got str"):
        index.add(["text"])  # type: ignore[list-item]


def test_the_same_input_again_embeds_nothing(tmp_path: Path, model: Counting) -> None:
    VectorIndex(tmp_path, model).add(DOCUMENTS)
    index = VectorIndex(tmp_path, model)
    before = ids(index)
    report = index.add(iter(DOCUMENTS))
    assert (report.added, report.unchanged) == (0, 30)
    assert model.embedded == 30
    assert ids(index) == before


def test_a_changed_source_replaces_its_own_chunks_and_touches_no_other(tmp_path: Path, model: Counting) -> None:
    index = VectorIndex(tmp_path, model)
    index.add(DOCUMENTS)
    report = index.add([DOCUMENTS[0], Document("Something new.", "source-0")])
    assert (report.added, report.unchanged, report.replaced) == (1, 1, 2)
    assert len(index) == 29
    assert index.sources() == {document.source for document in DOCUMENTS}
    assert index.add([DOCUMENTS[0]], prune=False).replaced == 0
    report = index.add([Document("", "source-0")])
    assert (report.added, report.replaced) == (0, 2)
    assert "source-0" not in index.sources()
    assert index.delete("source-1") == 3
    assert index.delete("source-1") == 0
    assert len(index) == 24


def test_equal_texts_are_kept_apart(tmp_path: Path, model: Counting) -> None:
    index = VectorIndex(tmp_path, model)
    equal = [Document("Twice.", "a"), Document("Twice.", "a"), Document("Twice.", "b")]
    assert index.add(equal).added == 3
    assert index.add(equal).unchanged == 3
    assert index.add(equal[1:]).replaced == 1
    assert len(index) == 2


def test_sources_in_mixed_order_lose_no_chunk(tmp_path: Path, model: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("c2v_rag.index.writing.DOCUMENTS_READ_AHEAD", 4)
    scattered = [Document(f"text {i}", f"source-{i % 3}") for i in range(20)]
    index = VectorIndex(tmp_path, model)
    assert index.add(scattered, write_every=5).added == 20
    assert index.add(scattered).unchanged == 20
    assert len(index) == 20


def test_long_documents_are_split_into_chunks_that_are_not_truncated(tmp_path: Path, model: Counting) -> None:
    text = "\n\n".join(f"Paragraph {i} speaks about the thing numbered {i}, at some length." for i in range(60))
    index = VectorIndex(tmp_path, model)
    report = index.add([Document(text, "long"), Document("x" * 5000, "one word"), Document("🙂\ud800\x00", "odd")])
    assert report.truncated == 0
    found = [chunk.text for chunk in index.chunks()]
    assert len(found) > 20
    assert max(model.count_tokens(found)) <= model.max_tokens
    for i in range(60):
        assert any(f"Paragraph {i} " in chunk for chunk in found)
    assert index.add([Document(text, "long")]).added == 0


def test_changed_and_deleted_files_update_the_index(tmp_path: Path, model: Counting) -> None:
    folder = tmp_path / "files"
    (folder / "below").mkdir(parents=True)
    for name in ("one.txt", "two.txt", "below/three.txt"):
        (folder / name).write_text(f"The file {name}.", encoding="utf-8")
    index = VectorIndex(tmp_path / "store", model)
    index.add([Document("elsewhere", "/elsewhere/gone.txt")])
    assert index.add(read_sources([folder])).added == 3
    (folder / "two.txt").write_text("Another text.", encoding="utf-8")
    (folder / "below" / "three.txt").unlink()
    (folder / "below").rmdir()
    report = index.add(read_sources([folder]))
    assert (report.added, report.unchanged, report.replaced) == (1, 1, 1)
    assert remove_vanished(index, folder) == 1
    assert index.sources() == {
        "/elsewhere/gone.txt",
        *(str((folder / name).resolve()) for name in ("one.txt", "two.txt")),
    }


def test_reading_a_mistyped_store_or_collection_creates_nothing(tmp_path: Path, model: Counting) -> None:
    missing = tmp_path / "mistyped" / "store"
    index = VectorIndex(missing, model)
    with pytest.raises(FileNotFoundError, match=r"There is no index in .*mistyped.store\. Make one"):
        index.search("anything")
    assert (len(index), index.sources(), list(index.chunks()), index.sample(3)) == (0, set(), [], [])
    assert index.get("some id") is None
    assert index.delete("some source") == 0
    index.delete_ids(["some id"])
    assert index.version == ""
    assert list(tmp_path.iterdir()) == []

    store = tmp_path / "store"
    VectorIndex(store, model).add(DOCUMENTS[:3])
    other = VectorIndex(store, model, "mistyped")
    assert len(other) == 0
    with pytest.raises(FileNotFoundError, match=r"no collection 'mistyped'; it has \['documents'\]"):
        other.search("anything")
    assert stored_stamps(store).keys() == {"documents"}
    assert other.add(DOCUMENTS[:3]).added == len(other.search("anything")) == 3


def test_a_folder_that_is_not_mounted_loses_no_chunks(
    tmp_path: Path, model: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    disk, moved = tmp_path / "notes" / "disk", tmp_path / "elsewhere"
    (disk / "below").mkdir(parents=True)
    for path in (tmp_path / "notes" / "a.txt", disk / "b.txt", disk / "below" / "c.txt"):
        path.write_text(f"The file {path.name}.", encoding="utf-8")
    index = VectorIndex(tmp_path / "store", model)
    assert index.add(read_sources([tmp_path / "notes"])).added == 3
    disk.rename(moved)
    disk.mkdir()
    (disk / ".keep").touch()
    assert remove_vanished(index, tmp_path / "notes") == remove_vanished(index, disk) == 0
    assert f"{disk.resolve()} is empty: 2 file(s)" in caplog.text
    assert "--prune" in caplog.text
    (tmp_path / "notes" / "a.txt").unlink()
    assert remove_vanished(index, tmp_path / "notes") == 1, "the folder has an entry: the file is really gone"
    assert len(index) == 2
    assert remove_vanished(index, tmp_path / "notes", prune=True) == 2
    assert len(index) == 0


def test_a_file_whose_state_cannot_be_read_has_not_vanished(
    tmp_path: Path, model: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "notes" / name).write_text(f"The file {name}.", encoding="utf-8")
    index = VectorIndex(tmp_path / "store", model)
    index.add(read_sources([tmp_path / "notes"]))
    (tmp_path / "notes" / "a.txt").unlink()
    real_stat = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return real_stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert remove_vanished(index, tmp_path / "notes", prune=True) == 0
    assert len(index) == 2


def test_hnsw_settings_belong_to_the_collection(tmp_path: Path, model: Counting) -> None:
    settings = HnswSettings(ef_construction=60, max_neighbors=8, ef_search=40)
    VectorIndex(tmp_path, model, "fast", hnsw=settings).add([Document("a heap", "heap.txt")])
    stored = open_store(tmp_path).client().get_collection("fast", embedding_function=None).configuration["hnsw"]
    assert {name: stored[name] for name in dataclasses.asdict(settings)} == dataclasses.asdict(settings)
    assert stored["space"] == "cosine"
    assert len(VectorIndex(tmp_path, model, "fast")) == len(VectorIndex(tmp_path, model, "fast", hnsw=settings)) == 1
    with pytest.raises(
        ValueError, match=r"(?s)'fast' was made with other settings:\n- ef_construction: 60 in the index, 100"
    ):
        VectorIndex(tmp_path, model, "fast", hnsw=HnswSettings())
    with pytest.raises(ValueError, match="max_neighbors must be at least 2; got 1"):
        HnswSettings(max_neighbors=1)


def test_a_known_file_is_not_parsed_again(tmp_path: Path, model: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "notes.txt").write_text("Bread needs yeast.", encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "table.csv").write_text("text,other\na heap,x\na queue,y\n", encoding="utf-8")
    (folder / "broken.csv").write_bytes(b"text\nrow 0\n\xff\n")
    index = VectorIndex(tmp_path / "store", model)

    def update(text_column: str = "text") -> tuple[list[str], int]:
        """The names of the files that were parsed, and the number of chunks of the others."""
        unread: list[Path] = []
        known = KnownFiles(index, [folder], text_column)
        documents = read_sources(
            [folder], text_column=text_column, on_error=lambda path, error: unread.append(path), skip=known.paths
        )
        read = list(documents)
        parsed = {Path(document.source).name for document in read}
        index.add(read)
        known.save(unread)
        return sorted(parsed | {path.name for path in unread}), known.num_chunks

    everything = ["broken.csv", "empty.txt", "notes.txt", "table.csv"]
    assert update() == (everything, 0)
    assert update() == (["broken.csv"], 3), "only the file that could not be read"
    (folder / "notes.txt").write_text("Bread needs flour.", encoding="utf-8")
    assert update() == (["broken.csv", "notes.txt"], 2)
    index.delete(str((folder / "table.csv").resolve()))
    assert update() == (["broken.csv", "table.csv"], 1), "its chunks are gone: it is read again"
    assert len(index) == 3
    assert update("other")[0] == everything, "another column of the tables"
    (file,) = (tmp_path / "store").rglob("files.json")
    file.write_text("[]", encoding="utf-8")
    assert update("other")[0] == everything

    (folder / "notes.txt").write_text("A third text.", encoding="utf-8")
    known = KnownFiles(index, [folder], "other")
    documents = stop_after(read_sources([folder], on_error=lambda path, error: None, skip=known.paths))
    with pytest.raises(RuntimeError, match="stopped"):  # a run that stops records nothing
        index.add(documents)
    assert "notes.txt" in update("other")[0]


def test_files_are_known_after_a_run_that_created_the_index(tmp_path: Path, model: Counting) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("notes.txt", "empty.txt"):
        (folder / name).write_text("Bread needs yeast." if name == "notes.txt" else "", encoding="utf-8")
    known = KnownFiles(None, [folder])
    assert (known.paths, known.num_chunks) == (set(), 0)
    with pytest.raises(ValueError, match="give the one that it created"):
        known.save()
    index = VectorIndex(tmp_path / "store", model)
    known.save(index=index)
    assert KnownFiles(index, [folder]).paths == {*folder.iterdir()}
    index.add(read_sources([folder]))
    assert KnownFiles(index, [folder]).paths == {folder / "empty.txt"}, "notes.txt has more chunks than were recorded"


def stop_after(documents: Iterable[Document]) -> Iterator[Document]:
    yield from documents
    raise RuntimeError("stopped")


def test_a_source_that_cannot_be_read_any_more_keeps_its_chunks(tmp_path: Path, model: Counting) -> None:
    table = tmp_path / "notes" / "table.csv"
    table.parent.mkdir()
    table.write_text("text\n" + "".join(f"row {i}\n" for i in range(20)), encoding="utf-8")
    index = VectorIndex(tmp_path / "store", model)
    assert index.add(read_sources([table])).added == 20
    table.write_bytes(b"text\nrow 0\nrow 1\n\xff\n")
    problems: list[str] = []
    report = index.add(read_sources([table.parent], on_error=lambda path, error: problems.append(str(error))))
    assert (report.added, report.unchanged, report.replaced) == (0, 0, 0)
    assert "table.csv" in problems[0]
    assert remove_vanished(index, table.parent) == 0
    assert len(index) == 20


def test_a_sample_reads_only_the_chunks_that_it_draws(
    tmp_path: Path, model: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("c2v_rag.index.vector_index.PAGE_SIZE", 7)
    index = VectorIndex(tmp_path, model)
    index.add(DOCUMENTS)
    with_embeddings: list[int] = []
    real_get = Collection.get

    def get(collection: Collection, **options: Any) -> Any:
        found = real_get(collection, **options)
        if options["include"]:
            with_embeddings.append(len(found["ids"]))
        return found

    monkeypatch.setattr(Collection, "get", get)
    sample = index.sample(9)
    assert sum(with_embeddings) == len({chunk.id for chunk in sample}) == 9
    monkeypatch.undo()
    everything = {chunk.id: chunk for chunk in index.chunks(embeddings=True)}
    positions = [list(everything).index(chunk.id) for chunk in sample]
    assert positions == sorted(positions)
    for chunk in sample:
        assert (chunk.text, chunk.metadata) == (everything[chunk.id].text, everything[chunk.id].metadata)
        np.testing.assert_array_equal(chunk.embedding, everything[chunk.id].embedding)
    assert [chunk.id for chunk in index.sample(9)] == [chunk.id for chunk in sample]
    assert [chunk.id for chunk in index.sample(9, seed=1)] != [chunk.id for chunk in sample]
    assert [chunk.id for chunk in index.sample(100)] == list(everything)


def test_a_store_inside_the_folder_that_it_indexes_is_no_part_of_it(tmp_path: Path, model: Counting) -> None:
    (tmp_path / "note.txt").write_text("Bread needs yeast.")
    index = VectorIndex(tmp_path / "store", model)
    for _ in range(2):
        index.add(read_sources([tmp_path]))
        assert len(index) == 1


def test_another_model_is_refused_and_a_copy_is_not(tmp_path: Path, tiny: Causal2Vec) -> None:
    VectorIndex(tmp_path, tiny).add(DOCUMENTS)
    with pytest.raises(ValueError, match=r"(?s)made with another model:.*weights.*index the documents again"):
        VectorIndex(tmp_path, tiny_model(seed=1))
    with pytest.raises(ValueError, match=r"embedding_dim: 64 in the index, 24 in this model"):
        VectorIndex(tmp_path, EncoderEmbedder(tiny))
    with pytest.raises(ValueError, match="instruction"):
        VectorIndex(tmp_path, tiny_model(instruction="another"))
    copy = tiny_model()
    copy.name = "a copy elsewhere"
    assert len(VectorIndex(tmp_path, copy)) == 30
    assert VectorIndex(tmp_path, tiny_model(seed=1), collection="other").add(DOCUMENTS[:1]).added == 1
    assert stored_stamp(tmp_path) == tiny.stamp


def test_a_collection_made_by_others_and_a_missing_index_are_named(tmp_path: Path, tiny: Causal2Vec) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no index in .*c2v-rag index"):
        stored_stamp(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    VectorIndex(tmp_path, tiny).add([])
    chromadb.PersistentClient(str(tmp_path)).create_collection("theirs")
    with pytest.raises(ValueError, match="was not made by c2v_rag"):
        VectorIndex(tmp_path, tiny, collection="theirs")
    with pytest.raises(ValueError, match="'a b' cannot name a Chroma collection"):
        VectorIndex(tmp_path, tiny, collection="a b")
    with pytest.raises(FileNotFoundError, match=r"no collection 'nothing'; it has \["):
        stored_stamp(tmp_path, "nothing")


def test_no_call_reads_more_chunks_than_sqlite_gives(
    tmp_path: Path, model: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("vector_index", "pages"):
        for name in ("PAGE_SIZE", "IDS_AT_ONCE"):
            monkeypatch.setattr(f"c2v_rag.index.{module}.{name}", 20)
    documents = [Document(f"{i}: a passage.", "table", {"row": i}) for i in range(60)]
    documents += [Document("word " * 2000, "long"), *numbered(6)]
    index = VectorIndex(tmp_path, model, chunking=ChunkSettings(max_tokens=40))
    index.add(documents)
    real_get, real_query = Collection.get, Collection.query

    def limited(found: Any, ids: int) -> Any:
        assert ids <= 20 or not {"documents", "metadatas", "embeddings"} & set(found["included"])
        return found

    def get(collection: Collection, **options: Any) -> Any:
        found = real_get(collection, **options)
        return limited(found, len(found["ids"]))

    def query(collection: Collection, **options: Any) -> Any:
        found = real_query(collection, **options)
        return limited(found, len(found["ids"][0]))

    monkeypatch.setattr(Collection, "get", get)
    monkeypatch.setattr(Collection, "query", query)
    report = index.add(documents)
    assert (report.added, report.unchanged) == (0, len(index))
    assert len(index) > 120
    for mode in ("dense", "hybrid", "lexical"):
        hits = index.search("a passage word", 100, mode=mode, group_by="source")  # type: ignore[arg-type]
        assert {hit.metadata["source"] for hit in hits} >= {"table", "source-0", "source-1"}
    assert len(index.search("a passage", 70, mode="dense")) == 70
    (hit,) = index.search("word word", 1, where={"source": "long"}, neighbours=1)
    assert len(hit.context) > len(hit.text)


def test_a_chunk_that_is_replaced_is_found_by_its_new_words(tmp_path: Path, model: Counting) -> None:
    index = VectorIndex(tmp_path, model)
    for text in ("old words", "refund policy"):
        index.write([Chunk("faq-1", text, {"source": "faq"})])
        assert [hit.text for hit in index.search(text, mode="lexical")] == [text]
    assert index.search("old words", mode="lexical") == []


def test_metadata_with_half_a_character_are_stored(tmp_path: Path, model: Counting) -> None:
    index = VectorIndex(tmp_path, model)
    for row in (0, 1):  # written, then moved
        index.add([Document("fine", "rows.jsonl", {"title": "nice \ud83d", "k\ud83d": 1, "row": row})])
        (chunk,) = index.chunks()
        assert chunk.metadata["title"] == "nice ?"
        assert (chunk.metadata["k?"], chunk.metadata["row"]) == (1, row)


def test_a_file_that_several_paths_reach_is_read_once(tmp_path: Path, model: Counting) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "agents.md").write_text("Run the tests.")
    (folder / "claude.md").symlink_to("agents.md")
    index = VectorIndex(tmp_path / "store", model)
    sources = [folder, folder / "agents.md"]
    known = KnownFiles(index, sources)
    assert index.add(read_sources(sources, skip=known.paths)).added == 1
    known.save()
    known = KnownFiles(index, sources)
    assert known.paths == {folder / "agents.md", folder / "claude.md"}
    assert [*read_sources(sources, skip=known.paths)] == []


def test_a_server_that_goes_away_is_a_connection_error(chroma_server: str, model: Counting) -> None:
    index = VectorIndex(chroma_server, model, "gone")
    index.add(DOCUMENTS)
    with (
        pytest.raises(ConnectionError, match=f"No Chroma server answers at {chroma_server}"),
        open_store(chroma_server).reading(),
    ):
        raise httpx.ConnectError("refused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx.Client, "request", lambda *_, **__: (_ for _ in ()).throw(httpx.ConnectError("refused")))
        with pytest.raises(ConnectionError, match="any more: refused"):
            index.search("passage")
    assert index.search("passage")


def test_any_embedder_can_be_used(tmp_path: Path, tiny: Causal2Vec) -> None:
    class Fixed:
        embedding_dim = 3
        stamp = {"name": "fixed", "weights": "0", "embedding_dim": 3}  # noqa: RUF012

        def encode_document(self, texts: Iterable[str]) -> np.ndarray:
            return np.array([[len(text), 1, 0] for text in texts], dtype=np.float32)

        encode_query = encode_document

    assert isinstance(Fixed(), Embedder)
    assert isinstance(tiny, Embedder)
    index = VectorIndex(tmp_path, Fixed())
    index.add([Document("word " * 2000, "long"), Document("short", "short")])
    assert len(index) > 5
    assert index.search("short", top_k=1)[0].text == "short"


KILLED = """
import sys, threading, time
from c2v_rag import VectorIndex
from c2v_rag.index.writing import CollectionWriter
from tests.plain import Letters, numbered
stored = threading.Semaphore(0)
store = CollectionWriter.store
def store_and_count(*arguments):
    store(*arguments)
    stored.release()
CollectionWriter.store = store_and_count
class Stuck(Letters):
    calls = 0
    def encode_document(self, texts):
        self.calls += 1
        if self.calls == 3:
            stored.acquire()  # the first batch is stored, and perhaps the second one
            print("stuck", flush=True)
            time.sleep(600)
        return super().encode_document(texts)
VectorIndex(sys.argv[1], Stuck()).add(numbered(240), write_every=30)
"""


def test_a_killed_run_continues_and_ends_with_the_same_ids(tmp_path: Path) -> None:
    for _ in range(2):  # each run writes 30 or 60 more chunks, and is killed while it embeds the next ones
        command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "stuck\n"
            finally:
                process.send_signal(signal.SIGKILL)
    resumed = VectorIndex(tmp_path / "killed", Letters())
    written = len(resumed)
    assert written in (60, 90, 120)
    report = resumed.add(numbered(240), write_every=30)
    assert (report.added, report.unchanged, report.replaced) == (240 - written, written, 0), "nothing is embedded twice"

    undisturbed = VectorIndex(tmp_path / "undisturbed", Letters())
    undisturbed.add(numbered(240))
    assert ids(resumed) == ids(undisturbed)
    query = "17: a passage"
    found, expected = (index.search(query, top_k=240, mode="dense") for index in (resumed, undisturbed))
    assert found[0].metadata["n"] == 17
    assert {hit.id: hit.score for hit in found} == pytest.approx({hit.id: hit.score for hit in expected}, abs=1e-6)


WRITER = """
import sys
from c2v_rag import VectorIndex
from tests.plain import Letters, numbered
def documents():
    yield from numbered(30)[3:]
    print("waiting", flush=True)
    sys.stdin.readline()
print("done", VectorIndex(sys.argv[1], Letters()).add(documents()).added, flush=True)
"""


def test_a_second_writer_is_told_who_writes_and_a_reader_sees_what_was_written(tmp_path: Path) -> None:
    reader = VectorIndex(tmp_path, Letters())
    reader.add(numbered(3))
    assert len(reader.search("passage", top_k=50)) == 3  # this process has loaded the vectors
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "waiting\n"
        with pytest.raises(PermissionError, match=f"is being written by process {writer.pid} on "):
            reader.add(numbered(30))
        writer.stdin.write("go\n")
        writer.stdin.close()
        assert writer.stdout.readline() == "done 27\n"
    assert len(reader.search("passage", top_k=50)) == 30
    assert reader.add(numbered(30)).unchanged == 30


def test_a_chroma_server_serves_the_same_index(
    tmp_path: Path, model: Counting, chroma_server: str, closed_port: int
) -> None:
    nobody = f"http://127.0.0.1:{closed_port}"
    with pytest.raises(ConnectionError, match=f"No Chroma server answers at {nobody}"):
        VectorIndex(nobody, model)
    index = VectorIndex(chroma_server, model, collection="same_index")
    assert index.add(DOCUMENTS).added == 30
    assert index.add(DOCUMENTS).unchanged == 30
    local = VectorIndex(tmp_path / "local", model)
    local.add(DOCUMENTS)
    found, expected = (
        {hit.id: hit.score for hit in one.search("topic 3", top_k=30, mode="dense")} for one in (index, local)
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert stored_stamp(chroma_server, "same_index") == model.stamp
