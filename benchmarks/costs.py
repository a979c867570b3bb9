"""What embedding costs: the model, the same with EOS, and its encoder in two paths, side by side.

The encoder runs in sentence-transformers and in our own path. `throughput.py` runs this and writes the figures. Every
round runs each system once, one after the other: all passages in one call, then each query alone. Passages/s and
queries/s are medians over the rounds, with the lowest and the highest; p50 and p99 are over the single queries of all
rounds. The peak memory is that of a new process that opens only this system and embeds the passages once: of the device
on CUDA, of the process elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch

from c2v_rag import Causal2Vec, checkpoint
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.parts import Part
from c2v_rag.sources import python_docs

Item = TypeVar("Item")
MODEL, BOTH = "default", "default with EOS"
PEER, OWN = "encoder, sentence-transformers", "encoder, EncoderEmbedder"


@dataclasses.dataclass(frozen=True)
class System:
    """One way to embed passages and queries; `disk_bytes`: the size of the files that it needs."""

    name: str
    embed_passages: Callable[[Sequence[str]], object]
    embed_queries: Callable[[Sequence[str]], object]
    disk_bytes: int


def folder_bytes(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def part_folder(model: Causal2Vec, part: Part) -> Path:
    """The folder that a part was read from. `Causal2Vec.base_folder` would open the part again to compare weights."""
    base = model.weights_record.parts[part].base
    assert base is not None
    return base.folder


def with_both_states(model: Causal2Vec) -> Causal2Vec:
    """The same weights, embedding with the Contextual token and EOS, so that the decoder reads the text."""
    config = dataclasses.replace(model.config, pooling="context_eos", truncate_dim=None)
    other = Causal2Vec(config, model.encoder, model.llm, model.tokenizer.encoder, model.tokenizer.llm).eval()
    other.projector.load_state_dict(model.projector.state_dict())
    other.name, other.weights_record = model.name, model.weights_record
    return other.to(model.device)


def system_of(name: str, model: Causal2Vec) -> System:
    """One system around an open model. Raises ModuleNotFoundError for sentence-transformers if it is not installed."""
    encoder_folder = part_folder(model, "encoder")
    if name == BOTH:
        model = with_both_states(model)
    if name in (MODEL, BOTH):
        disk_bytes = folder_bytes(checkpoint.locate(model.name), encoder_folder, part_folder(model, "llm"))
        return System(name, model.encode_document, model.encode_query, disk_bytes)
    if name == OWN:
        own = EncoderEmbedder(model)
        return System(name, own.encode_document, own.encode_query, folder_bytes(encoder_folder))
    return peer_system(encoder_folder, model.config.encoder_max_length, str(model.device), model.dtype)


def peer_system(folder: Path, max_length: int, device: str, dtype: torch.dtype) -> System:
    """The encoder in sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": dtype})
    peer.max_seq_length = max_length

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(peer.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))

    return System(PEER, embed, embed, folder_bytes(folder))


def available(model: Causal2Vec) -> list[System]:
    """All systems; sentence-transformers only where it is installed."""
    systems = []
    for name in (MODEL, BOTH, PEER, OWN):
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


def in_rounds(items: Sequence[Item], rounds: int, device: torch.device, label: str = "") -> Iterator[tuple[bool, Item]]:
    """Each item once a round, and whether the round counts: one more goes before them, to warm up.

    The device has finished all earlier work when an item is given.
    """
    synchronize = torch.get_device_module(device).synchronize
    for number in range(rounds + 1):
        print(f"{label}round {number} of {rounds}" if number else f"{label}warm-up", file=sys.stderr)
        for item in items:
            synchronize()
            yield number > 0, item


def measure(
    systems: Sequence[System], texts: Sequence[str], queries: Sequence[str], rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """The figures of each system but its memory. Every result is fetched, so that the device has finished."""
    passage_rates: dict[str, list[float]] = {system.name: [] for system in systems}
    query_rates: dict[str, list[float]] = {system.name: [] for system in systems}
    latencies: dict[str, list[float]] = {system.name: [] for system in systems}
    for counts, system in in_rounds(systems, rounds, device, "costs: "):
        start = perf_counter()
        system.embed_passages(texts)
        seconds = perf_counter() - start
        times = []
        for query in queries:
            start = perf_counter()
            system.embed_queries([query])
            times.append(perf_counter() - start)
        if counts:
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


def peak_in_its_own_process(name: str, model: Causal2Vec, num_passages: int) -> float:
    """Peak memory in MiB of a process that opens only this system and embeds the passages.

    `EncoderEmbedder` belongs to a whole model, so its process has the decoder in memory too.
    """
    settings = {
        "name": name,
        "model": model.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "encoder_folder": str(part_folder(model, "encoder")),
        "max_length": model.config.encoder_max_length,
        "passages": num_passages,
    }
    command = [sys.executable, __file__, json.dumps(settings)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compare(
    model: Causal2Vec, queries: Sequence[str], *, num_passages: int, rounds: int, with_memory: bool
) -> dict[str, Any]:
    """The figures of all systems, for the output of `throughput.py`."""
    texts = passages(num_passages)
    rows = measure(available(model), texts, queries, rounds, model.device)
    for name, row in rows.items() if with_memory else ():
        row["peak_mib"] = peak_in_its_own_process(name, model, num_passages)
    return {"passages": len(texts), "queries": len(queries), "rounds": rounds, "rows": rows}


def resident_peak_mib() -> float:
    """Peak memory of this process. Linux's ru_maxrss contains the parent's peak, so VmHWM is read there."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


def main() -> None:
    settings = json.loads(sys.argv[1])
    name, device = settings["name"], settings["device"]
    if name == PEER:
        dtype = getattr(torch, settings["dtype"])
        system = peer_system(Path(settings["encoder_folder"]), settings["max_length"], device, dtype)
    else:
        model = Causal2Vec.from_pretrained(settings["model"], device=device, dtype=settings["dtype"])
        system = system_of(name, model)
    system.embed_passages(passages(settings["passages"]))
    if torch.device(device).type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resident_peak_mib())


if __name__ == "__main__":
    main()
