"""Training the decoder's last layers alone, over states below them that are computed once a text.

What stays as it is need not be computed again: of 12 layers the last two cost a sixth, and nothing is propagated back
through the others.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from c2v_rag.model import Causal2Vec, pool
from c2v_rag.tokenization import TokenBatch


class UpperLayers(nn.Module):
    """The embedding of texts whose states at the input of layer `first` are kept, in bfloat16 and in memory.

    Raises ValueError for a decoder whose layers are not `model.llm.layers`, or that has no layer `first`.
    """

    def __init__(self, model: Causal2Vec, first: int) -> None:
        super().__init__()
        layers = getattr(model.llm, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not 0 < first < len(layers):
            found = f"has {len(layers)} layers" if isinstance(layers, nn.ModuleList) else "keeps no list of its layers"
            raise ValueError(f"from_layer is {first}, but the decoder {found}.")
        self._model = [model]  # in a list: its parameters are not this module's
        self._below = [_part(model.llm, layers[:first])]
        self._below[0].norm = nn.Identity()
        self._above = [_part(model.llm, layers[first:])]
        self._states: dict[tuple[tuple[int, ...], int], Tensor] = {}

    def forward(self, batch: TokenBatch, rows: Tensor, pooled: Tensor) -> Tensor:
        """Embeddings (B, embedding_dim), differentiable in the upper layers; `rows` (B,) name the texts."""
        prefix = tuple(batch.prefix_ids.tolist())
        missing = [place for place, row in enumerate(rows.tolist()) if (prefix, row) not in self._states]
        if missing:
            self._compute(batch, rows, pooled, missing)
        states = [self._states[prefix, row] for row in rows.tolist()]
        hidden = pad_sequence([one.to(pooled.device, pooled.dtype) for one in states], batch_first=True)
        lengths = torch.tensor([len(one) for one in states], device=hidden.device)
        mask = (torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]).long()
        hidden = self._above[0](inputs_embeds=hidden, attention_mask=mask, use_cache=False).last_hidden_state
        num_prefix, config = len(prefix), self._model[0].config
        hidden, mask = hidden[:, num_prefix:], mask[:, num_prefix:]
        vectors = pool(hidden, mask, config.pooling, text_start=1 + batch.num_lead)
        return normalize(vectors[:, : config.truncate_dim], dim=1)

    @torch.no_grad()
    def _compute(self, batch: TokenBatch, rows: Tensor, pooled: Tensor, places: list[int]) -> None:
        model, some = self._model[0], torch.tensor(places, device=batch.text_ids.device)
        embed = cast(nn.Embedding, model.llm.get_input_embeddings())
        contextual = model.projector(pooled[some]).unsqueeze(1)
        prefix = embed(batch.prefix_ids).expand(len(some), -1, -1)
        embeds = torch.cat([prefix, contextual.to(prefix.dtype), embed(batch.text_ids[some])], dim=1)
        text_mask = batch.text_mask[some]
        mask = torch.cat([text_mask.new_ones(len(some), prefix.shape[1] + 1), text_mask], dim=1)
        hidden = self._below[0](inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        key = tuple(batch.prefix_ids.tolist())
        for state, length, place in zip(hidden, mask.sum(dim=1).tolist(), places, strict=True):
            self._states[key, int(rows[place])] = state[:length].to("cpu", torch.bfloat16, copy=True)


def _part(llm: PreTrainedModel, layers: nn.ModuleList) -> PreTrainedModel:
    """The decoder with these of its layers; their weights are shared."""
    part = copy.copy(llm)
    part._modules = {**llm._modules, "layers": layers}
    part.config = copy.deepcopy(llm.config)
    part.config.num_hidden_layers = len(layers)
    return part
