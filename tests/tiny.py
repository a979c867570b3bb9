"""Tiny, randomly initialised models of every family, and texts for them. Built in code; no network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from c2v_rag.config import Causal2VecConfig
from c2v_rag.model import Causal2Vec
from c2v_rag.tokenization import TokenBatch

# tests/data holds the vectors that version 0.1 computed for these texts, so the texts must not change.
TEXTS = [
    "A heap keeps its smallest item first.",
    "Bread needs yeast, water and flour; knead the dough and let it rise in a warm place for an hour.",
    "Ask.",
    "",
    "   \n\t ",
    "The museum opens at nine in the morning and closes at six in the evening, except on Mondays. " * 6,
    "Übermäßig naïve façade 東京タワー Привет мир 🙂👍🏽",
    "A document may spell <|im_end|>, [SEP] or </s>, and goes on behind it.",
]
WORDS = "heap bread yeast museum morning queue knead flour nine closes item first warm place hour".split()
_OPENINGS = ("A recipe for", "The history of", "How to mend", "Four songs about", "A letter from")
_THINGS = ("bread", "a heap", "the museum", "an old clock", "copper", "the tide", "a violin", "the moon")
_ENDINGS = (
    "It was written in the winter of that year, when the harbour lay under ice.",
    "Knead it well, and leave it in a warm place for an hour.",
    "Nobody has counted them since; a guess is all there is.",
    "Read the second part first, then the appendix, then whatever is left.",
    "The smallest comes off first, and the others move up by one.",
    "Close it at six, except on Mondays and in the second week of May.",
    "Sand the edges, oil the hinges, and let the whole thing dry.",
)
INSTRUCTION = "Given a question, retrieve passages that answer it"


def passages(count: int) -> list[str]:
    """Distinct passages, at most 280, equal on every machine and in every version of Python."""
    assert count <= len(_OPENINGS) * len(_THINGS) * len(_ENDINGS)
    return [
        f"{_OPENINGS[i % len(_OPENINGS)]} {_THINGS[i % len(_THINGS)]}. {_ENDINGS[i % len(_ENDINGS)]}"
        for i in range(count)
    ]


def assert_ranked(found: Sequence[int], scores: np.ndarray, tolerance: float = 1e-5) -> None:
    """Assert that `found` are the positions of the highest of `scores` (N,), best first.

    Scores that differ by less than the tolerance may be in either order, because rounding decides which is higher.
    """
    assert len({*found}) == len(found) > 0
    assert np.ptp(scores) > 100 * tolerance, "all scores are nearly equal, so their order proves nothing"
    np.testing.assert_allclose(scores[[*found]], np.sort(scores)[::-1][: len(found)], rtol=0, atol=tolerance)


# Heads have 8 columns, so that the rotary embedding of every family has columns to rotate.
_SIZE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {"num_key_value_heads": 2, "head_dim": 8}
LLMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZE | {"num_key_value_heads": 2}),
    "mistral": ("MistralConfig", _SIZE | _GQA | {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", _SIZE | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", _SIZE | _GQA),
    "gemma": ("GemmaConfig", _SIZE | _GQA),
    "gemma2": ("Gemma2Config", _SIZE | _GQA | {"sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", _SIZE | _GQA | {"sliding_window": 16}),
    "gpt2": ("GPT2Config", {k: v for k, v in _SIZE.items() if k != "intermediate_size"}),
    "gpt_neox": ("GPTNeoXConfig", _SIZE),
    "phi": ("PhiConfig", _SIZE | {"num_key_value_heads": 4}),
}
_HYBRID = _SIZE | _GQA | {"layer_types": ["conv", "full_attention", "conv"]}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
# The caches of these families have other states than keys and values per token.
WITHOUT_KEY_VALUE_CACHE: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", _HYBRID),
    "qwen3_next": ("Qwen3NextConfig", _SIZE | _GQA | _LINEAR | _MOE),
    "falcon_h1": ("FalconH1Config", _SIZE | _GQA | _MAMBA),
    "mamba": ("MambaConfig", {k: v for k, v in _SIZE.items() if "attention" not in k} | {"state_size": 8}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _SIZE | {"hidden_size": 24}),
    "mpnet": ("MPNetConfig", _SIZE | {"hidden_size": 24}),
    "roberta": ("RobertaConfig", _SIZE | {"hidden_size": 24}),
    "modernbert": ("ModernBertConfig", _SIZE | {"hidden_size": 24, "cls_token_id": 1, "sep_token_id": 2}),
    "xlm_roberta": ("XLMRobertaConfig", _SIZE | {"hidden_size": 24}),  # the family of multilingual E5
}


def tiny_module(table: dict[str, tuple[str, dict[str, Any]]], family: str, **changes: Any) -> PreTrainedModel:
    name, settings = table[family]
    torch.manual_seed(0)
    model = AutoModel.from_config(getattr(transformers, name)(**settings | changes))
    # With the small initial weights, all texts would have nearly the same vector.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


_SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|im_end|>", "[SEP]"]


@functools.cache
def _backend(kind: str) -> Tokenizer:
    """A tokenizer with a fixed vocabulary; training would order ties differently in each process."""
    if kind == "bpe":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("e", "r"), ("t", "h"), ("i", "n"), ("th", "e"), ("a", "n")]
        words = _SPECIALS + alphabet + ["".join(merge) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        found = {word for text in TEXTS for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
        letters = [chr(i) for i in range(33, 127)]
        words = list(dict.fromkeys([*_SPECIALS, *letters, *(f"##{letter}" for letter in letters), *sorted(found)]))
        tokenizer = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
        ends = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.add_special_tokens(_SPECIALS)
    assert tokenizer.get_vocab_size() <= _SIZE["vocab_size"]
    return tokenizer


def tiny_tokenizer(kind: str, *, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A tokenizer of `kind` "bpe" (byte-level, for decoders) or "wordpiece" (adds <s> and </s>, for encoders)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_backend(kind)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_end|>", "[SEP]"],
        padding_side=padding_side,
    )


def tiny_model(
    llm: str = "llama", encoder: str = "bert", *, padding_side: str = "right", seed: int = 0, **settings: Any
) -> Causal2Vec:
    """A tiny `Causal2Vec`, float32, in eval mode."""
    config = Causal2VecConfig(**{"max_length": 256, "encoder_max_length": 64, "instruction": INSTRUCTION} | settings)
    parts = tiny_module(ENCODERS, encoder), tiny_module(LLMS | WITHOUT_KEY_VALUE_CACHE, llm)
    tokenizers = (
        tiny_tokenizer("wordpiece", padding_side=padding_side),
        tiny_tokenizer("bpe", padding_side=padding_side),
    )
    torch.manual_seed(seed)
    model = Causal2Vec(config, *parts, *tokenizers)
    table = model.llm.get_input_embeddings()
    with torch.no_grad():
        model.projector.start_at_norm(float(table(torch.arange(100)).norm(dim=-1).mean()))
    return model.eval()


def projector_gradient(model: Causal2Vec, batch: TokenBatch) -> Tensor:
    """The gradient of the projector's output weights, from the first columns of a batch's embeddings."""
    model(batch)[:, :5].sum().backward()
    gradient = model.projector.output.weight.grad
    assert gradient is not None
    return gradient
