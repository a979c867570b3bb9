"""Chroma's `EmbeddingFunction`, answered by a Causal2Vec model."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from c2v_rag import Embedder

_KEYS = ("name_or_path", "revision", "device", "dtype", "query_instruction", "document_instruction", "truncate_dim")


@register_embedding_function
class Causal2VecEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds a collection's documents and queries; a reopened collection finds it by name.

    Example:
        >>> import chromadb
        >>> from chroma_c2v import Causal2VecEmbeddingFunction
        >>> collection = chromadb.EphemeralClient().create_collection(
        ...     "notes", embedding_function=Causal2VecEmbeddingFunction()
        ... )
        >>> collection.add(ids=["a", "b"], documents=["A heap keeps its smallest item first.", "Bread needs yeast."])
        >>> collection.query(query_texts=["priority queue"], n_results=1)["ids"]
        [['a']]

    `name_or_path`: "default", a checkpoint folder, or a Hugging Face Hub id; or `model`, a loaded Causal2Vec, which
    must have such a name, because Chroma rebuilds the function from its saved settings again and again. Nothing is
    loaded before the first embedding, and every rebuilt function shares the one model in this process.

    Chroma compares functions by name only: a collection made with another model of the same width is not noticed.
    `c2v_rag.VectorIndex` remembers the model and refuses.
    """

    def __init__(
        self,
        name_or_path: str | None = None,
        revision: str | None = None,
        *,
        model: Embedder | None = None,
        device: str | None = None,
        dtype: str | None = None,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        if model is not None:
            given = {"name_or_path": name_or_path, "revision": revision, "device": device, "dtype": dtype}
            if named := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"Give either a loaded model or its name, not both: model and {', '.join(named)}.")
            name_or_path = str(model.stamp["name"])
            if not name_or_path:
                raise ValueError(
                    "Chroma saves the function by its model's name, and this model has none: it exists in memory only. "
                    "Save it with save_pretrained, load it from there, and give that."
                )
        self.name_or_path = "default" if name_or_path is None else name_or_path
        self.revision = revision
        self.device = device
        self.dtype = dtype
        self.query_instruction = query_instruction
        self.document_instruction = document_instruction
        self.truncate_dim = truncate_dim
        self._model = model

    def __call__(self, input: Documents) -> Embeddings:
        """Embeddings of what is searched."""
        return _rows(self._embedder().encode_document(input, **self._options(self.document_instruction)))

    def embed_query(self, input: Documents) -> Embeddings:
        """Embeddings of what is asked."""
        return _rows(self._embedder().encode_query(input, **self._options(self.query_instruction)))

    def _embedder(self) -> Embedder:
        if self._model is None:
            from c2v_rag import load_embedder

            self._model = load_embedder(self.name_or_path, revision=self.revision, device=self.device, dtype=self.dtype)
        return self._model

    def _options(self, instruction: str | None) -> dict[str, Any]:
        options = {"instruction": instruction, "truncate_dim": self.truncate_dim}
        return {name: value for name, value in options.items() if value is not None}

    @staticmethod
    def name() -> str:
        return "causal2vec"

    def default_space(self) -> Space:
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        return ["cosine", "ip", "l2"]

    def get_config(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _KEYS}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> Causal2VecEmbeddingFunction:
        Causal2VecEmbeddingFunction.validate_config(config)
        return Causal2VecEmbeddingFunction(**config)

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """ValueError for a setting that this version does not know."""
        if unknown := sorted(config.keys() - set(_KEYS)):
            raise ValueError(f"The collection's function has unknown settings {unknown}. Upgrade c2v-rag.")

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """ValueError for a change that would mix vectors of two kinds in one collection."""
        fixed = set(_KEYS) - {"device", "dtype"}
        if changed := sorted(key for key in fixed if old_config.get(key) != new_config.get(key)):
            raise ValueError(
                f"{', '.join(changed)} cannot be changed in a collection that has vectors already. Make a new one."
            )


def _rows(vectors: np.ndarray) -> Embeddings:
    return cast(Embeddings, list(vectors))
