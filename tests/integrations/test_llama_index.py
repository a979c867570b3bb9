"""The LlamaIndex package: index, query engine, ingestion pipeline, cache, events."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any
from uuid import uuid4

import chromadb
import numpy as np
import pytest
from llama_index.core import Settings, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.rate_limiter import BaseRateLimiter
from llama_index.core.schema import Document, MetadataMode, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.c2v import C2VRetriever, Causal2VecEmbedding
from llama_index.vector_stores.chroma import ChromaVectorStore

from c2v_rag import Document as SourceDocument
from c2v_rag import VectorIndex, embedders
from c2v_rag.index import Chunk
from c2v_rag.model import Causal2Vec
from tests.plain import Letters, numbered, recording_server
from tests.tiny import assert_ranked, tiny_model


def nodes_of(passages: list[str]) -> list[TextNode]:
    return [TextNode(text=text, id_=str(i)) for i, text in enumerate(passages)]


def test_it_is_a_base_embedding() -> None:
    assert BaseEmbedding.__name__ in [base.__name__ for base in Causal2VecEmbedding.__mro__]
    assert Causal2VecEmbedding.class_name() == "Causal2VecEmbedding"


def test_vectors_equal_those_of_the_model_and_the_batch_size_is_used(
    folder: str, core: Causal2Vec, passages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_model = Causal2VecEmbedding(folder, dtype="float32", embed_batch_size=64)
    sizes: list[int] = []
    embed = Causal2VecEmbedding._get_text_embeddings
    monkeypatch.setattr(
        Causal2VecEmbedding,
        "_get_text_embeddings",
        lambda self, texts: (sizes.append(len(texts)), embed(self, texts))[1],
    )
    expected = core.encode_document(passages)
    np.testing.assert_allclose(embed_model.get_text_embedding_batch(passages, show_progress=True), expected, atol=1e-5)
    assert sizes == [64, 64, 64, 8]
    np.testing.assert_allclose(embed_model.get_text_embedding(passages[0]), expected[0], atol=1e-5)
    query = core.encode_query(["a heap"])[0]
    np.testing.assert_allclose(embed_model.get_query_embedding("a heap"), query, atol=1e-5)

    async def all_async() -> tuple[list[list[float]], list[float], list[float]]:
        return (
            await embed_model.aget_text_embedding_batch(passages[:20]),
            await embed_model.aget_text_embedding(passages[0]),
            await embed_model.aget_query_embedding("a heap"),
        )

    batch, one, query_vector = asyncio.run(all_async())
    np.testing.assert_allclose(batch, expected[:20], atol=1e-5)
    np.testing.assert_allclose(one, expected[0], atol=1e-5)
    np.testing.assert_allclose(query_vector, query, atol=1e-5)
    assert embed_model.get_text_embedding_batch([]) == []
    assert Causal2VecEmbedding(folder, dtype="float32").embed_batch_size == 256


def test_settings_are_passed_to_the_model(folder: str, core: Causal2Vec) -> None:
    with_options = Causal2VecEmbedding(model=core, query_instruction="", text_instruction="read", truncate_dim=16)
    expected = core.encode_query(["a"], instruction="", truncate_dim=16)[0]
    np.testing.assert_allclose(with_options.get_query_embedding("a"), expected, atol=1e-6)
    expected = core.encode_document(["a"], instruction="read", truncate_dim=16)[0]
    np.testing.assert_allclose(with_options.get_text_embedding("a"), expected, atol=1e-6)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Causal2VecEmbedding(folder, querry_instruction="typo")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="keyed by the text alone"):
        Causal2VecEmbedding(folder, embeddings_cache=SimpleKVStore())
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string"):
        with_options.get_text_embedding_batch(["a", None])  # type: ignore[list-item]


def test_an_object_is_rebuilt_from_its_saved_settings(folder: str, core: Causal2Vec) -> None:
    embed_model = Causal2VecEmbedding(folder, dtype="float32", truncate_dim=16, embed_batch_size=7)
    for again in (
        Causal2VecEmbedding.from_dict(embed_model.to_dict()),
        Causal2VecEmbedding.from_json(embed_model.to_json()),
    ):
        assert again.to_dict() == embed_model.to_dict()
        assert again.embed_batch_size == 7
        np.testing.assert_array_equal(again.get_query_embedding("a"), embed_model.get_query_embedding("a"))
    with pytest.raises(ValueError, match=r"weights '0123' of .* which now has the weights"):
        Causal2VecEmbedding.from_dict(embed_model.to_dict() | {"weights_stamp": "0123"})
    with pytest.raises(ValueError, match="exists in memory only"):
        Causal2VecEmbedding.from_dict(Causal2VecEmbedding(model=tiny_model()).to_dict())


def test_a_name_together_with_a_loaded_model_is_refused(folder: str, core: Causal2Vec) -> None:
    for name, value in {"model_name": folder, "revision": "main", "device": "cpu", "dtype": "float32"}.items():
        with pytest.raises(ValueError, match=f"not both: model and {name}"):
            Causal2VecEmbedding(model=core, **{name: value})


def test_a_rate_limiter_is_asked_before_every_call(core: Causal2Vec) -> None:
    class Counter(BaseRateLimiter):
        calls = 0

        def acquire(self, num_tokens: int = 0) -> None:
            self.calls += 1

        async def async_acquire(self, num_tokens: int = 0) -> None:
            self.calls += 1

    counter = Counter()
    embed_model = Causal2VecEmbedding(model=core, rate_limiter=counter, embed_batch_size=2)
    embed_model.get_query_embedding("a")
    embed_model.get_text_embedding_batch(["a", "b", "c"])
    asyncio.run(embed_model.aget_query_embedding("a"))
    assert counter.calls == 4


def test_retrieval_equals_that_of_a_vector_index(
    folder: str, core: Causal2Vec, passages: list[str], queries: list[str], tmp_path: Path
) -> None:
    vector_index = VectorIndex(tmp_path, core)
    vector_index.add(SourceDocument(text, str(i)) for i, text in enumerate(passages))
    assert max(core.count_tokens(passages)) <= core.max_tokens, "each passage must be one chunk and one node"
    nodes = nodes_of(passages)
    collection = chromadb.EphemeralClient().create_collection(
        f"t{uuid4().hex}", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )
    context = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    for storage in (None, context):
        index = VectorStoreIndex(
            nodes, embed_model=Causal2VecEmbedding(folder, dtype="float32"), storage_context=storage
        )
        retriever = index.as_retriever(similarity_top_k=10)
        for query in queries:
            ids = [int(found.node.node_id) for found in retriever.retrieve(query)]
            found = vector_index.search(query, top_k=len(passages), mode="dense")
            scores = {int(hit.metadata["source"]): hit.score for hit in found}
            assert len(ids) == 10
            assert_ranked(ids, np.array([scores[i] for i in range(len(passages))]))


def test_a_query_engine_answers_with_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_embed_model", None)
    Settings.embed_model = Causal2VecEmbedding()
    documents = [
        Document(text="Bread rises because yeast eats the sugar in the dough and gives off gas.", id_="bread"),
        Document(text="The moon turns once on its axis for each time it goes around the earth.", id_="moon"),
    ]
    engine = VectorStoreIndex.from_documents(documents).as_query_engine(llm=MockLLM(), similarity_top_k=1)
    answer = engine.query("What makes dough grow in the oven?")
    assert [found.node.ref_doc_id for found in answer.source_nodes] == ["bread"]
    assert "yeast eats the sugar" in str(answer)


def test_embedding_events_are_sent(folder: str) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    embed_model = Causal2VecEmbedding(
        folder, dtype="float32", embed_batch_size=2, callback_manager=CallbackManager([handler])
    )
    embed_model.get_text_embedding_batch(["a", "b", "c"])
    assert len(handler.get_event_pairs(CBEventType.EMBEDDING)) == 2


def test_the_ingestion_cache_does_not_mix_models_and_the_docstore_skips_known_texts(folder: str) -> None:
    cache = IngestionCache()
    embeddings: list[list[float]] = []
    for model in (tiny_model(), tiny_model(seed=1), tiny_model()):
        pipeline = IngestionPipeline(transformations=[Causal2VecEmbedding(model=model)], cache=cache)
        (node,) = pipeline.run(nodes=[TextNode(text="the same text", id_="n")])
        embeddings.append(list(node.embedding or []))
    assert embeddings[0] == embeddings[2]
    assert embeddings[0] != embeddings[1], "another model's vector came out of the cache"

    collection = chromadb.EphemeralClient().create_collection(f"t{uuid4().hex}", embedding_function=None)
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), Causal2VecEmbedding(folder)],
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
        vector_store=ChromaVectorStore(chroma_collection=collection),
    )
    documents = [Document(text=f"text {i}", id_=str(i)) for i in range(6)]
    assert len(pipeline.run(documents=documents)) == 6
    assert len(pipeline.run(documents=[*documents[:4], Document(text="new", id_="new")])) == 1
    assert collection.count() == 5


def test_workers_load_the_model_by_name(folder: str, core: Causal2Vec) -> None:
    embed_model = Causal2VecEmbedding(folder, device="cpu", dtype="float32")
    assert len(pickle.dumps(embed_model)) < 10_000, "the pickle must not contain the weights"
    pipeline = IngestionPipeline(transformations=[embed_model])
    nodes = pipeline.run(nodes=nodes_of(["a", "b", "c", "d"]), num_workers=2)  # starts two processes
    expected = core.encode_document(["a", "b", "c", "d"])
    np.testing.assert_allclose([node.embedding for node in nodes], expected, atol=1e-5)


def test_stored_objects_refuse_other_weights_and_addresses(tmp_path: Path) -> None:
    tiny_model(seed=0).save_pretrained(tmp_path / "model")
    embed_model = Causal2VecEmbedding(str(tmp_path / "model"), dtype="float32")
    pickled, stored = pickle.dumps(embed_model), embed_model.to_dict()
    assert Causal2VecEmbedding.from_dict(stored).weights_stamp == embed_model.weights_stamp
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    embedders.release_shared_models()  # as in a new process
    with pytest.raises(ValueError, match="trained or replaced since"):
        Causal2VecEmbedding.from_dict(stored)
    with pytest.raises(ValueError, match="trained or replaced since"):
        pickle.loads(pickled).get_query_embedding("a heap")
    with recording_server() as (address, requests):
        with pytest.raises(ValueError, match="address that comes out of stored data is not opened"):
            Causal2VecEmbedding.from_dict(stored | {"model_name": address, "device": None, "dtype": None})
        assert requests == []
    in_memory = Causal2VecEmbedding(model=tiny_model())
    with pytest.raises(ValueError, match="exists in memory only"):
        Causal2VecEmbedding.from_dict(in_memory.to_dict())


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_a_retriever_gives_the_hits_of_the_index(mode: Any, tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, Letters())
    index.add(numbered(20))
    query, options = "a passage about topic 3", {"where": {"n": {"$lt": 9}}, "group_by": "source"}
    retriever = C2VRetriever(index, similarity_top_k=2, mode=mode, **options)
    expected = index.search(query, 2, mode=mode, **options)
    assert len(expected) == 2
    for nodes in (retriever.retrieve(query), asyncio.run(retriever.aretrieve(query))):
        assert [(one.node_id, one.text, one.score) for one in nodes] == [(h.id, h.text, h.score) for h in expected]
        assert [one.metadata for one in nodes] == [hit.metadata for hit in expected]


def test_a_retriever_gives_diverse_nodes_and_the_text_around_them(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, Letters())
    texts = ("One two.", "Three four.", "Five six.")
    index.write([Chunk(text, text, {"source": "a", "start": 20 * at}) for at, text in enumerate(texts)])
    (found,) = C2VRetriever(index, similarity_top_k=1, neighbours=1, where={"start": 20}).retrieve("Three")
    assert (found.text.split(), found.metadata["passage"]) == (" ".join(texts).split(), "Three four.")
    assert found.node.get_content(MetadataMode.LLM).count("Three four.") == 1
    retriever = C2VRetriever(index, similarity_top_k=2, mmr=0.1)
    assert [one.node_id for one in retriever.retrieve("Three")] == [h.id for h in index.search("Three", 2, mmr=0.1)]


def test_a_retriever_reranks(tmp_path: Path) -> None:
    def backwards(query: str, texts: Any) -> list[int]:
        return list(range(len(texts)))

    index = VectorIndex(tmp_path, Letters())
    index.add(numbered(20))
    expected = index.search("topic 3", 2, rerank=backwards, rerank_depth=8)
    assert [hit.id for hit in expected] == [hit.id for hit in index.search("topic 3", 8)[:5:-1]]
    assert [
        one.node_id
        for one in C2VRetriever(index, similarity_top_k=2, rerank=backwards, rerank_depth=8).retrieve("topic 3")
    ] == [hit.id for hit in expected]
