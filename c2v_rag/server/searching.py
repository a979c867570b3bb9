"""The work behind `POST /v1/search`: search the collections of one store with the served model."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import HTTPException

from c2v_rag.gatherer import gather
from c2v_rag.index import DEFAULT_COLLECTION, SearchOptions, StoreAddress, VectorIndex, check_mode
from c2v_rag.protocols import Embedder
from c2v_rag.sentences import best_sentences
from c2v_rag.server import schema
from c2v_rag.server.service import EmbeddingService

THREADS = 4
NO_STORE = "This server has no store to search. Start it with one: c2v-rag serve --store FOLDER_OR_URL"


class SearchService:
    """Searches within the limits of `service`, in threads, so that other requests are answered meanwhile.

    `collection`: the one that is searched unless a request names another. Raises ValueError if another model made it.
    """

    def __init__(
        self, service: EmbeddingService, store: StoreAddress | None, collection: str = DEFAULT_COLLECTION
    ) -> None:
        self._service = service
        self._store = store
        self._collection = collection
        self._model = _Gathering(service.embedder)
        self._lock = threading.Lock()
        self._indexes: dict[str, VectorIndex] = {}
        self._threads = ThreadPoolExecutor(THREADS, "search")
        if store is not None:
            VectorIndex(store, self._model, collection)

    async def search(self, body: schema.SearchRequest) -> schema.SearchResponse:
        """The response with the hits.

        Raises HTTPException: 404 without a store or such a collection; 400 for a query that is too long, a wrong
        filter, or a collection of another model; 429 and 504 as in `Limits`; 503 if the store's server does not answer.
        """
        if self._store is None:
            raise HTTPException(404, NO_STORE)
        await self._service.check_lengths([body.query], "Shorten the query.")
        with self._service.reserve(1):
            async with self._service.time_limit():
                response = await asyncio.get_running_loop().run_in_executor(self._threads, self._search, body)
        self._service.metrics.searches.labels(response.mode).inc()
        return response

    def _search(self, body: schema.SearchRequest) -> schema.SearchResponse:
        name, mode = body.collection or self._collection, check_mode(body.mode)
        options: SearchOptions = {
            "where": body.where,
            "min_score": body.min_score,
            "group_by": body.group_by,
            "offset": body.offset or 0,
            "mmr": body.mmr,
            "neighbours": body.neighbours or 0,
        }
        try:
            hits = self._index(name).search(body.query, body.top_k or schema.TOP_K, mode=mode, **options)
        except FileNotFoundError:
            raise HTTPException(404, f"The store has no collection {name!r}.") from None
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        except ConnectionError as error:
            raise HTTPException(503, str(error)) from error
        sentences: list[Any] = [None] * len(hits)
        if body.sentences is not False:
            model = None if mode == "lexical" else self._service.model
            sentences = list(best_sentences(body.query, [hit.text for hit in hits], model))
        return schema.SearchResponse(
            hits=[
                schema.SearchHit(
                    **dataclasses.asdict(hit), sentence=sentence and schema.Sentence(**dataclasses.asdict(sentence))
                )
                for hit, sentence in zip(hits, sentences, strict=True)
            ],
            mode=mode,
            collection=name,
        )

    def _index(self, name: str) -> VectorIndex:
        """The index of a collection. That of an existing one stays open, with its lexical index in memory."""
        assert self._store is not None
        with self._lock:
            if name in self._indexes:
                return self._indexes[name]
            index = VectorIndex(self._store, self._model, name)
            if len(index):
                self._indexes[name] = index
            return index


class _Gathering:
    """An embedder that embeds queries together with the texts of the server's other requests."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    @property
    def embedding_dim(self) -> int:
        return self._embedder.embedding_dim

    @property
    def stamp(self) -> dict[str, str | int]:
        return self._embedder.stamp

    def encode_query(self, texts: Iterable[str]) -> np.ndarray:
        return self._rows("query", texts)

    def encode_document(self, texts: Iterable[str]) -> np.ndarray:
        return self._rows("document", texts)

    def _rows(self, kind: Any, texts: Iterable[str]) -> np.ndarray:
        futures = [gather(self._embedder, kind, text, on_truncate="ignore") for text in texts]
        return np.stack([future.result() for future in futures])
