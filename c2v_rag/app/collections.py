"""The collections of a store that the page may search and add to."""

from __future__ import annotations

import threading

from c2v_rag.app.search import ENCODER_SUFFIX, Searcher, check_collection_name
from c2v_rag.index import StoreAddress, stored_stamps
from c2v_rag.protocols import Embedder, same_weights


class Collections:
    """One `Searcher` for each collection of a store, opened at its first use.

    `first`: the collection that the page was started with; it is made when documents are added.

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
        """The store's collections that this model made, without those of the encoder's vectors."""
        return sorted(
            name
            for name, stamp in stored_stamps(self._store).items()
            if same_weights(stamp.get("weights"), self._model.stamp) and not name.endswith(ENCODER_SUFFIX)
        )

    def to_search(self, name: str) -> Searcher:
        """A collection of the store; nothing is created. ValueError for another name."""
        if name not in self._open and name not in self.names():
            raise ValueError(f"This store has no collection {name!r} of this model.")
        return self._searcher(name)

    def to_add(self, name: str, *, may_be_new: bool) -> Searcher:
        """A collection of the store, the first one, or with `may_be_new` a new one.

        Raises ValueError for a name that is not allowed.
        """
        check_collection_name(name)
        if not may_be_new and name != self.first and name not in self.names():
            raise ValueError(
                f"There is no collection {name!r}. New ones are made on the computer that runs this page; choose one "
                f"of {', '.join(sorted({self.first, *self.names()}))}."
            )
        return self._searcher(name)

    def _searcher(self, name: str) -> Searcher:
        with self._lock:
            if name not in self._open:
                self._open[name] = Searcher(self._store, self._model, name)
            return self._open[name]
