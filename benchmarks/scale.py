"""What Ray costs on one machine: a corpus into a Chroma server, by one process and by two workers.

    python benchmarks/scale.py [--model M] [--documents N] [--vectors N] [--output FILE.json]

Each row is a whole `c2v-rag index`, from the command to its end, into a collection of its own of one `chroma run`:
interpreter, model and cluster are started in that time. "embedding" leaves out what the same command takes for a corpus
of one document. Where one process keeps all cores busy, two workers cannot be faster: the rows say what Ray costs, not
what it gains on more machines.

Then the server alone, each row into a new collection: random vectors upserted by one client, which waits for every
upsert or has several in flight, 256 or 1,024 vectors at a time, and what they add to the server's memory.
`c2v-rag index` writes 256 at a time and waits.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import psutil
from common import made
from throughput import print_table

from c2v_rag import Causal2Vec
from c2v_rag.sources import python_docs

WAYS = {
    "one process": [],
    "Ray, 1 worker": ["--ray", "auto", "--workers", "1"],
    "Ray, 2 workers": ["--ray", "auto", "--workers", "2"],
}
DIMENSIONS = 384
UPSERTS = ((1, 256), (2, 256), (4, 256), (1, 1024), (2, 1024))  # in flight, vectors each


@contextmanager
def chroma(folder: str) -> Iterator[tuple[str, int, psutil.Process]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("chroma")), "run", "--path", folder, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                try:
                    chromadb.HttpClient(port=port).heartbeat()
                    break
                except ValueError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", port, psutil.Process(process.pid)
        finally:
            process.kill()


def index(table: Path, store: str, collection: str, model: str, options: list[str]) -> tuple[float, int]:
    """Seconds of the whole command, and chunks added."""
    command = [sys.executable, "-m", "c2v_rag.cli", "index", str(table), "--store", store, "--collection", collection]
    started = time.perf_counter()
    run = subprocess.run(
        [*command, "--model", model, "--json", *options], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - started, int(json.loads(run.stdout)["added"])


def upserts(port: int, server: psutil.Process, vectors: int, in_flight: int, at_once: int) -> dict[str, float]:
    """Upserts of random vectors a second, and what each adds to the server's memory."""
    collection = chromadb.HttpClient(port=port).create_collection(
        f"random-{in_flight}-{at_once}", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    embeddings = np.random.default_rng(0).standard_normal((vectors, DIMENSIONS), dtype=np.float32)

    def upsert(start: int) -> None:
        some = embeddings[start : start + at_once]
        ids = [str(number) for number in range(start, start + len(some))]
        collection.upsert(ids=ids, embeddings=some, documents=["x" * 800] * len(some))

    before, started = server.memory_info().rss, time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        list(pool.map(upsert, range(0, vectors, at_once)))
    seconds = time.perf_counter() - started
    return {"per_s": vectors / seconds, "bytes_each": (server.memory_info().rss - before) / vectors}


def main() -> None:
    parser = argparse.ArgumentParser(description="Indexing by one process and on a local Ray.")
    parser.add_argument("--model", default="default", help="checkpoint: a folder, a hub id, or 'default'")
    parser.add_argument("--documents", type=int, default=1500, help="docstrings of Python's standard library")
    parser.add_argument("--vectors", type=int, default=20_480, help="random vectors for the server alone")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    arguments = parser.parse_args()

    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, chroma(f"{folder}/server") as (store, port, server):
        corpus, one = Path(folder) / "corpus.jsonl", Path(folder) / "one.jsonl"
        texts = [document.text for document in python_docs()[: arguments.documents]]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        one.write_text(json.dumps({"text": texts[0]}) + "\n")
        for number, (way, options) in enumerate(WAYS.items()):
            start, _ = index(one, store, f"one-{number}", arguments.model, options)
            whole, chunks = index(corpus, store, f"whole-{number}", arguments.model, options)
            rows[way] = {"whole_s": whole, "start_s": start, "chunks_per_s": chunks / (whole - start)}
        of_server = {
            f"{in_flight} in flight, {at_once:,} vectors each": upserts(
                port, server, arguments.vectors, in_flight, at_once
            )
            for in_flight, at_once in UPSERTS
        }
    base = rows["one process"]
    for row in rows.values():
        row["ratio"] = row["whole_s"] / base["whole_s"]
    forms = {"whole command": "{:.1f} s", "start": "{:.1f} s", "embedding": "{:.1f} chunks/s", "time, of one": "{:.2f}"}
    print_table(forms, {name: dict(zip(forms, row.values(), strict=True)) for name, row in rows.items()})
    print(f"Chroma server alone, {DIMENSIONS} columns")
    forms = {"upserts/s": "{:,.0f}", "bytes of memory each": "{:,.0f}"}
    print_table(forms, {name: dict(zip(forms, row.values(), strict=True)) for name, row in of_server.items()})
    if arguments.output:
        figures: dict[str, Any] = {
            **made(),
            "model": Causal2Vec.from_pretrained(arguments.model, device="cpu").stamp,
            "documents": len(texts),
            "rows": rows,
            "chroma_server": {"columns": DIMENSIONS, "vectors": arguments.vectors, "rows": of_server},
        }
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
