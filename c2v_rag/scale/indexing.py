"""Read, split, embed and write a corpus on many processes, into a Chroma server.

A chunk's id is the hash of its source and text, and writing is an upsert, so any work can be repeated. Ray replaces a
worker that dies and repeats its batch. A driver that dies can be started again. The ids are the same in the end.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import ray.data

from c2v_rag.index import (
    CHUNKS_WRITTEN_AT_ONCE,
    ChromaServer,
    Chunk,
    ChunkSettings,
    IndexReport,
    KnownFiles,
    Present,
    StampedModel,
    VectorIndex,
    find_collection,
    new_chunks,
    open_store,
    remove_vanished,
    stored_settings,
    stored_stamps,
)
from c2v_rag.protocols import is_url
from c2v_rag.scale.cluster import AUTO, EXPECTED, Loaded, Workers, connected, in_words, raise_reported
from c2v_rag.sources import PYTHON_DOCS, files_below, read_sources

_DOCUMENTS_AT_ONCE = 512
_MAX_BLOCKS = 1000  # of Ray's plan; if there are more files, a block has several


def index_on_ray(
    sources: Sequence[str | Path],
    store: str | ChromaServer,
    *,
    model: str = "default",
    collection: str,
    text_column: str = "text",
    address: str = AUTO,
    workers: Workers | None = None,
    dtype: str | None = None,
    prune: bool = False,
    chunking: ChunkSettings | None = None,
) -> tuple[IndexReport, list[str]]:
    """Bring a Chroma server's collection up to date with files, folders and "python-docs".

    Returns the report, and a message for each file that could not be read.

    The ids are those of `VectorIndex.add`, and the vectors too, except for rounding. The workers read the files, so
    every machine must see them under the same paths. Tenant, database and headers for the server are read from the
    driver's environment. `model` is loaded once in each worker. `unchanged` and `added` count this run's chunks. If a
    worker was replaced, a chunk may be counted twice. `prune`: as in `remove_vanished`.
    `chunking`: as for `VectorIndex`.

    Raises ValueError for a store that is a folder, and the errors of reading, loading and writing.
    """
    if isinstance(store, str):
        if not is_url(store):
            raise ValueError(
                f"{store} is a folder, and a folder takes one writer. Start a server (chroma run --path {store}) and "
                "give its address, such as http://localhost:8000."
            )
        store = ChromaServer(store)
    started = time.perf_counter()
    read_sources(sources)  # raises for a missing source
    known = KnownFiles(_index_without_model(store, collection), sources, text_column)
    units = [str(file) for source in sources for file in _units(source) if file not in known.paths]
    units = units or [""]  # without a file to read, the model is still compared with the collection's
    settings = chunking or ChunkSettings()
    counts: Counter[str] = Counter()
    outdated: list[str] = []
    left_out: dict[str, str] = {}  # what is wrong with a file, by its path
    with connected(address) as resources:
        chosen = (workers or Workers()).of(resources)
        chunks = ray.data.from_items(units, override_num_blocks=max(1, min(len(units), _MAX_BLOCKS))).flat_map(
            _Splitter,
            fn_constructor_args=(store, model, collection, text_column, settings),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, chosen.count or 1)),
            num_cpus=0.25,
        )
        written = chunks.map_batches(
            _Writer,
            fn_constructor_args=(store, model, collection, dtype, chosen.cpus, chunking),
            batch_size=CHUNKS_WRITTEN_AT_ONCE,
            **chosen.options,
        )
        for row in written.iter_rows():
            found = json.loads(row["report"])
            if "error" in found:
                raise_reported(found["error"])
            outdated += found.pop("outdated", [])
            left_out |= found.pop("left_out", {})
            counts.update(found)
    removed = 0
    if (index := _index_without_model(store, collection)) is not None:
        index.delete_ids(outdated)
        known.save(list(map(Path, left_out)), index)
        removed = sum(remove_vanished(index, Path(source), prune=prune) for source in sources if Path(source).is_dir())
    report = IndexReport(
        added=counts["added"],
        unchanged=counts["unchanged"] + known.num_chunks,
        replaced=len(outdated),
        removed=removed,
        truncated=counts["truncated"],
        seconds=time.perf_counter() - started,
    )
    return report, list(left_out.values())


def _units(source: str | Path) -> Iterator[str | Path]:
    """The units of work of a source: files, or "python-docs". One worker must number all chunks of a unit."""
    if str(source) == PYTHON_DOCS:
        yield PYTHON_DOCS
    else:
        yield from files_below(Path(source))


def _index_without_model(store: ChromaServer, collection: str) -> VectorIndex | None:
    """The collection, to count and delete chunks; None if it does not exist."""
    stamp = stored_stamps(store).get(collection)
    return VectorIndex(store, StampedModel(stamp), collection) if stamp else None


class _Splitter:
    """Reads and splits a unit. Yields a row for each chunk that is not in the collection, and a report row."""

    def __init__(
        self, store: ChromaServer, model: str, collection: str, text_column: str, settings: ChunkSettings
    ) -> None:
        self._settings = settings
        self._store = store
        self._model = model
        self._collection = collection
        self._text_column = text_column
        self._opened: Any = None  # the store, after the first call
        self._counter: Any = None

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, str]]:
        try:
            yield from self._split(row["item"])
        except EXPECTED as error:
            yield _report_row({"error": in_words(error)})

    def _split(self, unit: str) -> Iterator[dict[str, str]]:
        if self._counter is None:
            self._counter = _token_counter(self._model)
            self._opened = open_store(self._store)
        collection = find_collection(self._opened, self._collection)
        counts: Counter[str] = Counter(truncated=0, unchanged=0)
        present = Present()
        if collection is not None:
            self._settings = stored_settings(collection.metadata)
        left_out: dict[str, str] = {}

        def leave_out(path: Path, error: Exception) -> None:
            left_out[str(path)] = str(error)

        documents = read_sources([unit] if unit else [], text_column=self._text_column, on_error=leave_out)
        while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
            for chunks in new_chunks(batch, self._counter, self._settings, collection, present, counts):
                for chunk in chunks:
                    metadata = json.dumps(chunk.metadata)
                    yield {"id": chunk.id, "text": chunk.text, "metadata": metadata, "report": ""}
            if collection is not None and present.write_moved(collection):
                self._opened.wrote(collection)
        outdated = [id for ids in present.ids.values() for id in ids]
        yield _report_row({**counts, "outdated": outdated, "left_out": left_out})


class _Writer:
    """Embeds chunks and writes them; passes on the reports of the splitters."""

    def __init__(
        self,
        store: ChromaServer,
        model: str,
        collection: str,
        dtype: str | None,
        threads: float | None,
        chunking: ChunkSettings | None,
    ) -> None:
        self._chunking = chunking
        self._store = store
        self._collection = collection
        self._loaded = Loaded(model, dtype, threads)
        self._index: VectorIndex | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        chunks = [
            Chunk(str(id), str(text), json.loads(metadata))
            for id, text, metadata in zip(batch["id"], batch["text"], batch["metadata"], strict=True)
            if id
        ]
        reports = [str(report) for report in batch["report"] if report]
        try:
            written = self._write(chunks)
        except EXPECTED as error:
            written = {"error": in_words(error)}
        return {"report": [*reports, json.dumps(written)]}

    def _write(self, chunks: list[Chunk]) -> dict[str, Any]:
        if self._index is None:
            self._index = VectorIndex(self._store, self._loaded(), self._collection, chunking=self._chunking)
        self._index.write(chunks)
        return {"added": len(chunks)}


def _report_row(report: dict[str, Any]) -> dict[str, str]:
    return {"id": "", "text": "", "metadata": "", "report": json.dumps(report)}


def _token_counter(model: str) -> object:
    """An object that counts a model's tokens (`count_tokens`, `max_tokens`) without loading its weights."""
    if is_url(model):
        from c2v_rag.remote import RemoteModel

        return RemoteModel(model)
    from c2v_rag.weights import load_tokenizer

    return load_tokenizer(model)
