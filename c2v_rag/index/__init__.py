"""Documents -> chunks -> embeddings -> a Chroma collection that can be searched, resumed and brought up to date."""

from __future__ import annotations

from c2v_rag.index.chroma_server import ChromaServer
from c2v_rag.index.chunking import Chunk, Present, new_chunks
from c2v_rag.index.known_files import KnownFiles
from c2v_rag.index.lexical import LexicalIndex
from c2v_rag.index.query import DEFAULT_MODE, Hit, Reranker, SearchMode, SearchOptions, check_mode, location
from c2v_rag.index.settings import ChunkSettings, HnswSettings, stored_settings
from c2v_rag.index.stamp import STAMP_KEY, StampedModel, check_stamp, stored_stamp, stored_stamps
from c2v_rag.index.stores import DEFAULT_COLLECTION, StoreAddress, count_chunks, find_collection, open_store, store_name
from c2v_rag.index.vanished import remove_vanished
from c2v_rag.index.vector_index import VectorIndex
from c2v_rag.index.writing import CHUNKS_WRITTEN_AT_ONCE, IndexReport

__all__ = [
    "CHUNKS_WRITTEN_AT_ONCE",
    "DEFAULT_COLLECTION",
    "DEFAULT_MODE",
    "STAMP_KEY",
    "ChromaServer",
    "Chunk",
    "ChunkSettings",
    "Hit",
    "HnswSettings",
    "IndexReport",
    "KnownFiles",
    "LexicalIndex",
    "Present",
    "Reranker",
    "SearchMode",
    "SearchOptions",
    "StampedModel",
    "StoreAddress",
    "VectorIndex",
    "check_mode",
    "check_stamp",
    "count_chunks",
    "find_collection",
    "location",
    "new_chunks",
    "open_store",
    "remove_vanished",
    "store_name",
    "stored_settings",
    "stored_stamp",
    "stored_stamps",
]
