"""The texts, the untrained model and its vectors that the runs of a script share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from bases import new_model, reset_adapter
from packed import PackedModel, Ragged
from pairs import MAX_ROWS, DevSets, PieceBM25, Texts, kept_vectors
from torch import Tensor, nn

from c2v_rag import Causal2VecConfig
from c2v_rag.projector import INITIAL_TOKEN_SCALE, Projector, initialise

ENCODER_TOKENS, LLM_TOKENS = 256, 320


class Bench:
    """N texts: those of the training sets, then those of the development sets. E: the encoder's width.

    `context` (N, E): the vectors of the untrained encoder, of length 1, float16. `max_rows`: of each training set.
    `held_out`: training sets that are development sets here, as far as they are there. `reads_texts`: the decoder
    reads texts, not just the Contextual token.
    """

    def __init__(
        self,
        data: Path,
        folders: Sequence[Path],
        config: Causal2VecConfig,
        device: str,
        *,
        encoder_rank: int,
        llm_rank: int,
        seed: int = 0,
        max_rows: int = MAX_ROWS,
        held_out: Sequence[str] = (),
        reads_texts: bool = True,
    ) -> None:
        self.texts = Texts()
        self.texts.read(data, seed, max_rows)
        held = {name: self.texts.pairs.pop(name) for name in held_out if name in self.texts.pairs}
        self._trained = self.texts.all
        self.dev = DevSets(folders, self.texts)
        for name, (queries, positives) in held.items():
            self.dev.add_pairs(name, queries, positives)
        self.model = new_model(device, config, seed=seed, encoder_rank=encoder_rank, llm_rank=llm_rank)
        self._layers = list(self.model.llm.layers)  # type: ignore[arg-type]
        tokenizer, texts = self.model.tokenizer, self.texts.all
        self.encoder_ids = Ragged.tokenize(tokenizer.encoder, texts, self.model.device, most=ENCODER_TOKENS)
        if reads_texts:
            self.llm_ids = Ragged.tokenize(tokenizer.llm, texts, self.model.device, most=LLM_TOKENS, eos=tokenizer.eos)
        else:
            one_each = torch.ones(len(texts), dtype=torch.int64)
            self.llm_ids = Ragged(one_each.int(), one_each, self.model.device)
        self.packed = PackedModel(self.model, self.encoder_ids, self.llm_ids)
        with torch.no_grad():
            self.context = self.packed.in_parts(np.arange(len(texts)), self.packed.encode)
        self.bm25 = PieceBM25(self.encoder_ids, self.texts.pairs, len(tokenizer.encoder))

    def teacher(self, folder: str, kept: Path | None) -> Tensor:
        """The vectors of a sentence-transformers model, of the training sets' texts; see `kept_vectors`."""
        return kept_vectors(kept, folder, self._trained, self.model.device)

    def restart(self, num_layers: int, seed: int, scale: float = INITIAL_TOKEN_SCALE) -> None:
        """The untrained model with this many decoder layers, nothing of it trainable. `scale`: of the Contextual
        token."""
        model = self.model
        torch.manual_seed(seed)
        model.llm.layers = nn.ModuleList(self._layers[:num_layers])
        for part in (model.encoder, model.llm):
            reset_adapter(part, seed)
            part.requires_grad_(False)
        model.projector = Projector(model.encoder.config.hidden_size, model.llm.config.hidden_size).to(model.device)
        initialise(model.projector, model.llm, scale)
        model.projector.requires_grad_(False)
