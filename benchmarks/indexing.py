"""Speed of the index: chunks/s while documents are added, and latency and memory of a search.

    python benchmarks/indexing.py [--chunks N ...] [--columns D] [--skip add|search|hnsw] [--output FILE.json]

Adding: each load with steps one after the other (an empty queue) and at the same time, in turn, `--rounds` times. "CPU"
is the default model. "fast device" is an embedder that sleeps for 30 ms a batch of 256, as a GPU would compute, and
returns random vectors; texts are tokenised with the default model's tokenizers. Documents are read from a generator.

Searching: N chunks with random unit vectors (the hardest case for HNSW) and 40 words each, drawn by Zipf's law. Every
mode is measured in a process of its own: time of the first search, which loads the index, and of `--queries` more;
memory is that of the process after the searches, without what it had before the first one. Queries are not embedded.

HNSW: settings of Chroma's approximate index over `--hnsw-chunks` random unit vectors, whose variance falls from column
to column, as in an embedding, and over their first 256 columns: time of writing, recall@10 against exact search,
latency, and memory of a process that searches.

With --skip, the part that is not measured stays in FILE.json as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import made

from c2v_rag import Causal2Vec, Document, VectorIndex
from c2v_rag.index import CHUNKS_WRITTEN_AT_ONCE, Chunk, HnswSettings, check_mode, writing

VOCABULARY, WORDS, QUERY_WORDS = 50_000, 40, 6
MODES = ("dense", "lexical", "hybrid")
HNSW = "hnsw"
HNSW_SETTINGS = {
    "Chroma's settings": HnswSettings(ef_search=100),
    "ef_search=30": HnswSettings(ef_search=30),
    "ef_search=300": HnswSettings(ef_search=300),
    "ef_construction=200, max_neighbors=32": HnswSettings(ef_construction=200, max_neighbors=32, ef_search=100),
}
SPECTRUM, FIRST_COLUMNS = 1024, 256
DEVICE_SECONDS = 0.030  # for a batch of CHUNKS_WRITTEN_AT_ONCE
ONE_AFTER_THE_OTHER, AT_THE_SAME_TIME = "one after the other", "at the same time"


class RandomEmbedder:
    """Random unit vectors, equal for equal texts. Sleeps `seconds` for each batch of 256 texts."""

    max_tokens = 256

    def __init__(self, columns: int, seconds: float = 0.0, token_ends: Callable[..., Any] | None = None) -> None:
        self.embedding_dim = columns
        self.stamp: dict[str, str | int] = {"name": "random", "weights": "0", "embedding_dim": columns}
        self._seconds = seconds
        if token_ends is not None:
            self.token_ends = token_ends

    def encode_document(self, texts: Iterable[str]) -> np.ndarray:
        texts = list(texts)
        time.sleep(self._seconds * len(texts) / CHUNKS_WRITTEN_AT_ONCE)
        seed = int.from_bytes(texts[0].encode()[:8], "little") if texts else 0
        rows = np.random.default_rng(seed).standard_normal((len(texts), self.embedding_dim), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    encode_query = encode_document


def texts_of(number: int, words: int, seed: int) -> Iterator[str]:
    """Texts of words drawn by Zipf's law; each begins with its number."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    shares = np.cumsum(shares / shares.sum())
    for row in range(number):
        drawn = np.searchsorted(shares, rng.random(words))
        yield f"{row} " + " ".join(f"w{int(word)}x" for word in drawn)


def add_seconds(model: Any, documents: list[Document], queued: int) -> tuple[float, int]:
    """Seconds to add the documents to a new store, and the number of chunks."""
    writing.QUEUED_BATCHES = queued
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as store:
        report = VectorIndex(store, model).add(document for document in documents)
    return report.seconds, report.added


