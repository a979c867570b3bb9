"""Forward passes over texts without padding: sequences one behind the other, torch's varlen_attn on a GPU.

For recipes and benchmarks that train on one GPU. On a CPU the attention pads, among 32 texts of similar length.
T tokens of a batch, n texts, E encoder width, D decoder width.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, normalize, pad, scaled_dot_product_attention, silu

from c2v_rag import Causal2Vec
from c2v_rag.config import Pooling
from c2v_rag.inference import default_dtype

SEQUENCES_AT_ONCE = 32  # of attention on a CPU


class Ragged:
    """Rows of different lengths in one flat tensor."""

    def __init__(self, flat: Tensor, lengths: Tensor, device: torch.device) -> None:
        self.lengths = lengths.numpy()
        self.flat = flat.to(device)
        self.starts = (torch.cumsum(lengths, 0) - lengths).to(device)

    @classmethod
    def tokenize(
        cls, tokenizer: Any, texts: Sequence[str], device: torch.device, *, most: int, eos: int | None = None
    ) -> Ragged:
        """The ids of `texts`, at most `most` each: with the tokenizer's special tokens, or with `eos` at the end."""
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(most if eos is None else most - 1)
        flat, lengths = [], []
        for start in range(0, len(texts), 50_000):
            found = backend.encode_batch_fast(texts[start : start + 50_000], add_special_tokens=eos is None)
            rows = [one.ids if eos is None else [*one.ids, eos] for one in found]
            flat.append(torch.from_numpy(np.fromiter((i for row in rows for i in row), dtype=np.int32)))
            lengths += [len(row) for row in rows]
        backend.no_truncation()
        return cls(torch.cat(flat), torch.tensor(lengths), device)

    def shortened(self, most: int) -> Ragged:
        """The same rows with at most `most` ids each. The last id (EOS, or the encoder's) is kept."""
        device = self.flat.device
        packed = Packed.of(self.lengths.clip(max=most), device)
        whole = torch.from_numpy(self.lengths).to(device)[packed.sequence]
        is_last = packed.place == packed.lengths[packed.sequence] - 1
        place = torch.where(is_last, whole - 1, packed.place)
        return Ragged(self.flat[self.starts[packed.sequence] + place], packed.lengths.cpu(), device)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences one behind the other: of each token its sequence and its place in it; `ends` (n + 1,) int32."""

    sequence: Tensor
    place: Tensor
    ends: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> Packed:
        sizes = torch.from_numpy(lengths).to(device)
        ends = pad(torch.cumsum(sizes, 0), (1, 0))
        total = int(lengths.sum())
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes, output_size=total)
        place = torch.arange(total, device=device) - ends[sequence]
        return cls(sequence, place, ends.int(), sizes, int(lengths.max()))


def attend(query: Tensor, key: Tensor, value: Tensor, packed: Packed, *, causal: bool) -> Tensor:
    """Attention within each sequence; (T, heads, width) each."""
    if query.is_cuda:
        varlen_attn, options = _varlen(causal)
        return varlen_attn(query, key, value, packed.ends, packed.ends, packed.longest, packed.longest, **options)
    tokens, mixed = [], []
    for group in packed.lengths.argsort().split(SEQUENCES_AT_ONCE):  # of similar length
        places = torch.arange(int(packed.lengths[group].max()))
        is_token = places < packed.lengths[group, None]
        rows = packed.ends[group, None] + places
        q, k, v = (x[rows.clamp(max=len(x) - 1)].transpose(1, 2) for x in (query, key, value))
        # Padding comes last, so that causal attention never reads it.
        mask = None if causal else is_token[:, None, None]
        states = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        mixed.append(states.transpose(1, 2)[is_token])
        tokens.append(rows[is_token])
    return torch.cat(mixed)[torch.cat(tokens).argsort()]


@functools.cache
def _varlen(causal: bool) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """torch's attention over packed sequences, and its options, whose names differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    has_windows = "window_size" in inspect.signature(varlen_attn).parameters
    return varlen_attn, ({"window_size": (-1, 0)} if has_windows else {"is_causal": True}) if causal else {}


