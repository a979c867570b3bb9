"""Many callers, few batches; an error stays with its text; nothing is kept alive."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
import pytest

from c2v_rag import gather, gatherer


class Held:
    """An embedder that notes what it is asked for in one call; its first call goes on when it is released."""

    embedding_dim = 2
    stamp: dict[str, str | int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str], dict[str, Any]]] = []
        self.begun, self.released = threading.Event(), threading.Event()

    def _encode(self, kind: str, texts: Iterable[str], options: dict[str, Any]) -> np.ndarray:
        texts = list(texts)
        self.calls.append((kind, texts, options))
        self.begun.set()
        assert self.released.wait(60)
        if "bad" in texts:
            raise ValueError("bad is not a text")
        return np.array([[len(text), kind == "query"] for text in texts], dtype=np.float32)

    def encode_query(self, texts: Iterable[str], **options: Any) -> np.ndarray:
        return self._encode("query", texts, options)

    def encode_document(self, texts: Iterable[str], **options: Any) -> np.ndarray:
        return self._encode("document", texts, options)


def held_with(text: str, kind: Literal["query", "document"] = "query") -> tuple[Held, Future[np.ndarray]]:
    """An embedder in its first call, which embeds `text`; what is asked for now waits."""
    embedder = Held()
    first = gather(embedder, kind, text)
    assert embedder.begun.wait(60)
    return embedder, first


def test_sixty_four_at_once_are_two_calls_and_each_gets_its_own() -> None:
    embedder = Held()
    texts = ["x" * i for i in range(64)]

    async def ask() -> list[np.ndarray]:
        waiting = [asyncio.wrap_future(gather(embedder, "query", text)) for text in texts]
        embedder.released.set()
        return await asyncio.gather(*waiting)

    rows = asyncio.run(ask())
    assert [row.tolist() for row in rows] == [[i, 1] for i in range(64)]
    assert len(embedder.calls) <= 2
    assert sorted(text for _, some, _ in embedder.calls for text in some) == sorted(texts)


def test_kinds_and_options_are_not_mixed_and_a_call_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatherer, "MAX_BATCH_TEXTS", 4)
    embedder, first = held_with("first")
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


def test_long_texts_are_few_to_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatherer, "MAX_BATCH_CHARACTERS", 10)
    embedder, first = held_with("first")
    rest = [gather(embedder, "query", "x" * length) for length in (4, 6, 20, 5)]
    embedder.released.set()
    for future in (first, *rest):
        future.result(timeout=60)
    assert [[len(text) for text in texts] for _, texts, _ in embedder.calls] == [[5], [4, 6], [20], [5]]


def test_an_error_stays_with_its_text_and_a_cancelled_one_costs_nothing() -> None:
    embedder, first = held_with("first", "document")
    futures = {text: gather(embedder, "document", text) for text in ("a", "bad", "gone", "b")}
    assert futures["gone"].cancel()
    embedder.released.set()
    assert first.result(timeout=60).tolist() == [5, 0]
    assert futures["a"].result(timeout=60).tolist() == futures["b"].result(timeout=60).tolist() == [1, 0]
    with pytest.raises(ValueError, match="bad is not a text"):
        futures["bad"].result(timeout=60)
    assert all("gone" not in texts for _, texts, _ in embedder.calls)


def test_an_embedder_nobody_uses_is_let_go() -> None:
    embedder, first = held_with("a")
    embedder.released.set()
    first.result(timeout=60)
    for thread in threading.enumerate():
        if thread.name == "c2v-gatherer":  # ends with its work
            thread.join(60)
            assert not thread.is_alive()
    alive = weakref.ref(embedder)
    del embedder
    gc.collect()
    assert alive() is None
