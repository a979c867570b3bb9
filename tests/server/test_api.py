"""The server's answers: the vectors of `Causal2Vec`, and a clear error for every request that it refuses."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from c2v_rag.model import Causal2Vec
from c2v_rag.server.api import Limits, create_app
from tests.server.serving import serving
from tests.tiny import TEXTS, tiny_model

KEY = "correct horse"


@pytest.fixture(scope="module")
def model() -> Causal2Vec:
    return tiny_model()


@pytest.fixture(scope="module")
def client(model: Causal2Vec) -> Iterator[httpx.Client]:
    limits = Limits(body_bytes=100_000, inputs=64, tokens=200, waiting=256)
    with (
        serving(create_app(model, name="tiny", limits=limits)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def embed(client: httpx.Client, texts: str | list[str], **fields: Any) -> np.ndarray:
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": texts, "truncate": True, **fields})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert [one["index"] for one in found["data"]] == list(range(len(found["data"])))
    if fields.get("encoding_format") == "base64":
        return np.stack([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in found["data"]])
    return np.array([one["embedding"] for one in found["data"]], dtype=np.float32)


def test_a_request_is_tokenised_once(client: httpx.Client, model: Causal2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenised: dict[str, list[str]] = {"llm": [], "encoder": []}
    for part, texts_of_part in tokenised.items():
        tokenize = getattr(model.tokenizer, f"_tokenize_for_{part}")

        def counted(texts: list[str], *, found: list[str] = texts_of_part, tokenize: Any = tokenize) -> Any:
            found += texts
            return tokenize(texts)

        monkeypatch.setattr(model.tokenizer, f"_tokenize_for_{part}", counted)
    texts = ["one text", "another", "a third"]
    embed(client, texts)
    assert tokenised == {"llm": texts, "encoder": texts}
    embed(client, texts)
    assert tokenised == {"llm": texts * 2, "encoder": texts * 2}, "the ids of the first request were used once"


def test_vectors_equal_those_of_the_model(client: httpx.Client, model: Causal2Vec) -> None:
    documents, queries = model.encode_document(TEXTS), model.encode_query(TEXTS)
    np.testing.assert_allclose(embed(client, TEXTS), documents, atol=1e-5)
    np.testing.assert_allclose(embed(client, TEXTS, model="tiny:query"), queries, atol=1e-5)
    for input_type in ("query", "search_query"):
        np.testing.assert_allclose(embed(client, TEXTS, input_type=input_type), queries, atol=1e-5)
    for input_type in ("document", "search_document", "passage"):
        embedded = embed(client, TEXTS, model="tiny:query", input_type=input_type)
        np.testing.assert_allclose(embedded, documents, atol=1e-5)
    with_instruction = model.encode_query(TEXTS, instruction="Find the recipe")
    embedded = embed(client, TEXTS, input_type="query", instruction="Find the recipe")
    np.testing.assert_allclose(embedded, with_instruction, atol=1e-5)
    short = model.encode_document(TEXTS, truncate_dim=16)
    np.testing.assert_allclose(embed(client, TEXTS, dimensions=16), short, atol=1e-5)
    assert np.array_equal(embed(client, TEXTS[0], encoding_format="base64"), model.encode_document(TEXTS[:1]))
    content = b'{"model": "tiny", "input": "lone \\ud800"}'
    lone = client.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"}).json()
    np.testing.assert_allclose(lone["data"][0]["embedding"], model.encode_document(["lone \ud800"])[0], atol=1e-5)
    assert np.array_equal(embed(client, TEXTS[0]), model.encode_document(TEXTS[:1]))


def test_usage_counts_tokens_and_models_are_listed(client: httpx.Client, model: Causal2Vec) -> None:
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": TEXTS[:3], "truncate": True}).json()
    assert answer["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), sum(model.count_tokens(TEXTS[:3])))
    (listed,) = client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["embedding_dim"]) == ("tiny", model.embedding_dim)
    assert listed["stamp"]["weights"] == model.stamp["weights"]
    counted = client.post("/v1/tokenize", json={"model": "tiny", "input": TEXTS}).json()
    assert counted == {"counts": model.count_tokens(TEXTS), "max_tokens": model.max_tokens, "ends": None}
    asked = client.post("/v1/tokenize", json={"model": "tiny", "input": TEXTS, "ends": True}).json()
    assert asked == counted | {"counts": None, "ends": model.token_ends(TEXTS)}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 422, "JSON"),
        (b"\xff\xfe", 422, "cannot be read"),
        ({"input": "x"}, 422, "model"),
        ({"model": "tiny"}, 422, "input"),
        ({"model": "tiny", "input": []}, 422, "input"),
        ({"model": "tiny", "input": [1, 2]}, 422, "check_embedding_ctx_length=False"),
        ({"model": "tiny", "input": [[1, 2]]}, 422, "send text"),
        ({"model": "tiny", "input": ["x", None]}, 422, "input.1"),
        ({"model": "tiny", "input": {"text": "x"}}, 422, "input"),
        (b'{"model": "\\ud800", "input": "x"}', 404, "'tiny'"),
        ({"model": "tiny", "input": "x", "dimensions": 0}, 422, "dimensions"),
        ({"model": "tiny", "input": "x", "dimensions": 10**6}, 400, "at most 64"),
        ({"model": "tiny", "input": "x", "encoding_format": "hex"}, 422, "encoding_format"),
        ({"model": "tiny", "input": "x", "input_type": "classification"}, 422, "input_type"),
        ({"model": "tiny", "input": "x", "instruction": "i" * 4001}, 422, "instruction"),
        ({"model": "/etc/passwd", "input": "x"}, 404, "'tiny'"),
        ({"model": "tiny:document", "input": "x"}, 404, "/v1/models"),
        ({"model": "tiny", "input": ["x"] * 65}, 400, "at most 64"),
        ({"model": "tiny", "input": ["short", "word " * 300]}, 400, "index 1"),
        ({"model": "tiny", "input": "heap " * 70}, 400, "at most 64"),  # the decoder reads 256, the encoder 64
        ({"model": "tiny", "input": "x" * 100_001}, 413, "100000 bytes"),
    ],
)
def test_a_refused_request_gets_the_status_and_the_reason(
    client: httpx.Client, body: Any, status: int, words: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_body_without_a_content_length_is_limited_too(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"model": "tiny", "input": "'
        for _ in range(200):
            yield b"x" * 1000
        yield b'"}'

    answer = client.post("/v1/embeddings", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_a_request_without_a_valid_key_is_refused_if_there_are_keys(model: Causal2Vec) -> None:
    with serving(create_app(model, name="tiny", api_keys=["other", KEY])) as url:
        for path in ("/health", "/ready"):
            assert httpx.get(url + path).status_code == 200
        for value in ("", "Bearer wrong", f"Bearer {KEY[:-1]}", b"Bearer \xff", "other", f"Basic {KEY}", "Bearer"):
            given: Any = {"Authorization": value} if value else {}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/no/such/path"):
                refused = httpx.get(url + path, headers=given)
                assert refused.status_code == 401
                assert refused.headers["WWW-Authenticate"] == "Bearer"
                assert "Authorization: Bearer KEY" in refused.json()["error"]["message"]
            body = {"model": "tiny", "input": "x"}
            assert httpx.post(f"{url}/v1/embeddings", json=body, headers=given).status_code == 401
        for value in (f"Bearer {KEY}", "Bearer other", f"bearer {KEY}", "BEARER other"):
            for path in ("/v1/models", "/openapi.json"):
                assert httpx.get(url + path, headers={"Authorization": value}).status_code == 200


def test_the_body_of_a_request_without_a_key_is_not_read(model: Causal2Vec) -> None:
    with serving(create_app(model, name="tiny", api_keys=[KEY])) as url:
        malformed = httpx.post(f"{url}/v1/embeddings", content=b"{", headers={"Content-Type": "application/json"})
        assert malformed.status_code == 401
        host, port = url.removeprefix("http://").split(":")
        head = ["POST /v1/embeddings HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            # Only the headers are sent, none of the ten million bytes of the body.
            connection.sendall("\r\n".join([*head, "Content-Length: 10000000", "", ""]).encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 401")
        metrics = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        assert 'c2v_requests_total{path="/v1/embeddings",status="401"} 2.0' in metrics


@pytest.mark.parametrize("field", ["encoding_format", "dimensions", "user", "input_type", "instruction", "truncate"])
def test_a_null_field_equals_a_missing_field(client: httpx.Client, model: Causal2Vec, field: str) -> None:
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": TEXTS[0], field: None})
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose(answer.json()["data"][0]["embedding"], model.encode_document(TEXTS[:1])[0], atol=1e-5)


def test_fields_of_other_servers_are_ignored(client: httpx.Client, model: Causal2Vec) -> None:
    extras = {"extra_body": {"a": 1}, "timeout": 600, "metadata": None, "caching": False, "user": 7}
    np.testing.assert_allclose(embed(client, TEXTS[:1], **extras), model.encode_document(TEXTS[:1]), atol=1e-5)
    counted = client.post("/v1/tokenize", json={"model": "tiny", "input": "x", "user": None})
    assert counted.status_code == 200


def test_a_model_name_that_ends_in_query_is_refused_at_start(model: Causal2Vec) -> None:
    with pytest.raises(ValueError, match="cannot be called 'foo:query'"):
        create_app(model, name="foo:query")


def test_a_request_for_an_unknown_host_is_refused(model: Causal2Vec) -> None:
    with serving(create_app(model, name="tiny", allowed_hosts=["Vectors.example"])) as url:
        for host in (
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[::1",
            "",
        ):
            refused = httpx.get(f"{url}/v1/models", headers={"Host": host})
            assert refused.status_code == 400, host
        assert "--allowed-host evil.example" in httpx.get(url, headers={"Host": "evil.example"}).text
        own = ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "192.168.1.9", "vectors.example:443")
        for host in own:
            assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200, host
    with serving(create_app(model, name="tiny", allowed_hosts=["*"])) as url:
        assert httpx.get(f"{url}/v1/models", headers={"Host": "any.example"}).status_code == 200


class Gate:
    """Makes a model's `encode_document` wait until `opened` is set. `reached`: a call waits. `calls`: its texts."""

    def __init__(self, model: Causal2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.calls: list[list[str]] = []
        encode = model.encode_document

        def encode_when_opened(texts: Iterable[str], **options: Any) -> np.ndarray:
            self.calls.append(list(texts))
            self.reached.set()
            assert self.opened.wait(60)
            return encode(self.calls[-1], **options)

        monkeypatch.setattr(model, "encode_document", encode_when_opened)


def test_requests_that_wait_are_embedded_in_one_batch(model: Causal2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)
    texts = [f"text {number}" for number in range(32)]
    with (
        serving(create_app(model, name="tiny")) as url,
        ThreadPoolExecutor(32) as pool,
        httpx.Client(timeout=60) as client,
    ):
        answers = [
            pool.submit(client.post, f"{url}/v1/embeddings", json={"model": "tiny", "input": one}) for one in texts
        ]
        while "c2v_waiting_inputs 32.0" not in client.get(f"{url}/metrics").text:
            time.sleep(0.01)
        gate.opened.set()
        vectors = [one.result().json()["data"][0]["embedding"] for one in answers]
        np.testing.assert_allclose(vectors, model.encode_document(texts), atol=1e-5)
        metrics = client.get(f"{url}/metrics").text
    counted = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.labels in ({}, {"kind": "document"}, {"path": "/v1/embeddings", "status": "200"})
    }
    assert counted["c2v_requests_total"] == counted["c2v_inputs_total"] == 32
    assert counted["c2v_tokens_total"] == sum(model.count_tokens(texts))
    assert counted["c2v_waiting_inputs"] == 0
    assert counted["c2v_batch_texts_count"] <= 3
    assert counted["c2v_batch_texts_sum"] == 32


