"""An `EmbeddingFunction` for Chroma that embeds with a Causal2Vec model."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from c2v_rag import Embedder, EmbedderSpec, LazyEmbedder

_OPTIONS = ("query_instruction", "document_instruction", "truncate_dim")


@register_embedding_function
class Causal2VecEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds the documents and queries of a collection. Chroma finds it by its name when a collection is reopened.

    Examples:
        >>> import chromadb
        >>> from chroma_c2v import Causal2VecEmbeddingFunction
        >>> collection = chromadb.EphemeralClient().create_collection(
        ...     "passages", embedding_function=Causal2VecEmbeddingFunction()
        ... )
        >>> collection.add(ids=["a", "b"], documents=["A heap keeps its smallest item first.", "Bread needs yeast."])
        >>> collection.query(query_texts=["priority queue"], n_results=1)["ids"]
        [['a']]

    `name_or_path`: "default", a checkpoint folder, a Hugging Face Hub id, or the address of a server. Instead, `model`
    takes a loaded embedder. It must have such a name, because Chroma builds the function again from saved settings
    each time that it opens the collection. All functions with the same settings share one model in a process. The
    saved settings say how the model was loaded and which weights it had: other weights under the same name are refused.
    A saved address of a server is not opened, unless this process made a `RemoteModel` for it; no key is saved.

    Chroma itself compares functions by name only: it does not notice when an existing collection is opened with a
    function of another model. `c2v_rag.VectorIndex` compares the models and refuses another one.

    Raises ValueError if both a loaded model and a name are given, and for a model that exists in memory only.
    """

    def __init__(
        self,
        name_or_path: str | None = None,
        revision: str | None = None,
        *,
        model: Embedder | None = None,
        device: str | None = None,
        dtype: str | None = None,
        llm_kwargs: dict[str, Any] | None = None,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        lazy = LazyEmbedder.of(
            model, name_or_path=name_or_path, revision=revision, device=device, dtype=dtype, llm_kwargs=llm_kwargs
        )
        if not lazy.spec.name_or_path:
            raise ValueError(
                "Chroma saves the function by its model's name, and this model has none: it exists in memory only. "
                "Save it with save_pretrained, load it from there, and give that."
            )
        self._set_embedder(lazy)
        self.query_instruction = query_instruction
        self.document_instruction = document_instruction
        self.truncate_dim = truncate_dim

    def _set_embedder(self, lazy: LazyEmbedder) -> None:
        self._lazy = lazy
        self.name_or_path = lazy.spec.name_or_path
        self.revision = lazy.spec.revision
        self.device = lazy.spec.device
        self.dtype = lazy.spec.dtype

    def __call__(self, input: Documents) -> Embeddings:
        """Embeddings of documents."""
        return _rows(self._lazy().encode_document(input, **self._options(self.document_instruction)))

    def embed_query(self, input: Documents) -> Embeddings:
        """Embeddings of queries."""
        return _rows(self._lazy().encode_query(input, **self._options(self.query_instruction)))

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
        """The settings that Chroma saves. The model is loaded for its weights' stamp, unless they were saved before."""
        if not self._lazy.spec.is_stored:
            self._lazy()
        return {**self._lazy.current_spec.to_dict(), **{key: getattr(self, key) for key in _OPTIONS}}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> Causal2VecEmbeddingFunction:
        """The function with these saved settings. ValueError for a setting that this version does not know."""
        Causal2VecEmbeddingFunction.validate_config(config)
        function = Causal2VecEmbeddingFunction(**{key: config.get(key) for key in _OPTIONS})
        function._set_embedder(LazyEmbedder(_spec(config)))
        return function

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Raise ValueError for a setting that this version does not know."""
        _spec(config)

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Raise ValueError for a change that would mix different vectors in one collection."""
        old, new = ({**_spec(config).to_dict(), **config} for config in (old_config, new_config))
        fixed = (old.keys() | new.keys()) - {"device", "dtype"}
        if changed := sorted(key for key in fixed if old.get(key) != new.get(key)):
            raise ValueError(
                f"{', '.join(changed)} cannot be changed in a collection that has vectors already. Make a new one."
            )


def _spec(config: dict[str, Any]) -> EmbedderSpec:
    values = {key: value for key, value in config.items() if key not in _OPTIONS}
    return EmbedderSpec.from_stored(values, place="The collection's function")


def _rows(vectors: np.ndarray) -> Embeddings:
    return cast(Embeddings, list(vectors))
