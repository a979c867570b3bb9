"""The options of a run, and what is checked before anything is read or written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from c2v_rag.adapt.passages import MIN_PASSAGES
from c2v_rag.adapt.reindex import check_free
from c2v_rag.adapt.writers import HEADINGS
from c2v_rag.embedders import DEFAULT
from c2v_rag.index import StoreAddress, store_name, stored_stamp
from c2v_rag.protocols import is_url


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `adapt` that decide the result of a run."""

    sources: tuple[str, ...]
    store: StoreAddress | None
    collection: str
    model: str
    minutes: float
    questions: int
    writer: str
    writer_model: str | None
    prompts: Path | None
    from_questions: Path | None
    general: tuple[Path, ...]
    steps: int | None
    found_among: int
    soft_labels: float
    seed: int
    text_column: str
    device: str | None
    dtype: str | None
    show_progress: bool

    def check(self, *, reindex: bool) -> None:
        """Raise ValueError, FileNotFoundError or FileExistsError for options that cannot be used together."""
        has_sources, has_store = bool(self.sources), self.store is not None
        if has_sources and has_store:
            raise ValueError("Give either files and folders, or a store, not both.")
        if not has_sources and not has_store and self.from_questions is None:
            raise ValueError("Give the documents to adapt to: files and folders, or --store.")
        if reindex and not has_store:
            raise ValueError("--reindex embeds a collection again, so it needs --store.")
        for name, least, value in (
            ("minutes", 0, self.minutes),
            ("found_among", 0, self.found_among),
            ("steps", 0, 1 if self.steps is None else self.steps),
        ):
            if value <= least:
                raise ValueError(f"{name} must be above {least}, got {value}.")
        if self.soft_labels < 0:
            raise ValueError(f"soft_labels is a weight, so it must not be negative, got {self.soft_labels}.")
        if self.questions < MIN_PASSAGES:
            raise ValueError(f"questions must be at least {MIN_PASSAGES}, got {self.questions}.")
        if is_url(self.model):
            raise ValueError(f"{self.model} is a server. Training needs the weights: give a checkpoint with --model.")
        if self.writer == HEADINGS and (self.prompts or self.writer_model):
            raise ValueError('The writer "headings" uses no model and no prompts. Name another one with --writer.')
        if self.writer_model and not is_url(self.writer):
            raise ValueError("--writer-model is for a writer that is a server's URL; name a local model with --writer.")
        if reindex and self.store is not None:
            check_free(self.store, self.collection)

    def claim(self, output: Path, *, resume: bool) -> None:
        """Raise an error unless `output` is free, or holds a run with these options and `resume` is true."""
        recorded = output / "work" / "run.json"
        if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not recorded.is_file())):
            raise FileExistsError(f"{output} holds other files. Give a new folder as output.")
        if not recorded.is_file():
            return
        if not resume:
            raise FileExistsError(f"{output} holds a run already. Go on with it (--resume), or give another folder.")
        earlier = json.loads(recorded.read_text(encoding="utf-8"))
        if changed := [name for name, value in self.recorded().items() if earlier.get(name) != value]:
            lines = [f"- {name}: {earlier.get(name)!r} then, {self.recorded()[name]!r} now" for name in changed]
            raise ValueError(f"{output} holds a run with other options:\n" + "\n".join(lines))

    def recorded(self) -> dict[str, Any]:
        """The options that a resumed run must share, as JSON values; files by the hash of their content."""
        return {
            "sources": list(self.sources),
            "store": None if self.store is None else store_name(self.store),
            "collection": self.collection,
            "model": self.model,
            "questions": self.questions,
            "writer": self.writer,
            "writer_model": self.writer_model,
            "prompts": self.prompts and file_hash(self.prompts),
            "from_questions": self.from_questions and file_hash(self.from_questions),
            "general": [str(folder) for folder in self.general],
            "steps": self.steps,
            "found_among": self.found_among,
            "soft_labels": self.soft_labels,
            "seed": self.seed,
            "text_column": self.text_column,
        }


def model_name(model: str | None, store: StoreAddress | None, collection: str) -> str:
    """The model to adapt: the given one, else the one that made the collection, else the default."""
    if store is None:
        return model or DEFAULT
    stored = str(stored_stamp(store, collection)["name"])
    if model is None and not stored:
        raise ValueError("The model that made this collection has no name. Give its folder with --model.")
    return model or stored


def file_hash(path: Path) -> str:
    """SHA-256 of a file. FileNotFoundError if it does not exist."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return hashlib.sha256(path.read_bytes()).hexdigest()
