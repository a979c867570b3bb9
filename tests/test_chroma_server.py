"""Addresses of Chroma servers: ports, paths, tenants, and credentials that stay secret."""

from __future__ import annotations

import base64
import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import pytest

from c2v_rag.index import ChromaServer, VectorIndex, count_chunks, store_name, stored_stamp, stored_stamps
from tests.tiny import tiny_model

SECRET = "s3cret/word"
QUOTED = "s3cret%2Fword"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("C2V_RAG_CHROMA_HEADERS", "CHROMA_API_KEY", "CHROMA_TENANT", "CHROMA_DATABASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def requests() -> list[tuple[str, dict[str, str]]]:
    """(path, headers) of each request to the fake server."""
    return []


@pytest.fixture
def port(requests: list[tuple[str, dict[str, str]]]) -> Iterator[int]:
    """The port of a fake Chroma server at the path /chroma, with a tenant "team" and its empty database "notes"."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            answers: dict[str, Any] = {
                "/chroma/api/v2/auth/identity": {"user_id": "me", "tenant": "team", "databases": ["notes"]},
                "/chroma/api/v2/tenants/team": {"name": "team"},
                "/chroma/api/v2/tenants/team/databases/notes": {
                    "id": str(uuid4()),
                    "name": "notes",
                    "tenant": "team",
                },
                "/chroma/api/v2/tenants/team/databases/notes/collections": [],
            }
            path = self.path.partition("?")[0]
            self.send_response(200 if path in answers else 404)
            self.end_headers()
            error = {"error": "NotFoundError", "message": f"nothing at {path}"}
            self.wfile.write(json.dumps(answers.get(path, error)).encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_path_tenant_database_and_credentials_of_a_url_are_used(
    port: int, requests: list[tuple[str, dict[str, str]]]
) -> None:
    url = f"http://me:{QUOTED}@127.0.0.1:{port}/chroma/?tenant=team&database=notes"
    assert stored_stamps(url) == {}
    assert count_chunks(url) == 0
    assert requests[-2][0].startswith("/chroma/api/v2/tenants/team/databases/notes")
    expected = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
    assert {headers["authorization"] for _, headers in requests} == {expected}
    assert store_name(url) == f"http://127.0.0.1:{port}/chroma?tenant=team&database=notes"


def test_tenant_database_and_headers_come_from_arguments_or_the_environment(
    port: int, requests: list[tuple[str, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{port}/chroma"
    given = ChromaServer(url, tenant="team", database="notes", headers={"Authorization": f"Bearer {SECRET}"})
    assert len(VectorIndex(given, tiny_model())) == 0
    assert {headers["authorization"] for _, headers in requests} == {f"Bearer {SECRET}"}
    assert SECRET not in repr(given) + str(given)
    requests.clear()
    assert stored_stamps(pickle.loads(pickle.dumps(given))) == {}
    assert {headers["authorization"] for _, headers in requests} == {f"Bearer {SECRET}"}

    requests.clear()
    monkeypatch.setenv("CHROMA_TENANT", "team")
    monkeypatch.setenv("CHROMA_DATABASE", "notes")
    monkeypatch.setenv("CHROMA_API_KEY", "for the cloud only")
    monkeypatch.setenv("C2V_RAG_CHROMA_HEADERS", json.dumps({"X-Chroma-Token": SECRET}))
    assert stored_stamps(url) == {}
    assert {headers["x-chroma-token"] for _, headers in requests} == {SECRET}


def test_credentials_never_show_in_an_error(port: int) -> None:
    url = f"http://me:{QUOTED}@127.0.0.1:{port}"
    with pytest.raises(FileNotFoundError, match="There is no index in http://127") as missing:
        stored_stamp(f"{url}/chroma?tenant=team&database=notes")
    with pytest.raises(ConnectionError, match=r"No Chroma server answers at http://127\.[^@]*tenant") as refused:
        stored_stamps(url)
    with pytest.raises(ValueError, match="write / as %2F") as misread:
        stored_stamps(f"http://me:{SECRET}@127.0.0.1:{port}")
    with pytest.raises(ValueError, match=r"with \['team'\]") as unknown:
        stored_stamps(f"{url}?team=a")
    for caught in (missing, refused, misread, unknown):
        for secret in (SECRET, QUOTED, "s3cret", base64.b64encode(f"me:{SECRET}".encode()).decode()):
            assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.org", ("http://example.org", 80, False)),
        ("https://example.org/", ("https://example.org", 443, True)),
        ("http://example.org:8000", ("http://example.org:8000", 8000, False)),
        ("https://u:p@[::1]:9000/a/b/", ("https://[::1]:9000/a/b", 9000, True)),
    ],
)
def test_a_url_without_a_port_means_the_port_of_its_scheme(
    url: str, expected: tuple[str, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("chromadb.HttpClient", lambda **options: asked.update(options))
    ChromaServer(url).connect()
    assert (asked["host"], asked["port"], asked["ssl"]) == expected
    assert (asked["tenant"], asked["database"]) == ("default_tenant", "default_database")


def test_the_cloud_key_goes_to_the_cloud_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMA_API_KEY", SECRET)
    asked: dict[str, Any] = {}
    monkeypatch.setattr("chromadb.HttpClient", lambda **options: asked.update(options))
    ChromaServer("https://api.trychroma.com").connect()
    assert asked["headers"] == {"x-chroma-token": SECRET}
    assert asked["settings"].chroma_overwrite_singleton_tenant_database_access_from_auth
    for other in ("http://api.trychroma.com", "https://api.trychroma.com.example.org", "https://nottrychroma.com"):
        ChromaServer(other).connect()
        assert asked["headers"] == {}
    monkeypatch.setenv("C2V_RAG_CHROMA_HEADERS", SECRET)
    with pytest.raises(ValueError, match="C2V_RAG_CHROMA_HEADERS must be a JSON object") as caught:
        ChromaServer("http://localhost")
    assert SECRET not in str(caught.value)
