"""The stamp of a collection: which model made its vectors. Read, and compared with the model at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from c2v_rag.index.stores import DEFAULT_COLLECTION, holds_store, stored_metadata
from c2v_rag.protocols import same_weights

STAMP_KEY = "c2v_stamp"


def check_stamp(stored: Mapping[str, Any], model: Mapping[str, Any], collection: str) -> None:
    """ValueError when vectors of these two models must not be compared.

    Copies are equal: a model's name and the places its weights came from may differ. A stamp of version 0.1 names the
    weights as that version did.
    """
    keys = sorted((stored.keys() | model.keys()) - {"weights_0_1"})
    differing = [key for key in keys if stored.get(key) != model.get(key)]
    if same_weights(stored.get("weights"), model):
        differing = [key for key in differing if key != "weights"]
    if not set(differing) - {"name", "encoder", "llm"}:
        return
    lines = [f"- {key}: {stored.get(key)!r} in the index, {model.get(key)!r} in this model" for key in differing]
    raise ValueError(
        f"The collection {collection!r} was made with another model:\n" + "\n".join(lines) + "\n"
        f"Either load the model that made it ({stored.get('name')!r}; encoder from {stored.get('encoder')}, decoder "
        f"from {stored.get('llm')}), or index the documents again with this one into another collection or store."
    )


def read_stamp(metadata: Mapping[str, Any] | None, collection: str) -> dict[str, str | int]:
    """The stamp in a collection's metadata. ValueError where there is none."""
    if not metadata or STAMP_KEY not in metadata:
        raise ValueError(
            f"The collection {collection!r} was not made by c2v_rag, so nothing says which model its vectors are of. "
            "Use another collection name."
        )
    stamp: dict[str, str | int] = json.loads(metadata[STAMP_KEY])
    return stamp


def stored_stamp(path_or_url: str | os.PathLike[str], collection: str = DEFAULT_COLLECTION) -> dict[str, str | int]:
    """The stamp of the model that made a collection; nothing is created.

    Raises FileNotFoundError when there is no such store or collection, ValueError when c2v_rag did not make it.
    """
    if not holds_store(path_or_url):
        raise FileNotFoundError(
            f"There is no index in {path_or_url}. Make one: c2v-rag index SOURCE --store {path_or_url}"
        )
    found = stored_metadata(path_or_url)
    if collection not in found:
        raise FileNotFoundError(f"{path_or_url} has no collection {collection!r}; it has {list(found)}.")
    return read_stamp(found[collection], collection)


def stored_stamps(path_or_url: str | os.PathLike[str]) -> dict[str, dict[str, str | int]]:
    """The collections that c2v_rag made in a store, by name, and the stamps of their models; nothing is created."""
    found = stored_metadata(path_or_url) if holds_store(path_or_url) else {}
    return {name: read_stamp(metadata, name) for name, metadata in found.items() if STAMP_KEY in (metadata or {})}
