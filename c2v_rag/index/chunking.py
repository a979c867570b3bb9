"""Split documents into chunks with ids.

A chunk's id is the hash of its source and text, so that chunks which a collection already has are not embedded again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import numpy as np

from c2v_rag.index.cutting import TokenEnds, count, cut, estimated_ends
from c2v_rag.index.pages import pages
from c2v_rag.index.sections import title_and_sections
from c2v_rag.index.settings import FIRST, ChunkSettings
from c2v_rag.sources import Document

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

# Metadata for the index itself: the hash of the document, and the number of its chunks.
DOCUMENT_KEY, CHUNKS_KEY = "c2v_document", "c2v_chunks"
INTERNAL_KEYS = frozenset({DOCUMENT_KEY, CHUNKS_KEY})
_UPDATED_AT_ONCE = 256
_SPECIAL_TOKENS = 3  # at most, in a text of any of the tested tokenizers
SECTION_SEPARATOR = " > "
_HEADER_CHARACTERS = 200
_HEADING_MARKS = "#=-~*^ \t\r\n"
_CHARACTERS_PER_TOKEN = 4  # for an embedder that cannot count tokens


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a document as a collection stores it; `embedding` (embedding_dim,) if requested."""

    id: str
    text: str
    metadata: dict[str, Any]
    embedding: np.ndarray | None = None


@dataclasses.dataclass
class Present:
    """What a collection has of the sources of one run.

    `ids`: by source, the stored ids that the run has not seen yet; what remains at the end is outdated. `repeated`:
    numbers of chunks with equal source, text and header. `moved`: stored chunks of changed documents, whose offsets,
    pages or rows may differ from the stored ones.
    """

    ids: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    repeated: Counter[str] = dataclasses.field(default_factory=Counter)
    moved: list[Chunk] = dataclasses.field(default_factory=list)

    def read(self, collection: Collection | None, sources: AbstractSet[str]) -> None:
        """Read the ids of the sources that are not known yet."""
        self.ids.update(_present_ids(collection, sources - self.ids.keys()))

    def write_moved(self, collection: Collection | None) -> bool:
        """Store the metadata of the `moved` chunks, whose embeddings stay; returns whether there were any."""
        moved, self.moved = self.moved, []
        if not moved or collection is None:
            return False
        for start in range(0, len(moved), _UPDATED_AT_ONCE):
            part = {chunk.id: chunk for chunk in moved[start : start + _UPDATED_AT_ONCE]}
            stored = collection.get(ids=list(part), include=["metadatas"])
            # Chroma keeps the keys that an update does not name; None deletes one.
            gone = {id: dict.fromkeys(old) for id, old in zip(stored["ids"], stored["metadatas"] or [], strict=True)}
            metadatas: list[Any] = [{**gone.get(id, {}), **chunk.metadata} for id, chunk in part.items()]
            collection.update(ids=list(part), metadatas=metadatas)
        return True


def _present_ids(collection: Collection | None, sources: AbstractSet[str]) -> dict[str, set[str]]:
    """The ids of each source's chunks in a Chroma collection; empty sets if the collection does not exist."""
    present: dict[str, set[str]] = {source: set() for source in sorted(sources)}
    if not present or collection is None:
        return present
    in_sources: Any = {"source": {"$in": list(present)}}
    if len(present) == 1:  # a single source may be a large table: do not read its metadata
        (source,) = present
        present[source].update(collection.get(where=in_sources, include=[])["ids"])
        return present
    for page in pages(collection, ["metadatas"], in_sources):
        for id, metadata in zip(page["ids"], page["metadatas"], strict=True):
            present[str(metadata["source"])].add(id)
    return present