def measure_adding(rounds: int, fast_documents: int, cpu_documents: int, columns: int) -> dict[str, Any]:
    from c2v_rag.sources import python_docs

    queued = writing.QUEUED_BATCHES
    model = Causal2Vec.from_pretrained("default")
    fast = RandomEmbedder(columns, DEVICE_SECONDS, model.token_ends)
    docs = python_docs()
    many = [Document(f"{text}. " * 3, f"file-{row}") for row, text in enumerate(texts_of(fast_documents, WORDS, 1))]
    loads: dict[str, tuple[Any, list[Document]]] = {"fast device": (fast, many)}
    if cpu_documents:
        loads["CPU"] = (model, list(docs[:: max(1, len(docs) // cpu_documents)]))
    rows: dict[str, Any] = {}
    for name, (embedder, documents) in loads.items():
        add_seconds(embedder, documents[:20], queued)  # the first call loads Chroma
        found: dict[str, list[float]] = {ONE_AFTER_THE_OTHER: [], AT_THE_SAME_TIME: []}
        chunks = 0
        for _ in range(rounds if name != "CPU" else min(rounds, 2)):
            for way, number in ((ONE_AFTER_THE_OTHER, 0), (AT_THE_SAME_TIME, queued)):
                seconds, chunks = add_seconds(embedder, documents, number)
                found[way].append(chunks / seconds)
                print(f"{name}, {way}: {chunks / seconds:.1f} chunks/s", file=sys.stderr, flush=True)
        medians = {way: float(np.median(values)) for way, values in found.items()}
        rows[name] = {
            "documents": len(documents),
            "chunks": chunks,
            "chunks_per_s": medians,
            "all": found,
            "gain": medians[AT_THE_SAME_TIME] / medians[ONE_AFTER_THE_OTHER],
        }
    writing.QUEUED_BATCHES = queued
    return rows


def write_store(store: str, chunks: int, columns: int) -> None:
    """Write the chunks that are still missing."""
    index = VectorIndex(store, RandomEmbedder(columns))
    first = len(index)
    started = time.perf_counter()
    waiting: list[Chunk] = []
    for row, text in enumerate(texts_of(chunks, WORDS, 0)):
        if row < first:
            continue
        waiting.append(Chunk(str(row), text, {"source": f"file-{row // 10}"}))
        if len(waiting) == CHUNKS_WRITTEN_AT_ONCE or row == chunks - 1:
            index.write(waiting)
            waiting = []
            if row % 10_000 < CHUNKS_WRITTEN_AT_ONCE:
                print(f"{row} chunks, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def resident_mib() -> float:
    """Memory of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def measure_search(store: str, mode: str, queries: int, columns: int) -> dict[str, float]:
    """Latency and memory of one mode; called in a new process."""
    index = VectorIndex(store, RandomEmbedder(columns))
    texts = list(texts_of(queries + 1, QUERY_WORDS, 2))
    before = resident_mib()
    took = []
    for text in texts:
        started = time.perf_counter()
        assert index.search(text, 10, mode=check_mode(mode))
        took.append(time.perf_counter() - started)
    return {
        "first_s": took[0],
        "p50_s": float(np.percentile(took[1:], 50)),
        "p99_s": float(np.percentile(took[1:], 99)),
        "memory_mib": resident_mib() - before,
    }


def in_its_own_process(mode: str, store: str, columns: int, queries: int, *options: str) -> dict[str, float]:
    """The figures of one mode, measured by a new process that opens the store."""
    command = [sys.executable, __file__, "--mode", mode, "--store", store, "--columns", str(columns)]
    command += ["--queries", str(queries), *options]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def search_rows(chunks: int, columns: int, queries: int, keep: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        store = str(keep / f"{chunks}-{columns}") if keep else temporary
        write_store(store, chunks, columns)
        VectorIndex(store, RandomEmbedder(columns)).lexical_index()
        row: dict[str, Any] = {
            "columns": columns,
            "disk_mib": sum(file.stat().st_size for file in Path(store).rglob("*") if file.is_file()) / 2**20,
        }
        for mode in MODES:
            row[mode] = in_its_own_process(mode, store, columns, queries)
            print(f"{chunks} chunks, {mode}: {row[mode]}", file=sys.stderr, flush=True)
    return row


def decaying(number: int, columns: int, seed: int) -> np.ndarray:
    """(number, columns) float32 of length 1; the standard deviation of column k is 1 / sqrt(k + 1)."""
    rows = np.random.default_rng(seed).standard_normal((number, SPECTRUM), dtype=np.float32)[:, :columns]
    rows /= np.sqrt(np.arange(1, columns + 1, dtype=np.float32))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def hnsw_row(settings: HnswSettings, chunks: int, columns: int, queries: int) -> dict[str, float]:
    """Write the vectors with these settings, and search them in a process of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as store:
        embedder = RandomEmbedder(columns)
        index = VectorIndex(store, embedder, hnsw=settings)
        rows = decaying(chunks, columns, 0)
        started = time.perf_counter()
        for start in range(0, chunks, CHUNKS_WRITTEN_AT_ONCE):
            part = rows[start : start + CHUNKS_WRITTEN_AT_ONCE]
            embedder.encode_document = lambda texts, part=part: part  # type: ignore[method-assign]
            index.write([Chunk(str(start + i), "x", {"source": "random"}) for i in range(len(part))])
        seconds = time.perf_counter() - started
        found = in_its_own_process(HNSW, store, columns, queries, "--hnsw-chunks", str(chunks))
    print(f"{settings}, {columns} columns: {seconds:.0f} s, {found}", file=sys.stderr, flush=True)
    return {"writing_s_per_1000": 1000 * seconds / chunks, **found}


def measure_hnsw(store: str, chunks: int, columns: int, queries: int) -> dict[str, float]:
    """Recall, latency and memory of a store that `hnsw_row` wrote; called in a new process."""
    index = VectorIndex(store, RandomEmbedder(columns))
    asked = decaying(queries, columns, 1)
    index.search_by_vector(asked[0], 10)
    took, found = [], []
    for query in asked:
        started = time.perf_counter()
        found.append({int(hit.id) for hit in index.search_by_vector(query, 10)})
        took.append(time.perf_counter() - started)
    memory = resident_mib()
    exact = np.argsort(-(asked @ decaying(chunks, columns, 0).T), axis=1)[:, :10]
    recall = float(np.mean([len(ids & set(row.tolist())) / 10 for ids, row in zip(found, exact, strict=True)]))
    return {"recall_at_10": recall, "p50_s": float(np.percentile(took, 50)), "memory_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[100_000], help="sizes of the searched collections")
    parser.add_argument("--columns", type=int, default=384, help="columns of the random vectors")
    parser.add_argument("--queries", type=int, default=200, help="searches for each mode")
    parser.add_argument("--rounds", type=int, default=3, help="of adding; the median is reported")
    parser.add_argument("--documents", type=int, default=3000, help="that are added with the fast device")
    parser.add_argument("--cpu-documents", type=int, default=300, help="docstrings that the model embeds; 0: none")
    parser.add_argument("--hnsw-chunks", type=int, default=30_000)
    parser.add_argument("--skip", choices=("add", "search", "hnsw"), action="append", default=[])
    parser.add_argument("--keep", type=Path, help="folder for the searched stores; another run goes on with them")
    parser.add_argument("--mode", choices=(*MODES, HNSW), help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    if arguments.mode == HNSW:
        print(json.dumps(measure_hnsw(arguments.store, arguments.hnsw_chunks, arguments.columns, arguments.queries)))
        return
    if arguments.mode:
        found = measure_search(arguments.store, arguments.mode, arguments.queries, arguments.columns)
        print(json.dumps(found))
        return
    about = made() | {"load": round(os.getloadavg()[0], 1)}
    output = arguments.output
    result = json.loads(output.read_text(encoding="utf-8")) if output and output.exists() else {}
    if "add" not in arguments.skip:
        rows = measure_adding(arguments.rounds, arguments.documents, arguments.cpu_documents, arguments.columns)
        result |= {"model": Causal2Vec.from_pretrained("default").stamp, "adding": {**about, "rows": rows}}
    if "search" not in arguments.skip:
        rows = {
            str(chunks): search_rows(chunks, arguments.columns, arguments.queries, arguments.keep)
            for chunks in arguments.chunks
        }
        result["search"] = {**about, "rows": rows}
    if HNSW not in arguments.skip:
        rows = {
            f"{name}, {columns} columns": hnsw_row(settings, arguments.hnsw_chunks, columns, arguments.queries)
            for columns in dict.fromkeys([arguments.columns, FIRST_COLUMNS])
            for name, settings in HNSW_SETTINGS.items()
        }
        result[HNSW] = {**about, "chunks": arguments.hnsw_chunks, "rows": rows}
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
