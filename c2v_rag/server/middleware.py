"""ASGI middleware of the server: request metrics, the check of the API key, the limit of a request's length.

A request without a valid key, or with too large a Content-Length, is refused before its body is read.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from c2v_rag.server.errors import error_response
from c2v_rag.server.metrics import Metrics

WITHOUT_KEY = {"/health", "/ready"}


class RequestMetrics:
    """Counts requests by path and status, and measures their duration."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note_status)
        finally:
            # Only existing paths become labels: a client must not be able to create new counters.
            paths = {getattr(route, "path", "") for route in scope["app"].routes}
            path = scope["path"] if scope["path"] in paths else "other"
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)


class KeyCheck:
    """Answers 401 to a request without a valid `Authorization: Bearer KEY`, on every path but /health and /ready.

    `keys`: the valid keys; if there are none, every request is let through. `Bearer` may be upper or lower case.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in WITHOUT_KEY or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        message = "A valid key is needed: send it as 'Authorization: Bearer KEY'."
        await error_response(401, message, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if not self._keys:
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        # Against timing attacks: each comparison takes constant time, and none is skipped after a match.
        matches = sum(hmac.compare_digest(key.strip(), valid) for valid in self._keys)
        return scheme.lower() == b"bearer" and matches > 0


class BodyLimit:
    """Answers 413 to a request whose body is longer than `max_bytes`.

    The Content-Length decides; without one, the bytes are counted while they are read.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"The request is longer than {self._max_bytes} bytes. Send fewer texts at a time."
        if scope["type"] == "http":
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if length.isdigit() and int(length) > self._max_bytes:
                await error_response(413, message)(scope, receive, send)
                return
        num_read = 0

        async def receive_and_count() -> Message:
            nonlocal num_read
            received = await receive()
            num_read += len(received.get("body", b""))
            if num_read > self._max_bytes:
                raise HTTPException(413, message)
            return received

        await self._app(scope, receive_and_count, send)
