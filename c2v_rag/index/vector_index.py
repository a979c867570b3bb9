"""A Chroma collection that is filled from documents, searched, resumed and brought up to date.

A run that was killed continues where it stopped. The collection stores the stamp of the model that made it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from c2v_rag.index.chunking import Chunk
from c2v_rag.index.lexical import LexicalIndex
from c2v_rag.index.pages import IDS_AT_ONCE, PAGE_SIZE
from c2v_rag.index.query import Hit, SearchMode, SearchOptions, check_mode, check_options
from c2v_rag.index.search_cache import SearchCache
from c2v_rag.index.searching import search_collection
from c2v_rag.index.settings import (
    CHUNKING_KEY,
    ChunkSettings,
    HnswSettings,
    check_settings,
    stored_hnsw,
    stored_settings,
)
from c2v_rag.index.stamp import STAMP_KEY, check_stamp, read_stamp
from c2v_rag.index.stores import (
    DEFAULT_COLLECTION,
    StoreAddress,
    find_collection,
    missing_index,
    open_store,
)
from c2v_rag.index.writing import CHUNKS_WRITTEN_AT_ONCE, CollectionWriter, IndexReport
from c2v_rag.protocols import Embedder
from c2v_rag.sources import Document

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

_COLLECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,510}[A-Za-z0-9]")


class VectorIndex:
    """A Chroma collection filled and searched with one embedder.

    Examples:
        >>> from c2v_rag import Document, VectorIndex, shared_model
        >>> index = VectorIndex("store", shared_model())
        >>> index.add([Document("Bread needs yeast.", source="bread.txt")]).added
        1
        >>> index.search("how does dough rise?", top_k=1)[0].metadata["source"]
        'bread.txt'

    `store`: a folder (without a server), the http(s) URL of a Chroma server, or a `ChromaServer`, which also takes
    headers. `model`: any `Embedder`. Distances are cosines. One process at a time may write to a folder; any number may
    search it, and these see every write. `chunking`, `hnsw`: settings of a new collection; an existing one has its own.

    Only writing creates a folder or a collection. An index that does not exist yet has length 0, no sources and no
    chunks; searching it raises FileNotFoundError, so that a mistyped path is not mistaken for an empty index.

    Raises ValueError when the collection was made with another model, other settings or without c2v_rag,
    ConnectionError when no server answers, PermissionError from a writing method while another process writes.
    """

    def __init__(
        self,
        store: StoreAddress,
        model: Embedder,
        collection: str = DEFAULT_COLLECTION,
        *,
        chunking: ChunkSettings | None = None,
        hnsw: HnswSettings | None = None,
    ) -> None:
        if not _COLLECTION_NAME.fullmatch(collection):
            raise ValueError(
                f"{collection!r} cannot name a Chroma collection: 3 to 512 letters, digits, '.', '_' or '-', the first "
                "and the last a letter or digit."
            )
        self._address = store
        self._store = open_store(store)
        self._name = collection
        self._model = model
        self._chunking = chunking
        self._hnsw = hnsw
        self._cache = SearchCache()
        with self._store.reading():
            self._find()

    def __len__(self) -> int:
        """Number of chunks."""
        with self._store.reading():
            collection = self._find()
            return 0 if collection is None else collection.count()

    @property
    def chunking(self) -> ChunkSettings:
        """How this collection cuts documents; for a collection that does not exist yet, how it will."""
        with self._store.reading():
            collection = self._find()
            if collection is None:
                return self._chunking or ChunkSettings()
            return stored_settings(collection.metadata)

    def search(
        self, query: str, top_k: int = 5, *, mode: SearchMode | None = None, **options: Unpack[SearchOptions]
    ) -> list[Hit]:
        """The `top_k` best chunks, best first; fewer when the index has fewer.

        `mode`: "dense" sorts by the cosine similarity of embeddings; "lexical" by BM25, which needs words in common;
        "hybrid", the default, by both: the standardised cosine + 40 x the squared share of BM25's maximum. The lexical
        index is built at its first use, stored beside a folder's collections (in the cache folder for a server), and
        rebuilt when chunks have changed. `options`: see `SearchOptions`.

        Raises FileNotFoundError when the store or the collection does not exist.
        """
        if not isinstance(query, str):
            raise TypeError(f"query must be one string, got {type(query).__name__}. For several, use search_many.")
        return self.search_many([query], top_k, mode=mode, **options)[0]

    def search_many(
        self,
        queries: Sequence[str],
        top_k: int = 5,
        *,
        mode: SearchMode | None = None,
        **options: Unpack[SearchOptions],
    ) -> list[list[Hit]]:
        """`search` for each query, in their order, embedded together."""
        if isinstance(queries, str):
            raise TypeError("queries must be a list of strings, got one bare string. Use search, or wrap it: [query].")
        mode = check_mode(mode)
        check_options(top_k, options)
        vectors = [None] * len(queries) if mode == "lexical" else list(self._model.encode_query(queries))
        return self._search(queries, vectors, mode, top_k, options)

    def search_by_vector(self, vector: np.ndarray, top_k: int = 5, **options: Unpack[SearchOptions]) -> list[Hit]:
        """As a dense `search`, for a query's embedding (embedding_dim,). ValueError with `rerank`."""
        check_options(top_k, options)
        if options.get("rerank") is not None:
            raise ValueError("rerank needs the query's text, and search_by_vector has none. Use search.")
        if np.shape(vector) != (self._model.embedding_dim,):
            raise ValueError(f"vector must have the shape ({self._model.embedding_dim},), got {np.shape(vector)}.")
        return self._search([""], [np.asarray(vector)], "dense", top_k, options)[0]

    async def asearch(
        self, query: str, top_k: int = 5, *, mode: SearchMode | None = None, **options: Unpack[SearchOptions]
    ) -> list[Hit]:
        """`search`, in a thread."""
        return await asyncio.to_thread(self.search, query, top_k, mode=mode, **options)

    def _search(
        self,
        queries: Sequence[str],
        vectors: Sequence[np.ndarray | None],
        mode: SearchMode,
        top_k: int,
        options: SearchOptions,
    ) -> list[list[Hit]]:
        lexical = sample = None
        if mode != "dense":
            version = self.version
            lexical = self._lexical_index(version)
            if mode == "hybrid":
                sample = self._cache.sample(version, functools.partial(self._draw, lexical.ids))
        with self._store.reading():
            collection = self._find()
            if collection is None:
                raise missing_index(self._address, self._name)
            return [
                search_collection(collection, query, vector, lexical, sample, top_k, options)
                for query, vector in zip(queries, vectors, strict=True)
            ]

    def lexical_index(self) -> LexicalIndex:
        """BM25 over the chunks as they are now: from memory, from disk, or built."""
        return self._lexical_index(self.version)

    def _lexical_index(self, version: str) -> LexicalIndex:
        folder = self.folder_for("lexical")
        ids = (id for page in self._pages([]) for id in page["ids"])
        return self._cache.lexical(version, folder, ids, self.chunks())

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

        The store and the collection are created if they are missing. Documents are split into chunks of at most 256
        of the model's tokens. Chunks that are already stored are not embedded again. Chunks that these sources no
        longer contain are deleted at the end, after the new ones are written; if reading raises, nothing is deleted.
        Other sources are not changed. If a call is killed and repeated with the same documents, the index has the same
        ids as after one complete call. Where a document has changed, the metadata of its unchanged chunks is written
        without embedding them (their offsets may differ); in collections of version 0.1, only with new chunks.

        `prune=False`: delete nothing, for documents that are only a part of their source. `total`, `show_progress`: for
        the progress bar. `on_progress(documents, chunks)` is called with the numbers of documents read and chunks
        written so far, also by the thread that embeds, one call at a time; an exception that it raises stops the call,
        and the chunks written so far stay. `write_every`:
        number of chunks embedded and written at a time.
        """
        if isinstance(documents, Sequence):
            total = len(documents)
        with self._store.writing():
            return self._writer().add(
                documents,
                prune=prune,
                total=total,
                show_progress=show_progress,
                on_progress=on_progress,
                write_every=write_every,
            )

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Embed these chunks and store them, in place of chunks with the same ids; nothing else is changed.

        The lexical index is built again for the next search: the ids do not tell that a text is another one. Readers
        of a server on other machines keep theirs, so give a changed text another id there.
        """
        with self._store.writing():
            self._writer().write(chunks)
            shutil.rmtree(self.folder_for("lexical"), ignore_errors=True)

    def delete(self, source: str) -> int:
        """Delete a source's chunks; returns their number."""
        if not len(self):
            return 0
        with self._store.writing():
            ids = self._find_or_create().get(where={"source": source}, include=[])["ids"]
            self._writer().delete(ids)
        return len(ids)

    def delete_ids(self, ids: Sequence[str]) -> None:
        """Delete chunks; ids that are not stored are ignored."""
        if not len(self):
            return
        with self._store.writing():
            self._writer().delete(ids)

    def sources(self) -> set[str]:
        """The sources of all chunks."""
        return {str(metadata["source"]) for page in self._pages(["metadatas"]) for metadata in page["metadatas"]}

    def num_chunks(self, sources: Sequence[str]) -> dict[str, int]:
        """The number of chunks of each of these sources."""
        found = dict.fromkeys(sources, 0)
        names = list(found)
        for start in range(0, len(names), IDS_AT_ONCE):
            for page in self._pages(["metadatas"], {"source": {"$in": names[start : start + IDS_AT_ONCE]}}):
                for metadata in page["metadatas"]:
                    found[str(metadata["source"])] += 1
        return found

    def folder_for(self, name: str) -> Path:
        """The folder for files of this kind that belong to the collection; it may not exist yet."""
        return self._store.folder_for(f"{name}-{self._name}")

    def chunks(self, *, embeddings: bool = False) -> Iterator[Chunk]:
        """All chunks; with `embeddings=True`, also their embeddings."""
        for page in self._pages(["documents", "metadatas", *(["embeddings"] if embeddings else [])]):
            yield from _chunks_of(page)

    def sample(self, number: int, seed: int = 0) -> list[Chunk]:
        """At most `number` random chunks with their embeddings, in the collection's order; all if there are fewer.

        Equal seeds give equal samples of an unchanged collection. Of the chunks that are not drawn, only ids are read.
        """
        return self._draw([id for page in self._pages([]) for id in page["ids"]], number, seed)

    def _draw(self, ids: Sequence[str], number: int, seed: int = 0) -> list[Chunk]:
        """`sample`, from these ids of the collection."""
        chosen = np.random.default_rng(seed).choice(len(ids), min(number, len(ids)), replace=False)
        drawn = [ids[position] for position in sorted(chosen.tolist())]
        found: dict[str, Chunk] = {}
        for start in range(0, len(drawn), IDS_AT_ONCE):
            with self._store.reading():
                collection = self._find()
                if collection is not None:
                    include: Any = ["documents", "metadatas", "embeddings"]
                    page = collection.get(ids=drawn[start : start + IDS_AT_ONCE], include=include)
                    found.update((chunk.id, chunk) for chunk in _chunks_of(page))
        return [found[id] for id in drawn if id in found]

    def get(self, id: str) -> Chunk | None:
        """The chunk with this id, or None."""
        with self._store.reading():
            collection = self._find()
            if collection is None:
                return None
            return next(_chunks_of(collection.get(ids=[id], include=["documents", "metadatas"])), None)

    def _pages(self, include: Any, where: Any = None) -> Iterator[Any]:
        """The collection's columns, `PAGE_SIZE` chunks at a time; `where`: Chroma's metadata filter."""
        for start in count(step=PAGE_SIZE):
            with self._store.reading():
                collection = self._find()
                if collection is None:
                    return
                page = collection.get(limit=PAGE_SIZE, offset=start, include=include, where=where)
            yield page
            if len(page["ids"]) < PAGE_SIZE:
                return

    @property
    def version(self) -> str:
        """Changes with every write of c2v_rag to the store; for a server, to the collection."""
        with self._store.reading():
            collection = self._find()
            version = self._store.version_of(collection)
            return version if collection is None else f"{version}-{collection.count()}"

    def _find(self) -> Collection | None:
        """The collection, opened again, or None. Raises ValueError if another model made it."""
        collection = find_collection(self._store, self._name)
        if collection is not None:
            self._check(collection)
        return collection

    def _find_or_create(self) -> Collection:
        if (found := self._find()) is not None:
            return found
        configuration: Any = {"hnsw": {"space": "cosine", **dataclasses.asdict(self._hnsw or HnswSettings())}}
        collection = self._store.client().get_or_create_collection(  # another writer may have created it on the server
            self._name,
            metadata={
                STAMP_KEY: json.dumps(self._model.stamp, sort_keys=True),
                CHUNKING_KEY: json.dumps(dataclasses.asdict(self._chunking or ChunkSettings())),
            },
            configuration=configuration,
            embedding_function=None,
        )
        self._check(collection)
        return collection

    def _check(self, collection: Collection) -> None:
        """Raise ValueError if the collection was made with another model or other settings."""
        check_stamp(read_stamp(collection.metadata, self._name), self._model.stamp, self._name)
        check_settings(stored_settings(collection.metadata), self._chunking, self._name)
        if self._hnsw is not None:
            check_settings(stored_hnsw(collection.configuration), self._hnsw, self._name)

    def _writer(self) -> CollectionWriter:
        collection = self._find_or_create()
        return CollectionWriter(self._store, collection, self._model, stored_settings(collection.metadata))


def _chunks_of(page: Mapping[str, Any]) -> Iterator[Chunk]:
    """The chunks in an answer of Chroma's `get`, with texts and embeddings if they were included."""
    empty = [None] * len(page["ids"])
    texts = page["documents"] if page["documents"] is not None else empty
    embeddings = page["embeddings"] if page["embeddings"] is not None else empty
    for id, text, metadata, embedding in zip(page["ids"], texts, page["metadatas"], embeddings, strict=True):
        yield Chunk(id, text or "", dict(metadata or {}), embedding)
