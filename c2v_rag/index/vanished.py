"""Delete the chunks of files that no longer exist."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from c2v_rag.index.vector_index import VectorIndex

logger = logging.getLogger(__name__)


def remove_vanished(index: VectorIndex, folder: Path, *, prune: bool = False) -> int:
    """Delete the chunks of files in `folder` and its subfolders that no longer exist; returns the number of chunks.

    A folder without any visible entry may be a disk that is not mounted. Therefore the chunks of files that were in it
    or in its subfolders are not deleted, and a warning is logged; `prune=True` deletes them too. A file whose state
    cannot be read (no permission, a network that does not answer) counts as existing.
    """
    folder = folder.resolve()
    prefix = folder.as_posix().rstrip("/") + "/"
    removed, files_by_empty_folder = 0, Counter[Path]()
    for source in sorted(index.sources()):
        path = Path(source)
        if not source.startswith(prefix) or not _is_missing(path):
            continue
        nearest = next((parent for parent in path.parents if not _is_missing(parent)), folder)
        if not prune and _looks_empty(nearest):
            files_by_empty_folder[nearest] += 1
        else:
            removed += index.delete(source)
    for empty_folder, number in files_by_empty_folder.items():
        logger.warning(
            "%s is empty: %d file(s) that were indexed from there stay in the index, in case a disk is not mounted. "
            "If they are really gone, delete their chunks: c2v-rag index --prune",
            empty_folder,
            number,
        )
    return removed


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _looks_empty(folder: Path) -> bool:
    """Whether a folder has no visible entry, or cannot be listed."""
    try:
        return all(entry.name.startswith(".") for entry in folder.iterdir())
    except OSError:
        return True
