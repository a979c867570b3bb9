"""An embedder without a model and without torch, for tests that start processes; documents and a server for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from c2v_rag import Document


class Letters:
    """An embedder: unit vectors (N, 64) that count the letters of a text. Earlier letters have a larger weight."""

    embedding_dim = 64
    stamp: dict[str, str | int] = {"name": "letters", "weights": "0", "embedding_dim": 64}  # noqa: RUF012

    def encode_document(self, texts: Iterable[str]) -> np.ndarray:
        rows = []
        for text in texts:
            row = np.full(self.embedding_dim, 1e-3, dtype=np.float32)
            for position, letter in enumerate(text):
                row[ord(letter) % self.embedding_dim] += 1 / (1 + position)
            rows.append(row / np.linalg.norm(row))
        return np.array(rows).reshape(-1, self.embedding_dim)

    encode_query = encode_document


def numbered(count: int) -> list[Document]:
    """`count` short documents, three with each source."""
    return [Document(f"{i}: a passage about topic {i % 7}.", f"source-{i // 3}", {"n": i}) for i in range(count)]


class QuietHandler(BaseHTTPRequestHandler):
    """A handler that prints nothing."""

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run an HTTP server in a thread; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def recording_server() -> Iterator[tuple[str, list[str]]]:
    """Run an HTTP server that answers 404; yields its address, and the Authorization header of each request."""
    seen: list[str] = []

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            self.send_error(404, "not here")

        do_POST = do_GET

    with serving(Handler) as url:
        yield url, seen
