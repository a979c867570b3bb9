"""Lexical and hybrid search, filters and groups: equal to the definitions, and never stale."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
import Stemmer

from c2v_rag import Document, VectorIndex
from c2v_rag.index.lexical import LexicalIndex
from tests.plain import Letters, numbered

TOPICS = ["bread and yeast", "museums in the morning", "heaps of items", "copying a folder tree", "web addresses"]
DOCUMENTS = [
    Document(f"{i}: a passage about {TOPICS[i % 5]}, number {i}.", f"source-{i // 4}", {"n": i, "kind": TOPICS[i % 5]})
    for i in range(40)
]


@pytest.fixture
def index(tmp_path: Path) -> VectorIndex:
    vectors = VectorIndex(tmp_path / "store", Letters())
    vectors.add(DOCUMENTS)
    return vectors


def bm25_by_hand(texts: list[str], query: str) -> np.ndarray:
    """bm25s itself, without our index."""
    stemmer = Stemmer.Stemmer("english")
    model = bm25s.BM25()
    model.index(bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
    (words,) = bm25s.tokenize([query], stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)
    return np.asarray(model.get_scores(words))


def test_lexical_search_ranks_by_bm25_and_finds_only_what_shares_a_word(index: VectorIndex) -> None:
    hits = index.search("How do I copy folders?", top_k=40, mode="lexical")
    chunks = list(index.chunks())
    expected = bm25_by_hand([chunk.text for chunk in chunks], "How do I copy folders?")
    assert {hit.id for hit in hits} == {chunk.id for chunk, score in zip(chunks, expected, strict=True) if score > 0}
    assert len(hits) == 8
    by_id = {chunk.id: score for chunk, score in zip(chunks, expected, strict=True)}
    for hit in hits:
        assert hit.score == hit.scores["bm25"] == pytest.approx(by_id[hit.id], rel=1e-5)
        assert hit.text
        assert hit.metadata["source"]
    assert index.search("zebra", mode="lexical") == index.search("", mode="lexical") == []


@pytest.mark.parametrize(
    ("query", "source"),
    [("如何复制文件夹", "zh"), ("フォルダーのコピー", "ja"), ("파일 복사", "ko"), ("copytree", "zh"), ("何夹", None)],
)
def test_lexical_search_finds_words_of_scripts_without_spaces(tmp_path: Path, query: str, source: str | None) -> None:
    vectors = VectorIndex(tmp_path, Letters())
    texts = {"zh": "要复制整个文件夹，请使用 copytree。", "ja": "フォルダーをコピーするには", "ko": "파일을 복사하려면"}
    vectors.add([Document(text, name) for name, text in texts.items()])
    found = vectors.search(query, mode="lexical")
    assert [hit.metadata["source"] for hit in found] == ([source] if source else [])


def test_a_hybrid_search_tokenises_its_query_once(index: VectorIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.search("bread", mode="hybrid")
    tokenised: list[list[str]] = []
    tokenize = LexicalIndex._tokenize

    def counted(lexical: LexicalIndex, texts: list[str], *, return_ids: bool) -> Any:
        tokenised.append(texts)
        return tokenize(lexical, texts, return_ids=return_ids)

    monkeypatch.setattr(LexicalIndex, "_tokenize", counted)
    assert index.search("bread in the zeppelin", mode="hybrid")
    assert tokenised == [["bread in the zeppelin"]]


def test_hybrid_search_adds_the_standardised_cosine_and_the_squared_share_of_bm25(index: VectorIndex) -> None:
    """With fewer chunks than candidates and a sample of all of them, the estimate is the definition."""
    query = "bread in the zeppelin"
    chunks = list(index.chunks(embeddings=True))
    cosines = np.stack([chunk.embedding for chunk in chunks if chunk.embedding is not None])
    cosines = cosines @ Letters().encode_query([query])[0]
    words = bm25_by_hand([chunk.text for chunk in chunks], query)
    number = sum("bread" in chunk.text for chunk in chunks)
    assert number == 8
    assert not any("zeppelin" in chunk.text for chunk in chunks)
    limit = sum(math.log(1 + (40 - texts + 0.5) / (texts + 0.5)) for texts in (number, 0))
    expected = (cosines - cosines.mean()) / cosines.std() + 40 * (words / limit) ** 2
    hits = index.search(query, top_k=40, mode="hybrid")
    found = {hit.id: hit for hit in hits}
    assert len(found) == 40
    for chunk, score, cosine, bm25 in zip(chunks, expected, cosines, words, strict=True):
        assert found[chunk.id].score == pytest.approx(score, abs=1e-3)
        assert found[chunk.id].scores["cosine"] == pytest.approx(cosine, abs=1e-4)
        assert found[chunk.id].scores["bm25"] == pytest.approx(bm25, abs=1e-4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_filters_groups_offset_and_least_score_hold_in_every_mode(index: VectorIndex, mode: str) -> None:
    query = "a passage about bread"
    everything = index.search(query, top_k=40, mode=mode)  # type: ignore[arg-type]
    assert len(everything) == 40
    some = index.search(query, top_k=40, mode=mode, where={"n": {"$lt": 10}})  # type: ignore[arg-type]
    assert {hit.metadata["n"] for hit in some} == set(range(10))
    assert [hit.score for hit in some] == sorted((hit.score for hit in some), reverse=True)
    scores = [hit.score for hit in everything]
    second = index.search(query, top_k=5, offset=5, mode=mode)  # type: ignore[arg-type]
    assert [hit.score for hit in second] == pytest.approx(scores[5:10], abs=1e-5)
    least = scores[12]
    assert all(hit.score >= least for hit in index.search(query, 40, mode=mode, min_score=least))  # type: ignore[arg-type]
    assert len(index.search(query, 40, mode=mode, min_score=least)) >= 13  # type: ignore[arg-type]
    # Ten sources; the best eight hits are of fewer, so that more must be looked at.
    groups = index.search(query, top_k=8, mode=mode, group_by="source")  # type: ignore[arg-type]
    assert len({hit.metadata["source"] for hit in groups}) == len(groups) == 8
    best = {}
    for hit in everything:
        best.setdefault(hit.metadata["source"], hit.score)
    assert [hit.score for hit in groups] == pytest.approx(sorted(best.values(), reverse=True)[:8], abs=1e-5)


def test_the_lexical_index_follows_every_write_and_is_kept_on_disk(
    index: VectorIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    build = LexicalIndex.build.__func__  # type: ignore[attr-defined]

    def counted(cls: type[LexicalIndex], ids: list[str], texts: list[str]) -> LexicalIndex:
        built.append(len(ids))
        result: LexicalIndex = build(cls, ids, texts)
        return result

    monkeypatch.setattr(LexicalIndex, "build", classmethod(counted))
    assert index.search("zeppelin", mode="lexical") == []
    index.search("bread", mode="hybrid")
    assert built == [40]
    again = VectorIndex(tmp_path / "store", Letters())
    assert len(again.search("bread", top_k=40, mode="lexical")) == 8
    assert built == [40], "the index on disk must be used"

    VectorIndex(tmp_path / "store", Letters(), "another").add([Document("a zeppelin", "z")])
    assert index.search("zeppelin", mode="lexical") == []
    assert built == [40], "a write to another collection changes nothing here"

    index.add([Document("a zeppelin over the museum", "new")])
    for one in (index, again):
        assert [hit.metadata["source"] for hit in one.search("zeppelin", mode="lexical")] == ["new"]
    index.delete("new")
    for one in (index, again):
        assert one.search("zeppelin", mode="lexical") == []

    (about,) = (tmp_path / "store").glob("c2v-lexical-documents/c2v_lexical.json")
    for damage in ("{", json.dumps({"format": 99})):
        about.write_text(damage)
        fresh = VectorIndex(tmp_path / "store", Letters())
        assert len(fresh.search("bread", top_k=40, mode="lexical")) == 8
    (about.parent / "ids.json").unlink()
    assert len(VectorIndex(tmp_path / "store", Letters()).search("bread", top_k=40, mode="lexical")) == 8


def test_a_servers_collection_is_followed_too(
    chroma_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk is deleted and one is added: the number of chunks stays, the version must not."""
    monkeypatch.setenv("C2V_RAG_CACHE", str(tmp_path))
    writer, reader = (VectorIndex(chroma_server, Letters(), "followed") for _ in "ab")
    writer.add(DOCUMENTS)
    assert len(reader.search("bread", top_k=40, mode="lexical")) == 8
    writer.delete("source-0")
    writer.add([Document(f"bread, again {i}", "source-0") for i in range(4)])
    assert len(reader) == 40
    assert len(reader.search("bread again", top_k=40, mode="lexical")) == 11
    assert [path.name for path in tmp_path.glob("stores/*/*")] == ["lexical-followed"]


