"""Causal2Vec embeddings for Chroma."""

try:
    import chromadb  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "chromadb":
        raise
    raise ImportError('chroma_c2v needs Chroma: pip install "c2v-rag[chroma]"') from error

from chroma_c2v.embedding_function import Causal2VecEmbeddingFunction

__version__ = "0.2.0"

__all__ = ["Causal2VecEmbeddingFunction", "__version__"]