def test_a_full_queue_refuses_and_a_client_that_disconnects_is_not_embedded(
    model: Causal2Vec, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(model, monkeypatch)
    app = create_app(model, name="tiny", limits=Limits(inputs=4, waiting=4))
    with serving(app) as url, ThreadPoolExecutor(4) as pool:
        body = {"model": "tiny", "input": ["waiting"]}
        waiting = pool.submit(httpx.post, f"{url}/v1/embeddings", json=body, timeout=60)
        assert gate.reached.wait(60)
        # The model is busy. A client sends three more texts and disconnects: its texts must not be embedded.
        host, port = url.removeprefix("http://").split(":")
        content = json.dumps({"model": "tiny", "input": ["left", "left", "left"]}).encode()
        head = ["POST /v1/embeddings HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head += [f"Content-Length: {len(content)}", "", ""]
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall("\r\n".join(head).encode() + content)
            while httpx.get(f"{url}/ready").status_code == 200:
                time.sleep(0.01)
            refused = httpx.post(f"{url}/v1/embeddings", json=body)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert "4 texts wait already" in refused.json()["error"]["message"]
        while httpx.get(f"{url}/ready").status_code != 200:  # until its places in the queue are free again
            time.sleep(0.01)
        gate.opened.set()
        assert waiting.result().status_code == 200
        assert httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).status_code == 200
    assert gate.calls == [["waiting"], ["waiting"]]


def test_an_answer_that_does_not_come_in_time_is_504(model: Causal2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)
    with serving(create_app(model, name="tiny", limits=Limits(seconds=0.2))) as url:
        late = httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": "held"}, timeout=60)
        gate.opened.set()
    assert late.status_code == 504
    assert "No answer within 0.2 s" in late.json()["error"]["message"]


def test_an_internal_error_is_500_and_the_next_request_is_answered(
    model: Causal2Vec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(texts: Iterable[str], **options: Any) -> np.ndarray:
        raise RuntimeError("a secret of the machine")

    with serving(create_app(model, name="tiny")) as url:
        with monkeypatch.context() as patch:
            patch.setattr(model, "encode_document", broken)
            failed = httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": "x"})
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "server_error"
        assert "secret" not in failed.text
        assert httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": "x"}).status_code == 200


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="could never be accepted"):
        Limits(inputs=10, waiting=9)
