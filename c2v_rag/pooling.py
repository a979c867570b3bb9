"""Pool last hidden states into one vector per text.

B texts, S encoder tokens, N decoder positions after the prefix, E encoder width, D llm width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from c2v_rag.config import EncoderPooling, Pooling


def pool_encoder(hidden: Tensor, mask: Tensor, pooling: EncoderPooling) -> Tensor:
    """Pool the encoder's states (B, S, E), with their mask (B, S), into vectors (B, E), float32."""
    if pooling == "cls":
        return hidden[:, 0].float()
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling, text_start: int) -> Tensor:
    """Pool the decoder's last hidden states into one vector per text, float32, not normalised.

    `hidden` (B, N, D) starts after the prefix. The Contextual token is first, if there is one. The text starts at
    `text_start` and ends in EOS. `mask` (B, N) is 1 on real tokens; padding is on the right. `context_eos` returns
    (B, 2 D) with interleaved columns c0, e0, c1, e1, ...: the first columns contain both halves equally. Other poolings
    return (B, D).
    """
    hidden = hidden.float()
    if pooling == "context":
        return hidden[:, 0]
    if pooling == "mean":
        weights = mask.clone().unsqueeze(-1).float()
        weights[:, :text_start] = 0
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    last = mask.sum(dim=1) - 1
    eos = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return eos if pooling == "eos" else torch.stack([hidden[:, 0], eos], dim=-1).flatten(1)
