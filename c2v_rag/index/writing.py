"""Write documents into a collection: read and cut, embed, and store at the same time.

Reading and cutting run in the caller's thread, embedding and storing in a thread each. Batches are stored in the order
of the documents, so that a call that was killed can be repeated.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from tqdm.auto import tqdm

from c2v_rag.index.chunking import Chunk, Present, embedded_text, new_chunks, storable, storable_text
from c2v_rag.index.settings import ChunkSettings
from c2v_rag.index.stores import Store
from c2v_rag.protocols import Embedder
from c2v_rag.sources import Document

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

DOCUMENTS_READ_AHEAD = 512
CHUNKS_WRITTEN_AT_ONCE = 256
_SECONDS_BETWEEN_REPORTS = 0.2  # of progress while the caller waits: it may raise to cancel
QUEUED_BATCHES = 2  # that are embedded or stored while the next one is read; 0: one step after the other


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """The result of `add`, in numbers of chunks.

    `added`: embedded and written. `unchanged`: stored already. `replaced`: deleted, because their source no longer
    contains them. `removed`: deleted, because their source no longer exists. `truncated`: longer than the model reads,
    in spite of chunking. `seconds`: duration of the whole call.
    """

    added: int
    unchanged: int
    replaced: int
    removed: int
    truncated: int
    seconds: float


class CollectionWriter:
    """Writes into an open collection, with the embedder and the chunk settings that made it."""

    def __init__(self, store: Store, collection: Collection, model: Embedder, settings: ChunkSettings) -> None:
        self._store = store
        self._collection = collection
        self._model = model
        self._settings = settings

    def add(
        self,
        documents: Iterable[Document],
        *,
        prune: bool,
        total: int | None,
        show_progress: bool,
        on_progress: Callable[[int, int], None] | None,
        write_every: int,
    ) -> IndexReport:
        """Bring the collection up to date with `documents`; see `VectorIndex.add`."""
        started = time.perf_counter()
        counts: Counter[str] = Counter()
        present = Present()
        waiting: list[Chunk] = []
        num_read = 0

        reporting = threading.Lock()

        def report_progress() -> None:
            if on_progress is not None:
                with reporting:
                    on_progress(num_read, counts["added"])

        with (
            tqdm(total=total, unit="document", disable=not show_progress) as bar,
            _Pipeline(self, counts, report_progress) as pipeline,
        ):
            for batch in _batched(documents, DOCUMENTS_READ_AHEAD):
                for chunks in new_chunks(batch, self._model, self._settings, self._collection, present, counts):
                    for chunk in chunks:
                        waiting.append(chunk)
                        if len(waiting) >= write_every:
                            pipeline.put(waiting)
                            waiting = []
                    bar.update()
                    num_read += 1
                    report_progress()
                if present.write_moved(self._collection):
                    self._store.wrote(self._collection)
            pipeline.put(waiting)
            pipeline.drain()
            report_progress()
        outdated = [id for ids in present.ids.values() for id in ids] if prune else []
        self.delete(outdated)
        return IndexReport(
            added=counts["added"],
            unchanged=counts["unchanged"],
            replaced=len(outdated),
            removed=0,
            truncated=counts["truncated"],
            seconds=time.perf_counter() - started,
        )

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Embed these chunks and store them, in place of chunks with the same ids."""
        if chunks:
            self.store(chunks, self.embed(chunks))

    def embed(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """(n, embedding_dim) of the chunks, behind their headers if the collection has them."""
        return self._model.encode_document([embedded_text(chunk, self._settings) for chunk in chunks])

    def store(self, chunks: Sequence[Chunk], embeddings: np.ndarray) -> None:
        size = min(self._store.client().get_max_batch_size(), CHUNKS_WRITTEN_AT_ONCE)
        for start in range(0, len(chunks), size):
            part = chunks[start : start + size]
            self._collection.upsert(
                ids=[chunk.id for chunk in part],
                embeddings=embeddings[start : start + size],
                documents=[storable_text(chunk.text) for chunk in part],
                metadatas=[storable(chunk.metadata) for chunk in part],
            )
        self._store.wrote(self._collection)

    def delete(self, ids: Sequence[str]) -> None:
        size = self._store.client().get_max_batch_size()
        for start in range(0, len(ids), size):
            self._collection.delete(ids=list(ids[start : start + size]))
        if ids:
            self._store.wrote(self._collection)


class _Pipeline:
    """Embeds and stores batches of chunks in two threads, in their order, at most `QUEUED_BATCHES` at a time.

    `counts["added"]` grows when a batch is stored. An error of a thread is raised by the next call; batches behind it
    are not stored. Leaving the `with` block waits for the batches that run.
    """

    def __init__(self, writer: CollectionWriter, counts: Counter[str], report_progress: Callable[[], None]) -> None:
        self._report_progress = report_progress
        self._writer = writer
        self._counts = counts
        self._embedding = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._queued: deque[Future[int]] = deque()
        self._failed: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for queued in self._queued:
            queued.cancel()
        self._embedding.shutdown(cancel_futures=True)
        self._storing.shutdown(cancel_futures=True)

    def put(self, chunks: list[Chunk]) -> None:
        """Queue a batch; waits while the queue is full."""
        if not chunks:
            return
        embeddings = self._embedding.submit(self._embed, chunks)
        self._queued.append(self._storing.submit(self._store, chunks, embeddings))
        self._wait(QUEUED_BATCHES)

    def drain(self) -> None:
        """Wait until all batches are stored."""
        self._wait(0)

    def _embed(self, chunks: list[Chunk]) -> np.ndarray:
        with self._in_order("embedding"):
            self._report_progress()  # it may raise to cancel: nothing is embedded after that
            return self._writer.embed(chunks)

    def _store(self, chunks: list[Chunk], embeddings: Future[np.ndarray]) -> int:
        vectors = embeddings.result()
        with self._in_order("storing"):
            self._writer.store(chunks, vectors)
            return len(chunks)

    @contextmanager
    def _in_order(self, step: str) -> Iterator[None]:
        """Raise CancelledError if this step has failed for an earlier batch, so that batches are stored in order."""
        if step in self._failed:
            raise CancelledError
        try:
            yield
        except BaseException:
            self._failed.add(step)
            raise

    def _wait(self, most: int) -> None:
        while self._queued and (len(self._queued) > most or self._queued[0].done()):
            while not wait_for([self._queued[0]], _SECONDS_BETWEEN_REPORTS).done:
                self._report_progress()
            self._counts["added"] += self._queued.popleft().result()


def _batched(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, size)):
        for document in batch:
            if not isinstance(document, Document):
                raise TypeError(f"documents must be c2v_rag.Document objects, got {type(document).__name__}.")
        yield batch
