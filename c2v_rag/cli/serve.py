"""Commands that start a server: serve for programs, app for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from c2v_rag.cli.options import Collection, Device, DType, ModelName, Store, WriterModel
from c2v_rag.cli.shared import load_model, open_embedder, requires_extra
from c2v_rag.hosts import is_loopback

AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        metavar="NAME",
        help="Repeatable: a host name that clients use for this server, such as a proxy's. localhost, IP addresses and "
        'the name given as --host are always allowed; other names are refused. "*" allows all.',
    ),
]


def serve(
    model: ModelName = "default",
    host: Annotated[
        str, typer.Option(help="Address to listen at; an address that other machines reach needs a key.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with one key per line; clients must send one of them.")
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let everyone who reaches the address use it.")] = False,
    allowed_host: AllowedHosts = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Folder of an index that this model made, or the URL of a Chroma server: /v1/search searches it."
        ),
    ] = None,
    collection: Collection = "documents",
    name: Annotated[str, typer.Option(help="The model's name for clients; its own name unless given.")] = "",
    max_body: Annotated[int, typer.Option(min=1, help="Maximum MiB per request.")] = 16,
    max_inputs: Annotated[int, typer.Option(min=1, help="Maximum texts per request.")] = 2048,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per text, if less than the model reads.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Maximum texts that are accepted and not answered yet.")
    ] = 8192,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Maximum seconds until the answer.")] = 120.0,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Serve embeddings over HTTP, with OpenAI's API, and with --store a search in an index.

    Model NAME embeds documents, NAME:query embeds queries.
    """
    with requires_extra("server"):
        from c2v_rag.server import run
        from c2v_rag.server.api import Limits
        from c2v_rag.server.schema import check_model_name

    if not (is_loopback(host) or api_key_file or no_key):
        raise ValueError(
            f"Everyone who reaches {host} could use this server. Give --api-key-file, or say --no-key if you want that."
        )
    check_model_name(name)  # before the model is loaded
    keys = run.read_keys(api_key_file) if api_key_file else []
    limits = Limits(
        body_bytes=max_body * 2**20, inputs=max_inputs, tokens=max_tokens, waiting=max_waiting, seconds=max_seconds
    )
    run.serve(
        load_model(model, device, dtype), host=host, port=port, name=name, api_keys=keys, limits=limits,
        allowed_hosts=allowed_host or [], store=store, collection=collection,
    )  # fmt: skip


def search_app(
    store: Store,
    collection: Collection = "documents",
    model: Annotated[
        str | None,
        typer.Option(
            help="Unless given, the model that made the collection, or the default model for a new collection."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; an address that other machines reach needs --auth-file.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    auth_file: Annotated[
        Path | None, typer.Option(help="File with one USER:PASSWORD per line; the page then asks for a login.")
    ] = None,
    allowed_host: AllowedHosts = None,
    writer: Annotated[
        str,
        typer.Option(
            help='The language model of the tab "Ask": "default", the decoder inside the model; the folder or Hub id '
            "of a language model; or the URL of an OpenAI-compatible server, to which question and passages are sent "
            "(key: C2V_RAG_WRITER_API_KEY). It is loaded at the first question."
        ),
    ] = "default",
    writer_model: WriterModel = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Serve a page for the browser: search, ask, compare search methods, add documents, see a map of the collection."""
    with requires_extra("demo"):
        from c2v_rag.app.access import check_access, read_logins
        from c2v_rag.app.page import SearchApp

    from c2v_rag.index import stored_stamps

    logins = read_logins(auth_file) if auth_file else []
    check_access(host, allowed_host or [], logins)  # before the model is loaded
    stamp = stored_stamps(store).get(collection, {})
    name = model or str(stamp.get("name") or "default")
    page = SearchApp(
        store, open_embedder(name, device, dtype, is_stored=not model), collection=collection, writer=writer,
        writer_model=writer_model,
    )  # fmt: skip
    page.launch(host=host, port=port or None, auth=logins, allowed_hosts=allowed_host or [])
