"""Read a Chroma collection in parts: SQLite gives no more than 32,766 chunks with texts or metadata in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

IDS_AT_ONCE = 1000  # in one request
PAGE_SIZE = 10_000  # chunks. Chroma counts to a page's start again for each page, so that few large ones are faster


def pages(collection: Collection, include: Any, where: Any = None) -> Iterator[Any]:
    """The collection's columns, `PAGE_SIZE` chunks at a time; `where`: Chroma's metadata filter."""
    for start in count(step=PAGE_SIZE):
        page = collection.get(limit=PAGE_SIZE, offset=start, include=include, where=where)
        yield page
        if len(page["ids"]) < PAGE_SIZE:
            return


def pages_of(collection: Collection, ids: Sequence[str], include: Any) -> Iterator[Any]:
    """The columns of the chunks with these ids, `IDS_AT_ONCE` at a time; ids that are not stored are left out."""
    for start in range(0, len(ids), IDS_AT_ONCE):
        yield collection.get(ids=list(ids[start : start + IDS_AT_ONCE]), include=include)
