"""Texts that wait are embedded together: many callers, one at a time each, a few batches."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import numpy as np

    from c2v_rag.protocols import Embedder

# Embedded in one call; those behind wait for the next. Eight thousand tokens are a second or two on a CPU.
MOST_TEXTS = 256
MOST_CHARACTERS = 32_768


def gather(embedder: Embedder, kind: Literal["query", "document"], text: str, **options: Any) -> Future[np.ndarray]:
    """The future embedding (embedding_dim,) of one text, by `encode_query` or `encode_document` with `options`.

    Nothing is waited for: a text that comes alone is embedded at once, and those that come meanwhile go together in
    the next call, one for each combination of kind and options. An error reaches the texts it belongs to only. A
    future that is cancelled before its turn costs nothing. From a coroutine: `await asyncio.wrap_future(gather(...))`.
    """
    request = _Request(embedder, f"encode_{kind}", text, options)
    with _queues_lock:
        queue = _queues.setdefault(embedder, _Queue())
    queue.add(request)
    return request.future


@dataclasses.dataclass
class _Request:
    embedder: Embedder
    method: str
    text: str
    options: dict[str, Any]
    future: Future[np.ndarray] = dataclasses.field(default_factory=Future)

    def goes_with(self, other: _Request) -> bool:
        return (self.method, self.options) == (other.method, other.options)


class _Queue:
    """What waits for one embedder, and the thread that embeds it, which lives while there is something to do.

    The requests hold the embedder, the queue does not, so that an embedder nobody uses can go.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Request] = deque()
        self._works = False

    def add(self, request: _Request) -> None:
        with self._lock:
            self._waiting.append(request)
            if self._works:
                return
            self._works = True
        threading.Thread(target=self._work, name="c2v-gatherer", daemon=True).start()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            _embed([request for request in batch if request.future.set_running_or_notify_cancel()])

    def _next(self) -> list[_Request] | None:
        """The oldest request and those that go with it; None, and the thread's end, where nothing waits."""
        with self._lock:
            if not self._waiting:
                self._works = False
                return None
            first = self._waiting.popleft()
            batch, others, characters = [first], deque[_Request](), len(first.text)
            for request in self._waiting:
                fits = len(batch) < MOST_TEXTS and characters + len(request.text) <= MOST_CHARACTERS
                if fits and request.goes_with(first):
                    batch.append(request)
                    characters += len(request.text)
                else:
                    others.append(request)
            self._waiting = others
            return batch


def _embed(batch: list[_Request]) -> None:
    if not batch:
        return
    first = batch[0]
    try:
        rows = getattr(first.embedder, first.method)([request.text for request in batch], **first.options)
        answered = list(zip(batch, rows, strict=True))
    except Exception as error:
        if len(batch) == 1:
            first.future.set_exception(error)
        else:  # one bad text must not take the others with it
            for request in batch:
                _embed([request])
        return
    for request, row in answered:
        request.future.set_result(row)


_queues: WeakKeyDictionary[object, _Queue] = WeakKeyDictionary()
_queues_lock = threading.Lock()
