"""The `Embedder` protocol: the members of a model that index, integrations, server and app use. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np


@runtime_checkable
class Embedder(Protocol):
    """A model that embeds texts, such as `Causal2Vec`, `RemoteModel` or `EncoderEmbedder`.

    `stamp` identifies the model: vectors of models with different stamps must not be mixed. Its "name" is the name for
    loading the model, "" for a model that exists in memory only.

    `count_tokens(texts) -> list[int]` and `max_tokens` are optional. With them, documents are split into chunks that
    the embedder does not truncate. `token_ends(texts)`, also optional, gives for each text and tokenizer the offset at
    which each token ends; with it, a document is tokenised once.
    """

    @property
    def embedding_dim(self) -> int: ...
    @property
    def stamp(self) -> dict[str, str | int]: ...
    def encode_query(self, texts: Iterable[str]) -> np.ndarray: ...
    def encode_document(self, texts: Iterable[str]) -> np.ndarray: ...


class TokenCounter(Protocol):
    """A model that counts the tokens of texts, such as `Causal2Vec` or `RemoteModel`."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...


def is_url(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a model's or a store's name is the http(s) address of a server."""
    return os.fspath(name_or_path).startswith(("http://", "https://"))


def same_weights(expected: object, stamp: Mapping[str, object]) -> bool:
    """Whether `expected` is the identity of a stamp's weights, as this version or version 0.1 computes it."""
    return expected in (stamp.get("weights"), stamp.get("weights_0_1"))
