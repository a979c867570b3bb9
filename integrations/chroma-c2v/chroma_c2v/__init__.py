"""Causal2Vec embeddings for Chroma."""

try:
    import chromadb  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "chromadb":
        raise
    raise ImportError('chroma_c2v needs Chroma: pip install "c2v-rag[chroma]"') from error

from c2v_rag import __version__
from chroma_c2v.embedding_function import Causal2VecEmbeddingFunction

__all__ = ["Causal2VecEmbeddingFunction", "__version__"]
