"""Read the stamp of a collection (which model made its vectors), and compare it with the stamp of a loaded model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from c2v_rag.index.stores import DEFAULT_COLLECTION, StoreAddress, missing_index, stored_metadata
from c2v_rag.protocols import same_weights

if TYPE_CHECKING:
    import numpy as np

STAMP_KEY = "c2v_stamp"


@dataclasses.dataclass(frozen=True)
class StampedModel:
    """The stamp of a model that is not loaded, which is enough to read a collection and to delete from it."""

    stamp: dict[str, str | int]

    @property
    def embedding_dim(self) -> int:
        return int(self.stamp["embedding_dim"])

    def encode_query(self, texts: Iterable[str]) -> np.ndarray:
        raise TypeError("This model is not loaded.")

    encode_document = encode_query


def check_stamp(stored: Mapping[str, Any], model: Mapping[str, Any], collection: str) -> None:
    """Raise ValueError, with the entries that differ, if a collection was made with another model.

    `stored`: the collection's stamp; `model`: the loaded model's stamp. All entries must be equal, except those that
    only say where a model came from ("name", "encoder", "llm"): a copy of the model is accepted. A stamp of version 0.1
    has that version's identity of the weights, which is accepted too.
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
    """The stamp in a collection's metadata. Raises ValueError if there is none."""
    if not metadata or STAMP_KEY not in metadata:
        raise ValueError(
            f"The collection {collection!r} was not made by c2v_rag, so nothing says which model its vectors are of. "
            "Use another collection name."
        )
    stamp: dict[str, str | int] = json.loads(metadata[STAMP_KEY])
    return stamp


def stored_stamp(store: StoreAddress, collection: str = DEFAULT_COLLECTION) -> dict[str, str | int]:
    """The stamp of the model that made a collection; nothing is created.

    Raises FileNotFoundError if there is no such store or collection, ValueError if c2v_rag did not make it.
    """
    metadata_by_name = stored_metadata(store)
    if collection not in metadata_by_name:
        raise missing_index(store, collection)
    return read_stamp(metadata_by_name[collection], collection)


def stored_stamps(store: StoreAddress) -> dict[str, dict[str, str | int]]:
    """The stamps of all collections in a store that c2v_rag made, by name; nothing is created."""
    metadata_by_name = stored_metadata(store)
    return {
        name: read_stamp(metadata, name) for name, metadata in metadata_by_name.items() if STAMP_KEY in (metadata or {})
    }
