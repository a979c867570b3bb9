"""The projector turns a pooled encoder vector into a Contextual token. `initialise` prepares it for training.

B texts, E encoder width, D llm width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from c2v_rag.parts import token_embeddings

# The norm of a new projector's output, relative to a token embedding. The llm's layers change such a long vector
# little, so its last hidden state is the rotated encoder vector. SmolLM2-135M (12 layers) and all-MiniLM-L6-v2, before
# training: Spearman of the Contextual token's state on STSBenchmark dev is 23.8 at 1 x, 49.0 at 16 x, 83.3 at 64 x,
# 86.4 at 256 x, 86.6 at 1024 x. It is 86.7 for the encoder, and for the state divided by the final norm's weight.
INITIAL_TOKEN_SCALE = 1024
# From this scale on, the llm's layers leave the token nearly as it is, so that its last state is known in advance.
_PASSES_THROUGH = 64
_PROBES = 256


class Projector(nn.Module):
    """Two linear layers from the encoder's width E to the llm's width D: one text, one Contextual token.

    The input is scaled to mean square 1 first, so that the encoder's scale does not matter. A new projector is a
    random rotation: its hidden layer computes x and -x, and gelu(x) - gelu(-x) = x.
    """

    scale: Tensor

    def __init__(self, encoder_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(encoder_dim, 2 * encoder_dim)
        self.output = nn.Linear(2 * encoder_dim, llm_dim)
        self.register_buffer("scale", torch.ones(()))
        with torch.no_grad():
            rotation = nn.init.orthogonal_(torch.empty(llm_dim, encoder_dim))
            self.hidden.weight.copy_(torch.cat([torch.eye(encoder_dim), -torch.eye(encoder_dim)]))
            self.output.weight.copy_(torch.cat([rotation, -rotation], dim=1))
            self.hidden.bias.zero_()
            self.output.bias.zero_()

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, E) -> (B, D)."""
        unit = normalize(pooled.float(), dim=-1) * math.sqrt(pooled.shape[-1])
        output: Tensor = self.output(nn.functional.gelu(self.hidden(unit.to(self.hidden.weight.dtype))))
        return self.scale * output

    @torch.no_grad()
    def start_at_norm(self, norm: float) -> None:
        """Set the fixed scale of the outputs, so that the outputs of a new projector have about this norm."""
        self.scale.fill_(norm / math.sqrt(self.hidden.in_features))

    @torch.no_grad()
    def divide_columns(self, norm_weight: Tensor) -> None:
        """Divide a new projector's output columns by `norm_weight` (D,); the llm's final norm multiplies by it."""
        self.output.weight.div_(norm_weight.unsqueeze(1).to(self.output.weight))


def initialise(projector: Projector, llm: PreTrainedModel, scale: float = INITIAL_TOKEN_SCALE) -> None:
    """Scale a new projector for this decoder: its outputs get `scale` times the norm of a token embedding.

    From a scale of 64 on, the outputs are also divided by the weight of the final norm. With the default scale, the
    Contextual token's last state is then the rotated encoder vector.
    """
    token_norm = mean_token_norm(llm)
    projector.start_at_norm(scale * token_norm)
    if scale >= _PASSES_THROUGH:
        projector.divide_columns(final_norm_weight(llm, scale * token_norm))


def mean_token_norm(llm: PreTrainedModel) -> float:
    """Mean norm of the decoder's token embeddings, from an evenly spaced sample of the vocabulary."""
    table = token_embeddings(llm)
    ids = torch.linspace(0, table.num_embeddings - 1, steps=min(4096, table.num_embeddings)).long()
    with torch.no_grad():
        return float(table(ids.to(table.weight.device)).float().norm(dim=-1).mean())


@torch.no_grad()
def final_norm_weight(llm: PreTrainedModel, token_norm: float) -> Tensor:
    """(D,): the weight of the decoder's final norm, up to a factor common to all columns.

    It is measured with random input vectors of norm `token_norm`, which works for every decoder family: the layers
    change such long vectors little. A token embedding comes before each, because the first position is an attention
    sink.
    """
    table = token_embeddings(llm).weight
    width = table.shape[1]
    directions = torch.randn(_PROBES, width, generator=torch.Generator().manual_seed(0)).to(table)
    probes = torch.stack([table[:1].expand(_PROBES, -1), directions * (token_norm / math.sqrt(width))], dim=1)
    states = llm(inputs_embeds=probes, use_cache=False).last_hidden_state[:, 1].float()
    weight: Tensor = (states * directions).sum(dim=0) / directions.float().square().sum(dim=0)
    weight = weight / weight.abs().mean()
    signs = torch.where(weight < 0, -1.0, 1.0)
    return signs * weight.abs().clamp(min=0.05)  # no division by almost 0: a column with such a weight stays small
