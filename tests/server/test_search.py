"""`POST /v1/search`: the hits of `VectorIndex.search`, and a clear error for every request that it refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from c2v_rag import VectorIndex
from c2v_rag.model import Causal2Vec
from c2v_rag.server.api import Limits, create_app
from tests.plain import Letters, numbered
from tests.server.serving import serving
from tests.tiny import tiny_model

QUERY = "a passage about topic 3"


@pytest.fixture(scope="module")
def model() -> Causal2Vec:
    return tiny_model()


@pytest.fixture(scope="module")
def index(model: Causal2Vec, tmp_path_factory: pytest.TempPathFactory) -> VectorIndex:
    index = VectorIndex(store(tmp_path_factory), model)
    index.add(numbered(20))
    VectorIndex(store(tmp_path_factory), Letters(), "letters").add(numbered(3))
    return index


def store(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp() / "search-store"


@pytest.fixture(scope="module")
def client(model: Causal2Vec, index: VectorIndex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    app = create_app(model, name="tiny", limits=Limits(tokens=200), store=store(tmp_path_factory))
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3, "mode": "lexical"},
        {"top_k": 3, "mode": "hybrid", "group_by": "source", "offset": 1},
        {"where": {"n": {"$lt": 9}}, "min_score": -1.0},
        {"mmr": 0.3, "neighbours": 1, "mode": "dense"},
    ],
)
def test_hits_are_those_of_the_index(client: httpx.Client, index: VectorIndex, options: dict[str, Any]) -> None:
    answer = client.post("/v1/search", json={"query": QUERY, **options})
    assert answer.status_code == 200, answer.text
    hits, expected = answer.json()["hits"], index.search(QUERY, **options)
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    for hit, own in zip(hits, expected, strict=True):
        assert hit["score"] == pytest.approx(own.score, abs=1e-5)
        assert hit["scores"] == pytest.approx(dict(own.scores), abs=1e-5)
        assert (hit["text"], hit["metadata"]) == (own.text, own.metadata)
        assert (hit["before"], hit["after"]) == (own.before, own.after)
        assert hit["text"][hit["sentence"]["start"] : hit["sentence"]["end"]] == hit["sentence"]["text"] != ""
    assert answer.json()["collection"] == "documents"
    assert answer.headers["c2v-weights"] == index._model.stamp["weights"]


def test_sentences_can_be_left_out_and_searches_are_counted(client: httpx.Client) -> None:
    found = client.post("/v1/search", json={"query": QUERY, "mode": "lexical", "sentences": False}).json()
    assert [hit["sentence"] for hit in found["hits"]] == [None] * 5
    metrics = client.get("/metrics").text
    assert 'c2v_searches_total{mode="lexical"}' in metrics
    assert 'c2v_requests_total{path="/v1/search",status="200"}' in metrics


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "query"),
        ({"query": ""}, 422, "query"),
        ({"query": "x", "top_k": 0}, 422, "top_k"),
        ({"query": "x", "mode": "magic"}, 422, "mode"),
        ({"query": "x", "mmr": 2}, 422, "mmr"),
        ({"query": "x", "limit": 3}, 422, "limit"),
        ({"query": "x", "where": {"n": {"$magic": 1}}}, 400, "magic"),
        ({"query": "x", "collection": "missing"}, 404, "no collection 'missing'"),
        ({"query": "x", "collection": "letters"}, 400, "letters"),
        ({"query": "x", "collection": "!"}, 400, "cannot name a Chroma collection"),
        ({"query": "word " * 300}, 400, "Shorten the query"),
    ],
)
def test_a_refused_search_gets_the_status_and_the_reason(
    client: httpx.Client, body: dict[str, Any], status: int, words: str
) -> None:
    answer = client.post("/v1/search", json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_server_without_a_store_says_what_to_do_and_keys_are_checked(model: Causal2Vec) -> None:
    with serving(create_app(model, name="tiny", api_keys=["secret"])) as url:
        assert httpx.post(f"{url}/v1/search", json={"query": "x"}).status_code == 401
        answer = httpx.post(f"{url}/v1/search", json={"query": "x"}, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 404
        assert "c2v-rag serve --store" in answer.json()["error"]["message"]


def test_a_store_of_another_model_is_refused_at_start(model: Causal2Vec, tmp_path: Path) -> None:
    VectorIndex(tmp_path, Letters()).add(numbered(3))
    with pytest.raises(ValueError, match="documents"):
        create_app(model, name="tiny", store=tmp_path)


def test_other_requests_are_answered_while_a_search_runs(
    model: Causal2Vec, index: VectorIndex, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    search = VectorIndex.search

    def waiting(*arguments: Any, **options: Any) -> Any:
        started.set()
        assert go_on.wait(60)
        return search(*arguments, **options)

    monkeypatch.setattr(VectorIndex, "search", waiting)
    answers: list[httpx.Response] = []
    with serving(create_app(model, name="tiny", store=store(tmp_path_factory))) as url:
        body = {"query": QUERY}
        thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/search", json=body, timeout=60)))
        thread.start()
        assert started.wait(60)
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200
        go_on.set()
        thread.join()
    assert answers[0].status_code == 200
