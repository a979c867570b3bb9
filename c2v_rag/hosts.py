"""`HostCheck`: refuses requests by their `Host` and `Origin` headers. Needs no web framework."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

ANY_HOST = "*"


def is_loopback(host: str) -> bool:
    """Whether a server that is bound to `host` can be reached from this machine only."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


class HostCheck:
    """ASGI middleware that answers 400 to a request whose `Host` header names an unknown host.

    It protects against DNS rebinding: an attacker lets the name of their web page resolve to this machine's address,
    and the page's scripts can then read this server's answers. The `Host` header still holds the attacker's name.

    These hosts are accepted: IP addresses, which cannot be rebound, "localhost", and `allowed_hosts`; "*" in
    `allowed_hosts` accepts every name. With `same_origin`, a request whose `Origin` header names another site gets 403.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str] = (), same_origin: bool = False) -> None:
        self._app = app
        self._names = {_normalized(host) for host in allowed_hosts} | {"localhost"}
        self._same_origin = same_origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            host = _host_name(headers.get(b"host", b""))
            if not (host in self._names or _is_address(host) or ANY_HOST in self._names):
                message = f"This server does not answer for the host {host!r}. Start it with --allowed-host {host}"
                await _refuse(scope, send, 400, f"{message} if that is its name.")
                return
            if self._same_origin and b"origin" in headers:
                origin = headers[b"origin"].partition(b"://")[2]
                if _host_name(origin) not in {host, *(self._names - {"localhost"})}:
                    await _refuse(scope, send, 403, "A page of another site sent this request.")
                    return
        await self._app(scope, receive, send)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _normalized(host: str) -> str:
    return host.lower().rstrip(".").strip("[]")


def _host_name(host_and_port: bytes) -> str:
    """The name or address in a `Host` header; "" if the header cannot be parsed."""
    try:
        return _normalized(urlsplit(f"//{host_and_port.decode('latin-1')}").hostname or "")
    except ValueError:
        return ""


async def _refuse(scope: Scope, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message[:100]})
        return
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