def new_chunks(
    documents: Sequence[Document],
    model: object,
    settings: ChunkSettings,
    collection: Collection | None,
    present: Present,
    counts: Counter[str],
) -> Iterator[list[Chunk]]:
    """For each document, its chunks that are not in the collection yet.

    `present`: the ids of unchanged chunks are removed from it. Pass the same object to all calls of a run, and call its
    `write_moved` after each. `counts`: "unchanged" and "truncated" are increased. `model`: its `token_ends`,
    `count_tokens` and `max_tokens` are used if it has them; otherwise tokens are estimated from characters.
    """
    present.read(collection, {document.source for document in documents})
    keeps_hashes = settings.splitter != "characters"
    hashes = [_document_hash(document) if keeps_hashes else "" for document in documents]
    stored = _stored_documents(collection, hashes) if keeps_hashes else {}
    unchanged = [
        _take_unchanged(document, stored.get(hash, []), settings, present)
        for document, hash in zip(documents, hashes, strict=True)
    ]
    changed = [document for document, number in zip(documents, unchanged, strict=True) if not number]
    pieces = _split(changed, model, counts) if settings.splitter == "characters" else _cut(changed, model, settings)
    for document, hash, number in zip(documents, hashes, unchanged, strict=True):
        counts["unchanged"] += number
        chunks = []
        parts = [] if number else next(pieces)
        for text, position in parts:
            metadata = storable({**document.metadata, **position, "source": document.source})
            if keeps_hashes:
                metadata |= {DOCUMENT_KEY: hash, CHUNKS_KEY: len(parts)}
            header = chunk_header(text, metadata) if settings.header else ""
            id = _chunk_id(document.source, text, header, present.repeated)
            if id in present.ids[document.source]:
                present.ids[document.source].remove(id)
                counts["unchanged"] += 1
                if keeps_hashes:
                    present.moved.append(Chunk(id, text, metadata))
            else:
                chunks.append(Chunk(id, text, metadata))
        yield chunks


def storable_text(text: str) -> str:
    """The text without lone surrogates: Chroma stores UTF-8, which cannot hold them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def storable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata whose keys and texts are storable."""
    return {
        storable_text(key): storable_text(value) if isinstance(value, str) else value for key, value in metadata.items()
    }


def chunk_header(text: str, metadata: Mapping[str, Any]) -> str:
    """What a passage is embedded behind: the title and the headings above it, outermost first.

    The innermost one is left out if the passage begins with it.
    """
    parts = _header_parts(str(metadata.get("title", "")), str(metadata.get("section", "")).split(SECTION_SEPARATOR))
    if parts and text.lstrip(_HEADING_MARKS).casefold().startswith(parts[-1].casefold()):
        parts.pop()
    return SECTION_SEPARATOR.join(parts)


def _header_parts(title: str, path: Sequence[str]) -> list[str]:
    """Title and headings, each once. Of a long header the outermost parts are left out, of a long part its end."""
    parts = [part[:_HEADER_CHARACTERS] for part in dict.fromkeys([title, *path]) if part]
    while len(parts) > 1 and sum(map(len, parts)) > _HEADER_CHARACTERS:
        parts.pop(0)
    return parts


def embedded_text(chunk: Chunk, settings: ChunkSettings) -> str:
    """The text of a chunk as the model reads it."""
    header = chunk_header(chunk.text, chunk.metadata) if settings.header else ""
    return f"{header}\n\n{chunk.text}" if header else chunk.text


def _document_hash(document: Document) -> str:
    """A hash of everything that changes a document's chunks."""
    values = [document.source, document.title, document.format, dict(document.metadata), document.text]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _stored_documents(collection: Collection | None, hashes: Sequence[str]) -> dict[str, list[Chunk]]:
    """The stored chunks of the documents with these hashes, in the order of the text."""
    if collection is None or not hashes:
        return {}
    where: Any = {DOCUMENT_KEY: {"$in": sorted(set(hashes))}}
    found: dict[str, list[Chunk]] = {}
    for page in pages(collection, ["metadatas", "documents"], where):
        for id, text, metadata in zip(page["ids"], page["documents"], page["metadatas"], strict=True):
            found.setdefault(str(metadata[DOCUMENT_KEY]), []).append(Chunk(id, text, dict(metadata)))
    return {hash: sorted(chunks, key=lambda chunk: chunk.metadata["start"]) for hash, chunks in found.items()}


