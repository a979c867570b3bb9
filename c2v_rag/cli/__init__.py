"""c2v-rag: index, search, embed, info, train, mine, evaluate, serve, app.

Results go to stdout, everything else to stderr. An error is one message and exit code 1; `--debug` shows where.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from c2v_rag import __version__
from c2v_rag.cli import search, serve, train
from c2v_rag.cli.shared import err

app = typer.Typer(
    help="Causal2Vec embeddings: index what you have, search it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass  # the options act by themselves: --version in its callback, --debug in main


app.command()(search.index)
app.command()(search.search)
app.command()(search.embed)
app.command()(search.info)
app.command()(train.train)
app.command()(train.mine)
app.command()(train.evaluate)
app.command()(serve.serve)
app.command("app")(serve.search_app)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "chromadb", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message = f"Error: {error}"
        if not isinstance(error, ValueError | TypeError | OSError | ImportError | MemoryError):
            # A library's own kind of error, or a mistake of ours: its text alone may say little.
            message = (
                f"Error: {type(error).__name__}: {error}\nTo see where it came from, run it with --debug in front."
            )
        err.print(message, style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("Stopped. What was written so far is kept; run the same command to go on.")
        sys.exit(130)
