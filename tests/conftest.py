import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Nothing in the tests may reach for a hub; set before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The developer's own key and cluster are not the tests'.
for variable in ("C2V_RAG_API_KEY", "RAY_ADDRESS"):
    os.environ.pop(variable, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker: two workers of two threads on two cores wait for each other most of the time.
    os.environ["OMP_NUM_THREADS"] = "1"

NO_CHROMIUM = "no Chromium"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line where browser tests were skipped: their skips are easily missed in a long run."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if count := sum(NO_CHROMIUM in reason for reason in reasons):
        terminalreporter.write_line(
            f"{count} browser tests skipped: {NO_CHROMIUM}; apt-get install chromium, or playwright install chromium.",
            yellow=True,
        )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder, "tiny", for processes to load."""
    from tests.tiny import tiny_model  # imports transformers

    path: Path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Chroma server, one for all tests of a process: each uses collections of its own."""
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
    """Whether this server answers; False once it has ended."""
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
    """A port of this machine that refuses connections while the test runs: bound, and not listened to."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
