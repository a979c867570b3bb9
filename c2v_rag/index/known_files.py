"""Which files an index holds as they are on disk, so that they are not read and parsed again."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from c2v_rag import hashes
from c2v_rag.index.vector_index import VectorIndex
from c2v_rag.sources import PYTHON_DOCS, files_below, source_of

# Raise it when a file of the same bytes gives other documents than before.
_READERS_VERSION = 1


class KnownFiles:
    """The files of `sources`, compared with the last complete run that read them.

    A file is known if the hash of its bytes and the number of its chunks in the index are as they were then. The record
    is a JSON file beside the collection. If it is lost, files are read again. Make the object before the run, give
    `paths` to `read_sources(skip=...)`, and call `save` when the run is complete.

    `index`: None for a collection that the run creates: no file is known, and `save` needs the index.
    `paths`: the known files. `num_chunks`: the number of their chunks.
    """

    def __init__(self, index: VectorIndex | None, sources: Sequence[str | Path], text_column: str = "text") -> None:
        self._index = index
        self._recorded = {} if index is None else _read(_record(index))
        self._hashes: dict[str, str] = {}
        paths: dict[str, list[Path]] = {}  # a file may be reached by several
        for source in sources:
            for path in files_below(Path(source)) if str(source) != PYTHON_DOCS else ():
                with suppress(OSError):  # reading it will report the error
                    name = source_of(path)
                    self._hashes[name] = f"{_READERS_VERSION}:{text_column}:{hashes.sha256(path)}"
                    paths.setdefault(name, []).append(path)
        equal = [name for name, digest in self._hashes.items() if self._recorded.get(name, ["", 0])[0] == digest]
        stored = {} if index is None else index.num_chunks(equal)
        known = [name for name in equal if stored[name] == self._recorded[name][1]]
        self.paths = {path for name in known for path in paths[name]}
        self.num_chunks = sum(stored[name] for name in known)

    def save(self, left_out: Collection[Path] = (), index: VectorIndex | None = None) -> None:
        """Record the files as the index holds them now, except those that could not be read.

        Raises ValueError without an index.
        """
        index = self._index if index is None else index
        if index is None:
            raise ValueError("There was no index before the run: give the one that it created.")
        unread = {source_of(path) for path in left_out}
        read = {name: digest for name, digest in self._hashes.items() if name not in unread}
        stored = index.num_chunks(list(read))
        kept = {name: entry for name, entry in self._recorded.items() if name not in self._hashes}
        entries = kept | {name: (digest, stored[name]) for name, digest in read.items()}
        file = _record(index)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(entries), encoding="utf-8")
        unfinished.replace(file)


def _record(index: VectorIndex) -> Path:
    return index.folder_for("files") / "files.json"


def _read(file: Path) -> dict[str, tuple[str, int]]:
    """Hash and number of chunks by source; empty if there is no record or a damaged one."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): (str(digest), int(number)) for name, (digest, number) in entries.items()}
    return {}
