"""Runs the server: reads the API keys from a file and starts uvicorn with the application."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from c2v_rag.index import DEFAULT_COLLECTION, StoreAddress
from c2v_rag.model import Causal2Vec
from c2v_rag.server.api import create_app
from c2v_rag.server.service import Limits


def read_keys(path: Path) -> list[str]:
    """The API keys in a file: one per line, empty lines and lines that start with # are skipped.

    Raises ValueError if there is no key.
    """
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} holds no key. Write one per line, such as the output of `openssl rand -hex 32`.")
    return keys


def serve(
    model: Causal2Vec,
    *,
    host: str,
    port: int,
    name: str = "",
    api_keys: Sequence[str] = (),
    limits: Limits,
    allowed_hosts: Sequence[str] = (),
    store: StoreAddress | None = None,
    collection: str = DEFAULT_COLLECTION,
) -> None:
    """Run the server until SIGTERM or Ctrl-C. Requests that it has accepted by then are still answered.

    `allowed_hosts`: names of this server besides `host`, localhost and IP addresses. `store`, `collection`: what
    /v1/search searches. Raises SystemExit when the port is taken.
    """
    app = create_app(
        model, name=name, api_keys=api_keys, limits=limits, allowed_hosts=[host, *allowed_hosts], store=store,
        collection=collection,
    )  # fmt: skip
    logging.getLogger("c2v_rag").setLevel(logging.INFO)
    model.encode_query(["warm up"])  # the first call is slow, so no client should make it
    # A full garbage collection looks at half a million objects of the model's libraries, and all requests wait for it.
    gc.collect()
    gc.freeze()
    uvicorn.run(app, host=host, port=port, server_header=False, log_level="info", access_log=False)