def test_wrong_options_are_named_and_nothing_is_created(index: VectorIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be one of dense, lexical, hybrid; got 'magic'"):
        index.search("a", mode="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k must be at least 1; got 0"):
        index.search("a", top_k=0, mode="hybrid")
    with pytest.raises(ValueError, match="offset must be at least 0; got -1"):
        index.search("a", offset=-1)
    with pytest.raises(ValueError, match=r"shape \(64,\), got \(3,\)"):
        index.search_by_vector(np.zeros(3))
    missing = VectorIndex(tmp_path / "mistyped", Letters())
    for mode in ("dense", "lexical", "hybrid"):
        with pytest.raises(FileNotFoundError, match="There is no index"):
            missing.search("a", mode=mode)  # type: ignore[arg-type]
    assert not (tmp_path / "mistyped").exists()


def test_a_vector_and_a_coroutine_find_the_same(index: VectorIndex) -> None:
    query = "museums"
    dense = index.search(query, top_k=3, mode="dense")
    assert index.search_by_vector(Letters().encode_query([query])[0], top_k=3) == dense
    expected = index.search(query, top_k=3)
    assert expected == index.search(query, top_k=3, mode="hybrid"), "the default"
    assert asyncio.run(index.asearch(query, 3)) == expected
    assert asyncio.run(index.asearch(query, 3, mode="hybrid", group_by="kind")) == index.search(
        query, 3, mode="hybrid", group_by="kind"
    )


def test_the_length_of_an_embedders_vectors_changes_no_hybrid_score(tmp_path: Path) -> None:
    class Long(Letters):
        def encode_document(self, texts: Any) -> np.ndarray:
            return 8 * super().encode_document(texts)

        def encode_query(self, texts: Any) -> np.ndarray:
            return 5 * super().encode_document(texts)

    # The last passage is found by BM25 only: 120 others are nearer to the query.
    documents = [*numbered(150), Document("zzzz zebra zzzz", "zebra")]
    found = []
    for name, model in (("unit", Letters()), ("long", Long())):
        index = VectorIndex(tmp_path / name, model)
        index.add(documents)
        found.append({hit.id: hit for hit in index.search("0: a passage about a zebra", 120)})
    shared = found[0].keys() & found[1].keys()  # the last of many equal scores may differ
    assert any(found[0][id].metadata["source"] == "zebra" for id in shared)
    for id in shared:
        assert found[1][id].scores == pytest.approx(found[0][id].scores, abs=1e-4)
        assert found[1][id].score == pytest.approx(found[0][id].score, abs=1e-2)
