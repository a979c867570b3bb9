"""The application: routes, limits and errors. `c2v-rag serve` runs it; any ASGI server can.

Errors have OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, so that its clients show the message.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hmac
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from c2v_rag import __version__
from c2v_rag.gatherer import MOST_TEXTS, gather
from c2v_rag.model import Causal2Vec
from c2v_rag.remote import WEIGHTS_HEADER
from c2v_rag.server import schema
from c2v_rag.server.metrics import Metered, Metrics

logger = logging.getLogger(__name__)

Kind = Literal["query", "document"]

_JSON = "application/json"
_CLOSED_BY_CLIENT = 499  # nginx's; nobody is there to read it, it is for the counters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask of the server that all share.

    `body_bytes`: 413 above. `inputs`: texts a request, 400 above. `tokens`: tokens a text, 400 above unless the request
    says `truncate`; None takes what the decoder reads. `waiting`: texts accepted and not answered yet, over all
    requests, 429 above. `seconds`: until an answer, then 504.
    """

    body_bytes: int = 16 * 2**20
    inputs: int = 2048
    tokens: int | None = None
    waiting: int = 8192
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.inputs > self.waiting:
            raise ValueError(
                f"A request of {self.inputs} texts could never be accepted: only {self.waiting} may wait. "
                "Raise the queue's length or lower the texts a request."
            )


def create_app(
    model: Causal2Vec, *, name: str = "", api_keys: Sequence[str] = (), limits: Limits | None = None
) -> FastAPI:
    """The application over one loaded model.

    `name`: what clients call the model; its own unless given, a folder's without those above it. `api_keys`: one of
    them must come as `Authorization: Bearer KEY`, on every path but /health and /ready; without any, everyone is
    answered.
    """
    service = _Service(model, name or _public_name(model), limits or Limits())
    keys = [key.encode() for key in api_keys]

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("utf-8", "surrogateescape")
        # Every key is compared, and each in constant time.
        if keys and not sum(hmac.compare_digest(given, key) for key in keys):
            raise HTTPException(
                401, "A valid key is needed: send it as 'Authorization: Bearer KEY'.", {"WWW-Authenticate": "Bearer"}
            )

    app = FastAPI(title="c2v-rag", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(_BodyLimit, most=service.limits.body_bytes)
    app.add_middleware(_Counted, metrics=service.metrics)  # the last one added is the outermost
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _server_error)
    weights = str(model.stamp["weights"])

    async def name_weights(response: Response) -> None:
        response.headers[WEIGHTS_HEADER] = weights

    needs_key = [Depends(check_key), Depends(name_weights)]

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """There is room for another request."""
        if service.waiting >= service.limits.waiting:
            raise HTTPException(503, "The queue is full.")
        return {"status": "ready"}

    @app.get("/metrics", dependencies=needs_key)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=needs_key)
    async def models() -> schema.Models:
        return schema.Models(data=[service.description])

    @app.post("/v1/tokenize", dependencies=needs_key)
    async def tokenize(body: schema.TokenizeRequest) -> schema.TokenizeResponse:
        service.kind_of(body.model, None)
        counts = await service.count_tokens(body.input)
        return schema.TokenizeResponse(counts=counts, max_tokens=service.model.max_tokens)

    @app.post("/v1/embeddings", dependencies=needs_key)
    async def embeddings(body: schema.EmbeddingsRequest, request: Request) -> Response:
        answer = asyncio.create_task(service.answer(body))
        client_left = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({answer, client_left}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=_CLOSED_BY_CLIENT)
            return Response(answer.result().model_dump_json(), headers={WEIGHTS_HEADER: weights}, media_type=_JSON)
        finally:
            answer.cancel()
            client_left.cancel()

    return app


