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
from c2v_rag.pooling import pool
from c2v_rag.tokenization import TokenBatch


class Bidirectional(Causal2Vec):
    """Full attention instead of the causal mask (LLM2Vec, arXiv 2404.05961); for contextual_token "none"."""

    def compute_prefix(self, prefix_ids: Tensor) -> None:
        """None: the states of the instruction depend on the text, so they cannot be computed before it."""

    def embed_with_prefix(
        self, prefix: DynamicCache | None, batch: TokenBatch, *, pooled: Tensor | None, pooling: Pooling
    ) -> Tensor:
        """As `Causal2Vec.embed_with_prefix`, without `prefix` and `pooled`."""
        prompt_ids = batch.prefix_ids.expand(len(batch.text_ids), -1)
        mask = torch.cat([torch.ones_like(prompt_ids), batch.text_mask], dim=1)
        full_mask = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
        embeds = self.llm.get_input_embeddings()(torch.cat([prompt_ids, batch.text_ids], dim=1))
        hidden = self.llm(inputs_embeds=embeds, attention_mask=full_mask, use_cache=False).last_hidden_state
        return normalize(
            pool(hidden[:, prompt_ids.shape[1] :], batch.text_mask, pooling, batch.num_prompt_tokens), dim=1
        )


class Echo(Causal2Vec):
    """The text twice: the second copy can attend to the whole first one (arXiv 2402.15449)."""

    def embed_with_prefix(
        self, prefix: DynamicCache | None, batch: TokenBatch, *, pooled: Tensor | None, pooling: Pooling
    ) -> Tensor:
        """As `Causal2Vec.embed_with_prefix`, of each text written twice."""
        texts = [ids[:n] for ids, n in zip(batch.text_ids, batch.text_mask.sum(dim=1).tolist(), strict=True)]
        twice = [torch.cat([ids[:-1], ids]) for ids in texts]
        mask = pad_sequence([torch.ones_like(ids) for ids in twice], batch_first=True)
        batch = dataclasses.replace(batch, text_ids=pad_sequence(twice, batch_first=True), text_mask=mask)
        return super().embed_with_prefix(prefix, batch, pooled=pooled, pooling=pooling)
