"""Batches across callers: single texts of several callers are embedded, or counted, in one call of the model."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import numpy as np

    from c2v_rag.protocols import Embedder, TokenCounter

# A batch may take about this long, by the time that earlier ones took. Further texts wait for the next batch.
TARGET_SECONDS = 1.0
START_CHARACTERS = 32_768  # of a batch, before any time is known
LEAST_CHARACTERS, MOST_CHARACTERS = 2_048, 4_000_000
MAX_BATCH_TEXTS = 2_048
TEXT_CHARACTERS = 64  # count for each text in addition to its own: its special tokens and its row cost time too


def gather(embedder: Embedder, kind: Literal["query", "document"], text: str, **options: Any) -> Future[np.ndarray]:
    """A future for the embedding (embedding_dim,) of a text by `encode_query` or `encode_document` with `options`.

    A text is embedded at once if the embedder is idle. Texts that arrive while the embedder works form the next batch,
    if kind and options are equal. An error is set on the future of the text that causes it only; a ConnectionError
    is set on those of the whole batch. If a future is cancelled before its batch starts, its text is not embedded. In a
    coroutine: `await asyncio.wrap_future(gather(...))`.
    """
    request = _Request(embedder, f"encode_{kind}", text, options)
    _queue_of(embedder, _queues).add(request)
    return request.future


def gather_token_counts(model: TokenCounter, texts: Sequence[str]) -> list[Future[int]]:
    """For each text a future for its number of tokens by `model.count_tokens`; the rest as for `gather`.

    They have a queue of their own, so that they do not wait for texts that are embedded.
    """
    queue = _queue_of(model, _count_queues)
    requests = [_Request(model, "count_tokens", text, {}) for text in texts]
    for request in requests:
        queue.add(request)
    return [request.future for request in requests]


def batches_of(embedder: Embedder, texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in parts of about one batch each, so that other requests can come in between.

    The size of a part follows from the times of the embedder's batches until the part is asked for.
    """
    queue = _queue_of(embedder, _queues)
    start = 0
    while start < len(texts):
        end, characters, most = start, 0, queue.max_characters
        while end < len(texts) and end - start < MAX_BATCH_TEXTS and (end == start or characters < most):
            characters += _characters(texts[end])
            end += 1
        yield texts[start:end]
        start = end


@dataclasses.dataclass
class _Request:
    model: object
    method: str
    text: str
    options: dict[str, Any]
    future: Future[Any] = dataclasses.field(default_factory=Future)

    def can_share_batch(self, other: _Request) -> bool:
        return (self.method, self.options) == (other.method, other.options)


class _Queue:
    """The requests that wait for one model, and the thread that calls it. It ends when no request is left.

    The requests hold references to the model, the queue holds none, so that an unused model can be freed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Request] = deque()
        self._has_thread = False
        self._seconds = self._characters = 0.0  # of past batches; each counts half as much as the one after it

    @property
    def max_characters(self) -> float:
        """The limit of a batch's characters, so that it takes about `TARGET_SECONDS`."""
        if not self._seconds:
            return START_CHARACTERS
        most = TARGET_SECONDS * self._characters / self._seconds
        return min(max(most, LEAST_CHARACTERS), MOST_CHARACTERS)

    def add(self, request: _Request) -> None:
        with self._lock:
            self._waiting.append(request)
            if self._has_thread:
                return
            self._has_thread = True
        threading.Thread(target=self._run, name="c2v-gatherer", daemon=True).start()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            running = [request for request in batch if request.future.set_running_or_notify_cancel()]
            started = time.perf_counter()
            if _compute(running):
                self._seconds = self._seconds / 2 + time.perf_counter() - started
                self._characters = self._characters / 2 + sum(_characters(request.text) for request in running)

    def _next_batch(self) -> list[_Request] | None:
        """The oldest request and those that can share its batch; None, and the thread ends, if no request waits."""
        with self._lock:
            if not self._waiting:
                self._has_thread = False
                return None
            first = self._waiting.popleft()
            batch, not_in_batch, characters = [first], deque[_Request](), _characters(first.text)
            most = self.max_characters
            for request in self._waiting:
                fits = len(batch) < MAX_BATCH_TEXTS and characters + _characters(request.text) <= most
                if fits and request.can_share_batch(first):
                    batch.append(request)
                    characters += _characters(request.text)
                else:
                    not_in_batch.append(request)
            self._waiting = not_in_batch
            return batch


def _characters(text: str) -> int:
    return TEXT_CHARACTERS + len(text)


def _compute(batch: list[_Request]) -> bool:
    """Set the results of a batch; returns whether one call of the model computed them."""
    if not batch:
        return False
    first = batch[0]
    try:
        rows = getattr(first.model, first.method)([request.text for request in batch], **first.options)
        results = list(zip(batch, rows, strict=True))
    except Exception as error:
        if len(batch) == 1 or isinstance(error, ConnectionError):  # no text causes it, and each would wait for it again
            for request in batch:
                request.future.set_exception(error)
        else:  # embed one text at a time, so that only the text that causes the error gets it
            for request in batch:
                _compute([request])
        return False
    for request, row in results:
        request.future.set_result(row)
    return True


def _queue_of(model: object, queues: WeakKeyDictionary[object, _Queue]) -> _Queue:
    with _queues_lock:
        return queues.setdefault(model, _Queue())


_queues: WeakKeyDictionary[object, _Queue] = WeakKeyDictionary()  # by embedder
_count_queues: WeakKeyDictionary[object, _Queue] = WeakKeyDictionary()  # by the model that counts
_queues_lock = threading.Lock()
