"""A text has the same vector in every integration."""

from __future__ import annotations

from uuid import uuid4

import chromadb
import numpy as np
from llama_index.embeddings.c2v import Causal2VecEmbedding

from c2v_rag.model import Causal2Vec
from chroma_c2v import Causal2VecEmbeddingFunction
from langchain_c2v import Causal2VecEmbeddings
from sentence_transformers_c2v import load
from tests.tiny import assert_ranked


def test_every_integration_gives_the_models_vectors_and_rankings(
    folder: str, core: Causal2Vec, passages: list[str], queries: list[str]
) -> None:
    assert (len(passages), len(queries)) == (200, 20)
    expected_documents, expected_queries = core.encode_document(passages), core.encode_query(queries)

    langchain = Causal2VecEmbeddings(name_or_path=folder, dtype="float32")
    llama = Causal2VecEmbedding(folder, dtype="float32")
    chroma = Causal2VecEmbeddingFunction(folder, dtype="float32")
    sentence_transformers = load(folder, dtype="float32")
    integrations = {
        "langchain": (langchain.embed_documents(passages), [langchain.embed_query(query) for query in queries]),
        "llama_index": (
            llama.get_text_embedding_batch(passages),
            [llama.get_query_embedding(query) for query in queries],
        ),
        "chroma": (chroma(passages), chroma.embed_query(queries)),
        "sentence_transformers": (
            sentence_transformers.encode_document(passages),
            sentence_transformers.encode_query(queries),
        ),
    }
    for integration, (document_vectors, query_vectors) in integrations.items():
        np.testing.assert_allclose(document_vectors, expected_documents, atol=1e-5, err_msg=integration)
        np.testing.assert_allclose(query_vectors, expected_queries, atol=1e-5, err_msg=integration)

    collection = chromadb.EphemeralClient().create_collection(f"t{uuid4().hex}", embedding_function=chroma)
    collection.add(ids=[str(i) for i in range(200)], documents=passages)
    found = collection.query(query_texts=queries, n_results=10)["ids"]
    for ids, scores in zip(found, expected_queries @ expected_documents.T, strict=True):
        assert_ranked([int(id) for id in ids], scores)
