"""A large file is hashed once, and again when it has changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from c2v_rag import hashes

SIZE = 1_000_001


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read to be hashed; files count as old enough to be cached at once."""
    found: list[Path] = []
    hash_file = hashes._hash_file
    monkeypatch.setattr(hashes, "_hash_file", lambda path: (found.append(path), hash_file(path))[1])
    monkeypatch.setattr(hashes, "_RECENT_SECONDS", -60.0)
    monkeypatch.setattr(hashes, "_known", {})
    monkeypatch.setenv("C2V_RAG_CACHE", str(tmp_path / "cache"))
    return found


def test_a_large_file_is_hashed_once_also_by_the_next_process(tmp_path: Path, hashed: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * SIZE)
    expected = hashlib.sha256(b"a" * SIZE).hexdigest()
    assert hashes.sha256(file) == hashes.sha256(file) == expected
    hashes._known.clear()  # as in a new process
    assert hashes.sha256(file) == expected
    assert hashed == [file]


def test_a_changed_file_of_the_same_size_and_time_is_hashed_again(tmp_path: Path, hashed: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * SIZE)
    before = file.stat()
    hashes.sha256(file)
    time.sleep(0.05)  # file systems may count time in steps of some milliseconds
    file.write_bytes(b"b" * SIZE)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes.sha256(file) == hashlib.sha256(b"b" * SIZE).hexdigest()
    assert len(hashed) == 2


def test_a_cache_folder_that_cannot_be_written_costs_one_hash_in_a_process(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("C2V_RAG_CACHE", str(tmp_path / "file"))
    file = tmp_path / "weights"
    file.write_bytes(b"a" * SIZE)
    assert hashes.sha256(file) == hashes.sha256(file)
    assert len(hashed) == 1


def test_a_file_that_was_just_written_is_hashed_each_time(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time stamps may stay the same while it changes."""
    monkeypatch.setattr(hashes, "_RECENT_SECONDS", 60.0)
    file = tmp_path / "weights"
    file.write_bytes(b"a" * SIZE)
    hashes.sha256(file)
    hashes.sha256(file)
    assert len(hashed) == 2
