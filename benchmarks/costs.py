"""What embedding costs: the model, its encoder in sentence-transformers, and its encoder in our own path, side by side.

`throughput.py` runs it and writes its figures. Every round runs each system once, one after the other: all passages in
one call, then each query alone. Passages/s and queries/s are medians over the rounds, with the lowest and the highest;
p50 and p99 are over the single queries of all rounds. The peak memory is that of a new process that opens only this
system and embeds the passages once: of the device on CUDA, of the process elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from c2v_rag import Causal2Vec, checkpoint
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.sources import python_docs

DEFAULT, PEER, OWN = "default", "encoder, sentence-transformers", "encoder, EncoderEmbedder"


@dataclasses.dataclass(frozen=True)
class System:
    """One way to embed passages and queries; `disk_bytes`: the size of the files that it needs."""

    name: str
    embed_passages: Callable[[Sequence[str]], object]
    embed_queries: Callable[[Sequence[str]], object]
    disk_bytes: int


def folder_bytes(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def open_system(name: str, model_name: str, device: str | None, dtype: str | None) -> System:
    """Open one system. Raises ModuleNotFoundError for sentence-transformers where it is not installed."""
    model = Causal2Vec.from_pretrained(model_name, device=device, dtype=dtype)
    return system_of(name, model)


def system_of(name: str, model: Causal2Vec) -> System:
    encoder_folder = model.base_folder("encoder")
    if name == DEFAULT:
        folders = checkpoint.locate(model.name), encoder_folder, model.base_folder("llm")
        return System(name, model.encode_document, model.encode_query, folder_bytes(*folders))
    if name == OWN:
        own = EncoderEmbedder(model)
        return System(name, own.encode_document, own.encode_query, folder_bytes(encoder_folder))
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(encoder_folder), device=str(model.device), model_kwargs={"dtype": model.dtype})
    peer.max_seq_length = model.config.encoder_max_length

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(peer.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))

    return System(name, embed, embed, folder_bytes(encoder_folder))


def available(model: Causal2Vec) -> list[System]:
    """All systems; sentence-transformers only where it is installed."""
    systems = []
    for name in (DEFAULT, PEER, OWN):
        try:
            systems.append(system_of(name, model))
        except ModuleNotFoundError as error:
            if error.name != "sentence_transformers":
                raise
            print('Left out: sentence-transformers (pip install "sentence-transformers>=6.2,<7").', file=sys.stderr)
    return systems


def passages(count: int) -> list[str]:
    """Docstrings of Python's standard library, evenly taken."""
    texts = [document.text for document in python_docs()]
    return texts[:: max(1, len(texts) // count)][:count]


def measure(
    systems: Sequence[System], texts: Sequence[str], queries: Sequence[str], rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """The figures of each system but its memory. Every result is fetched, so that the device has finished."""
    synchronize = torch.get_device_module(device).synchronize
    passage_rates: dict[str, list[float]] = {system.name: [] for system in systems}
    query_rates: dict[str, list[float]] = {system.name: [] for system in systems}
    latencies: dict[str, list[float]] = {system.name: [] for system in systems}
    for number in range(rounds + 1):
        print(f"costs: round {number} of {rounds}" if number else "costs: warm-up", file=sys.stderr)
        for system in systems:
            synchronize()
            start = perf_counter()
            system.embed_passages(texts)
            seconds = perf_counter() - start
            times = []
            for query in queries:
                start = perf_counter()
                system.embed_queries([query])
                times.append(perf_counter() - start)
            if number:
                passage_rates[system.name].append(len(texts) / seconds)
                query_rates[system.name].append(len(queries) / sum(times))
                latencies[system.name] += times
    figures = {}
    for system in systems:
        p50, p99 = (1000 * float(value) for value in np.percentile(latencies[system.name], (50, 99)))
        figures[system.name] = {
            "passages_per_s": spread(passage_rates[system.name]),
            "queries_per_s": spread(query_rates[system.name]),
            "query_p50_ms": p50,
            "query_p99_ms": p99,
            "disk_mib": system.disk_bytes / 2**20,
        }
    return figures


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def peak_in_its_own_process(name: str, model: str, device: str, dtype: str, count: int) -> float:
    """Peak memory in MiB of a process that opens only this system and embeds the passages."""
    settings = json.dumps([name, model, device, dtype, count])
    done = subprocess.run([sys.executable, __file__, settings], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def compare(
    model: Causal2Vec, queries: Sequence[str], *, num_passages: int, rounds: int, with_memory: bool
) -> dict[str, Any]:
    """The figures of all systems, for the output of `throughput.py`."""
    texts = passages(num_passages)
    rows = measure(available(model), texts, queries, rounds, model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    for name, row in rows.items() if with_memory else ():
        row["peak_mib"] = peak_in_its_own_process(name, model.name, str(model.device), dtype, num_passages)
    return {"passages": len(texts), "queries": len(queries), "rounds": rounds, "rows": rows}


def main() -> None:
    name, model, device, dtype, count = json.loads(sys.argv[1])
    system = open_system(name, model, device, dtype)
    system.embed_passages(passages(count))
    if torch.device(device).type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(kib / 2 ** (20 if sys.platform == "darwin" else 10))


if __name__ == "__main__":
    main()
