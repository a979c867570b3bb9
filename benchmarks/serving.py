"""What gathering gains a server: `c2v-rag serve` with 1, 8 and 64 clients, each asking one query after another.

    python benchmarks/serving.py [--model M] [--seconds S] [--shared] [--output FILE.json]

Two servers in turn, each a process of its own: as it is, and one that embeds one text a call. Clients send questions of
about ten words to /v1/embeddings, in base64, and measure from sending to the parsed answer; p50 and p99 are over all
clients. "gain": queries a second beside the one-by-one server with as many clients. "of encode": beside `encode_query`
of 64 such questions a call, without a server, measured before it and again behind it.

The clients have one core for themselves, as if they were on another machine; the server, and `encode_query` too, have
all the others. "clients' CPU" is the share of their core that they take: near 100 %, they are what is measured. With
`--shared`, and on a system that cannot assign cores, clients and server share all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import numpy as np
import torch
from common import made, questions
from throughput import print_table

from c2v_rag import Causal2Vec

CLIENTS = (1, 8, 64)
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
GATHERED, ONE_BY_ONE = "gathered", "one by one"
_SERVER = """
import c2v_rag.gatherer as gatherer
gatherer.MAX_BATCH_TEXTS = {most} or gatherer.MAX_BATCH_TEXTS
from c2v_rag.cli import main
main()
"""


def use_cores(cores: Sequence[int]) -> None:
    """Run this thread, and the threads and processes that it starts from now on, on these cores; if any are given."""
    if cores:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))


@contextmanager
def serve(model: str, *, one_by_one: bool) -> Iterator[str]:
    command = [sys.executable, "-c", _SERVER.format(most=int(one_by_one)), "serve", "--model", model, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            address = next(filter(None, (re.search(r"running on (http://\S+)", line) for line in process.stderr)))
            yield address[1]
        finally:
            process.terminate()


def distinct_questions() -> Iterator[str]:
    """Endless, and no two are equal."""
    return (f"{row['question']} ({number})" for number, row in enumerate(cycle(questions())))


def encode_per_s(model: Causal2Vec, seconds: float) -> float:
    """Questions that `encode_query` embeds in a second, as many a call as there are clients at most."""
    texts, number = distinct_questions(), 0
    model.encode_query(list(islice(texts, CLIENTS[-1])))
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        number += len(model.encode_query(list(islice(texts, CLIENTS[-1]))))
    return number / elapsed


async def load(url: str, clients: int, seconds: float) -> list[float]:
    """The time of every answer that came before the end."""
    took: list[float] = []
    texts = distinct_questions()
    name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    async with AsyncExitStack() as stack:
        # A connection pool for each client, as they would have: httpx's costs more for each request the larger it is.
        pools = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=120, verify=False))
            for _ in range(clients)
        ]
        end = time.perf_counter() + seconds

        async def ask(client: httpx.AsyncClient) -> None:
            while (started := time.perf_counter()) < end:
                body = {"model": f"{name}:query", "input": next(texts), "encoding_format": "base64"}
                (await client.post("/v1/embeddings", json=body)).raise_for_status().json()
                took.append(time.perf_counter() - started)

        await asyncio.gather(*map(ask, pools))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput and latency of the server, with many clients.")
    parser.add_argument("--model", default="default", help="checkpoint: a folder, a hub id, or 'default'")
    parser.add_argument(
        "--seconds", type=float, default=20, help="how long each row is measured, behind a quarter of it"
    )
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--shared", action="store_true", help="clients and server share all cores")
    arguments = parser.parse_args()
    is_shared = arguments.shared or len(CORES) < 2
    client_cores, server_cores = ([], []) if is_shared else (CORES[-1:], CORES[:-1])

    use_cores(server_cores)
    rows: dict[str, dict[str, float]] = {}
    model = Causal2Vec.from_pretrained(arguments.model)
    encoded_per_s = [encode_per_s(model, arguments.seconds)]
    gc.collect()
    gc.freeze()  # else the clients would spend their time in the garbage collector, on the model's libraries
    for way in (GATHERED, ONE_BY_ONE):
        use_cores(server_cores)
        with serve(arguments.model, one_by_one=way == ONE_BY_ONE) as url:
            use_cores(client_cores)
            for clients in CLIENTS:
                asyncio.run(load(url, clients, arguments.seconds / 4))
                started, cpu_started = time.perf_counter(), time.process_time()
                took = asyncio.run(load(url, clients, arguments.seconds))
                elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu_started
                p50, p99 = (float(value) for value in np.percentile(took, (50, 99)))
                rows[f"{way}, {clients} clients"] = {
                    "queries_per_s": len(took) / elapsed,
                    "p50_s": p50,
                    "p99_s": p99,
                    "clients_cpu": cpu / elapsed / (len(client_cores) or os.cpu_count() or 1),
                }
    use_cores(server_cores)
    encoded_per_s.append(encode_per_s(model, arguments.seconds))
    for clients in CLIENTS:
        alone = rows[f"{ONE_BY_ONE}, {clients} clients"]["queries_per_s"]
        for way in (GATHERED, ONE_BY_ONE):
            row = rows[f"{way}, {clients} clients"]
            row["gain"] = row["queries_per_s"] / alone
            row["of_encode"] = row["queries_per_s"] / fmean(encoded_per_s)
    forms = {"queries/s": "{:,.1f}", "p50": "{:.3f} s", "p99": "{:.3f} s", "clients' CPU": "{:.0%}"}
    forms |= {"gain": "{:.2f} x", "of encode": "{:.0%}"}
    print_table(forms, {name: dict(zip(forms, row.values(), strict=True)) for name, row in rows.items()})
    if arguments.output:
        figures: dict[str, Any] = {
            **made(model.device, model.dtype),
            "cores": {"server": len(server_cores), "clients": len(client_cores)} if server_cores else "shared",
            "model": model.stamp,
            "seconds_a_row": arguments.seconds,
            "encode_per_s": encoded_per_s,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
