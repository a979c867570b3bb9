"""Where collections are kept: a folder that Chroma opens in this process, or a Chroma server."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from c2v_rag.protocols import is_url

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

DEFAULT_COLLECTION = "documents"
_LOCK_FILE = "c2v_writer.lock"
_HOLDER_FILE = "c2v_writer.holder"  # of an ending that no source has: a store may lie in a folder that is indexed
_GENERATION_FILE = "c2v_generation"


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


def holds_store(path_or_url: str | os.PathLike[str]) -> bool:
    return is_url(path_or_url) or (Path(path_or_url) / "chroma.sqlite3").is_file()


def stored_metadata(path_or_url: str | os.PathLike[str]) -> dict[str, Mapping[str, Any] | None]:
    """The metadata of every collection of a store, by name."""
    store = open_store(path_or_url)
    with store.reading():
        return {one.name: one.metadata for one in store.client().list_collections()}


def count_chunks(path_or_url: str | os.PathLike[str], collection: str = DEFAULT_COLLECTION) -> int:
    """How many chunks a collection has; 0 where there is none."""
    if not holds_store(path_or_url):
        return 0
    store = open_store(path_or_url)
    with store.reading():
        client = store.client()
        names = [one.name for one in client.list_collections()]
        return client.get_collection(collection, embedding_function=None).count() if collection in names else 0
