"""`c2v-rag serve` as a process: its keys, its end after SIGTERM, and its memory after thousands of requests."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from c2v_rag.model import Causal2Vec
from c2v_rag.server.run import read_keys
from tests.test_cli import run
from tests.tiny import WORDS

REQUESTS, AT_ONCE = 2_000, 32


@contextmanager
def serve(folder: str, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the server, and yield its address and its process."""
    command = [sys.executable, "-m", "c2v_rag.cli", "serve", "--model", folder, "--port", "0", *options]
    with subprocess.Popen([*command, "--dtype", "float32"], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on (http://\S+)", line):
                    yield found[1], process
                    return
            raise AssertionError(f"the server did not start: {''.join(lines)}")
        finally:
            process.kill()


def waiting(url: str) -> float:
    found = re.search(r"^c2v_waiting_inputs (\S+)", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_public_address_needs_a_key_file_or_no_key(tiny_checkpoint: str, tmp_path: Path) -> None:
    refused = run("serve", "--model", tiny_checkpoint, "--host", "0.0.0.0")
    assert refused.returncode == 1
    assert "Give --api-key-file, or say --no-key" in refused.stderr.replace("\n", " ")
    (tmp_path / "keys").write_text("# nobody yet\n\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_text("# mine\n first \n\nsecond\n")
    assert read_keys(tmp_path / "keys") == ["first", "second"]


@pytest.mark.slow
def test_accepted_requests_are_answered_after_sigterm(tiny_checkpoint: str) -> None:
    texts = [f"{' '.join(WORDS * 8)} {number}" for number in range(500)]
    with serve(tiny_checkpoint) as (url, process), ThreadPoolExecutor(1) as pool:
        body = {"model": "tiny", "input": texts, "truncate": True}
        answer = pool.submit(httpx.post, f"{url}/v1/embeddings", json=body, timeout=250)
        while not waiting(url):
            assert not answer.done(), "the request was answered before SIGTERM could be sent"
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        answered = answer.result()
        assert answered.status_code == 200
        assert len(answered.json()["data"]) == len(texts)
        assert process.wait(120) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thousands_of_mixed_requests_are_answered_without_a_leak(tiny_checkpoint: str) -> None:
    model = Causal2Vec.from_pretrained(tiny_checkpoint, dtype="float32")
    short, long, empty = "bread and yeast", " ".join(WORDS * 12), ""
    expected = {text: model.encode_document([text])[0] for text in (short, long, empty)}
    hostile = [
        ({"model": None, "input": "x"}, 422),
        ({"model": "none", "input": "x"}, 404),
        ({"input": ["x"] * 3000}, 400),
        ({"input": [[1, 2, 3]]}, 422),
        ({"input": " ".join(WORDS * 100)}, 400),
        (b"[", 422),
        (b"[" * 5000, 400),
        (b"\x00\xff", 422),
    ]
    seen: Counter[str] = Counter()
    memory: list[float] = []

    async def ask(client: httpx.AsyncClient, process: psutil.Process, number: int) -> None:
        chance = random.Random(number)
        kind = chance.choices(["short", "long", "empty", "hostile", "aborted"], [50, 20, 10, 15, 5])[0]
        if kind == "hostile":
            body, status = chance.choice(hostile)
            if isinstance(body, bytes):
                answer = await client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
            else:
                answer = await client.post("/v1/embeddings", json={"model": "tiny"} | body)
            assert answer.status_code == status, answer.text[:200]
        else:
            text = {"short": short, "long": long, "empty": empty, "aborted": long}[kind]
            count = chance.randint(1, 4)
            body = {"model": "tiny", "input": [text] * count, "truncate": True}
            if kind == "aborted":
                with pytest.raises(httpx.TimeoutException):
                    await client.post("/v1/embeddings", json=body | {"input": [text] * 16}, timeout=0.001)
            else:
                answer = await client.post("/v1/embeddings", json=body)
                assert answer.status_code == 200, answer.text[:200]
                vectors = [one["embedding"] for one in answer.json()["data"]]
                np.testing.assert_allclose(vectors, [expected[text]] * count, atol=1e-5)
        seen[kind] += 1
        if number % 500 == 499:
            memory.append(process.memory_info().rss / 2**20)

    async def load(url: str, process: psutil.Process) -> None:
        numbers = iter(range(REQUESTS))
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:

            async def worker() -> None:
                for number in numbers:
                    await ask(client, process, number)

            await asyncio.gather(*(worker() for _ in range(AT_ONCE)))

    with serve(tiny_checkpoint) as (url, process):
        started = time.perf_counter()
        asyncio.run(load(url, psutil.Process(process.pid)))
        took = time.perf_counter() - started
        while waiting(url):
            time.sleep(0.05)
        assert httpx.get(f"{url}/ready").status_code == 200
        metrics = httpx.get(f"{url}/metrics").text
    print(f"{REQUESTS} requests in {took:.0f} s: {dict(seen)}; MiB after every 500: {[round(m) for m in memory]}")
    assert seen.total() == REQUESTS
    good = re.search(r'c2v_requests_total\{path="/v1/embeddings",status="200"\} (\S+)', metrics)
    assert good is not None
    assert float(good[1]) == seen["short"] + seen["long"] + seen["empty"]
    assert 'status="500"' not in metrics
    # Allocators keep freed memory: with twice as many requests it grew by 76 MiB and then no more.
    assert memory[-1] < memory[0] + 100, memory
