"""A Chroma collection that is filled from documents, searched, resumed and brought up to date.

A run that was killed goes on where it was. The collection remembers the model that made it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from c2v_rag.index.chunking import Chunk, new_chunks, present_ids
from c2v_rag.index.stamp import STAMP_KEY, check_stamp, read_stamp
from c2v_rag.index.stores import DEFAULT_COLLECTION, open_store
from c2v_rag.protocols import Embedder
from c2v_rag.sources import Document

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

DOCUMENTS_READ_AHEAD = 512
CHUNKS_WRITTEN_AT_ONCE = 256
_PAGE = 1000
_COLLECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,510}[A-Za-z0-9]")


@dataclasses.dataclass(frozen=True)
class Hit:
    """A chunk that was found. `score` is the cosine similarity; `metadata` holds its source and the document's."""

    id: str
    score: float
    text: str
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """What `add` did, counted in chunks.

    `added`: embedded and written. `unchanged`: there already. `replaced`: deleted, because their source no longer
    holds them. `removed`: deleted, because their source is gone. `truncated`: longer than the model reads, in spite
    of chunking. `seconds`: for all of it.
    """

    added: int
    unchanged: int
    replaced: int
    removed: int
    truncated: int
    seconds: float


class VectorIndex:
    """A Chroma collection filled and searched with one embedder.

    Example:
        >>> from c2v_rag import Document, VectorIndex, shared_model
        >>> index = VectorIndex("store", shared_model())
        >>> index.add([Document("Bread needs yeast.", source="bread.txt")]).added
        1
        >>> index.search("how does dough rise?", top_k=1)[0].metadata["source"]
        'bread.txt'

    `path_or_url`: a folder (made when missing; no server needed) or the http(s) URL of a Chroma server. `model`: any
    `Embedder`. Cosine space. One process at a time may write to a folder; any number may search it, and see what was
    written since.

    Raises ValueError when the collection was made with another model or without c2v_rag, ConnectionError when no
    server answers, PermissionError from a writing method while another process writes.
    """

    def __init__(
        self, path_or_url: str | os.PathLike[str], model: Embedder, collection: str = DEFAULT_COLLECTION
    ) -> None:
        if not _COLLECTION_NAME.fullmatch(collection):
            raise ValueError(
                f"{collection!r} cannot name a Chroma collection: 3 to 512 letters, digits, '.', '_' or '-', the first "
                "and the last a letter or digit."
            )
        self._store = open_store(path_or_url)
        self._name = collection
        self._model = model
        self._collection()

    def __len__(self) -> int:
        """Number of chunks."""
        with self._store.reading():
            return self._collection().count()

    def search(self, query: str, top_k: int = 5) -> list[Hit]:
        """The `top_k` chunks most similar to `query`, best first; fewer when the index holds fewer."""
        if not isinstance(query, str):
            raise TypeError(f"query must be one string, got {type(query).__name__}. For several, use search_many.")
        return self.search_many([query], top_k)[0]

    def search_many(self, queries: Sequence[str], top_k: int = 5) -> list[list[Hit]]:
        """`search` for each query, in their order, embedded together."""
        if isinstance(queries, str):
            raise TypeError("queries must be a list of strings, got one bare string. Use search, or wrap it: [query].")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}.")
        embeddings = self._model.encode_query(queries)
        with self._store.reading():
            collection = self._collection()
            if not len(embeddings) or not collection.count():
                return [[] for _ in queries]
            found = collection.query(
                query_embeddings=embeddings, n_results=top_k, include=["documents", "metadatas", "distances"]
            )
        documents, metadatas, distances = found["documents"], found["metadatas"], found["distances"]
        assert documents is not None
        assert metadatas is not None
        assert distances is not None
        return [
            [
                Hit(id, 1.0 - distance, text, dict(metadata))
                for id, distance, text, metadata in zip(*columns, strict=True)
            ]
            for columns in zip(found["ids"], distances, documents, metadatas, strict=True)
        ]

    def add(
        self,
        documents: Iterable[Document],
        *,
        prune: bool = True,
        total: int | None = None,
        show_progress: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
        write_every: int = CHUNKS_WRITTEN_AT_ONCE,
    ) -> IndexReport:
        """Bring the index up to date with `documents`, read as a stream.

        Documents are cut into chunks of at most 256 of the model's tokens. Chunks that are there already are left
        alone; chunks that a source seen here no longer holds are deleted, after the new ones are written; other
        sources are not touched. Killed at any moment and called again with the same documents, it ends with the same
        ids as an undisturbed call. A document's metadata is written with its chunks and not compared afterwards.
        With `prune=False` nothing is deleted, for documents that are only a part of their source.
        `total` and `show_progress` are for the progress bar. `on_progress(documents, chunks)` is told how many were
        read and written so far; an exception it raises stops the call, and what was written stays. `write_every`:
        chunks embedded and written at a time.
        """
        started = time.perf_counter()
        if isinstance(documents, Sequence):
            total = len(documents)
        with self._store.writing():
            collection = self._collection()
            counts: Counter[str] = Counter()
            stale: dict[str, set[str]] = {}  # by source: ids in the collection that this call has not met
            repeated: Counter[str] = Counter()
            waiting: list[Chunk] = []
            num_read = 0
            with tqdm(total=total, unit="document", disable=not show_progress) as progress:
                for some in _batched(documents, DOCUMENTS_READ_AHEAD):
                    stale.update(present_ids(collection, {document.source for document in some} - stale.keys()))
                    for chunks in new_chunks(some, self._model, stale, repeated, counts):
                        for chunk in chunks:
                            waiting.append(chunk)
                            if len(waiting) >= write_every:
                                self._write(collection, waiting, counts)
                                waiting = []
                        progress.update()
                        num_read += 1
                        if on_progress is not None:
                            on_progress(num_read, counts["added"])
                self._write(collection, waiting, counts)
            gone = [id for ids in stale.values() for id in ids] if prune else []
            self._delete(collection, gone)
        return IndexReport(
            added=counts["added"],
            unchanged=counts["unchanged"],
            replaced=len(gone),
            removed=0,
            truncated=counts["truncated"],
            seconds=time.perf_counter() - started,
        )

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Embed these chunks and write them, over those of the same ids; nothing else is touched."""
        with self._store.writing():
            self._write(self._collection(), chunks, Counter())

    def delete(self, source: str) -> int:
        """Delete a source's chunks; returns how many there were."""
        with self._store.writing():
            collection = self._collection()
            ids = collection.get(where={"source": source}, include=[])["ids"]
            self._delete(collection, ids)
        return len(ids)

    def delete_ids(self, ids: Sequence[str]) -> None:
        """Delete chunks; ids that are not there are left alone."""
        with self._store.writing():
            self._delete(self._collection(), ids)

    def sources(self) -> set[str]:
        """The sources that have chunks here."""
        return {str(metadata["source"]) for page in self._pages(["metadatas"]) for metadata in page["metadatas"]}

    def chunks(self, *, embeddings: bool = False) -> Iterator[Chunk]:
        """Every chunk; with its embedding where that is asked for."""
        for page in self._pages(["documents", "metadatas", *(["embeddings"] if embeddings else [])]):
            vectors = page["embeddings"] if embeddings else [None] * len(page["ids"])
            for id, text, metadata, vector in zip(
                page["ids"], page["documents"], page["metadatas"], vectors, strict=True
            ):
                yield Chunk(id, text, dict(metadata), vector)

    def get(self, id: str) -> Chunk | None:
        """One chunk by its id; None where there is none."""
        with self._store.reading():
            page = self._collection().get(ids=[id], include=["documents", "metadatas"])
        if not page["ids"]:
            return None
        return Chunk(id, (page["documents"] or [""])[0], dict((page["metadatas"] or [{}])[0]))

    def _pages(self, include: Any) -> Iterator[Any]:
        """The collection's columns, a thousand chunks at a time."""
        for start in count(step=_PAGE):
            with self._store.reading():
                page = self._collection().get(limit=_PAGE, offset=start, include=include)
            yield page
            if len(page["ids"]) < _PAGE:
                return

    @property
    def version(self) -> str:
        """Changes with every write to the folder; of a server's collection, with the number of chunks only."""
        with self._store.reading():
            return f"{self._store.generation}-{self._collection().count()}"

    def _collection(self) -> Collection:
        """The collection as it is now, after checking that this model made it."""
        collection = self._store.client().get_or_create_collection(
            self._name,
            metadata={STAMP_KEY: json.dumps(self._model.stamp, sort_keys=True)},
            configuration={"hnsw": {"space": "cosine"}},
            embedding_function=None,
        )
        check_stamp(read_stamp(collection.metadata, self._name), self._model.stamp, self._name)
        return collection

    def _write(self, collection: Collection, chunks: Sequence[Chunk], counts: Counter[str]) -> None:
        if not chunks:
            return
        embeddings = self._model.encode_document([chunk.text for chunk in chunks])
        size = min(self._store.client().get_max_batch_size(), CHUNKS_WRITTEN_AT_ONCE)
        for start in range(0, len(chunks), size):
            part = chunks[start : start + size]
            collection.upsert(
                ids=[chunk.id for chunk in part],
                embeddings=embeddings[start : start + size],
                documents=[_storable(chunk.text) for chunk in part],
                metadatas=[chunk.metadata for chunk in part],
            )
        self._store.wrote()
        counts["added"] += len(chunks)

    def _delete(self, collection: Collection, ids: Sequence[str]) -> None:
        size = self._store.client().get_max_batch_size()
        for start in range(0, len(ids), size):
            collection.delete(ids=list(ids[start : start + size]))
        if ids:
            self._store.wrote()


def remove_vanished(index: VectorIndex, folder: Path) -> int:
    """Delete the chunks of files below `folder` that are no longer there; returns how many chunks."""
    below = folder.resolve().as_posix().rstrip("/") + "/"
    return sum(
        index.delete(source) for source in index.sources() if source.startswith(below) and not Path(source).exists()
    )


def _storable(text: str) -> str:
    """Chroma stores UTF-8, which has no lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _batched(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while some := list(islice(iterator, size)):
        for document in some:
            if not isinstance(document, Document):
                raise TypeError(f"documents must be c2v_rag.Document objects, got {type(document).__name__}.")
        yield some
