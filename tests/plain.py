"""An embedder that needs no model and no torch: for tests in which processes start, and their documents."""

from __future__ import annotations

from collections.abc import Iterable

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
