"""An embedder that uses only the encoder of a model: a baseline, and the source of vectors that training caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from c2v_rag import inference
from c2v_rag.identity import walk
from c2v_rag.model import Causal2Vec
from c2v_rag.tokenization import TextTokenizer, TokenBatch, TokenizedTexts


class EncoderEmbedder:
    """Embeds with the encoder of a Causal2Vec model alone.

    The encoder reads no instruction. It reads the config's `encoder_query_prompt` before queries and
    `encoder_document_prompt` before all other texts, if the model has them.

    `tokenizer` replaces the model's, to truncate texts at other lengths.
    """

    def __init__(self, model: Causal2Vec, tokenizer: TextTokenizer | None = None) -> None:
        self._model = model
        self._tokenizer = tokenizer or model.tokenizer

    @property
    def encoding_state(self) -> inference.EncodingState:
        """The model's state: embedders that use the same parts take turns."""
        return self._model.encoding_state

    def modules(self) -> Iterator[nn.Module]:
        return walk(self._model.encoder)

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def embedding_dim(self) -> int:
        return int(self._model.encoder.config.hidden_size)

    @property
    def stamp(self) -> dict[str, str | int]:
        return self._model.stamp | {"part": "encoder", "embedding_dim": self.embedding_dim}

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The same counts as the whole model's, so that an index made with either has the same chunks."""
        return self._model.count_tokens(texts)

    def token_ends(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """The same offsets as the whole model's."""
        return self._model.token_ends(texts)

    @property
    def max_tokens(self) -> int:
        return self._model.max_tokens

    def tokenize(self, texts: Sequence[str], instruction: str = "") -> TokenizedTexts:
        return self._tokenizer(texts, self._model.config.prompt(instruction))

    def embed(self, batch: TokenBatch) -> Tensor:
        """Embeddings (B, E), rows of length 1."""
        return normalize(self._model.pooled_encoder_states(batch), dim=1)

    def encode(self, texts: Iterable[str], **options: Unpack[inference.EncodeOptions]) -> np.ndarray:
        """Embeddings (n, E), float32, in input order; options as in `Causal2Vec.encode`."""
        return self._encode(texts, "", **options)

    encode_document = encode

    def encode_query(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[inference.EncodeOptions]
    ) -> np.ndarray:
        """`encode` for queries. With the instruction "" they are embedded as documents, as in the whole model."""
        chosen = self._model.config.instruction if instruction is None else instruction
        return self._encode(texts, chosen, **options)

    def _encode(
        self,
        texts: Iterable[str],
        instruction: str,
        devices: Sequence[torch.device | str] | None = None,
        **options: Any,
    ) -> np.ndarray:
        models = [self._model] if devices is None else self._model.replicas.get(self._model, devices)
        first, *replicas = [EncoderEmbedder(model, self._tokenizer) for model in models]
        return inference.encode(first, texts, instruction=instruction, replicas=replicas, **options)
