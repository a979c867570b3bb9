"""A `BaseEmbedding` for LlamaIndex that embeds with a Causal2Vec model."""

from __future__ import annotations

import asyncio
from typing import Any, Self

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.rate_limiter import BaseRateLimiter

from c2v_rag import Embedder, EmbedderSpec, LazyEmbedder, gather

_SPEC_FIELDS = ("revision", "device", "dtype", "llm_kwargs")


class Causal2VecEmbedding(BaseEmbedding):
    """Causal2Vec embedding model.

    Examples:
        >>> from llama_index.embeddings.c2v import Causal2VecEmbedding
        >>> embed_model = Causal2VecEmbedding()
        >>> len(embed_model.get_query_embedding("What keeps its smallest item first?"))
        384

    `model_name`: "default", a checkpoint folder, or a Hugging Face Hub id. Instead, `model` takes a loaded embedder.
    The model is loaded when the object is created, because the stamp of its weights is a field of the object, and
    LlamaIndex's ingestion cache compares the fields. Objects with the same arguments share one model in a process.
    `weights_stamp` is written by `to_dict`; if it is given, the loaded weights must have this stamp.

    Raises ValueError if both a loaded model and a name are given, for a `weights_stamp` of other weights, and for an
    `embeddings_cache`: its only key is the text, so a query would get the vector of a document with the same text, or
    a vector of another model.
    """

    revision: str | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    device: str | None = Field(default=None, description="cuda, mps or cpu; unless given, the first available.")
    dtype: str | None = Field(default=None, description="float32, bfloat16, ...")
    llm_kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments for the decoder's from_pretrained.")
    query_instruction: str | None = Field(
        default=None, description='Text before every query; the model\'s own unless given, "" for none.'
    )
    text_instruction: str | None = Field(default=None, description="Text before every document; none unless given.")
    truncate_dim: int | None = Field(default=None, description="Number of columns of a shorter embedding.")
    weights_stamp: str = Field(default="", description="Hash of the weights, so that caches do not mix models.")

    _lazy: Any = PrivateAttr(default=None)

    def __init__(
        self,
        model_name: str | None = None,
        *,
        model: Embedder | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        llm_kwargs: dict[str, Any] | None = None,
        query_instruction: str | None = None,
        text_instruction: str | None = None,
        truncate_dim: int | None = None,
        embed_batch_size: int = 256,
        num_workers: int | None = None,
        callback_manager: CallbackManager | None = None,
        embeddings_cache: Any = None,
        rate_limiter: BaseRateLimiter | None = None,
        weights_stamp: str = "",
    ) -> None:
        if embeddings_cache is not None:
            raise ValueError(
                "embeddings_cache is keyed by the text alone: a query would get a document's vector, or one of another "
                "model. Use IngestionPipeline's cache, whose key includes the model's fields."
            )
        if model_name == "":
            raise ValueError("A model that exists in memory only cannot be loaded by name: give it as model=.")
        lazy = LazyEmbedder.of(
            model,
            name_or_path=model_name,
            name_argument="model_name",
            revision=revision,
            device=device,
            dtype=dtype,
            llm_kwargs=llm_kwargs,
            weights=weights_stamp,
        )
        spec = lazy.spec
        stamp = lazy().stamp
        # A dict, because LlamaIndex's __init__ declares only its own fields to type checkers.
        fields: dict[str, Any] = {
            "model_name": spec.name_or_path,
            "revision": spec.revision,
            "device": spec.device,
            "dtype": spec.dtype,
            "llm_kwargs": dict(spec.llm_kwargs),
            "query_instruction": query_instruction,
            "text_instruction": text_instruction,
            "truncate_dim": truncate_dim,
            "embed_batch_size": embed_batch_size,
            "num_workers": num_workers,
            "callback_manager": callback_manager or CallbackManager([]),
            "rate_limiter": rate_limiter,
            "weights_stamp": "-".join(str(stamp[key]) for key in ("weights", "part") if key in stamp),
        }
        super().__init__(**fields)
        self._lazy = lazy

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """The object whose settings `to_dict` or `to_json` saved.

        Raises ValueError if the model has other weights now, and for the address of a server, unless this process made
        a `RemoteModel` for it: stored data must not decide where texts are sent.
        """
        fields = {**data, **kwargs}
        fields.pop("class_name", None)
        names = {"model_name": "name_or_path", "weights_stamp": "weights"} | {name: name for name in _SPEC_FIELDS}
        values = {spec_name: fields.pop(name) for name, spec_name in names.items() if fields.get(name) is not None}
        return cls(model=EmbedderSpec.from_stored(values, place="The stored embedding").open(), **fields)

    @classmethod
    def class_name(cls) -> str:
        return "Causal2VecEmbedding"

    def _embedder(self) -> Embedder:
        embedder: Embedder = self._lazy()
        return embedder

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle. ValueError for a model in memory only: LlamaIndex would drop it silently."""
        if not self.model_name:
            raise ValueError("A model that exists in memory only cannot be pickled: save it and give its folder.")
        state: dict[str, Any] = super().__getstate__()
        return state

    def _options(self, instruction: str | None) -> dict[str, Any]:
        options = {"instruction": instruction, "truncate_dim": self.truncate_dim}
        return {name: value for name, value in options.items() if value is not None}

    def _get_query_embedding(self, query: str) -> list[float]:
        vectors = self._embedder().encode_query([query], **self._options(self.query_instruction))
        vector: list[float] = vectors[0].tolist()
        return vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors = self._embedder().encode_document(texts, **self._options(self.text_instruction))
        rows: list[list[float]] = vectors.tolist()
        return rows

    # Async calls that wait at the same time are embedded in one batch.
    async def _aget_query_embedding(self, query: str) -> list[float]:
        vector = gather(self._embedder(), "query", query, **self._options(self.query_instruction))
        row: list[float] = (await asyncio.wrap_future(vector)).tolist()
        return row

    async def _aget_text_embedding(self, text: str) -> list[float]:
        vector = gather(self._embedder(), "document", text, **self._options(self.text_instruction))
        row: list[float] = (await asyncio.wrap_future(vector)).tolist()
        return row

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
