"""Batches across callers: single texts of several callers are embedded in one call of the model."""

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

# The largest batch: about 8,000 tokens, which take one or two seconds on a CPU. Further texts wait for the next batch.
MAX_BATCH_TEXTS = 256
MAX_BATCH_CHARACTERS = 32_768


def gather(embedder: Embedder, kind: Literal["query", "document"], text: str, **options: Any) -> Future[np.ndarray]:
    """A future for the embedding (embedding_dim,) of a text by `encode_query` or `encode_document` with `options`.

    A text is embedded at once if the embedder is idle. Texts that arrive while the embedder works form the next batch,
    if kind and options are equal. An error is set on the future of the text that causes it only. If a future is
    cancelled before its batch starts, its text is not embedded. In a coroutine:
    `await asyncio.wrap_future(gather(...))`.
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

    def can_share_batch(self, other: _Request) -> bool:
        return (self.method, self.options) == (other.method, other.options)


class _Queue:
    """The requests that wait for one embedder, and the thread that embeds them. It ends when no request is left.

    The requests hold references to the embedder, the queue holds none, so that an unused embedder can be freed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Request] = deque()
        self._has_thread = False

    def add(self, request: _Request) -> None:
        with self._lock:
            self._waiting.append(request)
            if self._has_thread:
                return
            self._has_thread = True
        threading.Thread(target=self._run, name="c2v-gatherer", daemon=True).start()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            _embed([request for request in batch if request.future.set_running_or_notify_cancel()])

    def _next_batch(self) -> list[_Request] | None:
        """The oldest request and those that can share its batch; None, and the thread ends, if no request waits."""
        with self._lock:
            if not self._waiting:
                self._has_thread = False
                return None
            first = self._waiting.popleft()
            batch, others, characters = [first], deque[_Request](), len(first.text)
            for request in self._waiting:
                fits = len(batch) < MAX_BATCH_TEXTS and characters + len(request.text) <= MAX_BATCH_CHARACTERS
                if fits and request.can_share_batch(first):
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
        else:  # embed one text at a time, so that only the text that causes the error gets it
            for request in batch:
                _embed([request])
        return
    for request, row in answered:
        request.future.set_result(row)


_queues: WeakKeyDictionary[object, _Queue] = WeakKeyDictionary()
_queues_lock = threading.Lock()
