"""Commands that listen: serve, and app for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from c2v_rag.cli.options import Collection, Device, DType, ModelName, Store
from c2v_rag.cli.shared import err, is_loopback, load_model, open_embedder, requires_extra


def serve(
    model: ModelName = "default",
    host: Annotated[str, typer.Option(help="Address to listen at; any but this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="File with a key a line; clients must send one.")] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let everyone who reaches the address use it.")] = False,
    name: Annotated[str, typer.Option(help="What clients call the model, its own name unless given.")] = "",
    max_body: Annotated[int, typer.Option(min=1, help="MiB a request.")] = 16,
    max_inputs: Annotated[int, typer.Option(min=1, help="Texts a request.")] = 2048,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens a text; what the decoder reads unless given.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Texts accepted and not answered yet.")] = 8192,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Until an answer.")] = 120.0,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Embed for other programs, over HTTP as OpenAI does; NAME embeds documents, NAME:query queries."""
    with requires_extra("server"):
        from c2v_rag.server import run
        from c2v_rag.server.api import Limits

    if not (is_loopback(host) or api_key_file or no_key):
        raise ValueError(
            f"Whoever reaches {host} could use this server. Give --api-key-file, or say --no-key if that is meant."
        )
    keys = run.read_keys(api_key_file) if api_key_file else []
    limits = Limits(
        body_bytes=max_body * 2**20, inputs=max_inputs, tokens=max_tokens, waiting=max_waiting, seconds=max_seconds
    )
    run.serve(load_model(model, device, dtype), host=host, port=port, name=name, api_keys=keys, limits=limits)


def search_app(
    store: Store,
    collection: Collection = "documents",
    model: Annotated[
        str | None, typer.Option(help="The collection's own model unless given, the default for a new one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; with another one than this, others can see it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Search in the browser, side by side with other methods; add documents, look at a map."""
    with requires_extra("demo"):
        from c2v_rag.app.page import SearchApp

    from c2v_rag.index import stored_stamps

    stamp = stored_stamps(store).get(collection, {})
    name = model or str(stamp.get("name") or "default")
    is_local = is_loopback(host)
    if not is_local:
        err.print(
            f"Whoever reaches {host} can search this store and add files to it; there is no password.", style="yellow"
        )
    page = SearchApp(store, open_embedder(name, device, dtype), collection=collection, is_local=is_local)
    page.launch(host=host, port=port or None)
