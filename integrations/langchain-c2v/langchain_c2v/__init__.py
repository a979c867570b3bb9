"""Causal2Vec embeddings for LangChain."""

try:
    import langchain_core  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "langchain_core":
        raise
    raise ImportError('langchain_c2v needs LangChain: pip install "c2v-rag[langchain]"') from error

from langchain_c2v.embeddings import Causal2VecEmbeddings
from langchain_c2v.retrievers import C2VRetriever

__version__ = "0.2.0"

__all__ = ["C2VRetriever", "Causal2VecEmbeddings", "__version__"]
