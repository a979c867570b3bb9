"""Pool last hidden states into one vector per text.

B texts, S encoder tokens, N decoder positions after the prefix, E encoder width, D llm width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from c2v_rag.attention import encoder_attention_mask
from c2v_rag.config import EncoderPooling, Pooling
from c2v_rag.tokenization import TokenBatch


def pool_encoder(hidden: Tensor, mask: Tensor, pooling: EncoderPooling) -> Tensor:
    """Pool the encoder's states (B, S, E), with their mask (B, S), into vectors (B, E), float32."""
    if pooling == "cls":
        return hidden[:, 0].float()
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def pool_by_length(encoder: PreTrainedModel, batch: TokenBatch, pooling: EncoderPooling) -> Tensor:
    """Pooled states (B, E) of the batch's texts, float32. The encoder runs on each of the batch's slices.

    Batches are sorted by length in the decoder; a slice has texts of similar lengths in the encoder. A slice without
    padding gets no attention mask.
    """
    batch = batch.with_encoder_order()
    assert batch.encoder_order is not None
    assert batch.encoder_slices is not None
    order, places = batch.encoder_order
    ids, mask = batch.encoder_ids[order], batch.encoder_mask[order]
    pooled = []
    for first, end, width, is_padded in batch.encoder_slices:
        part_mask = mask[first:end, :width]
        attention_mask = encoder_attention_mask(encoder, part_mask) if is_padded else None
        hidden = encoder(input_ids=ids[first:end, :width], attention_mask=attention_mask).last_hidden_state
        pooled.append(pool_encoder(hidden, part_mask, pooling))
    return torch.cat(pooled)[places]


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling, text_start: int) -> Tensor:
    """Pool the decoder's last hidden states into one vector per text, float32, not normalised.

    `hidden` (B, N, D) starts after the prefix. The Contextual token is first, if there is one. The text starts at
    `text_start` and ends in EOS. `mask` (B, N) is 1 on real tokens; padding is on the right. `context_eos` returns
    (B, 2 D) with interleaved columns c0, e0, c1, e1, ...: the first columns contain both halves equally. Other poolings
    return (B, D).
    """
    if pooling == "context":
        return hidden[:, 0].float()
    if pooling == "mean":
        weights = mask.clone().unsqueeze(-1).float()
        weights[:, :text_start] = 0
        return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
    last = mask.sum(dim=1) - 1
    eos = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    return eos if pooling == "eos" else torch.stack([hidden[:, 0].float(), eos], dim=-1).flatten(1)
