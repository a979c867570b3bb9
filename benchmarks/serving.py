"""What gathering gains a server: `c2v-rag serve` with 1, 8 and 64 clients, each asking one query after another.

    python benchmarks/serving.py [--model M] [--seconds S] [--output FILE.json]

Two servers in turn, each a process of its own: as it is, and one that embeds one text a call. Clients send questions of
about ten words to /v1/embeddings, in base64, and measure from sending to the parsed answer; p50 and p99 are over all
clients. "gain": queries a second beside the one-by-one server with as many clients. Clients and server share the
machine's cores, and the clients take some of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from throughput import QUESTIONS, print_table

CLIENTS = (1, 8, 64)
GATHERED, ONE_BY_ONE = "gathered", "one by one"
_SERVER = """
import c2v_rag.gatherer as gatherer
gatherer.MAX_BATCH_TEXTS = {most} or gatherer.MAX_BATCH_TEXTS
from c2v_rag.cli import main
main()
"""


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


async def load(url: str, clients: int, seconds: float) -> list[float]:
    """The time of every answer that came before the end."""
    questions = [json.loads(line)["question"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    took: list[float] = []
    numbers = count()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        end = time.perf_counter() + seconds

        async def ask() -> None:
            while (started := time.perf_counter()) < end:
                number = next(numbers)
                text = f"{questions[number % len(questions)]} ({number})"
                body = {"model": f"{model}:query", "input": text, "encoding_format": "base64"}
                (await client.post("/v1/embeddings", json=body)).raise_for_status().json()
                took.append(time.perf_counter() - started)

        await asyncio.gather(*(ask() for _ in range(clients)))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput and latency of the server, with many clients.")
    parser.add_argument("--model", default="default", help="checkpoint: a folder, a hub id, or 'default'")
    parser.add_argument(
        "--seconds", type=float, default=20, help="how long each row is measured, behind a quarter of it"
    )
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    arguments = parser.parse_args()

    rows: dict[str, dict[str, float]] = {}
    stamp: dict[str, Any] = {}
    for way in (GATHERED, ONE_BY_ONE):
        with serve(arguments.model, one_by_one=way == ONE_BY_ONE) as url:
            stamp = httpx.get(f"{url}/v1/models").json()["data"][0]["stamp"]
            for clients in CLIENTS:
                asyncio.run(load(url, clients, arguments.seconds / 4))
                started = time.perf_counter()
                took = asyncio.run(load(url, clients, arguments.seconds))
                elapsed = time.perf_counter() - started
                p50, p99 = (float(value) for value in np.percentile(took, (50, 99)))
                rows[f"{way}, {clients} clients"] = {"queries_per_s": len(took) / elapsed, "p50_s": p50, "p99_s": p99}
    for clients in CLIENTS:
        alone = rows[f"{ONE_BY_ONE}, {clients} clients"]["queries_per_s"]
        for way in (GATHERED, ONE_BY_ONE):
            row = rows[f"{way}, {clients} clients"]
            row["gain"] = row["queries_per_s"] / alone
    forms = {"queries/s": "{:,.1f}", "p50": "{:.3f} s", "p99": "{:.3f} s", "gain": "{:.2f} x"}
    print_table(forms, {name: dict(zip(forms, row.values(), strict=True)) for name, row in rows.items()})
    if arguments.output:
        figures: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "model": stamp,
            "seconds_a_row": arguments.seconds,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
