"""Options of a search: diversity and the text around a hit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from c2v_rag import Document, VectorIndex
from c2v_rag.index.chunking import Chunk
from tests.plain import Letters

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


def test_hits_are_plain_data(index: VectorIndex) -> None:
    write(index, SPANS)
    (hit,) = index.search("x", 1, neighbours=1)
    assert dataclasses.asdict(hit).keys() == {"id", "score", "text", "metadata", "scores", "before", "after"}
