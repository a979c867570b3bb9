"""The model computes what the paper says, for every family, alone and in batches, with the prefix reused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import normalize

from c2v_rag import inference
from c2v_rag.model import Causal2Vec
from tests.tiny import ENCODERS, INSTRUCTION, LLMS, TEXTS, WITHOUT_KEY_VALUE_CACHE, tiny_model


def by_hand(model: Causal2Vec, text: str, instruction: str = "") -> Tensor:
    """The definition in plain code: one text, no batch, no padding, no mask, no cache."""
    config = model.config
    encoder_ids = model.tokenizer.encoder(text, truncation=True, max_length=config.encoder_max_length)["input_ids"]
    if any(special in text for special in ("<|im_end|>", "[SEP]", "</s>")):
        backend = copy.deepcopy(model.tokenizer.encoder.backend_tokenizer)
        backend.encode_special_tokens = True
        encoder_ids = backend.encode(text).ids
    states = model.encoder(torch.tensor([encoder_ids])).last_hidden_state[0]
    token = model.projector(states.mean(dim=0) if config.encoder_pooling == "mean" else states[0])

    backend = copy.deepcopy(model.tokenizer.llm.backend_tokenizer)
    backend.encode_special_tokens = True
    prompt = backend.encode(config.prompt(instruction)).ids if instruction else []
    body = [*backend.encode(text).ids[: config.max_length - 1], model.tokenizer.llm.eos_token_id]
    embed = model.llm.get_input_embeddings()
    bos, prompt_states, body_states = (embed(torch.tensor(ids, dtype=torch.long)) for ids in ([1], prompt, body))
    order = {
        "after_instruction": [bos, prompt_states, token[None], body_states],
        "before_instruction": [bos, token[None], prompt_states, body_states],
        "none": [bos, prompt_states, body_states],
    }[config.contextual_token]
    place = {"after_instruction": 1 + len(prompt), "before_instruction": 1, "none": None}[config.contextual_token]
    inputs = torch.cat(order)[None]
    positions = torch.arange(inputs.shape[1])[None]
    hidden = model.llm(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state[0]
    eos = hidden[-1]
    if config.pooling == "context_eos":
        return normalize(torch.stack([hidden[place], eos], dim=1).flatten()[: config.truncate_dim], dim=0)
    vector = {"eos": eos, "context": hidden[place or 0], "mean": hidden[-len(body) :].mean(dim=0)}[config.pooling]
    return normalize(vector[: config.truncate_dim], dim=0)


def assert_same(vectors: Any, others: Any, at_least: float = 0.9999) -> None:
    vectors, others = torch.as_tensor(np.asarray(vectors)), torch.as_tensor(np.asarray(others))
    assert vectors.shape == others.shape
    assert len(vectors) > 0
    cosines = torch.nn.functional.cosine_similarity(vectors, others, dim=-1)
    assert cosines.min() > at_least, cosines


@torch.no_grad()
def written_out(model: Causal2Vec, texts: list[str], instruction: str = "") -> np.ndarray:
    return torch.stack([by_hand(model, text, instruction) for text in texts]).numpy()


@pytest.mark.parametrize("family", LLMS)
def test_batches_equal_the_definition_for_every_decoder_family(family: str) -> None:
    model = tiny_model(llm=family)
    assert_same(model.encode_document(TEXTS), written_out(model, TEXTS))
    # With an instruction the prefix is computed once and its keys and values are reused for every text.
    assert_same(model.encode_query(TEXTS), written_out(model, TEXTS, INSTRUCTION))
    assert_same(model.encode_query(TEXTS), written_out(model, TEXTS, INSTRUCTION))
    distinct = model.encode_document(TEXTS[:3])
    assert (distinct @ distinct.T)[0, 1] < 0.999, "texts must not look alike, or nothing was shown"


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_batches_equal_the_definition_for_every_encoder(family: str, pooling: str) -> None:
    model = tiny_model(encoder=family, encoder_pooling=pooling)
    assert_same(model.encode_document(TEXTS), written_out(model, TEXTS))


@pytest.mark.parametrize("pooling", ["context_eos", "eos", "context", "mean"])
@pytest.mark.parametrize("place", ["after_instruction", "before_instruction", "none"])
def test_every_pooling_and_place_of_the_token_equals_the_definition(pooling: str, place: str) -> None:
    if place == "none" and pooling in ("context", "context_eos"):
        with pytest.raises(ValueError, match="contextual_token is 'none'"):
            tiny_model(pooling=pooling, contextual_token=place)
        return
    model = tiny_model(pooling=pooling, contextual_token=place)
    assert_same(model.encode_query(TEXTS), written_out(model, TEXTS, INSTRUCTION))
    assert model.embedding_dim == (64 if pooling == "context_eos" else 32)
    assert model.encode(TEXTS).shape == (len(TEXTS), model.embedding_dim)


@pytest.mark.parametrize("family", LLMS)
def test_prefix_reuse_equals_the_full_forward(family: str) -> None:
    model = tiny_model(llm=family)
    batch = model.tokenize(TEXTS, INSTRUCTION).collate(range(len(TEXTS)))
    assert len(batch.prefix_ids) > 5
    full = model.embed(batch, reuse_prefix=False)
    first, again = model.embed(batch), model.embed(batch)
    with torch.no_grad():
        trained = model(batch)
    cached = model.prefix_cache.get(model.llm, batch.prefix_ids)
    assert cached is not None, "the prefix was not cached, so the test proves nothing"
    assert cached.layers[0].keys is not None
    assert len(cached.layers[0].keys) == 1, "a batch must not change the cached prefix"
    for vectors in (first, again, trained):
        assert_same(vectors, full)


def test_prefix_is_computed_once_and_again_when_weights_or_instruction_change() -> None:
    model = tiny_model()
    calls: list[int] = []

    def count_prefixes(llm: Any, arguments: Any, options: dict[str, Any]) -> None:
        if options.get("use_cache") and options.get("past_key_values") is None:
            calls.append(options["inputs_embeds"].shape[1])

    model.llm.register_forward_pre_hook(count_prefixes, with_kwargs=True)
    model.encode_query(TEXTS, batch_tokens=64)
    model.encode_query(TEXTS)
    assert len(calls) == 1
    model.encode_query(TEXTS, instruction="another one")
    assert len(calls) == 2

    before = model.encode_query(TEXTS)
    assert len(calls) == 2
    with torch.no_grad():
        model.llm.layers[0].self_attn.v_proj.weight.mul_(1.5)
    after = model.encode_query(TEXTS)
    assert len(calls) == 3
    assert np.abs(after - before).max() > 1e-3
    assert_same(after, written_out(model, TEXTS, INSTRUCTION))


@pytest.mark.parametrize("family", WITHOUT_KEY_VALUE_CACHE)
def test_decoders_without_keys_and_values_run_without_reuse(family: str) -> None:
    model = tiny_model(llm=family)
    assert model.compute_prefix(torch.tensor([1, 5, 6])) is None
    assert_same(model.encode_document(TEXTS), written_out(model, TEXTS))
    assert_same(model.encode_query(TEXTS), written_out(model, TEXTS, INSTRUCTION))


def test_prefix_follows_weights_written_through_data() -> None:
    """Moving averages and sharded optimizers write in this way, which changes no version counter."""
    model = tiny_model()
    model.encode_query(TEXTS)
    weight = model.llm.layers[0].self_attn.v_proj.weight
    version = weight._version
    weight.data.mul_(1.5)
    assert weight._version == version, "the counter moved, so nothing was shown"
    assert_same(model.encode_query(TEXTS), written_out(model, TEXTS, INSTRUCTION))


def test_embed_works_with_gradients_on_and_returns_none() -> None:
    model = tiny_model()
    batch = model.tokenize(TEXTS, INSTRUCTION).collate(range(len(TEXTS)))
    assert torch.is_grad_enabled()
    for _ in range(2):
        assert not model.embed(batch).requires_grad


def test_lengths_beyond_the_positions_of_a_part_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder_max_length is 4000, but the encoder has 1024 positions"):
        tiny_model(encoder_max_length=4000)
    with pytest.raises(ValueError, match=r"The decoder has 1024 positions, but 1\d\d\d are needed: 1024 for a text"):
        tiny_model(llm="gpt2", max_length=1024)
    model = tiny_model(llm="gpt2", max_length=900)
    assert np.isfinite(model.encode_query(["word " * 2000], on_truncate="ignore")).all()
    with pytest.raises(ValueError, match="shorten the instruction"):
        model.encode_query(["word " * 2000], instruction="find " * 200, on_truncate="ignore")
    # Computed positions have no limit; RoBERTa's positions start after its padding index.
    assert np.isfinite(
        tiny_model(llm="llama", max_length=1024).encode_query(["word " * 2000], on_truncate="ignore")
    ).all()
    with pytest.raises(ValueError, match="the encoder has 1023 positions"):
        tiny_model(encoder="roberta", encoder_max_length=1024)


def test_prefix_follows_an_adapter_that_is_merged_or_switched_off() -> None:
    model = tiny_model()
    plain = model.encode_query(TEXTS)
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), model.llm)
    adapted = model.encode_query(TEXTS)
    assert np.abs(adapted - plain).max() > 1e-3
    assert_same(adapted, written_out(model, TEXTS, INSTRUCTION))
    layers = [layer for layer in model.llm.modules() if isinstance(layer, BaseTunerLayer)]
    assert len(layers) == 21
    for layer in layers:
        layer.merge()
    assert_same(model.encode_query(TEXTS), adapted)
    for layer in layers:
        layer.unmerge()
        layer.enable_adapters(False)
    assert_same(model.encode_query(TEXTS), plain)


def test_a_fresh_lora_changes_nothing() -> None:
    model = tiny_model()
    plain = model.encode_document(TEXTS)
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model.llm)
    np.testing.assert_array_equal(model.encode_document(TEXTS), plain)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_text_has_one_vector_alone_in_a_batch_and_in_any_order(padding_side: str) -> None:
    model = tiny_model(padding_side=padding_side)
    rng = np.random.default_rng(0)
    words = " ".join(TEXTS).split()
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 60))) for _ in range(64)]
    together = model.encode_query(texts, batch_tokens=10**6, on_truncate="ignore")
    alone = np.concatenate([model.encode_query([text], on_truncate="ignore") for text in texts])
    assert_same(together, alone)
    order = rng.permutation(64)
    shuffled = model.encode_query([texts[i] for i in order], batch_tokens=500, on_truncate="ignore")
    assert_same(shuffled, together[order])
    assert_same(together[:8], written_out(model, texts[:8], INSTRUCTION))


def test_training_forward_reaches_encoder_and_projector_and_llm() -> None:
    model = tiny_model()
    batch = model.tokenize(TEXTS, INSTRUCTION).collate(range(len(TEXTS)))
    embeddings = model(batch)
    (embeddings @ embeddings.T).pow(2).sum().backward()
    for part in (model.encoder, model.projector, model.llm):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert gradients
        assert max(float(gradient.abs().max()) for gradient in gradients) > 0


@pytest.mark.parametrize("num_slices", [2, 5, 100])
def test_slices_of_a_batch_change_neither_embeddings_nor_gradients(num_slices: int) -> None:
    model = tiny_model()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(" ".join(TEXTS).split(), size=size)) for size in rng.integers(1, 60, size=12)]
    batch = model.tokenize(texts).collate(range(len(texts)))
    bare = dataclasses.replace(batch, encoder_order=None, encoder_slices=None)

    def embed(number: int) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        embeddings = model(bare.with_encoder_order(number))
        (embeddings @ embeddings.T).pow(2).sum().backward()
        return embeddings, [one.grad for one in model.encoder.parameters() if one.grad is not None]

    embeddings, gradients = embed(num_slices)
    whole, whole_gradients = embed(1)
    torch.testing.assert_close(embeddings, whole, atol=1e-5, rtol=0)
    assert gradients
    for one, expected in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-4 * float(expected.abs().max()) + 1e-7, rtol=0)


def test_a_sequence_that_ends_at_the_contextual_token_gives_the_same_state() -> None:
    """Under a causal mask nothing after the token can change its state. Training relies on this."""
    model = tiny_model()
    batch = model.tokenize(TEXTS, INSTRUCTION).collate(range(len(TEXTS)))
    with torch.no_grad():
        both = model(batch)
        pooled = model.pooled_encoder_states(batch)
        short = model(batch, pooled=pooled, pooling="context")
    torch.testing.assert_close(short, normalize(both[:, 0::2], dim=1), atol=1e-5, rtol=0)


def test_truncate_dim_keeps_both_halves_and_length_one() -> None:
    model = tiny_model()
    full, short = model.encode(TEXTS), model.encode(TEXTS, truncate_dim=16)
    assert short.shape == (len(TEXTS), 16)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    context = tiny_model(pooling="context").encode(TEXTS)
    eos = tiny_model(pooling="eos").encode(TEXTS)
    for half, states in ((0, context), (1, eos)):
        columns = short[:, half::2]
        assert_same(columns, states[:, :8])
    assert_same(short, full[:, :16])
    saved = tiny_model(truncate_dim=16)
    assert saved.embedding_dim == 16
    np.testing.assert_allclose(saved.encode(TEXTS), short, atol=1e-6)
    with pytest.raises(ValueError, match="from 1 to 64"):
        model.encode(TEXTS, truncate_dim=65)
    with pytest.raises(ValueError, match="64 columns"):
        tiny_model(truncate_dim=65)


def test_instruction_rules() -> None:
    model = tiny_model()
    assert_same(model.encode_query(TEXTS), model.encode(TEXTS, instruction=INSTRUCTION))
    np.testing.assert_array_equal(model.encode_query(TEXTS, instruction=""), model.encode_document(TEXTS))
    assert np.abs(model.encode_query(TEXTS) - model.encode_document(TEXTS)).max() > 1e-3
    assert_same(model.encode_document(TEXTS, instruction="find"), written_out(model, TEXTS, "find"))


def test_the_contextual_token_changes_both_halves() -> None:
    model = tiny_model()
    before = model.encode_document(TEXTS)
    with torch.no_grad():
        model.projector.output.weight.mul_(-1)
    after = model.encode_document(TEXTS)
    for half in (0, 1):
        assert np.abs(after[:, half::2] - before[:, half::2]).max() > 1e-3


def test_pickled_model_gives_equal_vectors() -> None:
    model = tiny_model()
    expected = model.encode_query(TEXTS)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(model)).encode_query(TEXTS), expected, atol=1e-6)


def test_default_dtype_follows_what_the_hardware_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for capabilities, expected in (
        ({"avx2": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert inference.default_dtype(cpu) == expected
