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

from c2v_rag.sources import Document

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

CHUNK_TOKENS = 256
CHUNK_OVERLAP = 0.1
_CHARACTERS_PER_TOKEN = 4  # for an embedder that cannot count tokens


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a document as a collection stores it; `embedding` (embedding_dim,) if requested."""

    id: str
    text: str
    metadata: dict[str, Any]
    embedding: np.ndarray | None = None


def present_ids(collection: Collection | None, sources: AbstractSet[str]) -> dict[str, set[str]]:
    """The ids of each source's chunks in a Chroma collection; empty sets if the collection does not exist."""
    present: dict[str, set[str]] = {source: set() for source in sorted(sources)}
    if not present or collection is None:
        return present
    in_sources: Any = {"source": {"$in": list(present)}}
    if len(present) == 1:  # a single source may be a large table: do not read its metadata
        (source,) = present
        present[source].update(collection.get(where=in_sources, include=[])["ids"])
        return present
    found = collection.get(where=in_sources, include=["metadatas"])
    for id, metadata in zip(found["ids"], found["metadatas"] or [], strict=True):
        present[str(metadata["source"])].add(id)
    return present


def new_chunks(
    documents: Sequence[Document],
    model: object,
    present: Mapping[str, set[str]],
    repeated: Counter[str],
    counts: Counter[str],
) -> Iterator[list[Chunk]]:
    """For each document, its chunks that are not in the collection yet.

    `present`: ids in the collection, by source. The ids of unchanged chunks are removed from it, so that the outdated
    ids remain. `repeated`: counts equal pairs of source and text; pass the same counter to all calls of a run.
    `counts`: "unchanged" and "truncated" are increased. `model`: its `count_tokens` and `max_tokens` are used if it has
    them; otherwise tokens are estimated from characters.
    """
    for document, texts in zip(documents, _split(documents, model, counts), strict=True):
        chunks = []
        for text in texts:
            id = _chunk_id(document.source, text, repeated)
            if id in present[document.source]:
                present[document.source].remove(id)
                counts["unchanged"] += 1
            else:
                chunks.append(Chunk(id, text, {**document.metadata, "source": document.source}))
        yield chunks


def _split(documents: Sequence[Document], model: object, counts: Counter[str]) -> list[list[str]]:
    """The texts of each document's chunks, of at most CHUNK_TOKENS of the model's tokens.

    Chunks that are still too long are counted in counts["truncated"].
    """
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    count_tokens = getattr(model, "count_tokens", _count_by_characters)
    size = min(CHUNK_TOKENS, getattr(model, "max_tokens", CHUNK_TOKENS))
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=size,
        chunk_overlap=int(size * CHUNK_OVERLAP),
        length_function=lambda text: count_tokens([text])[0],
    )
    chunks = []
    for document, length in zip(documents, count_tokens([document.text for document in documents]), strict=True):
        texts = [document.text] if length <= size else splitter.split_text(document.text)
        if length > size:
            counts["truncated"] += sum(more > size for more in count_tokens(texts))
        chunks.append([text for text in texts if text.strip()])
    return chunks


def _chunk_id(source: str, text: str, repeated: Counter[str]) -> str:
    """SHA-256 of the source, the text, and the number of earlier chunks with the same source and text."""
    pair = json.dumps([source, text])
    digest = hashlib.sha256(pair.encode()).hexdigest()
    earlier = repeated[digest]
    repeated[digest] += 1
    return hashlib.sha256(f"{digest}{earlier}".encode()).hexdigest()


def _count_by_characters(texts: Sequence[str]) -> list[int]:
    return [len(text) // _CHARACTERS_PER_TOKEN + 1 for text in texts]
