"""Tokenise texts (and an instruction) for the encoder and for the decoder, whose texts end in EOS.

B texts, P prefix tokens, S encoder tokens, T decoder tokens of the text (EOS included).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from c2v_rag.config import Causal2VecConfig

ENCODER_SLICES = 2  # of a batch: without them, a third of the encoder's tokens was padding
WIDTH_STEP = 8
_COUNTED_TOKENS = 1_000_000

# Half of a surrogate pair is no character: UTF-8 cannot hold it, and tokenizers refuse it.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """One padded batch of int64 tensors. Masks are 1 on real tokens; padding is on the right.

    `prefix_ids` (P,) comes before the Contextual token and is the same for every text. `text_ids` (B, T) comes after
    it. If the config places the instruction after the token, `text_ids` starts with its `num_prompt_tokens` tokens.

    The other fields are known on the host, so that no forward has to read them from a device. `collate` sets them;
    without them (None) they are read from the tensors. `prefix_key`: the ids of the prefix. `encoder_order` (2, B): the
    texts' positions, sorted by length in the encoder, and the place of each text in that order. `encoder_slices`: the
    texts of the encoder's slices, in that order: first, end and width of each; and whether the slice has padding.
    """

    prefix_ids: Tensor
    text_ids: Tensor
    text_mask: Tensor
    num_prompt_tokens: int
    encoder_ids: Tensor
    encoder_mask: Tensor
    prefix_key: tuple[int, ...] | None = None
    encoder_order: Tensor | None = None
    encoder_slices: tuple[EncoderSlice, ...] | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """The batch on another device: one copy for all tensors, from pinned memory to CUDA without waiting for it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        if all(tensor.device == device for tensor in tensors.values()):
            return self
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        if device.type == "cuda" and flat.device.type == "cpu":
            flat = flat.pin_memory()
        parts = torch.split(flat.to(device, non_blocking=True), [tensor.numel() for tensor in tensors.values()])
        moved = {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}
        return TokenBatch(**fields | moved)

    def with_encoder_order(self, num_slices: int = ENCODER_SLICES) -> TokenBatch:
        """The batch with the fields of the encoder's slices; they are computed from the mask if they are missing."""
        if self.encoder_order is not None:
            return self
        lengths = self.encoder_mask.sum(dim=1).cpu().numpy()
        order, slices = encoder_slices(lengths, self.encoder_ids.shape[1], num_slices)
        return dataclasses.replace(self, encoder_order=order.to(self.encoder_ids.device), encoder_slices=slices)


class EncoderSlice(NamedTuple):
    """Texts of similar length in the encoder: `first` to `end` in `TokenBatch.encoder_order`, `width` tokens wide."""

    first: int
    end: int
    width: int
    is_padded: bool


def encoder_slices(
    lengths: np.ndarray, longest: int, num_slices: int = ENCODER_SLICES
) -> tuple[Tensor, tuple[EncoderSlice, ...]]:
    """`TokenBatch.encoder_order` and its slices, at most `num_slices`, for texts of these lengths (B,) in the encoder.

    Widths are rounded up to a multiple of 8, but at most `longest`.
    """
    order = np.argsort(lengths, kind="stable")
    places = np.argsort(order, kind="stable")
    slices = []
    for rows in np.array_split(np.arange(len(order)), min(num_slices, len(order))) if len(order) else ():
        first, end = int(rows[0]), int(rows[-1]) + 1
        width = max(1, min(longest, round_up(int(lengths[order[end - 1]]))))
        slices.append(EncoderSlice(first, end, width, is_padded=bool(lengths[order[first]] < width)))
    return torch.from_numpy(np.stack([order, places])), tuple(slices)


