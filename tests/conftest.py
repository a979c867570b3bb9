import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests must not use the Hub. This must be set before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests must not use the developer's API key and Ray cluster.
for variable in ("C2V_RAG_API_KEY", "RAY_ADDRESS"):
    os.environ.pop(variable, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread per worker: two workers with two threads each on two cores mostly wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"

NO_CHROMIUM = "no Chromium"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line if browser tests were skipped, because single skips are easily overlooked in a long run."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if count := sum(NO_CHROMIUM in reason for reason in reasons):
        terminalreporter.write_line(
            f"{count} browser tests skipped: {NO_CHROMIUM}; apt-get install chromium, or playwright install chromium.",
            yellow=True,
        )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model's checkpoint, named "tiny"."""
    from tests.tiny import tiny_model  # imports transformers

    path: Path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Chroma server that all tests of a process share. Each test uses its own collections."""
    path = tmp_path_factory.mktemp("chroma")
    for _ in range(10):  # another program may take the port before the server does
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(Path(sys.executable).with_name("chroma")), "run", "--path", str(path), "--port", str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                if _answers(port, process):
                    yield f"http://127.0.0.1:{port}"
                    return
            finally:
                process.kill()
    raise RuntimeError("chroma run ended ten times before it answered")


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until this server answers; False if it ends first."""
    import chromadb

    while process.poll() is None:
        try:
            chromadb.HttpClient(port=port).heartbeat()
        except ValueError:
            time.sleep(0.1)
        else:
            return process.poll() is None
    return False


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that refuses connections during the test: it is bound, but nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
