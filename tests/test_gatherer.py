"""Many callers, few batches; an error stays with its text; nothing is kept alive."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from c2v_rag import gather, gatherer


class Slow:
    """An embedder that notes what it is asked for in one call."""

    embedding_dim = 2
    stamp: dict[str, str | int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str], dict[str, Any]]] = []
        self.begun = threading.Event()

    def _encode(self, kind: str, texts: Iterable[str], options: dict[str, Any]) -> np.ndarray:
        texts = list(texts)
        self.calls.append((kind, texts, options))
        self.begun.set()
        time.sleep(0.05)
        if "bad" in texts:
            raise ValueError("bad is not a text")
        return np.array([[len(text), kind == "query"] for text in texts], dtype=np.float32)

    def encode_query(self, texts: Iterable[str], **options: Any) -> np.ndarray:
        return self._encode("query", texts, options)

    def encode_document(self, texts: Iterable[str], **options: Any) -> np.ndarray:
        return self._encode("document", texts, options)


def test_sixty_four_at_once_are_two_calls_and_each_gets_its_own() -> None:
    embedder = Slow()
    texts = ["x" * i for i in range(64)]

    async def ask() -> list[np.ndarray]:
        return await asyncio.gather(*(asyncio.wrap_future(gather(embedder, "query", text)) for text in texts))

    rows = asyncio.run(ask())
    assert [row.tolist() for row in rows] == [[i, 1] for i in range(64)]
    assert len(embedder.calls) <= 3
    assert sorted(text for _, some, _ in embedder.calls for text in some) == sorted(texts)


def test_kinds_and_options_are_not_mixed_and_a_call_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatherer, "MAX_BATCH_TEXTS", 4)
    embedder = Slow()
    first = gather(embedder, "query", "first")
    embedder.begun.wait(5)
    rest = [gather(embedder, "query", f"q{i}") for i in range(6)]
    rest += [gather(embedder, "document", "d"), gather(embedder, "query", "other", instruction="i")]
    for future in (first, *rest):
        future.result(timeout=10)
    assert embedder.calls == [
        ("query", ["first"], {}),
        ("query", ["q0", "q1", "q2", "q3"], {}),
        ("query", ["q4", "q5"], {}),
        ("document", ["d"], {}),
        ("query", ["other"], {"instruction": "i"}),
    ]


def test_long_texts_are_few_to_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatherer, "MAX_BATCH_CHARACTERS", 10)
    embedder = Slow()
    first = gather(embedder, "query", "first")
    embedder.begun.wait(5)
    for future in (first, *[gather(embedder, "query", "x" * length) for length in (4, 6, 20, 5)]):
        future.result(timeout=10)
    assert [[len(text) for text in texts] for _, texts, _ in embedder.calls] == [[5], [4, 6], [20], [5]]


def test_an_error_stays_with_its_text_and_a_cancelled_one_costs_nothing() -> None:
    embedder = Slow()
    first = gather(embedder, "document", "first")
    embedder.begun.wait(5)
    futures = {text: gather(embedder, "document", text) for text in ("a", "bad", "gone", "b")}
    assert futures["gone"].cancel()
    assert first.result(timeout=10).tolist() == [5, 0]
    assert futures["a"].result(timeout=10).tolist() == futures["b"].result(timeout=10).tolist() == [1, 0]
    with pytest.raises(ValueError, match="bad is not a text"):
        futures["bad"].result(timeout=10)
    assert all("gone" not in texts for _, texts, _ in embedder.calls)


def test_an_embedder_nobody_uses_is_let_go() -> None:
    embedder = Slow()
    gather(embedder, "query", "a").result(timeout=10)
    alive = weakref.ref(embedder)
    del embedder
    for _ in range(50):
        gc.collect()
        if alive() is None:
            break
        time.sleep(0.02)
    assert alive() is None
    assert not [thread for thread in threading.enumerate() if thread.name == "c2v-gatherer"]
