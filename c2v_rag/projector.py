"""The projector, from a pooled encoder vector to a Contextual token, and the initialisation of a fresh one.

B texts, E encoder width, D llm width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from c2v_rag.parts import token_embeddings

# A fresh projector's output is this many times as long as a token embedding: what the llm's layers add to it is then
# small, and its last hidden state is the encoder's vector, rotated. SmolLM2-135M (12 layers) and all-MiniLM-L6-v2,
# untrained: Spearman of the Contextual token's state on STSBenchmark dev 23.8 at 1 x, 49.0 at 16 x, 83.3 at 64 x, 86.4
# at 256 x, 86.6 at 1024 x. The encoder itself has 86.7, and so has the state divided by the final norm's weight.
INITIAL_TOKEN_SCALE = 1024
_PROBES = 256


class Projector(nn.Module):
    """Two linear layers from the encoder's width E to the llm's width D: one text, one Contextual token.

    The input is scaled to mean square 1 first, so that the encoder's scale does not matter. A fresh projector is a
    random rotation: the hidden layer holds x and -x, and gelu(x) - gelu(-x) = x.
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
        """Set the fixed scale of the outputs so that those of a fresh projector have about this norm."""
        self.scale.fill_(norm / math.sqrt(self.hidden.in_features))

    @torch.no_grad()
    def divide_columns(self, norm_weight: Tensor) -> None:
        """Divide a fresh projector's output columns by `norm_weight` (D,), which the llm's final norm multiplies by."""
        self.output.weight.div_(norm_weight.unsqueeze(1).to(self.output.weight))


def initialise(projector: Projector, llm: PreTrainedModel) -> None:
    """Scale a fresh projector for this decoder, so that the Contextual token's last state is the encoder's vector.

    Its outputs are 1,024 times as long as a token embedding, and the final norm's weight is divided out.
    """
    token_norm = INITIAL_TOKEN_SCALE * mean_token_norm(llm)
    projector.start_at_norm(token_norm)
    projector.divide_columns(final_norm_weight(llm, token_norm))


def mean_token_norm(llm: PreTrainedModel) -> float:
    """Mean norm of the decoder's token embeddings, over a sample spread over the vocabulary."""
    table = token_embeddings(llm)
    ids = torch.linspace(0, table.num_embeddings - 1, steps=min(4096, table.num_embeddings)).long()
    with torch.no_grad():
        return float(table(ids.to(table.weight.device)).float().norm(dim=-1).mean())


@torch.no_grad()
def final_norm_weight(llm: PreTrainedModel, token_norm: float) -> Tensor:
    """(D,): the weight of the decoder's final norm, up to a factor common to all columns.

    Measured on tokens of this norm, too long for the layers to change much, so that it works for every family. The
    directions are random. They stand behind a word, because the first token takes the attention sink.
    """
    table = token_embeddings(llm).weight
    width = table.shape[1]
    directions = torch.randn(_PROBES, width, generator=torch.Generator().manual_seed(0)).to(table)
    probes = torch.stack([table[:1].expand(_PROBES, -1), directions * (token_norm / math.sqrt(width))], dim=1)
    states = llm(inputs_embeds=probes, use_cache=False).last_hidden_state[:, 1].float()
    weight: Tensor = (states * directions).sum(dim=0) / directions.float().square().sum(dim=0)
    weight = weight / weight.abs().mean()
    signs = torch.where(weight < 0, -1.0, 1.0)
    return signs * weight.abs().clamp(min=0.05)  # a column that is shut off stays so
