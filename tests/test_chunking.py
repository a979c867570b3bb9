"""How a collection cuts documents: settings, chunk headers, old collections, documents that have not changed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest

from c2v_rag import Document, VectorIndex
from c2v_rag.index import STAMP_KEY, ChunkSettings
from c2v_rag.index.cutting import cut
from c2v_rag.index.settings import CHUNKING_KEY
from tests.plain import Letters, numbered
from tests.tiny import tiny_model

BREAD = Document(
    "# Bread\n\nNeeds yeast.\n\n## Flour\n\nWhite or whole. " + "It is ground from wheat. " * 30,
    "bread.md",
    {"year": 1999},
    format="markdown",
)


class Recording(Letters):
    """Letters that remember the texts that they embed, and how often tokens were counted."""

    def __init__(self) -> None:
        self.embedded: list[str] = []
        self.counted = 0

    max_tokens = 64

    def count_tokens(self, texts: Iterable[str]) -> list[int]:
        self.counted += 1
        return [2 + len(text) // 4 for text in texts]

    def encode_document(self, texts: Iterable[str]) -> np.ndarray:
        texts = list(texts)
        self.embedded += texts
        return super().encode_document(texts)


def test_chunks_have_their_headings_and_offsets_and_are_embedded_behind_them(tmp_path: Path) -> None:
    model = Recording()
    index = VectorIndex(tmp_path, model)
    index.add([BREAD])
    chunks = sorted(index.chunks(), key=lambda chunk: chunk.metadata["start"])
    assert len(chunks) > 3
    for chunk in chunks:
        metadata = chunk.metadata
        assert BREAD.text[metadata["start"] : metadata["end"]] == chunk.text
        assert metadata["title"] == "Bread"
        assert metadata["section"] == ("Bread" if chunk is chunks[0] else "Bread > Flour")
        assert metadata["year"] == 1999
    # A chunk that begins with its innermost heading is embedded behind the others only.
    assert model.embedded[0] == chunks[0].text == "# Bread\n\nNeeds yeast."
    assert model.embedded[1] == f"Bread\n\n{chunks[1].text}"
    assert chunks[1].text.startswith("## Flour")
    assert model.embedded[2:] == [f"Bread > Flour\n\n{chunk.text}" for chunk in chunks[2:]]
    assert max(model.count_tokens(model.embedded)) <= model.max_tokens
    (hit,) = index.search("wheat", 1)
    assert {"section", "start", "end", "title"} <= hit.metadata.keys()
    assert not any(key.startswith("c2v_") for key in hit.metadata)


def test_without_headers_the_passage_alone_is_embedded(tmp_path: Path) -> None:
    model = Recording()
    index = VectorIndex(tmp_path, model, chunking=ChunkSettings(header=False, max_tokens=32))
    index.add([BREAD])
    assert sorted(model.embedded) == sorted(chunk.text for chunk in index.chunks())
    assert max(model.count_tokens(model.embedded)) <= 32


def test_a_new_title_embeds_the_chunks_again(tmp_path: Path) -> None:
    model = Recording()
    index = VectorIndex(tmp_path, model)
    plain = Document("Needs yeast. " * 40, "bread.txt", title="Bread")
    number = index.add([plain]).added
    report = index.add([Document(plain.text, plain.source, title="Dough")])
    assert (report.added, report.replaced, report.unchanged) == (number, number, 0)
    assert model.embedded[-1].startswith("Dough\n\n")


def test_settings_are_stored_and_others_are_refused(tmp_path: Path) -> None:
    settings = ChunkSettings(max_tokens=40, overlap=0.0)
    VectorIndex(tmp_path, Letters(), chunking=settings).add([BREAD])
    index = VectorIndex(tmp_path, Letters())
    assert index.chunking == settings
    assert index.add([BREAD]).added == 0
    with pytest.raises(ValueError, match=r"(?s)max_tokens: 40 in the index, 99 given.*another collection"):
        VectorIndex(tmp_path, Letters(), chunking=ChunkSettings(max_tokens=99, overlap=0.0))
    assert VectorIndex(tmp_path / "new", Letters()).chunking == ChunkSettings()
    for wrong, message in (
        ({"max_tokens": 8}, "max_tokens must be at least 16; got 8"),
        ({"overlap": 0.9}, "overlap must be from 0 to 0.5"),
        ({"splitter": "magic"}, "splitter must be one of structure, characters; got 'magic'"),
        ({"splitter": "characters"}, "header=True needs"),
    ):
        with pytest.raises(ValueError, match=message):
            ChunkSettings(**wrong)  # type: ignore[arg-type]


def test_a_collection_without_settings_is_cut_as_it_was_made(tmp_path: Path) -> None:
    """Version 0.1 stored no settings; its chunks had no offsets and no header."""
    model = Recording()
    old = chromadb.PersistentClient(str(tmp_path))
    old.create_collection("documents", metadata={STAMP_KEY: json.dumps(model.stamp)}, embedding_function=None)
    index = VectorIndex(tmp_path, model)
    assert index.chunking == ChunkSettings(splitter="characters", header=False)
    index.add([BREAD])
    chunks = list(index.chunks())
    assert all(chunk.metadata == {"year": 1999, "source": "bread.md"} for chunk in chunks)
    assert sorted(model.embedded) == sorted(chunk.text for chunk in chunks)
    assert index.add([BREAD]).unchanged == len(chunks)


def test_an_unchanged_document_is_neither_tokenised_nor_embedded_again(tmp_path: Path) -> None:
    model = Recording()
    index = VectorIndex(tmp_path, model)
    documents = [BREAD, *numbered(5), Document("Twice.", "a"), Document("Twice.", "a"), Document("  ", "blank")]
    number = index.add(documents).added
    before = sorted(chunk.id for chunk in index.chunks())
    model.embedded.clear()
    model.counted = 0
    report = index.add(documents[:-3])
    assert (report.added, report.unchanged, report.replaced) == (0, number - 2, 0)
    assert model.counted == 0
    report = index.add(documents)
    assert (report.added, report.unchanged, report.replaced) == (0, number, 0)
    assert model.embedded == []
    assert sorted(chunk.id for chunk in index.chunks()) == before


def test_chunks_that_moved_get_their_new_offsets_without_being_embedded(tmp_path: Path) -> None:
    model = Recording()
    index = VectorIndex(tmp_path, model)
    index.add([BREAD, Document("rye", "table.csv", {"row": 0})])
    model.embedded.clear()
    text = BREAD.text.replace("Needs yeast.", "Needs yeast and much time.")
    changed = [
        Document(text, BREAD.source, {"year": 2001}, format="markdown"),
        Document("rye", "table.csv", {"row": 7}),
    ]
    report = index.add(changed)
    assert len(model.embedded) == report.added == report.replaced == 1
    assert report.unchanged > 3
    for chunk in index.chunks():
        if chunk.metadata["source"] == "bread.md":
            assert text[chunk.metadata["start"] : chunk.metadata["end"]] == chunk.text
            assert chunk.metadata["year"] == 2001
        else:
            assert chunk.metadata["row"] == 7
    model.counted = 0
    assert index.add(changed).added == 0
    assert model.counted == 0, "the changed document is recognised as unchanged from now on"


def test_metadata_that_a_document_no_longer_has_is_deleted(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, Recording())
    index.add([Document("rye", "table.jsonl", {"row": 0, "status": "draft", "year": 1999})])
    report = index.add([Document("rye", "table.jsonl", {"row": 0, "year": 2001})])
    assert (report.added, report.unchanged) == (0, 1)
    (chunk,) = index.chunks()
    assert "status" not in chunk.metadata
    assert chunk.metadata["year"] == 2001
    assert index.search("rye", where={"status": "draft"}) == []


def test_a_document_that_was_written_in_part_is_completed(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, Recording())
    number = index.add([BREAD]).added
    before = sorted(chunk.id for chunk in index.chunks())
    index.delete_ids(before[:2])
    report = index.add([BREAD])
    assert (report.added, report.unchanged) == (2, number - 2)
    assert sorted(chunk.id for chunk in index.chunks()) == before


def test_the_offsets_of_a_model_are_those_of_its_tokenizers() -> None:
    model = tiny_model()
    texts = ["A heap keeps its smallest item first.", "🙂 汉字\ud800", ""]
    found = model.token_ends(texts)
    for text, ends in zip(texts, found, strict=True):
        assert len(ends) == 2
        assert max(len(ends[0]) + 1, len(ends[1]) + 2) == model.count_tokens([text])[0]
        assert all(one == sorted(one) for one in ends)
        assert all(one[-1] <= len(text) for one in ends if one)
    assert found[0][0][-1] == found[0][1][-1] == len(texts[0])


class Failing(Letters):
    """Raises at the third batch; remembers the threads that it was called in."""

    def __init__(self) -> None:
        self.calls = 0
        self.threads: set[str] = set()

    def encode_document(self, texts: Iterable[str]) -> np.ndarray:
        self.calls += 1
        self.threads.add(threading.current_thread().name)
        if self.calls == 3:
            raise MemoryError("no memory for this batch")
        return super().encode_document(texts)


def test_text_without_spaces_is_cut_after_its_sentences() -> None:
    text = "堆是一种树。" * 3 + "「要复制文件夹吗？」" + "请使用它。"
    ends = [list(range(1, len(text) + 1))]  # a token for each character
    pieces = [text[start:end] for start, end in cut(text, 0, len(text), ends, limit=10, overlap=0)]
    assert pieces == [*["堆是一种树。"] * 3, "「要复制文件夹吗？」", "请使用它。"]


def test_an_error_while_embedding_stops_the_call_and_keeps_what_was_written(tmp_path: Path) -> None:
    model = Failing()
    index = VectorIndex(tmp_path, model)
    read = 0

    def documents() -> Iterator[Document]:
        nonlocal read
        for document in numbered(400):
            read += 1
            yield document

    threads = threading.active_count()
    with pytest.raises(MemoryError, match="no memory for this batch"):
        index.add(documents(), write_every=10)
    assert len(index) == 20
    assert model.calls == 3
    assert threading.active_count() == threads
    model.calls = 10
    assert index.add(documents(), write_every=10).added == 380


def test_an_error_of_the_reader_or_the_caller_stops_the_threads(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, Letters())

    def broken() -> Iterator[Document]:
        yield from numbered(30)
        raise OSError("the disk is gone")

    def cancel(documents: int, chunks: int) -> None:
        if documents == 25:
            raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        index.add(broken(), write_every=10)
    with pytest.raises(KeyboardInterrupt):
        index.add(numbered(30), write_every=10, on_progress=cancel)
    assert threading.active_count() == threads
    assert len(index) in (0, 10, 20)


def test_progress_ends_with_everything_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    VectorIndex(tmp_path, Letters()).add(numbered(30), write_every=7, on_progress=lambda *now: seen.append(now))
    assert seen[-1] == (30, 30)
    assert seen == sorted(seen)
    assert sorted({documents for documents, _ in seen}) == list(range(1, 31))


def test_a_servers_index_has_the_same_settings(chroma_server: str) -> None:
    settings: Any = ChunkSettings(max_tokens=40)
    VectorIndex(chroma_server, Letters(), "settings", chunking=settings).add([BREAD])
    index = VectorIndex(chroma_server, Letters(), "settings")
    assert index.chunking == settings
    assert index.add([BREAD]).added == 0
    stored = chromadb.HttpClient(port=int(chroma_server.rpartition(":")[2])).get_collection("settings").metadata
    assert json.loads(stored[CHUNKING_KEY])["max_tokens"] == 40
