"""Tokenise texts (and an instruction) for the encoder and for the decoder, whose texts end in EOS.

B texts, P prefix tokens, S encoder tokens, T decoder tokens of the text (EOS included).
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from c2v_rag.config import Causal2VecConfig

# Half of a surrogate pair is no character: UTF-8 cannot hold it, and tokenizers refuse it.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """One padded batch. Masks are 1 on real tokens; padding is on the right.

    `prefix_ids` (P,) comes before the Contextual token and is the same for every text. `text_ids` (B, T) comes after
    it. If the config places the instruction after the token, `text_ids` starts with its `num_prompt_tokens` tokens.
    """

    prefix_ids: Tensor
    text_ids: Tensor
    text_mask: Tensor
    num_prompt_tokens: int
    encoder_ids: Tensor
    encoder_mask: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        moved: dict[str, Any] = {
            field.name: value.to(device) if isinstance(value := getattr(self, field.name), Tensor) else value
            for field in dataclasses.fields(self)
        }
        return TokenBatch(**moved)


@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of texts that share one prefix; `collate` makes padded batches of any of them."""

    prefix_ids: list[int]
    num_prompt_tokens: int
    text_ids: list[list[int]]
    encoder_ids: list[list[int]]
    truncated: list[int]  # positions of the texts that were truncated, for the decoder or the encoder
    text_pad: int
    encoder_pad: int

    @property
    def lengths(self) -> list[int]:
        """The part of a batch's token budget that each text uses: its tokens in the decoder or encoder, the larger.

        The decoder's tokens are the Contextual token, the text and EOS. A quarter of the prefix is added, because its
        keys and values are read for every text, but not computed again.
        """
        shared = 1 + len(self.prefix_ids) // 4
        pairs = zip(self.text_ids, self.encoder_ids, strict=True)
        return [max(shared + len(ids), len(encoder_ids)) for ids, encoder_ids in pairs]

    def collate(self, positions: Sequence[int]) -> TokenBatch:
        """A padded batch of the texts at these positions, in this order."""
        text_ids, text_mask = _pad([self.text_ids[i] for i in positions], self.text_pad)
        encoder_ids, encoder_mask = _pad([self.encoder_ids[i] for i in positions], self.encoder_pad)
        return TokenBatch(
            prefix_ids=torch.tensor(self.prefix_ids),
            text_ids=text_ids,
            text_mask=text_mask,
            num_prompt_tokens=self.num_prompt_tokens,
            encoder_ids=encoder_ids,
            encoder_mask=encoder_mask,
        )


