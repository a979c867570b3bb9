"""Causal2Vec embeddings for sentence-transformers."""

try:
    import sentence_transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    raise ImportError(
        'sentence_transformers_c2v needs sentence-transformers: pip install "c2v-rag[sentence-transformers]"'
    ) from error

from sentence_transformers_c2v.module import Causal2VecModule, load

__version__ = "0.2.0"

__all__ = ["Causal2VecModule", "__version__", "load"]