def _take_unchanged(document: Document, stored: Sequence[Chunk], settings: ChunkSettings, present: Present) -> int:
    """The number of a document's chunks if all of them are stored with the ids that they would get now, else 0.

    Their ids are then removed from `present`.
    """
    if not stored or len(stored) != stored[0].metadata[CHUNKS_KEY]:
        return 0
    ids = present.ids[document.source]
    own: Counter[str] = Counter()
    for chunk in stored:
        header = chunk_header(chunk.text, chunk.metadata) if settings.header else ""
        digest = _digest(document.source, chunk.text, header)
        if chunk.id not in ids or chunk.id != _numbered(digest, present.repeated[digest] + own[digest]):
            return 0
        own[digest] += 1
    present.repeated.update(own)
    ids.difference_update(chunk.id for chunk in stored)
    return len(stored)


def _cut(
    documents: Sequence[Document], model: object, settings: ChunkSettings
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """For each document its passages along its structure, each with its title, section and offsets."""
    size = min(settings.max_tokens, getattr(model, "max_tokens", settings.max_tokens)) - _SPECIAL_TOKENS
    outlines = [title_and_sections(document.text, document.format) for document in documents]
    titles = [document.title or title for document, (title, _) in zip(documents, outlines, strict=True)]
    headers = [
        [SECTION_SEPARATOR.join(_header_parts(title, section.path)) if settings.header else "" for section in parts]
        for title, (_, parts) in zip(titles, outlines, strict=True)
    ]
    names = sorted({header for one in headers for header in one if header})
    ends = _token_ends(model, [*(document.text for document in documents), *names])
    lengths = {"": 0} | {
        name: count(tokens, 0, len(name)) + 1 for name, tokens in zip(names, ends[len(documents) :], strict=True)
    }
    for document, title, (_, parts), own, tokens in zip(documents, titles, outlines, headers, ends, strict=False):
        passages = []
        for (start, end, path), header in zip(parts, own, strict=True):
            limit = max(size // 2, size - lengths[header])
            shown = {"title": title, "section": SECTION_SEPARATOR.join(path)}
            shown = {name: value for name, value in shown.items() if value}
            for first, last in cut(document.text, start, end, tokens, limit, int(limit * settings.overlap)):
                passages.append((document.text[first:last], {**shown, "start": first, "end": last}))
        yield passages


def _token_ends(model: object, texts: Sequence[str]) -> list[TokenEnds]:
    """The offsets at which the tokens of each text end, for each tokenizer of the model."""
    token_ends = getattr(model, "token_ends", None)
    if token_ends is None:
        return estimated_ends(texts, getattr(model, "count_tokens", None))
    found: list[TokenEnds] = token_ends(texts)
    return found


def _split(
    documents: Sequence[Document], model: object, counts: Counter[str]
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """For each document its chunks as version 0.1 made them, of at most 256 of the model's tokens.

    Chunks that are still too long are counted in counts["truncated"].
    """
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    count_tokens = getattr(model, "count_tokens", _count_by_characters)
    size = min(FIRST.max_tokens, getattr(model, "max_tokens", FIRST.max_tokens))
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=size,
        chunk_overlap=int(size * FIRST.overlap),
        length_function=lambda text: count_tokens([text])[0],
    )
    for document, length in zip(documents, count_tokens([document.text for document in documents]), strict=True):
        texts = [document.text] if length <= size else splitter.split_text(document.text)
        if length > size:
            counts["truncated"] += sum(more > size for more in count_tokens(texts))
        yield [(text, {}) for text in texts if text.strip()]


def _chunk_id(source: str, text: str, header: str, repeated: Counter[str]) -> str:
    """The id of the next chunk with this source, text and header."""
    digest = _digest(source, text, header)
    repeated[digest] += 1
    return _numbered(digest, repeated[digest] - 1)


def _digest(source: str, text: str, header: str) -> str:
    """SHA-256 of the source, the text and, if there is one, the header."""
    return hashlib.sha256(json.dumps([source, text, header] if header else [source, text]).encode()).hexdigest()


def _numbered(digest: str, earlier: int) -> str:
    """The id of a chunk: its digest hashed with the number of earlier equal chunks."""
    return hashlib.sha256(f"{digest}{earlier}".encode()).hexdigest()


def _count_by_characters(texts: Sequence[str]) -> list[int]:
    return [len(text) // _CHARACTERS_PER_TOKEN + 1 for text in texts]
