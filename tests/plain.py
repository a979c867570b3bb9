"""An embedder that needs no model and no torch: for tests in which processes start, and their documents."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from c2v_rag import Document


class Letters:
    """Unit vectors (N, 64) of the letters in a text, earlier ones weighing more."""

    embedding_dim = 64
    stamp: dict[str, str | int] = {"name": "letters", "weights": "0", "embedding_dim": 64}  # noqa: RUF012

    def encode_document(self, texts: Iterable[str]) -> np.ndarray:
        rows = []
        for text in texts:
            row = np.full(self.embedding_dim, 1e-3, dtype=np.float32)
            for place, letter in enumerate(text):
                row[ord(letter) % self.embedding_dim] += 1 / (1 + place)
            rows.append(row / np.linalg.norm(row))
        return np.array(rows).reshape(-1, self.embedding_dim)

    encode_query = encode_document


def numbered(count: int) -> list[Document]:
    """Short documents, three to a source."""
    return [Document(f"{i}: a passage about topic {i % 7}.", f"source-{i // 3}", {"n": i}) for i in range(count)]


@contextmanager
def recording_server() -> Iterator[tuple[str, list[str]]]:
    """An HTTP server's address, and the Authorization of each request that reached it. It answers 404."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            self.send_error(404, "not here")

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()
