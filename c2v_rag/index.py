"""Documents -> chunks -> embeddings -> a Chroma collection that can be searched, resumed and brought up to date.

A chunk's id is the hash of its source and text: what is there already is not embedded again, and a run that was killed
goes on where it was. The collection remembers the model that made it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from c2v_rag.protocols import Embedder, is_url
from c2v_rag.sources import Document

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

logger = logging.getLogger(__name__)

STAMP_KEY = "c2v_stamp"
DEFAULT_COLLECTION = "documents"
DOCUMENTS_READ_AHEAD = 512
CHUNKS_WRITTEN_AT_ONCE = 256
CHUNK_TOKENS = 256
CHUNK_OVERLAP = 0.1
_TOKENS_UNKNOWN_CHARACTERS = 4  # characters a token, for an embedder that cannot count
_PAGE = 1000
_COLLECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,510}[A-Za-z0-9]")
_LOCK_FILE = "c2v_writer.lock"
_HOLDER_FILE = "c2v_writer.holder"  # of an ending that no source has: a store may lie in a folder that is indexed
_GENERATION_FILE = "c2v_generation"


@dataclasses.dataclass(frozen=True)
class Hit:
    """A chunk that was found. `score` is the cosine similarity; `metadata` holds its source and the document's."""

    id: str
    score: float
    text: str
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a collection holds: a part of a document, and its embedding (embedding_dim,) where that was asked for."""

    id: str
    text: str
    metadata: dict[str, Any]
    embedding: np.ndarray | None = None


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


def present_ids(collection: Collection, sources: AbstractSet[str]) -> dict[str, set[str]]:
    """By source, the ids of the chunks that a Chroma collection has of it."""
    present: dict[str, set[str]] = {source: set() for source in sorted(sources)}
    if not present:
        return present
    of_these: Any = {"source": {"$in": list(present)}}
    if len(present) == 1:  # perhaps a large table, whose metadata need not be read
        (source,) = present
        present[source].update(collection.get(where=of_these, include=[])["ids"])
        return present
    found = collection.get(where=of_these, include=["metadatas"])
    for id, metadata in zip(found["ids"], found["metadatas"] or [], strict=True):
        present[str(metadata["source"])].add(id)
    return present


def new_chunks(
    documents: Sequence[Document],
    model: object,
    present: Mapping[str, set[str]],
    repeated: Counter[str],
    counts: Counter[str],
) -> Iterator[list[Chunk]]:
    """For each document its chunks that are not `present` (by source); those that are, are taken out of there.

    `repeated` counts equal pairs of source and text, over all calls of a run; `counts` what was "unchanged" and
    "truncated". `model` as for `_cut`.
    """
    for document, texts in zip(documents, _cut(documents, model, counts), strict=True):
        chunks = []
        for text in texts:
            id = _chunk_id(document.source, text, repeated)
            if id in present[document.source]:
                present[document.source].remove(id)
                counts["unchanged"] += 1
            else:
                chunks.append(Chunk(id, text, {**document.metadata, "source": document.source}))
        yield chunks


def _cut(documents: Sequence[Document], model: object, counts: Counter[str]) -> list[list[str]]:
    """The texts of each document's chunks, of at most 256 of the model's tokens.

    `model` counts tokens where it can (`count_tokens`, `max_tokens`). Pieces that could not be made short enough are
    added to counts["truncated"].
    """
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    count_tokens = getattr(model, "count_tokens", _count_by_characters)
    size = min(CHUNK_TOKENS, getattr(model, "max_tokens", CHUNK_TOKENS))
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=size,
        chunk_overlap=int(size * CHUNK_OVERLAP),
        length_function=lambda text: count_tokens([text])[0],
    )
    chunks = []
    for document, length in zip(documents, count_tokens([document.text for document in documents]), strict=True):
        texts = [document.text] if length <= size else splitter.split_text(document.text)
        if length > size:
            counts["truncated"] += sum(more > size for more in count_tokens(texts))
        chunks.append([text for text in texts if text.strip()])
    return chunks


def remove_vanished(index: VectorIndex, folder: Path) -> int:
    """Delete the chunks of files below `folder` that are no longer there; returns how many chunks."""
    below = folder.resolve().as_posix().rstrip("/") + "/"
    return sum(
        index.delete(source) for source in index.sources() if source.startswith(below) and not Path(source).exists()
    )


def stored_stamp(path_or_url: str | os.PathLike[str], collection: str = DEFAULT_COLLECTION) -> dict[str, str | int]:
    """The stamp of the model that made a collection; nothing is created.

    Raises FileNotFoundError when there is no such store or collection, ValueError when c2v_rag did not make it.
    """
    if not _holds_store(path_or_url):
        raise FileNotFoundError(
            f"There is no index in {path_or_url}. Make one: c2v-rag index SOURCE --store {path_or_url}"
        )
    found = _stored_metadata(path_or_url)
    if collection not in found:
        raise FileNotFoundError(f"{path_or_url} has no collection {collection!r}; it has {list(found)}.")
    return read_stamp(found[collection], collection)


def count_chunks(path_or_url: str | os.PathLike[str], collection: str = DEFAULT_COLLECTION) -> int:
    """How many chunks a collection has; 0 where there is none."""
    if not _holds_store(path_or_url):
        return 0
    store = open_store(path_or_url)
    with store.reading():
        client = store.client()
        names = [one.name for one in client.list_collections()]
        return client.get_collection(collection, embedding_function=None).count() if collection in names else 0


def stored_stamps(path_or_url: str | os.PathLike[str]) -> dict[str, dict[str, str | int]]:
    """The collections that c2v_rag made in a store, by name, and the stamps of their models; nothing is created."""
    found = _stored_metadata(path_or_url) if _holds_store(path_or_url) else {}
    return {name: read_stamp(metadata, name) for name, metadata in found.items() if STAMP_KEY in (metadata or {})}


def _holds_store(path_or_url: str | os.PathLike[str]) -> bool:
    return is_url(path_or_url) or (Path(path_or_url) / "chroma.sqlite3").is_file()


def _stored_metadata(path_or_url: str | os.PathLike[str]) -> dict[str, Mapping[str, Any] | None]:
    """The metadata of every collection of a store, by name."""
    store = open_store(path_or_url)
    with store.reading():
        return {one.name: one.metadata for one in store.client().list_collections()}


def read_stamp(metadata: Mapping[str, Any] | None, collection: str) -> dict[str, str | int]:
    """The stamp in a collection's metadata. ValueError where there is none."""
    if not metadata or STAMP_KEY not in metadata:
        raise ValueError(
            f"The collection {collection!r} was not made by c2v_rag, so nothing says which model its vectors are of. "
            "Use another collection name."
        )
    stamp: dict[str, str | int] = json.loads(metadata[STAMP_KEY])
    return stamp


