"""Build the collection of the adapted model beside the old one, which stays as it is."""

from __future__ import annotations

from itertools import islice

from tqdm.auto import tqdm

from c2v_rag.index import (
    StampedModel,
    StoreAddress,
    VectorIndex,
    find_collection,
    open_store,
    store_name,
    stored_stamp,
    stored_stamps,
)
from c2v_rag.protocols import Embedder, same_weights

_BLOCK = 256


def open_stored(store: StoreAddress, collection: str) -> VectorIndex:
    """A collection for reading its chunks, without its model. FileNotFoundError if it does not exist."""
    return VectorIndex(store, StampedModel(stored_stamp(store, collection)), collection)


def new_name(collection: str) -> str:
    """The name of the new collection."""
    return f"{collection}-adapted"


def check_free(store: StoreAddress, collection: str) -> None:
    """Raise FileExistsError if the store has a collection of the new name."""
    if new_name(collection) in stored_stamps(store):
        raise FileExistsError(
            f"{store_name(store)} has a collection {new_name(collection)!r} already. Delete it, or run without "
            "--reindex."
        )


def build_collection(store: StoreAddress, collection: str, model: Embedder, *, show_progress: bool = False) -> str:
    """Embed all chunks of a collection with `model` into a new collection; returns its name.

    The new collection has another name until it is complete, so that nobody searches a part of it. A call that was
    killed and is repeated continues; what a killed call with another model has left is deleted.
    """
    old = open_stored(store, collection)
    unfinished = f"{new_name(collection)}.unfinished"
    opened = open_store(store)
    left = stored_stamps(store).get(unfinished)
    if left is not None and not same_weights(left["weights"], model.stamp):
        with opened.writing():
            opened.client().delete_collection(unfinished)
    new = VectorIndex(store, model, unfinished, chunking=old.chunking)
    present = {chunk.id for chunk in new.chunks()}
    if gone := sorted(present - {chunk.id for chunk in old.chunks()}):
        new.delete_ids(gone)
    missing = (chunk for chunk in old.chunks() if chunk.id not in present)
    with tqdm(total=len(old), initial=len(present) - len(gone), unit="chunk", disable=not show_progress) as progress:
        while block := list(islice(missing, _BLOCK)):
            new.write(block)
            progress.update(len(block))
    with opened.writing():
        found = find_collection(opened, unfinished)
        if found is None:
            raise ValueError(f"The collection {collection!r} has no chunks.")
        found.modify(name=new_name(collection))
        opened.wrote(found)
    return new_name(collection)
