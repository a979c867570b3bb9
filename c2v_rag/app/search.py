"""`Searcher`: searches a collection with Causal2Vec, its encoder alone, BM25, or a fusion of Causal2Vec and BM25."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.index import Chunk, Hit, StoreAddress, VectorIndex
from c2v_rag.model import Causal2Vec
from c2v_rag.protocols import Embedder
from c2v_rag.sources import Document

Report = Callable[[str, float | None], None]
CAUSAL2VEC, ENCODER, BM25, HYBRID = "Causal2Vec", "Encoder alone", "BM25", "Hybrid (Causal2Vec + BM25)"
METHODS = {
    CAUSAL2VEC: "cosine similarity of the embeddings",
    ENCODER: "cosine similarity of the contextual encoder's own vectors",
    BM25: "words in common; rare words count more",
    HYBRID: "Causal2Vec and BM25; BM25 counts where it finds most of the question's words",
}
DEFAULT_METHODS = {"dense": CAUSAL2VEC, "lexical": BM25, "hybrid": HYBRID}  # by the default mode of a search
ENCODER_SUFFIX = ".encoder"


def check_collection_name(name: str) -> None:
    """Raise ValueError for a name that ends in ".encoder": such collections hold the encoder's vectors."""
    if name.endswith(ENCODER_SUFFIX):
        raise ValueError(
            f"{name!r} cannot be the name of a collection here: names that end in {ENCODER_SUFFIX!r} are for the "
            "vectors of the encoder alone. Choose another."
        )


def _ignore_progress(message: str, done: float | None) -> None:
    pass


class Searcher:
    """Searches a `VectorIndex` with any of `METHODS`.

    `prepare` builds the data that a method needs besides the index, and updates it after documents were added or
    deleted: the encoder's vectors, in a second collection of the same store (`encoder_index`, None until then), and
    the lexical index.

    Raises ValueError for a collection name that ends in ".encoder".
    """

    def __init__(self, store: StoreAddress, model: Embedder, collection: str) -> None:
        check_collection_name(collection)
        self.index = VectorIndex(store, model, collection)
        self.model = model
        self.collection = collection
        self._store = store
        self._preparing = threading.Lock()
        self.encoder_index: VectorIndex | None = None
        self._prepared: dict[str, str] = {}  # method -> version of the index at its preparation

    def is_prepared(self, method: str) -> bool:
        """Whether `search` by this method can answer at once."""
        return method == CAUSAL2VEC or self._prepared.get(_needs(method)) == self.index.version

    def prepare(self, method: str, report: Report = _ignore_progress) -> None:
        """Build the data that `method` needs, unless it is up to date.

        `report(message, share done or None)` gets the progress; if it raises, the preparation stops.
        """
        with self._preparing:
            if self.is_prepared(method):
                return
            version = self.index.version
            if method == ENCODER:
                self._prepare_encoder(list(self.index.chunks()), report)
                # Writing the encoder's collection changes the folder's version too; the documents are the same.
                version = self.index.version
            else:
                report(f"Counting the words of {len(self.index):,} passages for BM25 …", None)
                self.index.lexical_index()
            self._prepared[_needs(method)] = version

    def _prepare_encoder(self, chunks: Sequence[Chunk], report: Report) -> None:
        if self.encoder_index is None:
            assert isinstance(self.model, Causal2Vec)
            self.encoder_index = VectorIndex(self._store, EncoderEmbedder(self.model), self.collection + ENCODER_SUFFIX)
        for vanished in self.encoder_index.sources() - {str(chunk.metadata["source"]) for chunk in chunks}:
            self.encoder_index.delete(vanished)
        self.encoder_index.add(
            [
                Document(
                    chunk.text,
                    str(chunk.metadata["source"]),
                    {key: value for key, value in chunk.metadata.items() if key != "source"},
                )
                for chunk in chunks
            ],
            on_progress=lambda read, added: report(
                f"First use: embedding with the encoder alone, {read:,} of {len(chunks):,} passages …",
                read / len(chunks),
            ),
            write_every=64,
        )

    def search(self, method: str, query: str, top_k: int, *, by_source: bool = False) -> list[Hit]:
        """The best passages by `method`, which must be prepared. Each method has its own scale of `score`.

        `by_source`: only the best passage of each source.
        """
        group_by = "source" if by_source else None
        if method == CAUSAL2VEC:
            return self.index.search(query, top_k, mode="dense", group_by=group_by)
        if method == ENCODER:
            assert self.encoder_index is not None
            return self.encoder_index.search(query, top_k, mode="dense", group_by=group_by)
        return self.index.search(query, top_k, mode="lexical" if method == BM25 else "hybrid", group_by=group_by)


def _needs(method: str) -> str:
    """The method whose preparation `method` needs: hybrid search needs BM25's, any other method its own."""
    return BM25 if method == HYBRID else method