def check_stamp(stored: Mapping[str, Any], model: Mapping[str, Any], collection: str) -> None:
    """ValueError when vectors of these two models must not be compared. A model's name may differ: copies are equal."""
    differing = [key for key in sorted(stored.keys() | model.keys()) if stored.get(key) != model.get(key)]
    if not set(differing) - {"name", "encoder", "llm"}:
        return
    lines = [f"- {key}: {stored.get(key)!r} in the index, {model.get(key)!r} in this model" for key in differing]
    raise ValueError(
        f"The collection {collection!r} was made with another model:\n" + "\n".join(lines) + "\n"
        f"Either load the model that made it ({stored.get('name')!r}; encoder from {stored.get('encoder')}, decoder "
        f"from {stored.get('llm')}), or index the documents again with this one into another collection or store."
    )


def _chunk_id(source: str, text: str, repeated: Counter[str]) -> str:
    """SHA-256 of source, text, and how many equal pairs came before."""
    pair = json.dumps([source, text])
    digest = hashlib.sha256(pair.encode()).hexdigest()
    earlier = repeated[digest]
    repeated[digest] += 1
    return hashlib.sha256(f"{digest}{earlier}".encode()).hexdigest()


def _storable(text: str) -> str:
    """Chroma stores UTF-8, which has no lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _count_by_characters(texts: Sequence[str]) -> list[int]:
    return [len(text) // _TOKENS_UNKNOWN_CHARACTERS + 1 for text in texts]


def _batched(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while some := list(islice(iterator, size)):
        for document in some:
            if not isinstance(document, Document):
                raise TypeError(f"documents must be c2v_rag.Document objects, got {type(document).__name__}.")
        yield some


# Stores


class _Server:
    """A Chroma server: it serialises writers and has no stale readers."""

    def __init__(self, url: str) -> None:
        import chromadb

        parts = urlsplit(url)
        try:
            self._client = chromadb.HttpClient(
                host=parts.hostname or "",
                port=parts.port or (443 if parts.scheme == "https" else 8000),
                ssl=parts.scheme == "https",
            )
        except ValueError as error:
            raise ConnectionError(
                f"No Chroma server answers at {url}: {error} Start one: chroma run --path DIR"
            ) from error

    generation = ""

    def client(self) -> ClientAPI:
        return self._client

    def wrote(self) -> None:
        pass

    def reading(self) -> AbstractContextManager[object]:
        return nullcontext()

    def writing(self) -> AbstractContextManager[object]:
        return nullcontext()


class _Folder:
    """A folder that Chroma opens in this process.

    Chroma keeps a searched collection's graph in memory and does not notice what another process writes; only closing
    every client of the folder helps. So writers leave a new word in a file, and the one client per folder and process
    is closed and opened again when the word has changed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._client: Any = None  # ClientAPI, with the close() that its base class lacks
        self._generation = ""

    def client(self) -> ClientAPI:
        import chromadb

        with self._lock:
            generation = self._read(_GENERATION_FILE)
            if self._client is not None and generation != self._generation:
                self._client.close()
                self._client = None
            if self._client is None:
                self._path.mkdir(parents=True, exist_ok=True)
                # No settings of our own: Chroma refuses a folder's second client (a framework's) with other ones.
                self._client = chromadb.PersistentClient(str(self._path))
                self._generation = generation
            client: ClientAPI = self._client
            return client

    def wrote(self) -> None:
        with self._lock:
            self._generation = uuid.uuid4().hex
            (self._path / _GENERATION_FILE).write_text(self._generation, encoding="utf-8")

    @property
    def generation(self) -> str:
        return self._read(_GENERATION_FILE)

    def reading(self) -> AbstractContextManager[object]:
        """Keep other threads from closing the client meanwhile."""
        return self._lock

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's writer lock; the operating system frees it if the process dies."""
        self._path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._path / _LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise PermissionError(
                f"{self._path} is being written by {self._read(_HOLDER_FILE) or 'another process'}. A folder takes one "
                "writer at a time: wait for it, or use a Chroma server (chroma run) for several."
            ) from None
        try:
            holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            (self._path / _HOLDER_FILE).write_text(holder, encoding="utf-8")
            yield
        finally:
            lock.release()

    def _read(self, name: str) -> str:
        try:
            return (self._path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""


_folders: dict[Path, _Folder] = {}
_folders_lock = threading.Lock()


def open_store(path_or_url: str | os.PathLike[str]) -> _Server | _Folder:
    if is_url(path_or_url):
        return _Server(os.fspath(path_or_url))
    path = Path(path_or_url).resolve()
    with _folders_lock:
        return _folders.setdefault(path, _Folder(path))
