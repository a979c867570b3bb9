"""The command `c2v-rag`: download, index, search, embed, info, train, mine, evaluate, adapt, serve, app.

Results go to stdout, all other output to stderr. An error prints one message, and the exit code is 1; `--debug` shows
the traceback.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from c2v_rag import __version__
from c2v_rag.cli import adapt, download, search, serve, train
from c2v_rag.cli.shared import err

app = typer.Typer(
    help="Causal2Vec embeddings: index your documents and search them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass  # --version works in its callback, --debug in main


app.command()(download.download)
app.command()(search.index)
app.command()(search.search)
app.command()(search.embed)
app.command()(search.info)
app.command()(train.train)
app.command()(train.mine)
app.command()(train.evaluate)
app.command()(adapt.adapt)
app.command()(serve.serve)
app.command("app")(serve.search_app)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "chromadb", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message = f"Error: {error}"
        if not isinstance(error, ValueError | TypeError | OSError | ImportError | MemoryError):
            # The exception of a library, or a bug in this package: its text alone may not be enough.
            message = f"Error: {type(error).__name__}: {error}\nFor the traceback run c2v-rag --debug COMMAND ..."
        err.print(message, style="red", markup=False, highlight=False)
        sys.exit(1)
