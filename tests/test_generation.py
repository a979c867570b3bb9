"""One decoder in memory generates as the plain decoder does, and embeds as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from c2v_rag import Causal2Vec, Causal2VecConfig
from c2v_rag.generation import causal_lm
from c2v_rag.parts import adapted_layers
from tests.tiny import ENCODERS, LLMS, TEXTS, tiny_model, tiny_module, tiny_tokenizer

FAMILIES = ("llama", "gpt2", "gemma3")


def shared_bytes(left: torch.nn.Module, right: torch.nn.Module) -> int:
    """Bytes of the parameters that both modules share in memory."""
    places = {parameter.data_ptr() for parameter in left.parameters()}
    found = {p.data_ptr(): p.numel() * p.element_size() for p in right.parameters() if p.data_ptr() in places}
    return sum(found.values())


def parts(folder: Path, family: str) -> tuple[Path, Path]:
    """A tiny encoder and a tiny causal language model with its head, as transformers writes them."""
    name, settings = LLMS[family]
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)).save_pretrained(folder / "llm")
    tiny_tokenizer("bpe").save_pretrained(folder / "llm")
    tiny_module(ENCODERS, "bert").save_pretrained(folder / "encoder")
    tiny_tokenizer("wordpiece").save_pretrained(folder / "encoder")
    return folder / "encoder", folder / "llm"


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_plain_decoder_and_embeddings_do_not_change(family: str, tmp_path: Path) -> None:
    encoder, llm = parts(tmp_path, family)
    model = Causal2Vec.from_parts(encoder, llm, config=Causal2VecConfig(num_llm_layers=2), dtype="float32")
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), model.llm)
    for layer in adapted_layers(model.llm):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
        layer.merge()
    before, stamp = model.encode_query(TEXTS), model.stamp
    whole = causal_lm(model)

    np.testing.assert_allclose(model.encode_query(TEXTS), before, atol=1e-5)
    assert model.stamp == stamp
    plain = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 40, 50, 60]])
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=0)
    own = sum(p.numel() * 4 for name, p in model.llm.named_parameters() if ".lora_" not in name)
    assert shared_bytes(model, whole) == own
    assert shared_bytes(model, plain) == 0


def test_weights_that_cannot_be_shared_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in memory only"):
        causal_lm(tiny_model())
    encoder, llm = parts(tmp_path, "llama")
    with pytest.raises(ValueError, match="first 3 layers only"):
        causal_lm(Causal2Vec.from_parts(encoder, llm, config=Causal2VecConfig(num_llm_layers=3)))
    tiny_module(LLMS, "mistral").save_pretrained(tmp_path / "headless")
    tiny_tokenizer("bpe").save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"no head.*lm_head"):
        causal_lm(Causal2Vec.from_parts(encoder, tmp_path / "headless"))
    changed = Causal2Vec.from_parts(encoder, llm)
    with torch.no_grad():
        next(changed.llm.parameters()).mul_(2)
    with pytest.raises(ValueError, match="in memory only"):
        causal_lm(changed)


def test_the_real_decoder_embeds_and_continues_a_text() -> None:
    model = Causal2Vec.from_pretrained("default", dtype="float32")
    before = model.encode_document(["A heap keeps its smallest item first."])
    whole = causal_lm(model)
    np.testing.assert_allclose(model.encode_document(["A heap keeps its smallest item first."]), before, atol=1e-4)
    ids = model.tokenizer.llm("The capital of France is", return_tensors="pt").input_ids
    written = whole.generate(ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in model.tokenizer.llm.decode(written[0])
    assert shared_bytes(model, whole) > 0.25 * sum(p.numel() * 4 for p in whole.parameters())
