"""Speed of the index: chunks/s while documents are added, and latency and memory of a search.

    python benchmarks/indexing.py [--chunks N ...] [--columns D] [--skip add|search] [--output FILE.json]

Adding: each load with steps one after the other (an empty queue) and at the same time, in turn, `--rounds` times. "CPU"
is the default model. "fast device" is an embedder that sleeps for 30 ms a batch of 256, as a GPU would compute, and
returns random vectors; texts are tokenised with the default model's tokenizers. Documents are read from a generator.

Searching: N chunks with random unit vectors (the hardest case for HNSW) and 40 words each, drawn by Zipf's law. Every
mode is measured in a process of its own: time of the first search, which loads the index, and of `--queries` more;
memory is that of the process after the searches, without what it had before the first one. Queries are not embedded.

With --skip, the part that is not measured stays in FILE.json as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from c2v_rag import Document, VectorIndex
from c2v_rag.index import CHUNKS_WRITTEN_AT_ONCE, Chunk, check_mode, writing

VOCABULARY, WORDS, QUERY_WORDS = 50_000, 40, 6
MODES = ("dense", "lexical", "hybrid")
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
    from c2v_rag.model import Causal2Vec
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


def write_store(store: str, chunks: int, columns: int) -> float:
    """Write the chunks that are still missing; returns seconds for each thousand."""
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
    return 1000 * (time.perf_counter() - started) / max(1, chunks - first)


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


def search_rows(chunks: int, columns: int, queries: int, keep: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        store = str(keep / f"{chunks}-{columns}") if keep else temporary
        seconds = write_store(store, chunks, columns)
        started = time.perf_counter()
        VectorIndex(store, RandomEmbedder(columns)).lexical_index()
        row: dict[str, Any] = {
            "columns": columns,
            "writing_s_per_1000": seconds,
            "lexical_build_s": time.perf_counter() - started,
            "disk_mib": sum(file.stat().st_size for file in Path(store).rglob("*") if file.is_file()) / 2**20,
        }
        for mode in MODES:
            command = [sys.executable, __file__, "--mode", mode, "--store", store, "--columns", str(columns)]
            command += ["--queries", str(queries)]
            row[mode] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(f"{chunks} chunks, {mode}: {row[mode]}", file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[100_000], help="sizes of the searched collections")
    parser.add_argument("--columns", type=int, default=768, help="columns of the random vectors")
    parser.add_argument("--queries", type=int, default=200, help="searches for each mode")
    parser.add_argument("--rounds", type=int, default=3, help="of adding; the median is reported")
    parser.add_argument("--documents", type=int, default=3000, help="that are added with the fast device")
    parser.add_argument("--cpu-documents", type=int, default=300, help="docstrings that the model embeds; 0: none")
    parser.add_argument("--skip", choices=("add", "search"), action="append", default=[])
    parser.add_argument("--keep", type=Path, help="folder for the searched stores; another run goes on with them")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    if arguments.mode:
        found = measure_search(arguments.store, arguments.mode, arguments.queries, arguments.columns)
        print(json.dumps(found))
        return
    made = {
        "command": shlex.join(["python", "benchmarks/indexing.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
    }
    output = arguments.output
    result = json.loads(output.read_text(encoding="utf-8")) if output and output.exists() else {}
    if "add" not in arguments.skip:
        rows = measure_adding(arguments.rounds, arguments.documents, arguments.cpu_documents, arguments.columns)
        result["adding"] = {**made, "rows": rows}
    if "search" not in arguments.skip:
        rows = {
            str(chunks): search_rows(chunks, arguments.columns, arguments.queries, arguments.keep)
            for chunks in arguments.chunks
        }
        result["search"] = {**made, "rows": rows}
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
