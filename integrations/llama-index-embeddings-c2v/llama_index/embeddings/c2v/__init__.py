"""Causal2Vec embeddings for LlamaIndex."""

try:
    import llama_index.core  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("llama_index", "llama_index.core"):
        raise
    raise ImportError('llama_index.embeddings.c2v needs LlamaIndex: pip install "c2v-rag[llama-index]"') from error

from llama_index.embeddings.c2v.base import Causal2VecEmbedding
from llama_index.embeddings.c2v.retriever import C2VRetriever

__version__ = "0.2.0"

__all__ = ["C2VRetriever", "Causal2VecEmbedding", "__version__"]
