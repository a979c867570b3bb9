"""OpenAI's clients and `RemoteModel` get the vectors of `Causal2Vec` from a running server."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
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
from c2v_rag.remote import API_KEY_VARIABLE, MAX_PARALLEL_REQUESTS, ApiKeyError, opened_model
from c2v_rag.server.api import Limits, create_app
from chroma_c2v import Causal2VecEmbeddingFunction
from langchain_c2v import Causal2VecEmbeddings
from tests.server.serving import serving
from tests.tiny import TEXTS, tiny_model

KEY = "open sesame"
WHOLE = [text for text in TEXTS if len(text) < 200]  # texts that no part of the model cuts


@pytest.fixture(scope="module")
def model() -> Causal2Vec:
    return tiny_model(encoder_max_length=96)


@pytest.fixture(scope="module")
def url(model: Causal2Vec) -> Iterator[str]:
    with serving(create_app(model, name="tiny", api_keys=[KEY], limits=Limits(inputs=64))) as url:
        yield url


@pytest.fixture
def remote(url: str) -> RemoteModel:
    return RemoteModel(url, KEY)


def test_openais_client_gets_the_models_vectors(url: str, model: Causal2Vec) -> None:
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


def test_langchains_openai_embeddings_get_the_models_vectors(url: str, model: Causal2Vec) -> None:
    settings: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": KEY, "check_embedding_ctx_length": False}
    documents = OpenAIEmbeddings(model="tiny", **settings).embed_documents(WHOLE)
    np.testing.assert_allclose(documents, model.encode_document(WHOLE), atol=1e-5)
    query = OpenAIEmbeddings(model="tiny:query", **settings).embed_query(WHOLE[0])
    np.testing.assert_allclose([query], model.encode_query(WHOLE[:1]), atol=1e-5)


def test_llama_indexs_openai_like_embedding_gets_the_models_vectors(url: str, model: Causal2Vec) -> None:
    settings: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": KEY}
    texts = [text for text in WHOLE if text.strip()]  # LlamaIndex refuses empty texts
    documents = OpenAILikeEmbedding(model_name="tiny", **settings).get_text_embedding_batch(texts)
    np.testing.assert_allclose(documents, model.encode_document(texts), atol=1e-5)
    query = OpenAILikeEmbedding(model_name="tiny:query", **settings).get_query_embedding(texts[0])
    np.testing.assert_allclose([query], model.encode_query(texts[:1]), atol=1e-5)


def test_a_remote_model_gives_the_results_of_the_served_model(remote: RemoteModel, model: Causal2Vec, url: str) -> None:
    many = [f"{text} {number}" for number in range(30) for text in TEXTS] + ["lone \ud800"]  # more than one request
    np.testing.assert_allclose(remote.encode_document(many), model.encode_document(many), atol=1e-5)
    np.testing.assert_allclose(remote.encode(iter(TEXTS)), model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(remote.encode_query(TEXTS), model.encode_query(TEXTS), atol=1e-5)
    for options in ({"instruction": ""}, {"instruction": "Find it"}, {"truncate_dim": 6}):
        embedded = remote.encode_query(TEXTS, **options)  # type: ignore[arg-type]
        np.testing.assert_allclose(embedded, model.encode_query(TEXTS, **options), atol=1e-5)  # type: ignore[arg-type]
    assert remote.encode([]).shape == (0, model.embedding_dim)
    assert remote.encode(TEXTS).dtype == np.float32
    assert (remote.embedding_dim, remote.max_tokens) == (model.embedding_dim, model.max_tokens)
    assert remote.count_tokens(many) == model.count_tokens(many)
    assert remote.token_ends(many) == model.token_ends(many)
    assert remote.stamp == model.stamp | {"name": url}
    for wrong in ("x", ["x", None]):
        with pytest.raises(TypeError, match="string"):
            remote.encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"from 1 to {model.embedding_dim}"):
        remote.encode(["x"], truncate_dim=model.embedding_dim + 1)
    with pytest.raises(ValueError, match="index 0 has"):
        remote.encode(["word " * 300], on_truncate="error")
    unpickled = pickle.loads(pickle.dumps(remote))
    np.testing.assert_allclose(unpickled.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_every_integration_works_with_a_remote_model(
    remote: RemoteModel, model: Causal2Vec, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, query = model.encode_document(WHOLE), model.encode_query(WHOLE[:1])
    langchain, llama = Causal2VecEmbeddings(model=remote), Causal2VecEmbedding(model=remote)
    np.testing.assert_allclose(langchain.embed_documents(WHOLE), documents, atol=1e-5)
    np.testing.assert_allclose([langchain.embed_query(WHOLE[0])], query, atol=1e-5)
    np.testing.assert_allclose(llama.get_text_embedding_batch(WHOLE), documents, atol=1e-5)
    np.testing.assert_allclose([llama.get_query_embedding(WHOLE[0])], query, atol=1e-5)

    # By the address alone too, which Chroma saves; the key is read from the environment.
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


def test_a_model_and_its_remote_model_can_share_an_index(
    remote: RemoteModel, model: Causal2Vec, tmp_path: Path
) -> None:
    # Words of several tokens, without and with spaces around them: only the tokenizers know where tokens end.
    words = "".join(f"Sentence\u00e9 number{number}, of-a_long.text " + "antidisestablish" * 3 for number in range(60))
    long = Document(words, "long.txt")
    report = VectorIndex(tmp_path, remote).add([long, Document("A heap.", "heap.txt")])
    assert report.added > 3
    local = VectorIndex(tmp_path, model)
    assert local.add([long]).unchanged == report.added - 1  # cut into the same chunks
    assert [hit.id for hit in local.search("heap")] == [hit.id for hit in VectorIndex(tmp_path, remote).search("heap")]
    app = SearchApp(tmp_path, remote)
    assert app.collections() == ["documents"]
    *_, found = app.search("heap", "documents", "Causal2Vec", "BM25", 3)
    assert "heap.txt" in found
    assert "Encoder alone" not in app.methods()


def test_an_unreachable_busy_or_replaced_server_is_a_clear_error(
    model: Causal2Vec, url: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="c2v-rag serve"):
        _ = RemoteModel(f"http://127.0.0.1:{closed_port}").stamp
    with pytest.raises(ApiKeyError, match=API_KEY_VARIABLE) as refused:
        _ = RemoteModel(url, "wrong").stamp
    assert not isinstance(refused.value, OSError), "PermissionError means that another process writes to a store"
    with pytest.raises(ValueError, match="http://"):
        RemoteModel("localhost:8000")
    network = httpx.HTTPTransport()
    with serving(create_app(tiny_model(seed=1), name="tiny")) as other:
        port = httpx.URL(url).port

        def send_to_port(request: httpx.Request) -> httpx.Response:
            request.url = request.url.copy_with(port=port)
            return network.handle_request(request)

        restarted = RemoteModel(url, KEY, transport=httpx.MockTransport(send_to_port))
        assert len(restarted.encode(["x"])) == 1
        port = httpx.URL(other).port  # as if another model had been started at the same address
        with pytest.raises(ValueError, match="another one now"):
            restarted.encode(["x"])

    requests: list[httpx.Request] = []

    def busy_twice(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if len(requests) == 1:
            raise httpx.ConnectError("reset")
        if len(requests) == 2:
            return httpx.Response(503, json={"error": {"message": "busy"}})
        return network.handle_request(request)

    assert RemoteModel(url, KEY, transport=httpx.MockTransport(busy_twice)).embedding_dim == model.embedding_dim
    assert len(requests) == 3
    busy = httpx.MockTransport(lambda request: httpx.Response(503, text="<html>busy"))
    with pytest.raises(ConnectionError, match="answered 503: <html>busy"):
        RemoteModel(url, KEY, transport=busy).encode(["x"])
    network.close()


def remote_model(handler: Callable[[httpx.Request], httpx.Response], **settings: Any) -> RemoteModel:
    """A `RemoteModel` whose requests `handler` answers. Its model has 1 column and takes 2 texts a request."""
    model = {"id": "m", "embedding_dim": 1, "max_tokens": 9, "max_inputs": 2, "stamp": {"weights": "w"}}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [model]})
        return handler(request)

    return RemoteModel("http://server.test", KEY, transport=httpx.MockTransport(answer), **settings)


def texts_of(request: httpx.Request) -> list[str]:
    texts: list[str] = json.loads(request.content)["input"]
    return texts


def vectors(texts: list[str]) -> httpx.Response:
    """A response whose vectors have one column: the number in each text."""
    rows = [base64.b64encode(np.array([float(text)], "<f4").tobytes()).decode() for text in texts]
    return httpx.Response(200, json={"data": [{"embedding": row} for row in rows]})


def test_requests_of_one_call_run_at_the_same_time_and_keep_their_order() -> None:
    all_sent = threading.Barrier(MAX_PARALLEL_REQUESTS)
    texts = [str(number) for number in range(2 * MAX_PARALLEL_REQUESTS)]
    last_answered = threading.Event()

    def handler(request: httpx.Request) -> httpx.Response:
        all_sent.wait(30)
        if texts[-1] in texts_of(request):
            last_answered.set()
        assert last_answered.wait(30), "the last request is answered first"
        return vectors(texts_of(request))

    assert remote_model(handler).encode_document(iter(texts))[:, 0].tolist() == [float(text) for text in texts]


def test_an_older_server_that_does_not_know_where_tokens_end_is_a_clear_error() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"counts": [3] * len(texts_of(request)), "max_tokens": 9})

    old = remote_model(handler)
    assert old.count_tokens(["a", "b"]) == [3, 3]
    with pytest.raises(ValueError, match="update the server"):
        old.token_ends(["a", "b"])


def test_an_error_of_one_request_is_raised() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if "5" in texts_of(request):
            return httpx.Response(400, json={"error": {"message": "no fives"}})
        return vectors(texts_of(request))

    with pytest.raises(ValueError, match="answered 400: no fives"):
        remote_model(handler).encode_document([str(number) for number in range(20)])
    with pytest.raises(TypeError, match=r"texts\[3\]"):
        remote_model(handler).encode_document(["0", "1", "2", None])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("error", "tries"),
    [(httpx.ReadTimeout, 1), (httpx.WriteTimeout, 1), (httpx.ConnectTimeout, 5), (httpx.ReadError, 5)],
)
def test_a_request_that_the_server_may_be_working_on_is_not_sent_again(
    error: type[httpx.TransportError], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    sent: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        raise error("away", request=request)

    with pytest.raises(ConnectionError, match="was not asked again" if tries == 1 else "Is `c2v-rag serve` running"):
        remote_model(handler).encode_query(["1"])
    assert len(sent) == tries


def test_retries_end_when_the_time_for_a_request_is_over() -> None:
    timeouts: list[dict[str, float]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"])
        time.sleep(0.06)
        return httpx.Response(503)

    with pytest.raises(ConnectionError, match="answered 503"):
        remote_model(handler, timeout=0.1).encode_query(["1"])
    assert len(timeouts) <= 2
    assert all(timeout["read"] <= 0.1 for timeout in timeouts)


def test_the_key_is_not_sent_to_the_target_of_a_redirect() -> None:
    requests: list[tuple[str, str]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append((request.url.host, request.headers["Authorization"]))
        return httpx.Response(307, headers={"Location": "http://elsewhere.test/v1/embeddings"})

    remote = remote_model(handler)
    with pytest.raises(ValueError, match=r"redirects to 'http://elsewhere\.test.* Give the final address"):
        remote.encode_query(["1"])
    assert requests == [("server.test", f"Bearer {KEY}")]
    assert KEY not in repr(remote)
    with pytest.raises(ValueError, match="user or password") as refused:
        RemoteModel("http://me:secret@server.test")
    assert "secret" not in str(refused.value)


def test_async_methods_give_the_same_vectors_and_leave_the_event_loop_free(
    remote: RemoteModel, model: Causal2Vec
) -> None:
    all_sent = threading.Barrier(8)

    def handler(request: httpx.Request) -> httpx.Response:
        all_sent.wait(30)
        return vectors(texts_of(request))

    waits_for_8 = remote_model(handler)

    async def ask() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        at_once = await asyncio.gather(*(waits_for_8.aencode_query([str(number)]) for number in range(8)))
        return at_once, await remote.aencode_query(WHOLE, instruction="Find it"), await remote.aencode_document(WHOLE)

    at_once, queries, documents = asyncio.run(ask())
    assert [float(row[0, 0]) for row in at_once] == list(range(8))
    np.testing.assert_allclose(queries, model.encode_query(WHOLE, instruction="Find it"), atol=1e-5)
    np.testing.assert_allclose(documents, model.encode_document(WHOLE), atol=1e-5)
    assert len(pickle.loads(pickle.dumps(remote)).encode(["x"])) == 1


def test_opened_model_returns_the_newest_model_of_an_address_while_it_is_used() -> None:
    address = "http://once.test"
    assert opened_model(address) is None
    first = RemoteModel(address, KEY)
    later = RemoteModel(address)
    assert opened_model(address) is later
    del later
    assert opened_model(address) is first
    del first
    assert opened_model(address) is None
