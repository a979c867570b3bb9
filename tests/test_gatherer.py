"""Many callers share few batches; an error reaches its own text only; unused embedders are freed."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
import pytest

from c2v_rag import gather, gatherer
from c2v_rag.gatherer import gather_token_counts


class PausedEmbedder:
    """An embedder that records its calls. Its calls wait until `released` is set."""

    embedding_dim = 2
    stamp: dict[str, str | int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str], dict[str, Any]]] = []
        self.started, self.released = threading.Event(), threading.Event()

    def _encode(self, kind: str, texts: Iterable[str], options: dict[str, Any]) -> np.ndarray:
        texts = list(texts)
        self.calls.append((kind, texts, options))
        self.started.set()
        assert self.released.wait(60)
        if "bad" in texts:
            raise ValueError("bad is not a text")
        return np.array([[len(text), kind == "query"] for text in texts], dtype=np.float32)

    def encode_query(self, texts: Iterable[str], **options: Any) -> np.ndarray:
        return self._encode("query", texts, options)

    def encode_document(self, texts: Iterable[str], **options: Any) -> np.ndarray:
        return self._encode("document", texts, options)


def paused_embedder(
    text: str, kind: Literal["query", "document"] = "query"
) -> tuple[PausedEmbedder, Future[np.ndarray]]:
    """An embedder that waits in its first call, which embeds `text`; later requests form the next batches."""
    embedder = PausedEmbedder()
    first = gather(embedder, kind, text)
    assert embedder.started.wait(60)
    return embedder, first


def test_sixty_four_simultaneous_texts_need_two_calls_and_each_gets_its_own_vector() -> None:
    embedder = PausedEmbedder()
    texts = ["x" * i for i in range(64)]

    async def ask() -> list[np.ndarray]:
        waiting = [asyncio.wrap_future(gather(embedder, "query", text)) for text in texts]
        embedder.released.set()
        return await asyncio.gather(*waiting)

    rows = asyncio.run(ask())
    assert [row.tolist() for row in rows] == [[i, 1] for i in range(64)]
    assert len(embedder.calls) <= 2
    assert sorted(text for _, call_texts, _ in embedder.calls for text in call_texts) == sorted(texts)


def test_token_counts_share_calls_and_do_not_wait_for_embeddings() -> None:
    class Counter(PausedEmbedder):
        def __init__(self) -> None:
            super().__init__()
            self.counted: list[list[str]] = []
            self.is_counting, self.may_count = threading.Event(), threading.Event()

        def count_tokens(self, texts: Sequence[str]) -> list[int]:
            self.counted.append(list(texts))
            self.is_counting.set()
            assert self.may_count.wait(60)
            return [len(text) for text in texts]

    model = Counter()
    embedding = gather(model, "query", "embedded")
    assert model.started.wait(60)
    counts = gather_token_counts(model, ["first"])
    assert model.is_counting.wait(60)
    for text in ("a", "bb", "ccc"):
        counts += gather_token_counts(model, [text])
    model.may_count.set()
    assert [future.result(60) for future in counts] == [5, 1, 2, 3]
    assert model.counted == [["first"], ["a", "bb", "ccc"]]
    assert not embedding.done()
    model.released.set()
    assert embedding.result(60).tolist() == [8, 1]


def test_a_call_has_one_kind_and_one_set_of_options_and_a_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatherer, "MAX_BATCH_TEXTS", 4)
    embedder, first = paused_embedder("first")
    rest = [gather(embedder, "query", f"q{i}") for i in range(6)]
    rest += [gather(embedder, "document", "d"), gather(embedder, "query", "other", instruction="i")]
    embedder.released.set()
    for future in (first, *rest):
        future.result(timeout=60)
    assert embedder.calls == [
        ("query", ["first"], {}),
        ("query", ["q0", "q1", "q2", "q3"], {}),
        ("query", ["q4", "q5"], {}),
        ("document", ["d"], {}),
        ("query", ["other"], {"instruction": "i"}),
    ]


def test_a_call_has_a_limited_number_of_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatherer._Queue, "max_characters", 10)
    monkeypatch.setattr(gatherer, "TEXT_CHARACTERS", 0)
    embedder, first = paused_embedder("first")
    rest = [gather(embedder, "query", "x" * length) for length in (4, 6, 20, 5)]
    embedder.released.set()
    for future in (first, *rest):
        future.result(timeout=60)
    assert [[len(text) for text in texts] for _, texts, _ in embedder.calls] == [[5], [4, 6], [20], [5]]


def test_an_error_reaches_its_own_text_only_and_a_cancelled_text_is_not_embedded() -> None:
    embedder, first = paused_embedder("first", "document")
    futures = {text: gather(embedder, "document", text) for text in ("a", "bad", "gone", "b")}
    assert futures["gone"].cancel()
    embedder.released.set()
    assert first.result(timeout=60).tolist() == [5, 0]
    assert futures["a"].result(timeout=60).tolist() == futures["b"].result(timeout=60).tolist() == [1, 0]
    with pytest.raises(ValueError, match="bad is not a text"):
        futures["bad"].result(timeout=60)
    assert all("gone" not in texts for _, texts, _ in embedder.calls)


def test_an_error_of_the_connection_reaches_the_whole_batch_after_one_call() -> None:
    class Unreachable(PausedEmbedder):
        def _encode(self, kind: str, texts: Iterable[str], options: dict[str, Any]) -> np.ndarray:
            super()._encode(kind, texts, options)
            raise ConnectionError("no answer")

    embedder = Unreachable()
    first = gather(embedder, "query", "first")
    assert embedder.started.wait(60)
    rest = [gather(embedder, "query", text) for text in ("a", "b")]
    embedder.released.set()
    for future in (first, *rest):
        with pytest.raises(ConnectionError, match="no answer"):
            future.result(timeout=60)
    assert [texts for _, texts, _ in embedder.calls] == [["first"], ["a", "b"]]


class TimedEmbedder(PausedEmbedder):
    """An embedder whose calls take `seconds` for each character, by the gatherer's clock."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seconds, self.now = seconds, 0.0
        self.released.set()
        monkeypatch.setattr(gatherer.time, "perf_counter", lambda: self.now)

    def _encode(self, kind: str, texts: Iterable[str], options: dict[str, Any]) -> np.ndarray:
        rows = super()._encode(kind, texts, options)
        self.now += self.seconds * sum(gatherer._characters(text) for text in self.calls[-1][1])
        return rows


