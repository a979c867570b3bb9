"""Vectors of the model before a stage: a teacher that keeps what the model can do already.

N texts, D columns of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from c2v_rag import inference
from c2v_rag.finetune.vectors import TextVectors, autocast
from c2v_rag.identity import hash_tensors
from c2v_rag.model import Causal2Vec
from c2v_rag.tokenization import TextTokenizer, TokenBatch, TokenizedTexts

_SEPARATOR = "\0"  # between prompt and text; a prompt does not contain it


class StartVectors:
    """A table of the vectors that `model` computes now, of each text with the prompt that is put before it.

    `tokenizer` cuts texts at the stage's length. The vectors are kept in `folder`; a table that was computed from other
    trained weights is not used. Each of `num_processes` processes computes its share.
    """

    def __init__(
        self,
        model: Causal2Vec,
        tokenizer: TextTokenizer,
        trained: Mapping[str, Tensor],
        folder: Path,
        *,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        digest = hash_tensors(trained, max_length=tokenizer.config.max_length)
        self._model = model
        self._tokenizer = tokenizer
        self._table = TextVectors(
            folder / f"start-{digest[:16]}", self._embed, process=process, num_processes=num_processes
        )

    def prepare(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Compute what is missing: the texts of each prompt; the prompt "" is for documents."""
        self._table.prepare(f"{prompt}{_SEPARATOR}{text}" for prompt, group in texts.items() for text in group)

    def __call__(self, prompt: str, texts: Sequence[str]) -> Tensor:
        """(N, D), rows of length 1. KeyError for a text that was not prepared with this prompt."""
        return self._table(self._table.rows([f"{prompt}{_SEPARATOR}{text}" for text in texts]))

    def _embed(self, keys: Sequence[str]) -> np.ndarray:
        groups: dict[str, list[int]] = {}
        texts = []
        for row, key in enumerate(keys):
            prompt, _, text = key.partition(_SEPARATOR)
            groups.setdefault(prompt, []).append(row)
            texts.append(text)
        found = np.empty((len(keys), self._model.embedding_dim), dtype=np.float32)
        for prompt, rows in groups.items():
            embedder = _PromptedModel(self._model, self._tokenizer, prompt)
            with autocast(self._model.device):
                found[rows] = inference.encode(
                    embedder, [texts[row] for row in rows], on_truncate="ignore", show_progress=True
                )
        return found


class _PromptedModel:
    """A model that tokenises with another tokenizer and puts one prompt before every text."""

    def __init__(self, model: Causal2Vec, tokenizer: TextTokenizer, prompt: str) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._prompt = prompt
        self.encoding_state = model.encoding_state
        self.embedding_dim = model.embedding_dim
        self.device = model.device

    def modules(self) -> Iterator[nn.Module]:
        return self._model.modules()

    def tokenize(self, texts: Sequence[str], instruction: str = "") -> TokenizedTexts:
        return self._tokenizer(texts, self._prompt)

    def embed(self, batch: TokenBatch) -> Tensor:
        return self._model.embed(batch)
