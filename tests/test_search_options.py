"""Options of a search: diversity and the text around a hit."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from sentence_transformers import CrossEncoder

from c2v_rag import Document, VectorIndex
from c2v_rag.index import query as query_module
from c2v_rag.index.chunking import Chunk
from tests.plain import Letters, numbered
from tests.tiny import tiny_tokenizer

TEXT = "Zero one. Two three. Four five. Six seven. Eight nine."
SPANS = ((0, 9), (5, 20), (21, 31), (32, 42), (43, 54))  # the first two overlap, the others have a space between


def write(index: VectorIndex, spans: Sequence[tuple[int, int]], source: str = "a.txt", **metadata: Any) -> None:
    chunks = [
        Chunk(f"{source}{metadata}{start}", TEXT[start:end], {"source": source, "start": start, "end": end, **metadata})
        for start, end in spans
    ]
    index.write(chunks[::-1])  # the order of writing must not matter


@pytest.fixture
def index(tmp_path: Path) -> VectorIndex:
    return VectorIndex(tmp_path / "store", Letters())


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_mmr_chooses_as_another_implementation_does(index: VectorIndex, weight: float) -> None:
    words = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (40, 12))
    index.add([Document("".join(row), f"{number}.txt") for number, row in enumerate(words)])
    query = "some query"
    candidates = index.search(query, 20, mode="dense")
    embeddings = {chunk.id: chunk.embedding for chunk in index.chunks(embeddings=True)}
    rows: Any = [embeddings[hit.id] for hit in candidates]
    expected = maximal_marginal_relevance(Letters().encode_query([query])[0], rows, weight, 6)
    found = index.search(query, 6, mode="dense", mmr=weight, mmr_depth=20)
    assert [hit.id for hit in found] == [candidates[at].id for at in expected]
    assert ([hit.id for hit in found] == [hit.id for hit in candidates[:6]]) == (weight == 1.0)
    assert index.search(query, 3, mode="dense", offset=3, mmr=weight, mmr_depth=20) == found[3:], (
        "pages follow each other"
    )


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_mmr_leaves_out_copies_in_every_mode(index: VectorIndex, mode: Any) -> None:
    index.add([Document("bread and yeast", f"copy-{i}") for i in range(3)] + [Document("soup with bread", "other")])
    plain = index.search("bread and yeast", 2, mode=mode)
    assert {hit.text for hit in plain} == {"bread and yeast"}
    diverse = index.search("bread and yeast", 2, mode=mode, mmr=0.3)
    assert [hit.text for hit in diverse] == ["bread and yeast", "soup with bread"]
    assert len(index.search("bread and yeast", 10, mode=mode, mmr=0.3)) == 4
    grouped = index.search("bread and yeast", 10, mode=mode, mmr=0.3, group_by="source", where={"source": "other"})
    assert [hit.metadata["source"] for hit in grouped] == ["other"]


def test_neighbours_are_the_text_around_a_hit_without_repetitions(index: VectorIndex) -> None:
    write(index, SPANS)
    write(index, SPANS, "b.txt")
    for start, end in SPANS:
        for number in (1, 2, 9):
            hit = next(
                hit
                for hit in index.search("x", 20, neighbours=number, where={"source": "a.txt"})
                if hit.metadata["start"] == start
            )
            at = SPANS.index((start, end))
            around = SPANS[max(0, at - number) : at + number + 1]
            assert hit.context.split() == TEXT[around[0][0] : around[-1][1]].split()
            assert hit.context == hit.before + hit.text + hit.after
            assert hit.text == TEXT[start:end]
    (alone,) = index.search("x", 1)
    assert (alone.before, alone.after) == ("", "")


def test_rows_of_a_table_are_not_neighbours_of_each_other(index: VectorIndex) -> None:
    for row in (1, 2):
        write(index, SPANS[1:3], "table.csv", row=row)
    for hit in index.search("x", 10, neighbours=5):
        assert hit.context.split() == TEXT[5:31].split()


def test_chunks_without_a_position_have_no_neighbours_and_the_log_says_so(
    index: VectorIndex, caplog: pytest.LogCaptureFixture
) -> None:
    index.write([Chunk("old", "bread", {"source": "a.txt"})])
    with caplog.at_level(logging.WARNING):
        (hit,) = index.search("bread", 1, neighbours=2)
    assert hit.context == "bread"
    assert "1 of 1 hits have no neighbours" in caplog.text
    assert "Index the documents into a new collection" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mmr": 1.5}, "mmr must be from 0"),
        ({"neighbours": -1}, "neighbours must be at least 0; got -1"),
        ({"mmr_depth": 0, "mmr": 0.5}, "mmr_depth must be at least 1; got 0"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_is_embedded(
    index: VectorIndex, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        index.search("a", **options)


@pytest.mark.parametrize("default", ["dense", "hybrid"])
def test_one_constant_is_the_default_mode(index: VectorIndex, default: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add(numbered(12))
    monkeypatch.setattr(query_module, "DEFAULT_MODE", default)
    hits = index.search("topic 3", 3)
    assert hits == index.search("topic 3", 3, mode=default)
    assert ("bm25" in hits[0].scores) == (default == "hybrid")


def test_hits_are_plain_data(index: VectorIndex) -> None:
    write(index, SPANS)
    (hit,) = index.search("x", 1, neighbours=1)
    assert dataclasses.asdict(hit).keys() == {"id", "score", "text", "metadata", "scores", "before", "after"}


def longest_first(query: str, texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_a_function_reranks_the_first_hits_only(index: VectorIndex, mode: Any) -> None:
    index.add([Document("bread " + "and more " * i, f"{i % 5}.txt") for i in range(20)])
    first = index.search("bread", 8, mode=mode)
    found = index.search("bread", 3, mode=mode, rerank=longest_first, rerank_depth=8)
    assert [hit.id for hit in found] == [hit.id for hit in sorted(first, key=lambda hit: -len(hit.text))[:3]]
    for hit in found:
        assert hit.score == hit.scores["rerank"] == len(hit.text)
        assert hit.scores.keys() > {"rerank"}, "the scores that chose the candidates stay"
    assert len(index.search("bread", 12, mode=mode, rerank=longest_first, rerank_depth=8)) == 12
    later = index.search("bread", 2, offset=1, mode=mode, rerank=longest_first, rerank_depth=8)
    assert [hit.id for hit in later] == [hit.id for hit in found[1:]]
    least = found[1].score
    assert index.search("bread", 3, mode=mode, rerank=longest_first, rerank_depth=8, min_score=least) == found[:2]
    grouped = index.search("bread", 5, mode=mode, rerank=longest_first, rerank_depth=20, group_by="source")
    assert [len(hit.text) for hit in grouped] == sorted((len(hit.text) for hit in grouped), reverse=True)
    assert len({hit.metadata["source"] for hit in grouped}) == 5


def tiny_cross_encoder(labels: int = 1) -> Any:
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=labels,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


@pytest.mark.parametrize("given", ["instance", "folder"])
def test_a_cross_encoder_reranks_by_its_own_scores(index: VectorIndex, tmp_path: Path, given: str) -> None:
    tiny_cross_encoder().save_pretrained(tmp_path / "cross")
    tiny_tokenizer("wordpiece").save_pretrained(tmp_path / "cross")
    cross = CrossEncoder(str(tmp_path / "cross"), device="cpu")
    index.add(numbered(12))
    reranker = cross if given == "instance" else str(tmp_path / "cross")
    found = index.search("topic 3", 12, rerank=reranker)
    expected = cross.predict([("topic 3", hit.text) for hit in found], show_progress_bar=False)
    assert [hit.score for hit in found] == pytest.approx(list(expected), abs=1e-5)
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)


def test_a_reranker_that_cannot_be_used_is_named(index: VectorIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add([])
    assert index.search("a", rerank=longest_first) == []
    index.add(numbered(4))
    for wrong in (lambda query, texts: [1.0], lambda query, texts: [float("nan")] * len(texts)):
        with pytest.raises(ValueError, match="one finite number for each of 4 texts"):
            index.search("a", rerank=wrong)
    unknown: Any = 7
    with pytest.raises(TypeError, match="CrossEncoder, its name, or a function"):
        index.search("a", rerank=unknown)
    with pytest.raises(ValueError, match="rerank needs the query's text"):
        index.search_by_vector(Letters().encode_query(["a"])[0], rerank=longest_first)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"c2v-rag\[rerank\]"):
        index.search("a", rerank="some/cross-encoder")


def test_an_option_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, Letters())
    index.add(numbered(3))
    for search in (index.search, index.search_by_vector):
        query: Any = "topic" if search == index.search else Letters().encode_query(["topic"])[0]
        with pytest.raises(TypeError, match=r"no search option 'filter', 'k'\. The options are where, min_score"):
            search(query, filter={"n": 1}, k=3)  # type: ignore[call-arg]