def round_up(length: int) -> int:
    """The next multiple of 8. Batches have few distinct widths, so that kernels and their plans are reused."""
    return -(-length // WIDTH_STEP) * WIDTH_STEP


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

        The decoder's tokens are the Contextual token, the text and EOS. Both are rounded up as in `collate`. A quarter
        of the prefix is added, because its keys and values are read for every text, but not computed again.
        """
        shared = 1 + len(self.prefix_ids) // 4
        pairs = zip(self.text_ids, self.encoder_ids, strict=True)
        return [max(shared + round_up(len(ids)), round_up(len(encoder_ids))) for ids, encoder_ids in pairs]

    @functools.cached_property
    def _longest(self) -> tuple[int, int]:
        """Tokens of the longest text in decoder and encoder: no batch is wider, so that positions suffice."""
        return max(map(len, self.text_ids), default=0), max(map(len, self.encoder_ids), default=0)

    def collate(self, positions: Sequence[int]) -> TokenBatch:
        """A padded batch of the texts at these positions, in this order.

        Its width is the longest text's, rounded up to a multiple of 8, but not wider than the longest of all texts.
        """
        longest_text, longest_encoder = self._longest
        text_ids, text_mask, _ = _pad([self.text_ids[i] for i in positions], self.text_pad, longest_text)
        encoder_ids, encoder_mask, lengths = _pad(
            [self.encoder_ids[i] for i in positions], self.encoder_pad, longest_encoder
        )
        order, slices = encoder_slices(lengths, encoder_ids.shape[1])
        return TokenBatch(
            prefix_ids=torch.tensor(self.prefix_ids),
            text_ids=text_ids,
            text_mask=text_mask,
            num_prompt_tokens=self.num_prompt_tokens,
            encoder_ids=encoder_ids,
            encoder_mask=encoder_mask,
            prefix_key=tuple(self.prefix_ids),
            encoder_order=order,
            encoder_slices=slices,
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
        self._counted_llm, self._counted_encoder = _CountedTexts(), _CountedTexts()

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
        """Length of each text in tokens: the larger of the two tokenizers' counts, special tokens included.

        The next call that tokenises the same texts uses the token ids of this one.
        """
        clean = [_LONE_SURROGATE.sub("\ufffd", text) for text in texts]
        encoder_texts = [self.config.encoder_document_prompt + text for text in clean]
        plain, encoder_ids = self._ids(clean), self._encoder_ids(encoder_texts, truncation=False)
        self._counted_llm.keep(clean, plain)
        self._counted_encoder.keep(encoder_texts, encoder_ids)
        return [max(len(ids) + 1, len(encoded)) for ids, encoded in zip(plain, encoder_ids, strict=True)]

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
        return self._counted_llm.take(texts, self._tokenize_for_llm)

    def _encoder_ids(self, texts: list[str], *, truncation: bool) -> list[list[int]]:
        if truncation:
            return self._tokenize_for_encoder(texts, truncation=True, max_length=self.config.encoder_max_length)
        return self._counted_encoder.take(texts, self._tokenize_for_encoder)

    def _tokenize_for_llm(self, texts: list[str]) -> list[list[int]]:
        with _lock_of(self.llm):
            return _input_ids(self.llm(texts, add_special_tokens=False, split_special_tokens=True, verbose=False))

    def _tokenize_for_encoder(self, texts: list[str], **truncation: Any) -> list[list[int]]:
        options = {"truncation": False, "split_special_tokens": True, "verbose": False} | truncation
        with _lock_of(self.encoder):
            return _input_ids(self.encoder(texts, **options))


class _CountedTexts:
    """Token ids of texts that were counted and not tokenised since, up to a million tokens, the newest ones.

    A server counts the tokens of a request before it embeds it. A pickle or copy is empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: dict[str, list[int]] = {}
        self._num_tokens = 0

    def __reduce__(self) -> tuple[type[_CountedTexts], tuple[()]]:
        return _CountedTexts, ()

    def keep(self, texts: list[str], ids: list[list[int]]) -> None:
        with self._lock:
            for text, text_ids in zip(texts, ids, strict=True):
                self._remove(text)
                self._ids[text] = text_ids
                self._num_tokens += len(text_ids)
            while self._num_tokens > _COUNTED_TOKENS:
                self._remove(next(iter(self._ids)))

    def take(self, texts: list[str], tokenize: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
        """The ids of the texts. Those that are kept are removed; `tokenize` is called for the others."""
        with self._lock:
            found = {text: ids for text in texts if (ids := self._remove(text)) is not None}
        missing = [text for text in texts if text not in found] if found else texts
        tokenized = iter(tokenize(missing) if missing else [])
        return [found[text] if text in found else next(tokenized) for text in texts]

    def _remove(self, text: str) -> list[int] | None:
        ids = self._ids.pop(text, None)
        self._num_tokens -= len(ids or ())
        return ids


_locks: WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock_of(tokenizer: PreTrainedTokenizerBase) -> threading.Lock:
    """The one lock of a tokenizer. It is not an attribute, because a tokenizer with a lock could not be pickled."""
    with _locks_lock:
        return _locks.setdefault(tokenizer, threading.Lock())


def _input_ids(encoding: Any) -> list[list[int]]:
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _pad(rows: list[list[int]], pad: int, longest: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Right-padded ids and mask (B, width), and lengths (B,). There is at least one column, so that a mean is defined.

    The width is the longest row's, rounded up to a multiple of 8, but at most `longest`.
    """
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    width = max(1, min(longest, round_up(int(lengths.max(initial=0)))))
    mask = np.arange(width) < lengths[:, None]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), lengths
