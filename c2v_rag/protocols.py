"""The `Embedder` protocol: what the index, the integrations, the server and the app need of a model. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np


@runtime_checkable
class Embedder(Protocol):
    """Whatever embeds: a `Causal2Vec`, a remote model, an encoder alone.

    `stamp` tells models apart whose vectors must not be mixed; its "name" is what the model can be loaded by, "" for
    one that exists in memory only.

    `count_tokens(texts) -> list[int]` and `max_tokens` are used where an embedder has them, to cut documents into
    chunks that it reads whole.
    """

    @property
    def embedding_dim(self) -> int: ...
    @property
    def stamp(self) -> dict[str, str | int]: ...
    def encode_query(self, texts: Iterable[str]) -> np.ndarray: ...
    def encode_document(self, texts: Iterable[str]) -> np.ndarray: ...


def is_url(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a model's or a store's name is the http(s) address of a server."""
    return os.fspath(name_or_path).startswith(("http://", "https://"))


def same_weights(expected: object, stamp: Mapping[str, object]) -> bool:
    """Whether a stamp is of the weights with this identity, as this version or version 0.1 names them."""
    return expected in (stamp.get("weights"), stamp.get("weights_0_1"))
