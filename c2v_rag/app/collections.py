"""The collections of a store that the page may search and add to."""

from __future__ import annotations

import threading

from c2v_rag.app.search import ENCODER_SUFFIX, Searcher, check_collection_name
from c2v_rag.index import StoreAddress, stored_stamps
from c2v_rag.protocols import Embedder, same_weights


class Collections:
    """Opens a `Searcher` for each collection of a store at its first use.

    `first`: the collection that the page shows first; it is created when documents are added.

    Raises ValueError for a name that ends in ".encoder".
    """

    def __init__(self, store: StoreAddress, model: Embedder, first: str) -> None:
        check_collection_name(first)
        self.first = first
        self._store = store
        self._model = model
        self._open: dict[str, Searcher] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Names of the store's collections that this model made, without those of the encoder's vectors."""
        return sorted(
            name
            for name, stamp in stored_stamps(self._store).items()
            if same_weights(stamp.get("weights"), self._model.stamp)
            and "part" not in stamp
            and not name.endswith(ENCODER_SUFFIX)
        )

    def to_search(self, name: str) -> Searcher:
        """The searcher of an existing collection; nothing is created. ValueError if there is no such collection."""
        if name not in self._open and name not in self.names():
            raise ValueError(f"This store has no collection {name!r} of this model.")
        return self._searcher(name)

    def to_add(self, name: str, *, may_be_new: bool) -> Searcher:
        """The searcher of an existing collection or of `first`; with `may_be_new`, of a new one too.

        Raises ValueError for any other name, and for a reserved one.
        """
        check_collection_name(name)
        if not may_be_new and name != self.first and name not in self.names():
            raise ValueError(
                f"There is no collection {name!r}. New ones can be made only on the computer that runs this page; "
                f"choose one of {', '.join(sorted({self.first, *self.names()}))}."
            )
        return self._searcher(name)

    def _searcher(self, name: str) -> Searcher:
        with self._lock:
            if name not in self._open:
                self._open[name] = Searcher(self._store, self._model, name)
            return self._open[name]
