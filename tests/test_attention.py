"""The decoder runs without an attention mask, and gives the vectors that it gives with one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from c2v_rag import model as model_module
from c2v_rag.model import Causal2Vec
from tests.tiny import INSTRUCTION, LLMS, TEXTS, WITHOUT_KEY_VALUE_CACHE, projector_gradient, tiny_model

FAMILIES = sorted(LLMS | WITHOUT_KEY_VALUE_CACHE)


def masks_given(model: Causal2Vec) -> list[bool]:
    """A list to which each later forward of the decoder adds whether it got an attention mask."""
    given: list[bool] = []
    model.llm.register_forward_pre_hook(
        lambda module, arguments, options: given.append(options.get("attention_mask") is not None), with_kwargs=True
    )
    return given


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask_every_family_gives_the_same_vectors_as_with_one(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(llm=family)
    given = masks_given(model)
    documents, queries = model.encode_document(TEXTS), model.encode_query(TEXTS)
    assert not any(given)
    monkeypatch.setattr(model_module, "is_causal", lambda llm: False)
    given.clear()
    np.testing.assert_allclose(documents, model.encode_document(TEXTS), rtol=0, atol=1e-5)
    np.testing.assert_allclose(queries, model.encode_query(TEXTS), rtol=0, atol=1e-5)
    assert given
    assert all(given)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask_training_has_the_same_gradients_as_with_one(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[Tensor] = []
    for with_mask in (False, True):
        model = tiny_model(llm=family)
        if with_mask:
            monkeypatch.setattr(model_module, "is_causal", lambda llm: False)
        batch = model.tokenize(TEXTS[:4], INSTRUCTION).collate(range(4))
        gradients.append(projector_gradient(model, batch))
    assert gradients[0].norm() > 1e-6
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_documents_need_no_mask_no_cache_and_no_forward_of_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    calls: list[dict[str, Any]] = []
    attentions: list[dict[str, Any]] = []
    model.llm.register_forward_pre_hook(lambda module, arguments, options: calls.append(options), with_kwargs=True)
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(*arguments: Any, **options: Any) -> Tensor:
        attentions.append(options)
        return attention(*arguments, **options)

    batch = model.tokenize(TEXTS).collate(range(len(TEXTS)))
    pooled = model.pooled_encoder_states(batch)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr(model, "pooled_encoder_states", lambda batch: pooled)
    model.embed(batch)
    assert len(calls) == 1
    assert all(layer.keys is None for layer in calls[0]["past_key_values"].layers), "nothing is stored"
    assert calls[0]["inputs_embeds"].shape[1] == 2 + batch.text_ids.shape[1], "BOS and the Contextual token"
    assert len(attentions) == 3, "one for each layer of the decoder"
    assert all(options["attn_mask"] is None and options["is_causal"] for options in attentions)


def test_a_prefix_is_cached_only_if_it_is_long_beside_the_texts() -> None:
    model = tiny_model(max_length=1000)
    long = [TEXTS[5] * 2]
    assert len(model.tokenize(long, "to").prefix_ids) == 20
    model.encode_document(TEXTS)
    model.encode_document(long, instruction="to", on_truncate="ignore")
    assert len(model.prefix_cache) == 0
    model.encode_document(["short"], instruction="to")
    assert len(model.prefix_cache) == 1


def test_a_decoder_that_is_not_causal_gets_its_mask() -> None:
    model = tiny_model("gemma")
    model.llm.config.use_bidirectional_attention = True
    given = masks_given(model)
    model.encode_document(TEXTS[:3])
    assert given == [True]
