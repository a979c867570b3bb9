"""Freed memory stays in the process, unless the user's environment says what glibc does."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from c2v_rag import allocator, inference
from tests.tiny import tiny_model

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# Page faults of allocating, filling and freeing 64 MB twenty times, before and after the call.
PROGRAM = """
import ctypes, resource
from c2v_rag.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes, libc.malloc.argtypes = [ctypes.c_void_p], [ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = libc.malloc(64 * 2**20)
        libc.memset(block, 1, 64 * 2**20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
print(before, keep_freed_memory(), faults())
"""


def run(**variables: str) -> tuple[int, bool, int]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True, timeout=60)
    before, is_kept, after = done.stdout.split()
    return int(before), is_kept == "True", int(after)


@glibc_only
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    before, is_kept, after = run()
    assert is_kept
    assert after * 5 < before


@glibc_only
@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_setting_of_the_user_is_left_alone(variable: str) -> None:
    value = {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}.get(variable, "131072")
    assert not run(**{variable: value})[1]


def test_encoding_on_a_cpu_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(inference, "keep_freed_memory", lambda: called.append(True))
    tiny_model().encode(["text"])
    assert called


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory.__wrapped__()
