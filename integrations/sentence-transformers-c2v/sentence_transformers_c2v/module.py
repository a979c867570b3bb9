"""A Causal2Vec model as the one module of a `SentenceTransformer`.

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
    """Tokenises and embeds; what `SentenceTransformer` needs of a first, and only, module.

    Example:
        >>> from c2v_rag import Causal2Vec
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers_c2v import Causal2VecModule
        >>> model = SentenceTransformer(modules=[Causal2VecModule(Causal2Vec.from_pretrained("default"))])
        >>> model.encode(["Bread needs yeast."]).shape
        (1, 1152)

    Put together like this the model has no prompts, so that queries get no instruction: use `load`, which sets them.
    A prompt is tokenised apart from the text behind it, as an instruction is in `Causal2Vec.encode_query`.
    """

    def __init__(self, model: Causal2Vec) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Features of strings, as `to_features` makes them. Raises TypeError for anything that is no string."""
        for text in inputs:
            if not isinstance(text, str):
                raise TypeError(f"A text must be a string, got {type(text).__name__}: {text!r:.80}.")
        return to_features(self.model.tokenizer(inputs, prompt or "").collate(range(len(inputs))))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds "sentence_embedding" (B, embedding_dim), rows of length 1."""
        batch = to_token_batch(features)
        # Training repeats its forward without gradients and must draw the same dropout: nothing may be kept there.
        features["sentence_embedding"] = self.model(batch) if self.training else self.model.embed(batch).float()
        return features

    def get_embedding_dimension(self) -> int:
        return self.model.embedding_dim

    @property
    def max_seq_length(self) -> int:
        """Tokens of the decoder. It belongs to the model's config: every door cuts a text at the same place."""
        return self.model.config.max_length

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The decoder's."""
        return self.model.tokenizer.llm

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """For the trainer: trade computing for memory in the decoder."""
        self.model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs)  # type: ignore[no-untyped-call]

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the checkpoint into `output_path`; always safetensors."""
        target = Path(output_path)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
            made = Path(temporary) / "checkpoint"
            self.model.save_pretrained(made)
            # sentence-transformers has written files of its own into the folder already, so it cannot be replaced.
            for file in sorted(made.rglob("*")):
                place = target / file.relative_to(made)
                if file.is_dir():
                    place.mkdir(parents=True, exist_ok=True)
                elif file.name != "config_sentence_transformers.json":
                    file.replace(place)

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
        """Called by `SentenceTransformer(folder, trust_remote_code=True)`.

        `model_kwargs`: `dtype`, and what else the decoder's `from_pretrained` takes. `init_defaults` is not used: the
        checkpoint holds every setting. Errors as in `Causal2Vec.from_pretrained`; pickled weights are never read.
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
    """A token batch as sentence-transformers carries one: tensors by name, each of B rows.

    `input_ids` (B, T) is the only name of that ending: the trainer looks for it to find the columns. The other ids
    have a dimension more, (B, 1, S) and (B, 1, P): the cached losses cut the padding off every tensor that is as wide
    as `input_ids`, whatever is in it.
    """
    rows = len(batch.text_ids)
    return {
        "input_ids": batch.text_ids,
        "attention_mask": batch.text_mask,
        "encoder_ids": batch.encoder_ids.unsqueeze(1),
        "encoder_mask": batch.encoder_mask.unsqueeze(1),
        "prefix_ids": batch.prefix_ids.expand(rows, 1, -1),
        "num_prompt_tokens": torch.full((rows,), batch.num_prompt_tokens),
    }


def to_token_batch(features: Mapping[str, Tensor]) -> TokenBatch:
    """What `to_features` was made of."""
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
    """A `SentenceTransformer` of a Causal2Vec checkpoint; arguments as in `Causal2Vec.from_pretrained`.

    Example:
        >>> from sentence_transformers_c2v import load
        >>> model = load("default")
        >>> documents = model.encode_document(["A heap keeps its smallest item first.", "Bread needs yeast."])
        >>> int(model.similarity(model.encode_query(["priority queue"]), documents).argmax())
        0

    `SentenceTransformer(folder)` opens the same folder, but wants `trust_remote_code=True` for any module class that
    is not its own. `encode_query` puts the config's instruction before the texts; `encode` and `encode_document` put
    nothing. `truncate_dim` cuts the columns, without bringing them to length 1 again.
    """
    model = Causal2Vec.from_pretrained(name_or_path, revision=revision, device=device, dtype=dtype, **llm_kwargs)
    return SentenceTransformer(
        modules=[Causal2VecModule(model)],
        prompts={"query": model.config.prompt(model.config.instruction), "document": ""},
        similarity_fn_name="cosine",
        truncate_dim=truncate_dim,
        device=str(model.device),
    )
