"""LlamaIndex's `BaseEmbedding`, answered by a Causal2Vec model."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.rate_limiter import BaseRateLimiter

from c2v_rag import Embedder, gather


class Causal2VecEmbedding(BaseEmbedding):
    """Causal2Vec embedding model.

    Example:
        >>> from llama_index.embeddings.c2v import Causal2VecEmbedding
        >>> embed_model = Causal2VecEmbedding()
        >>> len(embed_model.get_query_embedding("What keeps its smallest item first?"))
        1152

    `model_name`: "default", a checkpoint folder, or a Hugging Face Hub id; or `model`, a loaded embedder. The model is
    loaded when the object is made, because its weights' stamp is one of the fields by which LlamaIndex's ingestion
    cache tells embeddings apart; objects of the same arguments share one model in a process. `weights_stamp` is
    written by `to_dict`; given, it must be that of the loaded weights.

    Raises ValueError for a loaded model together with a name, for a `weights_stamp` of other weights, and for an
    `embeddings_cache`: LlamaIndex keys it by the text alone, and would give a document's vector to a query, and one
    model's to another.
    """

    revision: str | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    device: str | None = Field(default=None, description="cuda, mps or cpu; the first there is unless given.")
    dtype: str | None = Field(default=None, description="float32, bfloat16, ...")
    query_instruction: str | None = Field(default=None, description='The model\'s own unless given; "" for none.')
    text_instruction: str | None = Field(default=None, description="None unless given.")
    truncate_dim: int | None = Field(default=None, description="A shorter embedding.")
    weights_stamp: str = Field(default="", description="Tells the weights apart, for caches.")

    _model: Any = PrivateAttr(default=None)

    def __init__(
        self,
        model_name: str | None = None,
        *,
        model: Embedder | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
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
                "embeddings_cache is keyed by the text alone: a query would get a document's vector, and one model "
                "another's. Use IngestionPipeline's cache, which asks for the model's fields too."
            )
        if model is not None:
            given = {"model_name": model_name, "revision": revision, "device": device, "dtype": dtype}
            if named := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"Give either a loaded model or its name, not both: model and {', '.join(named)}.")
            model_name = str(model.stamp["name"])
        elif model_name == "":
            raise ValueError("A model that exists in memory only cannot be loaded by name: give it as model=.")
        # By dict: for type checkers LlamaIndex's own __init__ hides the fields that are added here.
        fields: dict[str, Any] = {
            "model_name": "default" if model_name is None else model_name,
            "revision": revision,
            "device": device,
            "dtype": dtype,
            "query_instruction": query_instruction,
            "text_instruction": text_instruction,
            "truncate_dim": truncate_dim,
            "embed_batch_size": embed_batch_size,
            "num_workers": num_workers,
            "callback_manager": callback_manager or CallbackManager([]),
            "rate_limiter": rate_limiter,
            "weights_stamp": weights_stamp,
        }
        super().__init__(**fields)
        self._model = None if model is None else self._checked(model)
        self.weights_stamp = str(self._embedder().stamp["weights"])

    @classmethod
    def class_name(cls) -> str:
        return "Causal2VecEmbedding"

    def _embedder(self) -> Embedder:
        if self._model is None:
            from c2v_rag import load_embedder

            self._model = self._checked(
                load_embedder(self.model_name, revision=self.revision, device=self.device, dtype=self.dtype)
            )
        embedder: Embedder = self._model
        return embedder

    def _checked(self, embedder: Embedder) -> Embedder:
        """The same embedder. ValueError where its weights are not those of `weights_stamp`."""
        loaded = str(embedder.stamp["weights"])
        if self.weights_stamp and loaded != self.weights_stamp:
            raise ValueError(
                f"{self.model_name!r} was saved with the weights {self.weights_stamp}, and now has {loaded}: vectors "
                "of both must not be mixed. Load the weights that it was saved with, or leave weights_stamp out."
            )
        return embedder

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights: workers load them by name. ValueError where the model has none."""
        if not self.model_name:
            raise ValueError("A model that exists in memory only cannot be pickled: save it and give its folder.")
        state: dict[str, Any] = super().__getstate__()
        private = state.get("__pydantic_private__") or {}
        return {**state, "__pydantic_private__": {**private, "_model": None}}

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

    # Calls that wait at the same time are embedded together.
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
