"""Programs that know nothing of c2v_rag, and `RemoteModel`, get the core's vectors from a running server."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import httpx
import numpy as np
import pytest
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.c2v import Causal2VecEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from openai import NotFoundError, OpenAI

from c2v_rag import Document, RemoteModel, VectorIndex, load_embedder
from c2v_rag.app.page import SearchApp
from c2v_rag.model import Causal2Vec
from c2v_rag.remote import API_KEY_VARIABLE
from c2v_rag.server.api import Limits, create_app
from chroma_c2v import Causal2VecEmbeddingFunction
from langchain_c2v import Causal2VecEmbeddings
from tests.server.serving import serving
from tests.tiny import TEXTS, tiny_model

KEY = "open sesame"
WHOLE = [text for text in TEXTS if len(text) < 200]  # what no part of the model cuts


@pytest.fixture(scope="module")
def model() -> Causal2Vec:
    return tiny_model()


@pytest.fixture(scope="module")
def url(model: Causal2Vec) -> Iterator[str]:
    with serving(create_app(model, name="tiny", api_keys=[KEY], limits=Limits(inputs=64))) as url:
        yield url


@pytest.fixture
def remote(url: str) -> RemoteModel:
    return RemoteModel(url, KEY)


def test_openais_client(url: str, model: Causal2Vec) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=KEY)
    for name, expected in (("tiny", model.encode_document(WHOLE)), ("tiny:query", model.encode_query(WHOLE))):
        for encoding in ("float", "base64"):
            answer = client.embeddings.create(model=name, input=WHOLE, encoding_format=encoding)  # type: ignore[arg-type]
            found: list[Any] = [one.embedding for one in answer.data]
            if encoding == "base64":
                found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
            np.testing.assert_allclose(found, expected, atol=1e-5)
    short = client.embeddings.create(model="tiny", input="Ask.", dimensions=8).data[0].embedding
    np.testing.assert_allclose([short], model.encode_document(["Ask."], truncate_dim=8), atol=1e-5)
    assert [one.id for one in client.models.list()] == ["tiny"]
    with pytest.raises(NotFoundError, match="There is no model 'text-embedding-3-small' here"):
        client.embeddings.create(model="text-embedding-3-small", input="x")


def test_langchains_openai_embeddings(url: str, model: Causal2Vec) -> None:
    settings: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": KEY, "check_embedding_ctx_length": False}
    documents = OpenAIEmbeddings(model="tiny", **settings).embed_documents(WHOLE)
    np.testing.assert_allclose(documents, model.encode_document(WHOLE), atol=1e-5)
    query = OpenAIEmbeddings(model="tiny:query", **settings).embed_query(WHOLE[0])
    np.testing.assert_allclose([query], model.encode_query(WHOLE[:1]), atol=1e-5)


def test_llama_indexs_openai_like_embedding(url: str, model: Causal2Vec) -> None:
    settings: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": KEY}
    texts = [text for text in WHOLE if text.strip()]  # it refuses empty ones
    documents = OpenAILikeEmbedding(model_name="tiny", **settings).get_text_embedding_batch(texts)
    np.testing.assert_allclose(documents, model.encode_document(texts), atol=1e-5)
    query = OpenAILikeEmbedding(model_name="tiny:query", **settings).get_query_embedding(texts[0])
    np.testing.assert_allclose([query], model.encode_query(texts[:1]), atol=1e-5)


def test_a_remote_model_is_the_model(remote: RemoteModel, model: Causal2Vec, url: str) -> None:
    many = [f"{text} {number}" for number in range(30) for text in TEXTS] + ["lone \ud800"]  # more than one request
    np.testing.assert_allclose(remote.encode_document(many), model.encode_document(many), atol=1e-5)
    np.testing.assert_allclose(remote.encode(iter(TEXTS)), model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(remote.encode_query(TEXTS), model.encode_query(TEXTS), atol=1e-5)
    for options in ({"instruction": ""}, {"instruction": "Find it"}, {"truncate_dim": 6}):
        asked = remote.encode_query(TEXTS, **options)  # type: ignore[arg-type]
        np.testing.assert_allclose(asked, model.encode_query(TEXTS, **options), atol=1e-5)  # type: ignore[arg-type]
    assert remote.encode([]).shape == (0, model.embedding_dim)
    assert remote.encode(TEXTS).dtype == np.float32
    assert (remote.embedding_dim, remote.max_tokens) == (model.embedding_dim, model.max_tokens)
    assert remote.count_tokens(many) == model.count_tokens(many)
    assert remote.stamp == model.stamp | {"name": url}
    for wrong in ("x", ["x", None]):
        with pytest.raises(TypeError, match="string"):
            remote.encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"from 1 to {model.embedding_dim}"):
        remote.encode(["x"], truncate_dim=model.embedding_dim + 1)
    with pytest.raises(ValueError, match="index 0 has"):
        remote.encode(["word " * 300], on_truncate="error")
    travelled = pickle.loads(pickle.dumps(remote))
    np.testing.assert_allclose(travelled.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_every_integration_takes_a_remote_model(
    remote: RemoteModel, model: Causal2Vec, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, query = model.encode_document(WHOLE), model.encode_query(WHOLE[:1])
    langchain, llama = Causal2VecEmbeddings(model=remote), Causal2VecEmbedding(model=remote)
    np.testing.assert_allclose(langchain.embed_documents(WHOLE), documents, atol=1e-5)
    np.testing.assert_allclose([langchain.embed_query(WHOLE[0])], query, atol=1e-5)
    np.testing.assert_allclose(llama.get_text_embedding_batch(WHOLE), documents, atol=1e-5)
    np.testing.assert_allclose([llama.get_query_embedding(WHOLE[0])], query, atol=1e-5)

    # By the address alone, too, which is what Chroma keeps; the key is found in the environment.
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    np.testing.assert_allclose(Causal2VecEmbeddings(name_or_path=url).embed_documents(WHOLE), documents, atol=1e-5)
    client = chromadb.EphemeralClient()
    client.create_collection("by_address", embedding_function=Causal2VecEmbeddingFunction(model=remote))
    collection = client.get_collection("by_address")
    ids = [str(number) for number in range(len(WHOLE))]
    collection.add(ids=ids, documents=[text or "-" for text in WHOLE])
    found = collection.get(ids=ids[:1], include=["embeddings"])["embeddings"]
    np.testing.assert_allclose(found, documents[:1], atol=1e-5)
    with pytest.raises(ValueError, match="device: the server"):
        load_embedder(url, device="cpu")


def test_an_index_of_either_is_one_of_the_other(remote: RemoteModel, model: Causal2Vec, tmp_path: Path) -> None:
    long = Document(" ".join(f"Sentence number {number} of a long text." for number in range(60)), "long.txt")
    report = VectorIndex(tmp_path, remote).add([long, Document("A heap.", "heap.txt")])
    assert report.added > 3
    here = VectorIndex(tmp_path, model)
    assert here.add([long]).unchanged == report.added - 1  # cut into the same chunks
    assert [hit.id for hit in here.search("heap")] == [hit.id for hit in VectorIndex(tmp_path, remote).search("heap")]
    app = SearchApp(tmp_path, remote)
    assert app.collections() == ["documents"]
    *_, found = app.search("heap", "documents", "Causal2Vec", "BM25", 3)
    assert "heap.txt" in found
    assert "Encoder alone" not in app._methods()


def test_who_is_away_busy_or_another_is_named(
    model: Causal2Vec, url: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="c2v-rag serve"):
        _ = RemoteModel(f"http://127.0.0.1:{closed_port}").stamp
    with pytest.raises(PermissionError, match=API_KEY_VARIABLE):
        _ = RemoteModel(url, "wrong").stamp
    with pytest.raises(ValueError, match="http://"):
        RemoteModel("localhost:8000")
    with serving(create_app(tiny_model(seed=1), name="tiny")) as other:
        moved = RemoteModel(url, KEY)
        assert len(moved.encode(["x"])) == 1
        moved._client.base_url = httpx.URL(other)  # as if another model had been started at the same address
        with pytest.raises(ValueError, match="another one now"):
            moved.encode(["x"])

    remote, asked = RemoteModel(url, KEY), []
    send = remote._client.request

    def busy_twice(*args: Any, **kwargs: Any) -> httpx.Response:
        asked.append(args)
        if len(asked) == 1:
            raise httpx.ConnectError("reset")
        return httpx.Response(503, json={"error": {"message": "busy"}}) if len(asked) == 2 else send(*args, **kwargs)

    monkeypatch.setattr(remote._client, "request", busy_twice)
    assert remote.embedding_dim == model.embedding_dim
    assert len(asked) == 3
    monkeypatch.setattr(remote._client, "request", lambda *args, **kwargs: httpx.Response(503, text="<html>busy"))
    with pytest.raises(ConnectionError, match="answered 503: <html>busy"):
        remote.encode(["x"])
