"""The address of a Chroma server, the credentials for it, and the connection."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

HEADERS_VARIABLE = "C2V_RAG_CHROMA_HEADERS"
_CLOUD_DOMAIN = "trychroma.com"


class ChromaServer:
    """The address of a Chroma server, a tenant and database there, and the headers of every request.

    Examples:
        >>> ChromaServer("https://me:secret@example.org/chroma?tenant=team&database=notes").url
        'https://example.org/chroma?tenant=team&database=notes'

    `url`: http://HOST or https://HOST, with a port (80 and 443 unless given), a path, `?tenant=...&database=...`, and
    USER:PASSWORD@ before the host, which become a basic Authorization header. `tenant`, `database`: unless given, the
    URL's, else those in the environment variables CHROMA_TENANT and CHROMA_DATABASE, else Chroma's defaults.
    `headers`: sent with every request, in addition to those in the environment variable C2V_RAG_CHROMA_HEADERS, a JSON
    object. The key in the environment variable CHROMA_API_KEY is sent to Chroma Cloud (https://*.trychroma.com) only.

    The attribute `url` is the address without credentials. Only it is shown in messages; credentials are not stored.
    Raises ValueError for an invalid URL or environment variable.
    """

    def __init__(
        self,
        url: str,
        *,
        tenant: str | None = None,
        database: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        try:
            parts = urlsplit(url)
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:  # the message does not repeat the URL: its "port" may be a part of a password
            raise ValueError(
                "The address of the Chroma server has a port that is no number from 0 to 65535. In a user's name or "
                "password, write / as %2F, : as %3A and @ as %40."
            ) from None
        host = parts.netloc.rpartition("@")[2]
        query = parse_qs(parts.query, keep_blank_values=True)
        unknown = sorted(query.keys() - {"tenant", "database"})
        if parts.scheme not in ("http", "https") or not parts.hostname or unknown or parts.fragment:
            raise ValueError(
                f"A Chroma server's address is http(s)://HOST[:PORT][/PATH][?tenant=...&database=...]; got "
                f"{parts.scheme}://{host}{parts.path}" + (f" with {unknown}." if unknown else ".")
            )
        self._base = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        self.url = self._base + (f"?{parts.query}" if parts.query else "")
        self.tenant = tenant or query.get("tenant", [""])[0] or os.environ.get("CHROMA_TENANT")
        self.database = database or query.get("database", [""])[0] or os.environ.get("CHROMA_DATABASE")
        self._is_cloud = parts.scheme == "https" and f".{parts.hostname}".endswith(f".{_CLOUD_DOMAIN}")
        self._headers = {**_environment_headers(self._is_cloud), **_basic(parts.username, parts.password)}
        self._headers |= headers or {}

    def __repr__(self) -> str:
        return f"ChromaServer({self.url!r})"

    def __str__(self) -> str:
        return self.url

    def connect(self) -> ClientAPI:
        """A client of the server. Raises ConnectionError if the server does not answer, or refuses."""
        import chromadb
        from chromadb.config import DEFAULT_DATABASE, DEFAULT_TENANT, Settings
        from chromadb.errors import ChromaError

        # Chroma Cloud chooses tenant and database by the key.
        settings = Settings(chroma_overwrite_singleton_tenant_database_access_from_auth=self._is_cloud)
        try:
            return chromadb.HttpClient(
                host=self._base,  # Chroma accepts a whole URL here, with path and port
                port=self._port,
                ssl=self._base.startswith("https:"),
                headers=dict(self._headers),
                tenant=self.tenant or DEFAULT_TENANT,
                database=self.database or DEFAULT_DATABASE,
                settings=settings,
            )
        except (ValueError, ChromaError) as error:
            if "Could not connect to a Chroma server" in str(error):
                advice = "Start one: chroma run --path DIR"
            else:
                advice = (
                    "Check the port (80 for http, 443 for https unless given), the path, tenant and database (in the "
                    f"URL, or CHROMA_TENANT, CHROMA_DATABASE), and the credentials ({HEADERS_VARIABLE}, CHROMA_API_KEY)"
                )
            raise ConnectionError(f"No Chroma server answers at {self.url}: {error} {advice}.") from error


def _basic(user: str | None, password: str | None) -> dict[str, str]:
    if user is None:
        return {}
    credentials = f"{unquote(user)}:{unquote(password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"}


def _environment_headers(is_cloud: bool) -> dict[str, str]:
    headers: dict[str, str] = {}
    if is_cloud and (key := os.environ.get("CHROMA_API_KEY")):
        headers["x-chroma-token"] = key
    if variable := os.environ.get(HEADERS_VARIABLE):
        try:
            values: Any = json.loads(variable)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise ValueError(
                f'{HEADERS_VARIABLE} must be a JSON object of strings, such as {{"Authorization": "Bearer ..."}}.'
            )
        headers |= values
    return headers