@pytest.mark.parametrize(("seconds", "expected"), [(1e-4, 10_000), (1e-6, 1_000_000), (1.0, 2_048), (1e-9, 4_000_000)])
def test_the_size_of_a_batch_follows_from_the_time_that_batches_took(
    seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = TimedEmbedder(seconds, monkeypatch)
    texts = ["x" * (1000 - gatherer.TEXT_CHARACTERS)] * 5000
    first = next(gatherer.batches_of(embedder, texts))
    assert len(first) == 33, "before any time is known"
    for _ in range(2):
        gather(embedder, "query", texts[0]).result(timeout=60)
        end_gatherer_threads()
    assert gatherer._queues[embedder].max_characters == pytest.approx(expected)
    parts = list(gatherer.batches_of(embedder, texts))
    assert sum(map(len, parts)) == 5000
    assert len(parts[0]) == min(-(-expected // 1000), gatherer.MAX_BATCH_TEXTS)


def end_gatherer_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "c2v-gatherer":  # it ends after its last request
            thread.join(60)
            assert not thread.is_alive()


def test_an_embedder_that_is_not_used_is_freed() -> None:
    embedder, first = paused_embedder("a")
    embedder.released.set()
    first.result(timeout=60)
    end_gatherer_threads()
    reference = weakref.ref(embedder)
    del embedder
    gc.collect()
    assert reference() is None
