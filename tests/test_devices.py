"""encode on several devices: order, errors, and copies that follow the weights. Two CPU devices stand for two GPUs."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.model import Causal2Vec
from c2v_rag.tokenization import TokenBatch
from tests.tiny import passages, tiny_model

TWO = ["cpu", "cpu"]


def test_two_devices_give_the_vectors_of_one_in_the_same_order_and_both_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny_model(), passages(120)
    expected = model.encode_query(texts)
    threads: dict[str, set[str]] = {}
    both_run = threading.Barrier(2)
    embed = Causal2Vec.embed

    def recorded(self: Causal2Vec, batch: TokenBatch) -> torch.Tensor:
        name = threading.current_thread().name
        if name not in threads:
            threads[name] = set()
            both_run.wait(60)  # neither thread can embed everything alone
        threads[name].add(str(id(self)))
        return embed(self, batch)

    monkeypatch.setattr(Causal2Vec, "embed", recorded)
    found = model.encode_query(texts, devices=TWO, batch_tokens=200)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(threads) == 2
    assert len(set.union(*threads.values())) == 2, "each thread has its own copy of the model"


def test_copies_are_kept_and_made_again_when_the_weights_change() -> None:
    model, texts = tiny_model(), passages(20)
    model.encode(texts, devices=TWO)
    first = model.replicas.get(model, TWO)
    assert first[0] is model
    assert model.replicas.get(model, TWO)[1] is first[1]
    with torch.no_grad():
        model.projector.output.weight.mul_(-1)
    np.testing.assert_allclose(model.encode(texts, devices=TWO, batch_tokens=100), model.encode(texts), atol=1e-5)
    assert model.replicas.get(model, TWO)[1] is not first[1]


def test_an_error_on_one_device_stops_the_others_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    working, broken = model.replicas.get(model, TWO)
    failed = threading.Event()
    embed = working.embed

    def fail(batch: TokenBatch) -> torch.Tensor:
        failed.set()
        raise ArithmeticError("broken")

    def wait(batch: TokenBatch) -> torch.Tensor:
        assert failed.wait(60), "the other device got no batch"
        return embed(batch)

    monkeypatch.setattr(broken, "embed", fail)
    monkeypatch.setattr(working, "embed", wait)
    with pytest.raises(ArithmeticError, match="broken"):
        model.encode(passages(60), devices=TWO, batch_tokens=100)


def test_the_encoder_alone_embeds_on_several_devices() -> None:
    embedder, texts = EncoderEmbedder(tiny_model()), passages(60)
    np.testing.assert_allclose(embedder.encode(texts, devices=TWO, batch_tokens=200), embedder.encode(texts), atol=1e-5)


def test_devices_must_be_a_list_of_at_least_one() -> None:
    model = tiny_model()
    for wrong in ("cuda", []):
        with pytest.raises(ValueError, match="devices must be a list"):
            model.encode(["text"], devices=wrong)
