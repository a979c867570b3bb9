"""Other ways to embed with the same decoder, as models that train and embed like Causal2Vec."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from c2v_rag import Causal2Vec
from c2v_rag.config import Pooling
from c2v_rag.model import pool
from c2v_rag.tokenization import TokenBatch


class Bidirectional(Causal2Vec):
    """Full attention instead of the causal mask (LLM2Vec, arXiv 2404.05961); for contextual_token "none"."""

    def _prefix_states(self, prefix_ids: Tensor) -> None:
        """None: the instruction sees the text too, so that nothing of it can be computed beforehand."""

    def _embed(self, batch: TokenBatch, prefix: DynamicCache | None, pooled: Tensor | None, pooling: Pooling) -> Tensor:
        lead = batch.prefix_ids.expand(len(batch.text_ids), -1)
        mask = torch.cat([torch.ones_like(lead), batch.text_mask], dim=1)
        seen = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
        embeds = self.llm.get_input_embeddings()(torch.cat([lead, batch.text_ids], dim=1))
        hidden = self.llm(inputs_embeds=embeds, attention_mask=seen, use_cache=False).last_hidden_state
        return normalize(pool(hidden[:, lead.shape[1] :], batch.text_mask, pooling, batch.num_lead), dim=1)


class Echo(Causal2Vec):
    """The text twice, so that the second copy has read the first (arXiv 2402.15449)."""

    def _embed(self, batch: TokenBatch, prefix: DynamicCache | None, pooled: Tensor | None, pooling: Pooling) -> Tensor:
        texts = [ids[:n] for ids, n in zip(batch.text_ids, batch.text_mask.sum(dim=1).tolist(), strict=True)]
        twice = [torch.cat([ids[:-1], ids]) for ids in texts]
        mask = pad_sequence([torch.ones_like(ids) for ids in twice], batch_first=True)
        batch = dataclasses.replace(batch, text_ids=pad_sequence(twice, batch_first=True), text_mask=mask)
        return super()._embed(batch, prefix, pooled, pooling)
