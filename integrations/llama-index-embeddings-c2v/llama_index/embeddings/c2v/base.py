"""LlamaIndex's `BaseEmbedding`, answered by a Causal2Vec model."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager

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
    cache tells embeddings apart; objects of the same arguments share one model in a process.

    Raises ValueError for an `embeddings_cache`: LlamaIndex keys it by the text alone, and would give a document's
    vector to a query, and one model's to another.
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
        model_name: str = "default",
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
    ) -> None:
        if embeddings_cache is not None:
            raise ValueError(
                "embeddings_cache is keyed by the text alone: a query would get a document's vector, and one model "
                "another's. Use IngestionPipeline's cache, which asks for the model's fields too."
            )
        super().__init__(
            model_name=model_name if model is None else str(model.stamp["name"]),
            revision=revision,
            device=device,
            dtype=dtype,
            query_instruction=query_instruction,
            text_instruction=text_instruction,
            truncate_dim=truncate_dim,
            embed_batch_size=embed_batch_size,
            num_workers=num_workers,
            callback_manager=callback_manager or CallbackManager([]),
        )
        self._model = model
        self.weights_stamp = str(self._embedder().stamp["weights"])

    @classmethod
    def class_name(cls) -> str:
        return "Causal2VecEmbedding"

    def _embedder(self) -> Embedder:
        if self._model is None:
            from c2v_rag import load_embedder

            self._model = load_embedder(self.model_name, revision=self.revision, device=self.device, dtype=self.dtype)
        embedder: Embedder = self._model
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
