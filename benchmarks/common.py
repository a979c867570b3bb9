"""What the benchmarks share: how a result was made, and the 60 questions about Python's documentation."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from c2v_rag.inference import default_device, default_dtype

QUESTIONS = Path(__file__).with_name("python_docs_questions.jsonl")


def questions() -> list[dict[str, Any]]:
    """The 60 questions, each with `question` and `answers`: the qualified names that answer it."""
    return [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]


def made(device: torch.device | None = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Command, date and machine of a result, as JSON values. Unless given, the device and dtype that a model gets."""
    device = device or default_device()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = {
        "platform": platform.platform(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": str(dtype or default_dtype(device)).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
    }
