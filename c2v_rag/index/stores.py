"""Stores of collections: a folder that Chroma opens in this process, or a Chroma server."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from filelock import FileLock, Timeout

from c2v_rag.hashes import cache_folder
from c2v_rag.index.chroma_server import ChromaServer
from c2v_rag.protocols import is_url

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

StoreAddress = str | os.PathLike[str] | ChromaServer

DEFAULT_COLLECTION = "documents"
_LOCK_FILE = "c2v_writer.lock"
# A suffix that is not indexed: a store may be inside a folder of documents.
_WRITER_FILE = "c2v_writer.holder"
_VERSION_FILE = "c2v_generation"
_VERSION_KEY = "c2v_version"  # in the metadata of a server's collection


class _Server:
    """An open Chroma server. The server itself orders writes, and readers see every write."""

    def __init__(self, server: ChromaServer) -> None:
        self._client = server.connect()
        self._url = server.url
        self._name = "\n".join([server.url, server.tenant or "", server.database or ""])

    def version_of(self, collection: Collection | None) -> str:
        """Changes with every write of c2v_rag to the collection."""
        return str((collection.metadata or {}).get(_VERSION_KEY, "")) if collection is not None else ""

    def folder_for(self, name: str) -> Path:
        """Where a reader of the server keeps files that belong to a collection."""
        return cache_folder() / "stores" / hashlib.sha256(self._name.encode()).hexdigest()[:16] / name

    def exists(self) -> bool:
        return True

    def client(self) -> ClientAPI:
        return self._client

    def wrote(self, collection: Collection) -> None:
        """Tell readers that the collection has changed, by a random version in its metadata."""
        collection.modify(metadata={**(collection.metadata or {}), _VERSION_KEY: uuid.uuid4().hex})

    @contextmanager
    def reading(self) -> Iterator[None]:
        """ConnectionError if the server does not answer in the block."""
        try:
            yield
        except httpx.TransportError as error:
            raise ConnectionError(f"No Chroma server answers at {self._url} any more: {error}.") from error

    writing = reading


class _Folder:
    """A folder that Chroma opens in this process.

    Chroma keeps the vectors of a searched collection in memory and does not notice what another process writes until
    every client of the folder is closed. Therefore every write puts a new random version into a file, and this
    process's only client of the folder is closed and opened again when that version has changed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._client: Any = None  # ClientAPI, with the close() that its base class lacks
        self._opened_version = ""

    def folder_for(self, name: str) -> Path:
        """Where files that belong to a collection are kept."""
        return self._path / f"c2v-{name}"

    @property
    def version(self) -> str:
        """Changes with every write; "" before the first one."""
        return self._read(_VERSION_FILE)

    def version_of(self, collection: Collection | None) -> str:
        """Changes with every write to the folder, to whichever collection."""
        return self.version

    def exists(self) -> bool:
        return (self._path / "chroma.sqlite3").is_file()

    def client(self) -> ClientAPI:
        """The open client. Opening creates the folder, so readers must check `exists` first."""
        import chromadb

        with self._lock:
            version = self.version
            if self._client is not None and version != self._opened_version:
                self._client.close()
                self._client = None
            if self._client is None:
                self._path.mkdir(parents=True, exist_ok=True)
                # Default settings: Chroma refuses a second client of a folder (a framework's) with other settings.
                self._client = chromadb.PersistentClient(str(self._path))
                self._opened_version = version
            client: ClientAPI = self._client
            return client

    def wrote(self, collection: Collection) -> None:
        """Tell the readers in other processes that the folder has changed."""
        with self._lock:
            self._opened_version = uuid.uuid4().hex
            (self._path / _VERSION_FILE).write_text(self._opened_version, encoding="utf-8")

    def reading(self) -> AbstractContextManager[object]:
        """A context in which no other thread can close the client."""
        return self._lock

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Create and lock the folder for writing; the operating system releases the lock if the process dies."""
        self._path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._path / _LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise PermissionError(
                f"{self._path} is being written by {self._read(_WRITER_FILE) or 'another process'}. A folder takes one "
                "writer at a time: wait for it, or use a Chroma server (chroma run) for several."
            ) from None
        try:
            writer = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            (self._path / _WRITER_FILE).write_text(writer, encoding="utf-8")
            yield
        finally:
            lock.release()

    def _read(self, name: str) -> str:
        try:
            return (self._path / name).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return ""


Store = _Server | _Folder

_folders: dict[Path, _Folder] = {}
_folders_lock = threading.Lock()


def open_store(store: StoreAddress) -> Store:
    """The store at this address. A folder is not created until something is written.

    Raises ConnectionError if the server does not answer or refuses, ValueError for an invalid URL.
    """
    if isinstance(store, ChromaServer):
        return _Server(store)
    if is_url(store):
        return _Server(ChromaServer(os.fspath(store)))
    path = Path(store).resolve()
    with _folders_lock:
        return _folders.setdefault(path, _Folder(path))


def store_name(store: StoreAddress) -> str:
    """The address without credentials, for messages."""
    if isinstance(store, ChromaServer):
        return store.url
    return ChromaServer(os.fspath(store)).url if is_url(store) else os.fspath(store)


def find_collection(store: _Server | _Folder, name: str) -> Collection | None:
    """A collection, or None if it does not exist; nothing is created."""
    from chromadb.errors import NotFoundError

    if not store.exists():
        return None
    try:
        return store.client().get_collection(name, embedding_function=None)
    except NotFoundError:
        return None


def stored_metadata(store: StoreAddress) -> dict[str, Mapping[str, Any] | None]:
    """The metadata of every collection of a store, by name; {} if the store does not exist."""
    opened = open_store(store)
    if not opened.exists():
        return {}
    with opened.reading():
        return {collection.name: collection.metadata for collection in opened.client().list_collections()}


def missing_index(store: StoreAddress, collection: str) -> FileNotFoundError:
    """The error for a store or a collection that does not exist."""
    name, found = store_name(store), sorted(stored_metadata(store))
    if not found:
        return FileNotFoundError(f"There is no index in {name}. Make one: c2v-rag index SOURCE --store {name}")
    return FileNotFoundError(f"{name} has no collection {collection!r}; it has {found}.")


def count_chunks(store: StoreAddress, collection: str = DEFAULT_COLLECTION) -> int:
    """Number of chunks of a collection; 0 if it does not exist."""
    opened = open_store(store)
    with opened.reading():
        found = find_collection(opened, collection)
        return 0 if found is None else found.count()
