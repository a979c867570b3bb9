"""A Causal2Vec model as the only module of a `SentenceTransformer`.

B texts, P tokens before the Contextual token, S encoder tokens, T decoder tokens of the text.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from c2v_rag import Causal2Vec, TokenBatch


class Causal2VecModule(InputModule):
    """Tokenises and embeds: the first and only module of a `SentenceTransformer`.

    Examples:
        >>> from c2v_rag import Causal2Vec
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers_c2v import Causal2VecModule
        >>> model = SentenceTransformer(modules=[Causal2VecModule(Causal2Vec.from_pretrained("default"))])
        >>> model.encode(["Bread needs yeast."]).shape
        (1, 384)

    A model that is built like this has no prompts, so queries get no instruction. `load` sets the prompts.
    Prompt and text are tokenised separately, as instruction and text are in `Causal2Vec.encode_query`.
    """

    def __init__(self, model: Causal2Vec) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """The features of texts, as `to_features` returns them. TypeError for an input that is not a string."""
        for text in inputs:
            if not isinstance(text, str):
                raise TypeError(f"A text must be a string, got {type(text).__name__}: {text!r:.80}.")
        return to_features(self.model.tokenizer(inputs, prompt or "").collate(range(len(inputs))))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add "sentence_embedding" (B, embedding_dim) to the features; its rows have length 1."""
        batch = to_token_batch(features)
        # In training without the prefix cache: a cached loss repeats the forward pass and must draw the same dropout.
        features["sentence_embedding"] = self.model(batch) if self.training else self.model.embed(batch).float()
        return features

    def get_embedding_dimension(self) -> int:
        return self.model.embedding_dim

    @property
    def max_seq_length(self) -> int:
        """Maximum tokens of a text in the decoder. It is read-only, so that all integrations cut at the same place."""
        return self.model.config.max_length

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The decoder's tokenizer."""
        return self.model.tokenizer.llm

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute the decoder's activations in the backward pass, which needs less memory. The trainer calls it."""
        self.model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs)  # type: ignore[no-untyped-call]

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the checkpoint into `output_path`, always as safetensors."""
        target = Path(output_path)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
            checkpoint = Path(temporary) / "checkpoint"
            self.model.save_pretrained(checkpoint)
            # File by file: sentence-transformers has written files of its own into `target` before.
            for file in sorted(checkpoint.rglob("*")):
                destination = target / file.relative_to(checkpoint)
                if file.is_dir():
                    destination.mkdir(parents=True, exist_ok=True)
                elif file.name != "config_sentence_transformers.json":
                    file.replace(destination)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Causal2VecModule:
        """The module of a saved checkpoint. `SentenceTransformer(folder, trust_remote_code=True)` calls it.

        `model_kwargs`: `dtype` and other arguments of the decoder's `from_pretrained`. `init_defaults` is not used,
        because the checkpoint has all settings. Errors as in `Causal2Vec.from_pretrained`; pickled weights are never
        read.
        """
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        if folder is None:
            raise FileNotFoundError(f"{model_name_or_path!r} is neither a folder nor on the Hub.")
        return cls(Causal2Vec.from_pretrained(folder, **dict(model_kwargs or {})))


def to_features(batch: TokenBatch) -> dict[str, Tensor]:
    """The features of a token batch for sentence-transformers: tensors by name, each with B rows.

    Only `input_ids` (B, T) has a name with this ending, because the trainer finds the text columns by it. The ids of
    encoder and prefix have one more dimension, (B, 1, S) and (B, 1, P), because a cached loss cuts the padding off
    every tensor that is as wide as `input_ids`.
    """
    rows = len(batch.text_ids)
    return {
        "input_ids": batch.text_ids,
        "attention_mask": batch.text_mask,
        "encoder_ids": batch.encoder_ids.unsqueeze(1),
        "encoder_mask": batch.encoder_mask.unsqueeze(1),
        "prefix_ids": batch.prefix_ids.repeat(rows, 1, 1),  # not `expand`: such a view cannot be pinned for a GPU
        "num_prompt_tokens": torch.full((rows,), batch.num_prompt_tokens),
    }


def to_token_batch(features: Mapping[str, Tensor]) -> TokenBatch:
    """The token batch from which `to_features` made these features."""
    return TokenBatch(
        prefix_ids=features["prefix_ids"][0, 0],
        text_ids=features["input_ids"],
        text_mask=features["attention_mask"],
        num_prompt_tokens=int(features["num_prompt_tokens"][0]),
        encoder_ids=features["encoder_ids"].squeeze(1),
        encoder_mask=features["encoder_mask"].squeeze(1),
    )


def load(
    name_or_path: str | os.PathLike[str] = "default",
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    truncate_dim: int | None = None,
    **llm_kwargs: Any,
) -> SentenceTransformer:
    """A `SentenceTransformer` with a Causal2Vec checkpoint. Arguments as in `Causal2Vec.from_pretrained`.

    Examples:
        >>> from sentence_transformers_c2v import load
        >>> model = load("default")
        >>> documents = model.encode_document(["A heap keeps its smallest item first.", "Bread needs yeast."])
        >>> int(model.similarity(model.encode_query(["priority queue"]), documents).argmax())
        0

    `SentenceTransformer(folder)` opens the same folder, but requires `trust_remote_code=True` for any module class that
    is not its own. `encode_query` puts the config's instruction before the texts; `encode` and `encode_document` add
    nothing. `truncate_dim` keeps the first columns; such shorter vectors are not normalised to length 1 again.
    """
    model = Causal2Vec.from_pretrained(name_or_path, revision=revision, device=device, dtype=dtype, **llm_kwargs)
    return SentenceTransformer(
        modules=[Causal2VecModule(model)],
        prompts={"query": model.config.prompt(model.config.instruction), "document": ""},
        similarity_fn_name="cosine",
        truncate_dim=truncate_dim,
        device=str(model.device),
    )
