"""SHA-256 of files: one at a time, with the hashes of large files kept, and of a whole folder in SHA256SUMS."""

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
# People edit the card, and sentence-transformers writes its two files anew with its own versions.
_NOT_IN_SUMS = {SUMS_FILE, "README.md", ".gitattributes", "modules.json", "config_sentence_transformers.json"}
_CACHED_FROM_BYTES = 1_000_000
# A file that was written this recently may be written again without a change of its time stamp.
_RECENT_S = 2.0


def cache_folder() -> Path:
    """Where converted weights are kept: $C2V_RAG_CACHE, else `c2v_rag` below the user's cache folder."""
    if given := os.environ.get("C2V_RAG_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "c2v_rag"


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits.

    The hash of a large file is kept in the cache folder, and used again while path, size and times of the file stay.
    """
    status = path.stat()
    if status.st_size < _CACHED_FROM_BYTES:
        return _hash_file(path)
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    kept = cache_folder() / "hashes" / f"{key}.json"
    seen = {"size": status.st_size, "modified": status.st_mtime_ns, "changed": status.st_ctime_ns}
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(kept.read_text(encoding="utf-8"))
        if {name: entry[name] for name in seen} == seen:
            return str(entry["sha256"])
    digest = _hash_file(path)
    if time.time() - max(status.st_mtime, status.st_ctime) > _RECENT_S:
        with suppress(OSError):  # a cache folder that cannot be written costs time only
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False, encoding="utf-8") as file:
                json.dump({**seen, "sha256": digest}, file)
            Path(file.name).replace(kept)
    return digest


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every file below `folder`, in the format of `sha256sum`; README.md may be edited freely."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in _NOT_IN_SUMS)
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def verify_sums(folder: Path, remedy: str = "Save or fetch the checkpoint again.") -> dict[str, str]:
    """The checked content of SHA256SUMS, file to hash. ValueError names the first file that does not fit."""
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
        found = sha256(folder / name)
        if found != expected:
            raise ValueError(
                f"{folder / name} is truncated or altered: expected SHA-256 {expected}, found {found}. {remedy}"
            )
        sums[name] = expected
    return sums