class PackedModel:
    """Forward passes of a `Causal2Vec` with a BERT encoder and a Llama decoder, as its config says.

    `encoder_ids`, `llm_ids`: the token ids of all texts, for the encoder and for the decoder (EOS included).
    `bidirectional`: the decoder's attention is not causal. `echo`: the decoder reads each text twice. Both are for
    models without a Contextual token.
    """

    def __init__(
        self,
        model: Causal2Vec,
        encoder_ids: Ragged,
        llm_ids: Ragged,
        *,
        bidirectional: bool = False,
        echo: bool = False,
    ) -> None:
        self.model = model
        self.encoder_ids, self.llm_ids = encoder_ids, llm_ids
        self.bidirectional, self.echo = bidirectional, echo
        self.device = model.device
        self.dtype = default_dtype(self.device)
        prompt = model.config.prompt(model.config.instruction)
        backend = model.tokenizer.llm.backend_tokenizer
        ids = [model.tokenizer.bos, *backend.encode(prompt, add_special_tokens=False).ids]
        self.prefix = torch.tensor(ids, device=self.device)

    def dense(self, layer: Any, x: Tensor) -> Tensor:
        """A linear layer, with its adapter merged on the fly."""
        base = getattr(layer, "base_layer", layer)
        weight = base.weight
        if base is not layer:
            weight = weight + layer.scaling["default"] * (
                layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            )
        bias = None if base.bias is None else base.bias.to(self.dtype)
        return linear(x.to(self.dtype), weight.to(self.dtype), bias)

    def encode(self, rows: np.ndarray) -> Tensor:
        """(n, E): mean of the encoder's last states of the texts in these rows, float32."""
        bert: Any = self.model.encoder
        packed = Packed.of(self.encoder_ids.lengths[rows], self.device)
        starts = self.encoder_ids.starts[torch.from_numpy(rows).to(self.device)]
        ids = self.encoder_ids.flat[starts[packed.sequence] + packed.place].long()
        embeddings = bert.embeddings
        h = embeddings.word_embeddings(ids) + embeddings.position_embeddings(packed.place)
        h = embeddings.LayerNorm((h + embeddings.token_type_embeddings.weight[0]).float())
        heads = bert.config.num_attention_heads
        for layer in bert.encoder.layer:
            attention = layer.attention
            q, k, v = (
                self.dense(getattr(attention.self, name), h).unflatten(1, (heads, -1))
                for name in ("query", "key", "value")
            )
            mixed = self.dense(attention.output.dense, attend(q, k, v, packed, causal=False).flatten(1))
            h = attention.output.LayerNorm(h + mixed.float())
            inner = self.dense(layer.output.dense, gelu(self.dense(layer.intermediate.dense, h)))
            h = layer.output.LayerNorm(h + inner.float())
        total = torch.zeros(len(rows), h.shape[1], device=self.device).index_add(0, packed.sequence, h)
        return total / packed.lengths[:, None]

    def pool(self, rows: np.ndarray, num_queries: int, pooling: Pooling, pooled: Tensor | None = None) -> Tensor:
        """(n, D), or (n, 2 D) for "context_eos": as `c2v_rag.pooling.pool`. The first `num_queries` rows are queries.

        `pooled` (n, E): vectors of the encoder; unless given, they are computed.
        """
        llm: Any = self.model.llm
        place_of_token = self.model.config.contextual_token
        has_token = place_of_token != "none"
        text_lengths = self.llm_ids.lengths[rows]
        if pooling == "context":
            text_lengths = np.zeros_like(text_lengths)  # no token reads what comes after it
        again = text_lengths - 1 if self.echo else np.zeros_like(text_lengths)
        prompt = np.zeros(len(rows), dtype=np.int64)
        prompt[:num_queries] = len(self.prefix) - 1
        before = prompt + 1 if place_of_token == "after_instruction" or not has_token else np.ones_like(prompt)
        start = prompt + 1 + has_token  # of the text
        packed = Packed.of(start + again + text_lengths, self.device)
        first, text_start, repeated = (torch.from_numpy(x).to(self.device) for x in (before, start, again))

        place = packed.place - text_start[packed.sequence]  # in the text; negative before it
        in_text = torch.where(place >= repeated[packed.sequence], place - repeated[packed.sequence], place)
        starts = self.llm_ids.starts[torch.from_numpy(rows).to(self.device)]
        text = self.llm_ids.flat[starts[packed.sequence] + in_text.clamp(min=0)]
        in_prefix = packed.place - (packed.place > first[packed.sequence]).long() * has_token
        ids = torch.where(place >= 0, text, self.prefix[in_prefix.clamp(max=len(self.prefix) - 1)]).long()
        h = llm.embed_tokens(ids).float()
        token_places = packed.ends[:-1].long() + first
        if has_token:
            token = self.model.projector(self.encode(rows) if pooled is None else pooled)
            h = h.index_copy(0, token_places, token.float())

        states = llm.norm(self._layers(h, packed))
        if pooling == "context":
            return states[token_places]
        if pooling == "mean":
            shares = ((place >= 0) / (packed.lengths - text_start)[packed.sequence]).unsqueeze(1)
            return torch.zeros(len(rows), h.shape[1], device=self.device).index_add(0, packed.sequence, states * shares)
        eos = states[packed.ends[1:].long() - 1]
        return eos if pooling == "eos" else torch.stack([states[token_places], eos], dim=-1).flatten(1)

    def _layers(self, h: Tensor, packed: Packed) -> Tensor:
        llm: Any = self.model.llm
        cos, sin = (x[0].unsqueeze(1) for x in llm.rotary_emb(h.unsqueeze(0), packed.place.unsqueeze(0)))
        config = llm.config
        width = config.hidden_size // config.num_attention_heads
        for layer in llm.layers:
            x = layer.input_layernorm(h)
            attention = layer.self_attn
            q, k, v = (self.dense(getattr(attention, f"{name}_proj"), x).unflatten(1, (-1, width)) for name in "qkv")
            q, k = (y * cos.to(y.dtype) + _rotate(y) * sin.to(y.dtype) for y in (q, k))
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            mixed = attend(q, k, v, packed, causal=not self.bidirectional).flatten(1)
            h = h + self.dense(attention.o_proj, mixed).float()
            x = layer.post_attention_layernorm(h)
            gate, up = self.dense(layer.mlp.gate_proj, x), self.dense(layer.mlp.up_proj, x)
            h = h + self.dense(layer.mlp.down_proj, silu(gate) * up).float()
        return h

    def in_parts(self, rows: np.ndarray, compute: Callable[[np.ndarray], Tensor], tokens: int = 300_000) -> Tensor:
        """`compute` on parts of similar length, in the order of `rows`; rows of length 1, float16."""
        lengths = np.maximum(self.llm_ids.lengths, self.encoder_ids.lengths)[rows]
        order = np.argsort(lengths, kind="stable")
        if self.device.type == "cpu":
            tokens = min(tokens, 32_768)
        size = max(1, tokens // int(lengths.max() + 20))
        parts = [
            normalize(compute(rows[order[start : start + size]]), dim=1).half() for start in range(0, len(order), size)
        ]
        return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(self.device)]

    @torch.no_grad()
    def embed(self, rows: np.ndarray, *, queries: bool, pooling: Pooling | None = None) -> Tensor:
        """(n, .) float16 of length 1: the embeddings of queries or documents."""
        chosen = pooling or self.model.config.pooling
        return self.in_parts(rows, lambda part: self.pool(part, len(part) if queries else 0, chosen))


def _rotate(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)
