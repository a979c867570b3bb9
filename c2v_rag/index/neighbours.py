"""The text around a hit: chunks before and after it in the same source, ordered by their metadata "start"."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from c2v_rag.index.pages import pages, pages_of
from c2v_rag.index.query import Hit

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

logger = logging.getLogger(__name__)


def with_neighbours(collection: Collection, hits: Sequence[Hit], number: int) -> list[Hit]:
    """The hits with the text of `number` chunks before and after each.

    Text that neighbouring chunks repeat is left out. Hits without the integer metadata "start" are returned unchanged,
    and the log says so.
    """
    positions: dict[str, list[str]] = {}  # by filter: ids in the order of the text
    result, without = [], 0
    for hit in hits:
        if not isinstance(hit.metadata.get("start"), int):
            without += 1
            result.append(hit)
            continue
        where = _same_text(hit)
        if repr(where) not in positions:
            positions[repr(where)] = _ordered_ids(collection, where)
        ids = positions[repr(where)]
        if hit.id not in ids:  # deleted meanwhile
            result.append(hit)
            continue
        at = ids.index(hit.id)
        before, after = ids[max(0, at - number) : at], ids[at + 1 : at + 1 + number]
        texts = _texts(collection, [*before, *after])
        result.append(
            dataclasses.replace(
                hit,
                before=_before([texts[id] for id in before], (hit.text, hit.metadata)),
                after=_after((hit.text, hit.metadata), [texts[id] for id in after]),
            )
        )
    if without:
        logger.warning(
            "%d of %d hits have no neighbours: their chunks were stored without a position (metadata 'start'). Index "
            "the documents into a new collection to get it.",
            without,
            len(hits),
        )
    return result


_Piece = tuple[str, dict[str, Any]]  # text and metadata


def _same_text(hit: Hit) -> dict[str, Any]:
    """Chroma's filter for the chunks of the hit's text: its source; of a table, its row, whose offsets start at 0."""
    same = {"source": hit.metadata["source"]}
    if "row" in hit.metadata:
        same["row"] = hit.metadata["row"]
    return {"$and": [{key: value} for key, value in same.items()]} if len(same) > 1 else same


def _ordered_ids(collection: Collection, where: Any) -> list[str]:
    positions = [
        (metadata.get("page", 0), metadata["start"], id)
        for page in pages(collection, ["metadatas"], where)
        for id, metadata in zip(page["ids"], page["metadatas"], strict=True)
        if isinstance(metadata.get("start"), int)
    ]
    return [id for *_, id in sorted(positions)]


def _texts(collection: Collection, ids: list[str]) -> dict[str, _Piece]:
    return {
        id: (text, dict(metadata))
        for page in pages_of(collection, ids, ["documents", "metadatas"])
        for id, text, metadata in zip(page["ids"], page["documents"], page["metadatas"], strict=True)
    }


def _before(pieces: Sequence[_Piece], hit: _Piece) -> str:
    """The text of `pieces`, which stand before `hit`, each without what the next one repeats."""
    parts = []
    for piece, following in zip(pieces, [*pieces[1:], hit], strict=False):
        text, overlap = piece[0], _overlap(piece, following)
        parts.append(text[: len(text) - overlap] if overlap else text + _gap(piece, following))
    return "".join(parts)


def _after(hit: _Piece, pieces: Sequence[_Piece]) -> str:
    """The text of `pieces`, which stand after `hit`, each without what the one before it has already."""
    parts = []
    for earlier, piece in zip([hit, *pieces], pieces, strict=False):
        overlap = _overlap(earlier, piece)
        parts.append(piece[0][overlap:] if overlap else _gap(earlier, piece) + piece[0])
    return "".join(parts)


def _overlap(earlier: _Piece, later: _Piece) -> int:
    """Number of characters at the end of `earlier` that `later` starts with, as their offsets say."""
    length = _end(earlier) - int(later[1]["start"])
    return length if 0 < length <= len(later[0]) and earlier[0].endswith(later[0][:length]) else 0


def _gap(earlier: _Piece, later: _Piece) -> str:
    """A line break between chunks that do not touch: the white space between them is not stored."""
    return "" if _end(earlier) == int(later[1]["start"]) else "\n"


def _end(piece: _Piece) -> int:
    text, metadata = piece
    end = metadata.get("end")
    return end if isinstance(end, int) else int(metadata["start"]) + len(text)