class _Service:
    """The model, its queue, and what is allowed."""

    def __init__(self, model: Causal2Vec, name: str, limits: Limits) -> None:
        self.model = model
        self.name = name
        self.limits = limits
        self.metrics = Metrics()
        self.waiting = 0
        self._most_tokens = limits.tokens or model.config.max_length
        self._embedder = Metered(model, self.metrics)
        self._tokenizing = ThreadPoolExecutor(1, "count-tokens")  # one at a time may use the tokenizers anyway
        stamp = model.stamp | {"name": name} | {part: _without_path(origin) for part, origin in model.sources.items()}
        self.description = schema.Model(
            id=name,
            created=int(time.time()),
            embedding_dim=model.embedding_dim,
            max_tokens=model.max_tokens,
            max_inputs=limits.inputs,
            stamp=stamp,
        )

    def kind_of(self, name: str, input_type: str | None) -> Kind:
        """Whether queries or documents are asked for. 404 for another model."""
        plain = name.removesuffix(schema.QUERY_SUFFIX)
        if plain != self.name:
            raise HTTPException(404, f"There is no model {name!r} here. Ask for {self.name!r}, or list /v1/models.")
        if input_type is not None:
            return "query" if input_type in ("query", "search_query") else "document"
        return "document" if plain == name else "query"

    async def count_tokens(self, texts: list[str]) -> list[int]:
        if len(texts) > self.limits.inputs:
            raise HTTPException(400, f"{len(texts)} texts in one request; at most {self.limits.inputs} are allowed.")
        with self._place(len(texts)):
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, self.model.count_tokens, texts)

    async def answer(self, body: schema.EmbeddingsRequest) -> schema.EmbeddingsResponse:
        """400, 404, 429 or 504 as `Limits` says; when it is cancelled, what waits for it is taken from the queue."""
        kind = self.kind_of(body.model, body.input_type)
        if body.dimensions is not None and body.dimensions > self.model.embedding_dim:
            raise HTTPException(400, f"dimensions must be at most {self.model.embedding_dim}, got {body.dimensions}.")
        counts = await self.count_tokens(body.input)
        longest = max(counts)
        if longest > self._most_tokens and not body.truncate:
            raise HTTPException(
                400,
                f"The text at index {counts.index(longest)} has {longest} tokens; at most {self._most_tokens} are "
                'read. Cut it into chunks, or send "truncate": true.',
            )
        options = {"truncate_dim": body.dimensions, "instruction": body.instruction, "on_truncate": "ignore"}
        options = {key: value for key, value in options.items() if value is not None}
        with self._place(len(counts)):
            try:
                async with asyncio.timeout(self.limits.seconds):
                    rows = await self._embed(kind, body.input, options)
            except TimeoutError:
                raise HTTPException(
                    504, f"No answer within {self.limits.seconds:g} s: the server is busy. Send fewer texts, or later."
                ) from None
        self.metrics.inputs.labels(kind).inc(len(rows))
        self.metrics.tokens.inc(sum(counts))
        return schema.EmbeddingsResponse(
            data=[
                schema.Embedding.model_construct(index=index, embedding=_written(row, body.encoding_format))
                for index, row in enumerate(rows)
            ],
            model=body.model,
            usage=schema.Usage(prompt_tokens=sum(counts), total_tokens=sum(counts)),
        )

    async def _embed(self, kind: Kind, texts: list[str], options: dict[str, Any]) -> list[np.ndarray]:
        """A long request queues a slice at a time, so that short ones of others need not wait for all of it."""
        rows: list[np.ndarray] = []
        for start in range(0, len(texts), MOST_TEXTS):
            some = [gather(self._embedder, kind, text, **options) for text in texts[start : start + MOST_TEXTS]]
            rows += await _all_of(some)
        return rows

    @contextmanager
    def _place(self, texts: int) -> Iterator[None]:
        """Places in the queue for so many texts. 429 where there are none."""
        if self.waiting + texts > self.limits.waiting:
            raise HTTPException(
                429,
                f"{self.waiting} texts wait already, and {self.limits.waiting} may. Send it again later.",
                {"Retry-After": "1"},
            )
        self.waiting += texts
        self.metrics.waiting.set(self.waiting)
        try:
            yield
        finally:
            self.waiting -= texts
            self.metrics.waiting.set(self.waiting)


def _public_name(model: Causal2Vec) -> str:
    name = str(model.stamp["name"])
    return (Path(name).resolve().name if Path(name).is_dir() else name) or "model"


def _without_path(origin: str) -> str:
    """Where weights came from, without the folders of this machine."""
    kind, _, where = origin.partition(" ")
    return f"{kind} {PurePath(where).name}" if kind in ("folder", "file") else origin


async def _all_of(futures: list[Future[np.ndarray]]) -> list[np.ndarray]:
    """The results in order; where one fails or this is cancelled, the others leave the queue."""
    try:
        return [await asyncio.wrap_future(future) for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _written(row: np.ndarray, encoding: Literal["float", "base64"]) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = row.tolist()
    return numbers


class _Counted:
    """Counts requests by path and status, and their time."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            # Only paths that there are: others would make a counter each.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)


class _BodyLimit:
    """Refuses a body that is longer than it may be: by its header where it has one, else once it has come."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = HTTPException(413, f"The request is longer than {self._most} bytes. Send fewer texts at a time.")
        if scope["type"] == "http":
            announced = dict(scope["headers"]).get(b"content-length", b"0")
            if announced.isdigit() and int(announced) > self._most:
                refusal = _http_error(Request(scope), error)
                await refusal(scope, receive, send)
                return
        read = 0

        async def counting() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise error
            return message

        await self._app(scope, counting, send)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return _error(error.status_code, error.detail, kind, error.headers)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    """422: which field, and why. What was sent is not repeated: it may be long, and not even be text."""
    assert isinstance(error, RequestValidationError)
    found = [
        f"{'.'.join(str(part) for part in one['loc'][1:]) or 'body'}: {one['msg'].removeprefix('Value error, ')}"
        for one in error.errors()[:5]
    ]
    return _error(422, "The request cannot be read. " + "; ".join(found) + ".", "invalid_request_error")


def _server_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("An error of the server's own", exc_info=error)
    return _error(500, "The server failed; its log says why.", "server_error")


def _error(status: int, message: str, kind: str, headers: Any = None) -> JSONResponse:
    content = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(content, status, headers)
