"""Documents -> chunks -> embeddings -> a Chroma collection that can be searched, resumed and brought up to date."""

from __future__ import annotations

from c2v_rag.index.chunking import Chunk, new_chunks, present_ids
from c2v_rag.index.stamp import STAMP_KEY, check_stamp, stored_stamp, stored_stamps
from c2v_rag.index.stores import DEFAULT_COLLECTION, count_chunks, open_store
from c2v_rag.index.vector_index import CHUNKS_WRITTEN_AT_ONCE, Hit, IndexReport, VectorIndex, remove_vanished

__all__ = [
    "CHUNKS_WRITTEN_AT_ONCE",
    "DEFAULT_COLLECTION",
    "STAMP_KEY",
    "Chunk",
    "Hit",
    "IndexReport",
    "VectorIndex",
    "check_stamp",
    "count_chunks",
    "new_chunks",
    "open_store",
    "present_ids",
    "remove_vanished",
    "stored_stamp",
    "stored_stamps",
]
