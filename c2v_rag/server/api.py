"""The server's ASGI application and its routes. `c2v-rag serve` runs it; any ASGI server can run it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from c2v_rag import __version__
from c2v_rag.hosts import HostCheck
from c2v_rag.index import DEFAULT_COLLECTION, StoreAddress
from c2v_rag.model import Causal2Vec
from c2v_rag.remote import WEIGHTS_HEADER
from c2v_rag.server import schema
from c2v_rag.server.errors import add_error_handlers
from c2v_rag.server.middleware import BodyLimit, KeyCheck, RequestMetrics
from c2v_rag.server.searching import SearchService
from c2v_rag.server.service import EmbeddingService, Limits, public_name

__all__ = ["Limits", "create_app"]

_JSON = "application/json"
_CLOSED_BY_CLIENT = 499  # nginx's status for it; only the metrics show it, because the client is gone


def create_app(
    model: Causal2Vec,
    *,
    name: str = "",
    api_keys: Sequence[str] = (),
    limits: Limits | None = None,
    allowed_hosts: Sequence[str] = (),
    store: StoreAddress | None = None,
    collection: str = DEFAULT_COLLECTION,
) -> FastAPI:
    """The ASGI application that serves one loaded model.

    `name`: the model's name for clients. Unless given, it is the model's own name; of a folder's path, the last part.
    `api_keys`: each request must send one of them as `Authorization: Bearer KEY`, except to /health and /ready; if
    there are none, every request is answered. `allowed_hosts`: names of this server besides localhost and IP addresses;
    requests for other hosts are refused, "*" allows all.

    `store`, `collection`: what /v1/search searches; without a store it answers 404 and says what to do.

    Raises ValueError for a name that ends in ":query", and for a collection that another model made.
    """
    name = schema.check_model_name(name or public_name(model))
    service = EmbeddingService(model, name, limits or Limits())
    searching = SearchService(service, store, collection)
    weights = str(model.stamp["weights"])

    app = FastAPI(title="c2v-rag", version=__version__, docs_url=None, redoc_url=None)
    # The middleware that is added last is the outermost: it runs first.
    app.add_middleware(BodyLimit, max_bytes=service.limits.body_bytes)
    app.add_middleware(KeyCheck, keys=api_keys)
    app.add_middleware(HostCheck, allowed_hosts=allowed_hosts)
    app.add_middleware(RequestMetrics, metrics=service.metrics)
    add_error_handlers(app)

    async def add_weights_header(response: Response) -> None:
        response.headers[WEIGHTS_HEADER] = weights

    with_weights = [Depends(add_weights_header)]

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """200 while the queue has room for another request, else 503."""
        if service.waiting >= service.limits.waiting:
            raise HTTPException(503, "The queue is full.")
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=with_weights)
    async def models() -> schema.Models:
        return schema.Models(data=[service.description])

    @app.post("/v1/tokenize", dependencies=with_weights)
    async def tokenize(body: schema.TokenizeRequest) -> schema.TokenizeResponse:
        service.kind_of(body.model, None)
        longest = service.model.max_tokens
        if body.ends:
            return schema.TokenizeResponse(max_tokens=longest, ends=await service.token_ends(body.input))
        return schema.TokenizeResponse(max_tokens=longest, counts=await service.count_tokens(body.input))

    @app.post("/v1/embeddings")
    async def embeddings(body: schema.EmbeddingsRequest, request: Request) -> Response:
        return await _answer(service.embed(body), request)

    @app.post("/v1/search")
    async def search(body: schema.SearchRequest, request: Request) -> Response:
        return await _answer(searching.search(body), request)

    async def _answer(work: Coroutine[Any, Any, BaseModel], request: Request) -> Response:
        """The result of `work` as JSON; if the client is gone before, `work` is cancelled."""
        answer = asyncio.create_task(work)
        disconnect = asyncio.create_task(_wait_for_disconnect(request))
        try:
            await asyncio.wait({answer, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=_CLOSED_BY_CLIENT)
            return Response(answer.result().model_dump_json(), headers={WEIGHTS_HEADER: weights}, media_type=_JSON)
        finally:
            answer.cancel()
            disconnect.cancel()

    return app


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
