"""Helpers of several commands: the consoles, opening a model, and the error for a missing extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from c2v_rag.model import Causal2Vec
    from c2v_rag.protocols import Embedder

out = Console(soft_wrap=False)
err = Console(stderr=True, soft_wrap=True)  # a wrapped path cannot be copied


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Turn a failed import in the block into an ImportError with the pip line that installs `extra`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "c2v_rag":
            raise
        raise ImportError(f'This command needs {error.name}: pip install "c2v-rag[{extra}]"') from error


def open_embedder(name: str, device: str | None, dtype: str | None, *, is_stored: bool = False) -> Embedder:
    """The embedder of this name, in this process or on the server at this URL.

    `is_stored`: the name was read from a store, not given by the user. ValueError if it is a URL then.
    """
    with err.status("Loading the model"):
        from c2v_rag.embedders import EmbedderSpec

        return EmbedderSpec(name_or_path=name, device=device, dtype=dtype, is_stored=is_stored).open()


def load_model(name: str, device: str | None, dtype: str | None) -> Causal2Vec:
    with err.status("Loading the model"):
        from c2v_rag.model import Causal2Vec

        return Causal2Vec.from_pretrained(name, device=device, dtype=dtype)