class TextTokenizer:
    """The encoder's and the decoder's tokenizer, in one call.

    Padding is on the right; the tokenizers' own padding side is ignored. A text that contains a special token's name
    ("<|im_end|>") is tokenised as ordinary text. Lone surrogates become U+FFFD, the replacement character.

    Thread-safe, also if several `TextTokenizer` use the same two tokenizers: each of these has one lock in this
    process, because a call sets its truncation.
    """

    def __init__(
        self,
        config: Causal2VecConfig,
        encoder_tokenizer: PreTrainedTokenizerBase,
        llm_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.config = config
        self.encoder = encoder_tokenizer
        self.llm = llm_tokenizer
        if llm_tokenizer.eos_token_id is None:
            raise ValueError(
                "The decoder's tokenizer has no EOS token, and its last hidden state is half of the embedding. "
                "Set tokenizer.eos_token to an existing token and save it again."
            )
        limit = encoder_tokenizer.model_max_length
        if config.encoder_max_length > limit:
            raise ValueError(
                f"encoder_max_length is {config.encoder_max_length}, but the encoder reads {limit} tokens at most. "
                f"Set encoder_max_length to {limit} or less."
            )
        self.eos: int = llm_tokenizer.eos_token_id
        # The first position is an attention sink: Llama-like models have massive activations there. A fixed token takes
        # this position, because the Contextual token's information would be lost in them.
        self.bos: int = self.eos if llm_tokenizer.bos_token_id is None else llm_tokenizer.bos_token_id

    def __call__(self, texts: Sequence[str], prompt: str = "") -> TokenizedTexts:
        """Token ids of `texts`, truncated to the config's lengths. EOS and the encoder's special tokens are kept.

        The decoder reads `prompt` (`config.prompt(instruction)`) before each text. It is tokenised separately. The
        encoder reads `config.encoder_prompt(prompt)` before each text.
        """
        clean = [_LONE_SURROGATE.sub("\ufffd", text) for text in texts]
        prompt_ids = self._ids([prompt])[0] if prompt else []
        prompt_follows_token = self.config.contextual_token == "before_instruction"

        # Texts are tokenised in full and truncated afterwards, so that truncated texts can be counted.
        plain = self._ids(clean)
        max_ids = self.config.max_length - 1
        encoder_texts = [self.config.encoder_prompt(prompt) + text for text in clean]
        encoder_ids = self._encoder_ids(encoder_texts, truncation=False)
        too_long = [i for i, ids in enumerate(encoder_ids) if len(ids) > self.config.encoder_max_length]
        if too_long:
            # Only the tokenizer knows which special tokens must be kept.
            shorter = self._encoder_ids([encoder_texts[i] for i in too_long], truncation=True)
            for i, ids in zip(too_long, shorter, strict=True):
                encoder_ids[i] = ids
        return TokenizedTexts(
            prefix_ids=[self.bos] + ([] if prompt_follows_token else prompt_ids),
            num_prompt_tokens=len(prompt_ids) if prompt_follows_token else 0,
            text_ids=[(prompt_ids if prompt_follows_token else []) + ids[:max_ids] + [self.eos] for ids in plain],
            encoder_ids=encoder_ids,
            truncated=sorted({i for i, ids in enumerate(plain) if len(ids) > max_ids}.union(too_long)),
            text_pad=self.eos,
            encoder_pad=self.encoder.pad_token_id or 0,
        )

    @property
    def max_tokens(self) -> int:
        """The longest text, in `count_tokens`, that neither tokenizer truncates."""
        return min(self.config.max_length, self.config.encoder_max_length)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Length of each text in tokens: the larger of the two tokenizers' counts, special tokens included."""
        clean = [_LONE_SURROGATE.sub("\ufffd", text) for text in texts]
        encoder_texts = [self.config.encoder_document_prompt + text for text in clean]
        pairs = zip(self._ids(clean), self._encoder_ids(encoder_texts, truncation=False), strict=True)
        return [max(len(ids) + 1, len(encoder_ids)) for ids, encoder_ids in pairs]

    def token_ends(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """For each text, for decoder and encoder, the offset at which each token ends; without special tokens.

        Raises ValueError for a tokenizer without offsets (one that is not of the tokenizers library).
        """
        clean = [_LONE_SURROGATE.sub("\ufffd", text) for text in texts]
        pairs = zip(self._ends(self.llm, clean), self._ends(self.encoder, clean), strict=True)
        return [list(pair) for pair in pairs]

    def _ends(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no offsets of its tokens. Use its fast version.")
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        with _lock_of(tokenizer):
            encoding: Any = tokenizer(texts, return_offsets_mapping=True, **options)
        return [[end for _, end in offsets] for offsets in encoding["offset_mapping"]]

    def with_config(self, config: Causal2VecConfig) -> TextTokenizer:
        """The same tokenizers with other lengths."""
        return TextTokenizer(config, self.encoder, self.llm)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        with _lock_of(self.llm):
            return _input_ids(self.llm(texts, add_special_tokens=False, split_special_tokens=True, verbose=False))

    def _encoder_ids(self, texts: list[str], *, truncation: bool) -> list[list[int]]:
        max_length = self.config.encoder_max_length if truncation else None
        with _lock_of(self.encoder):
            return _input_ids(
                self.encoder(
                    texts, truncation=truncation, max_length=max_length, split_special_tokens=True, verbose=False
                )
            )


_locks: WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock_of(tokenizer: PreTrainedTokenizerBase) -> threading.Lock:
    """The one lock of a tokenizer. It is not an attribute, because a tokenizer with a lock could not be pickled."""
    with _locks_lock:
        return _locks.setdefault(tokenizer, threading.Lock())


def _input_ids(encoding: Any) -> list[list[int]]:
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _pad(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask (B, longest), with at least one column, so that a mean over columns is defined."""
    width = max(1, *(len(row) for row in rows)) if rows else 1
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids, mask
