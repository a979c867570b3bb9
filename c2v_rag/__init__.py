"""c2v_rag: Causal2Vec embeddings (arXiv 2507.23386) and a Chroma index to search with them.

The names below are imported on first use (PEP 562). `import c2v_rag` takes milliseconds and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from c2v_rag.config import Causal2VecConfig
    from c2v_rag.embedders import EmbedderSpec, LazyEmbedder, load_embedder, shared_model
    from c2v_rag.gatherer import gather
    from c2v_rag.index import Hit, IndexReport, Reranker, SearchMode, VectorIndex
    from c2v_rag.model import Causal2Vec
    from c2v_rag.protocols import Embedder
    from c2v_rag.remote import RemoteModel
    from c2v_rag.sources import Document, read_sources
    from c2v_rag.tokenization import TokenBatch

__version__ = "0.2.0"

_MODULES = {
    "Causal2Vec": "model",
    "Causal2VecConfig": "config",
    "Document": "sources",
    "Embedder": "protocols",
    "EmbedderSpec": "embedders",
    "Hit": "index",
    "IndexReport": "index",
    "LazyEmbedder": "embedders",
    "RemoteModel": "remote",
    "Reranker": "index",
    "TokenBatch": "tokenization",
    "SearchMode": "index",
    "VectorIndex": "index",
    "gather": "gatherer",
    "load_embedder": "embedders",
    "read_sources": "sources",
    "shared_model": "embedders",
}
__all__ = [
    "Causal2Vec",
    "Causal2VecConfig",
    "Document",
    "Embedder",
    "EmbedderSpec",
    "Hit",
    "IndexReport",
    "LazyEmbedder",
    "RemoteModel",
    "Reranker",
    "SearchMode",
    "TokenBatch",
    "VectorIndex",
    "gather",
    "load_embedder",
    "read_sources",
    "shared_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'c2v_rag' has no attribute {name!r}")
    return getattr(import_module(f"c2v_rag.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
