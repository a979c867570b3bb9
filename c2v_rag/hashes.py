"""SHA-256 of single files, cached for large ones, and of all files of a folder, in SHA256SUMS."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

SUMS_FILE = "SHA256SUMS"
# Users may edit the model card (README.md), and sentence-transformers overwrites its two .json files when it saves.
_NOT_IN_SUMS = {SUMS_FILE, "README.md", ".gitattributes", "modules.json", "config_sentence_transformers.json"}
_MIN_CACHED_BYTES = 1_000_000
# A file that was written less than 2 s ago may change again with the same time stamp. Its hash is not cached.
_RECENT_SECONDS = 2.0
_known: dict[str, tuple[dict[str, int], str]] = {}  # by the hash of a path: the file's state and SHA-256


def cache_folder() -> Path:
    """The folder for converted weights and hashes: $C2V_RAG_CACHE, else `c2v_rag` in the user's cache folder."""
    if given := os.environ.get("C2V_RAG_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "c2v_rag"


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits.

    The hash of a large file is cached, in this process and in the user's cache folder. It is used again while the
    file's path, size and time stamps are the same.
    """
    status = path.stat()
    if status.st_size < _MIN_CACHED_BYTES:
        return _hash_file(path)
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    cache_file = cache_folder() / "hashes" / f"{key}.json"
    file_state = {"size": status.st_size, "modified": status.st_mtime_ns, "changed": status.st_ctime_ns}
    if (known := _known.get(key)) is not None and known[0] == file_state:
        return known[1]
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(cache_file.read_text(encoding="utf-8"))
        if {name: entry[name] for name in file_state} == file_state:
            _known[key] = file_state, str(entry["sha256"])
            return str(entry["sha256"])
    digest = _hash_file(path)
    if time.time() - max(status.st_mtime, status.st_ctime) > _RECENT_SECONDS:
        _known[key] = file_state, digest
        with suppress(OSError):  # the cache only saves time: it may be read-only
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=cache_file.parent, delete=False, encoding="utf-8") as file:
                json.dump({**file_state, "sha256": digest}, file)
            Path(file.name).replace(cache_file)
    return digest


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, in the format of `sha256sum`, of the files in `folder` and its subfolders.

    Files that users and sentence-transformers change are left out.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in _NOT_IN_SUMS)
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def verify_sums(folder: Path, remedy: str = "Save or fetch the checkpoint again.") -> dict[str, str]:
    """Check the files of a folder against its SHA256SUMS; returns the hash of each file.

    Raises ValueError for the first file that is missing or has another hash; `remedy` ends the message.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {SUMS_FILE}, so its files cannot be checked. {remedy}")
    sums: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        expected, _, name = line.partition("  ")
        if (
            not re.fullmatch(r"[0-9a-f]{64}", expected)
            or not name
            or ".." in Path(name).parts
            or Path(name).is_absolute()
        ):
            raise ValueError(f"{path}:{number}: expected a SHA-256 and a file name, got {line[:80]!r}. {remedy}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing. {remedy}")
        actual = sha256(folder / name)
        if actual != expected:
            raise ValueError(
                f"{folder / name} is truncated or altered: expected SHA-256 {expected}, found {actual}. {remedy}"
            )
        sums[name] = expected
    return sums
