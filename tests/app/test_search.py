"""`Searcher`: each search method compared with a direct computation, and updated with the index."""

from __future__ import annotations

from pathlib import Path

import pytest

from c2v_rag import Document
from c2v_rag.app.search import BM25, CAUSAL2VEC, ENCODER, HYBRID, METHODS, Searcher
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.fusion import reciprocal_rank_fusion
from c2v_rag.model import Causal2Vec
from tests.tiny import assert_ranked, tiny_model

DOCUMENTS = [Document(f"Passage {word} is about topic {i % 7}.", f"{word}.txt") for i, word in enumerate(
    "heap bread yeast museum moon tide glass harbour violin copper lantern orchard".split()
)]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Causal2Vec:
    return tiny_model()


@pytest.fixture
def searcher(tmp_path: Path, model: Causal2Vec) -> Searcher:
    searcher = Searcher(tmp_path / "store", model, "documents")
    searcher.index.add(DOCUMENTS)
    return searcher


def test_every_method_ranks_by_its_own_scores(searcher: Searcher, model: Causal2Vec) -> None:
    query, texts = "the violin by the harbour", [document.text for document in DOCUMENTS]
    for method in METHODS:
        searcher.prepare(method)
        assert searcher.is_prepared(method)
    found = {method: [hit.text for hit in searcher.search(method, query, 4)] for method in METHODS}
    for method, embedder in ((CAUSAL2VEC, model), (ENCODER, EncoderEmbedder(model))):
        scores = embedder.encode_document(texts) @ embedder.encode_query([query])[0]
        assert_ranked([texts.index(text) for text in found[method]], scores)
    assert {*found[BM25]} == {"Passage violin is about topic 1.", "Passage harbour is about topic 0."}
    assert searcher.search(BM25, query, 4) == searcher.index.search(query, 4, mode="lexical")
    assert searcher.search(HYBRID, query, 4) == searcher.index.search(query, 4, mode="hybrid")


def test_methods_are_updated_after_documents_are_added_or_deleted(searcher: Searcher) -> None:
    for method in (ENCODER, BM25):
        searcher.prepare(method)
    searcher.index.delete("violin.txt")
    searcher.index.add([Document("A walrus sings.", "walrus.txt")])
    messages: list[str] = []
    for method in (ENCODER, BM25):
        assert not searcher.is_prepared(method)
        searcher.prepare(method, lambda message, done: messages.append(message))
        sources = {hit.metadata["source"] for hit in searcher.search(method, "a walrus plays the violin", 20)}
        assert "walrus.txt" in sources
        assert "violin.txt" not in sources
    assert messages[-1] == "Counting the words of 12 passages for BM25 …"
    assert "encoder alone, 12 of 12" in messages[-2]


def test_the_encoders_index_is_kept_in_the_store(searcher: Searcher, model: Causal2Vec, tmp_path: Path) -> None:
    searcher.prepare(ENCODER)
    again = Searcher(tmp_path / "store", model, "documents")
    again.prepare(ENCODER)
    assert again.encoder_index is not None
    assert len(again.encoder_index) == len(DOCUMENTS)
    assert {chunk.id for chunk in again.encoder_index.chunks()} == {chunk.id for chunk in again.index.chunks()}


def test_bm25_finds_nothing_for_words_that_are_in_no_passage(searcher: Searcher) -> None:
    searcher.prepare(BM25)
    for query in ("xylophone", "the", "?!", "\ud800"):
        assert searcher.search(BM25, query, 3) == []


def test_reciprocal_rank_fusion_equals_its_formula() -> None:
    fused = reciprocal_rank_fusion([["a", "b", "c"], ["c", "a"]])
    assert list(fused) == ["a", "c", "b"]
    assert fused["a"] == pytest.approx(1 / 61 + 1 / 62)
    assert fused["b"] == pytest.approx(1 / 62)
    assert reciprocal_rank_fusion([[], []]) == {}
