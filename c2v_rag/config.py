"""Causal2VecConfig: every setting that changes an embedding, in one file that is saved with the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

Pooling = Literal["context_eos", "eos", "context", "mean"]
ContextualTokenPlace = Literal["after_instruction", "before_instruction", "none"]
EncoderPooling = Literal["mean", "cls"]

CONFIG_FILE = "c2v_config.json"
_TEXT = "{text}"
_INSTRUCTION = "{instruction}"
# Settings that older checkpoints do not have. They are saved only if they are set, so that models without them keep
# their identity.
_ADDED_SETTINGS = ("encoder_query_prompt", "encoder_document_prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal2VecConfig:
    """Settings of a Causal2Vec model; frozen, because the weights were trained with them.

    `pooling`: which last hidden states form the embedding. `"context_eos"` (as in the paper) interleaves the columns
    of the Contextual token's and EOS's states, 2 D columns; the others have D columns. `"mean"` averages the states of
    the text and EOS, without the prefix and the Contextual token.
    `contextual_token`: its place. "after_instruction" is `BOS instruction C text EOS`; "before_instruction" is
    `BOS C instruction text EOS`; "none" leaves the token out.
    `num_llm_layers`: use the decoder's first N layers and its final norm; None uses all layers.
    `truncate_dim`: number of columns of a Matryoshka-shortened embedding; None means all columns.
    `encoder_pooling`: how the encoder's states become one vector: attention-masked mean, or the first token.
    `max_length`: most tokens of a text in the decoder, EOS included. Prefix and Contextual token are not counted.
    `encoder_max_length`: most tokens of a text in the encoder, its special tokens included.
    `query_template`: the prompt and the text, for a text with an instruction. It must end in "{text}", because the
    prompt is tokenised separately and its keys and values are reused. With the instruction "" there is no prompt.
    `instruction`: the default of `encode_query`.
    `encoder_query_prompt`, `encoder_document_prompt`: what the encoder reads before a text with an instruction, and
    before any other text, such as E5's "query: " and "passage: ". The decoder does not read them.

    Raises ValueError for any other value.
    """

    pooling: Pooling = "context_eos"
    contextual_token: ContextualTokenPlace = "after_instruction"
    num_llm_layers: int | None = None
    truncate_dim: int | None = None
    encoder_pooling: EncoderPooling = "mean"
    max_length: int = 512
    encoder_max_length: int = 512
    query_template: str = "Instruct: {instruction}\nQuery:\n{text}"
    instruction: str = "Given a question, retrieve passages that answer it"
    encoder_query_prompt: str = ""
    encoder_document_prompt: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("pooling", get_args(Pooling)),
            ("contextual_token", get_args(ContextualTokenPlace)),
            ("encoder_pooling", get_args(EncoderPooling)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        for name in ("num_llm_layers", "truncate_dim", "max_length", "encoder_max_length"):
            value = getattr(self, name)
            if value is None and name in ("num_llm_layers", "truncate_dim"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number; got {value!r}.")
        for name in ("query_template", "instruction", *_ADDED_SETTINGS):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string; got {getattr(self, name)!r}.")
        if self.contextual_token == "none" and self.pooling in ("context", "context_eos"):
            raise ValueError(
                f"pooling {self.pooling!r} reads the Contextual token, but contextual_token is 'none'. "
                "Use pooling 'eos' or 'mean', or give the token a place."
            )
        if not self.query_template.endswith(_TEXT) or self.query_template.count(_TEXT) != 1:
            raise ValueError(
                f"query_template must end in '{_TEXT}' and hold it once; got {self.query_template!r}. "
                "The prompt is computed once and reused, so nothing may follow the text."
            )
        if _INSTRUCTION not in self.query_template:
            raise ValueError(f"query_template must hold '{_INSTRUCTION}'; got {self.query_template!r}.")

    def prompt(self, instruction: str) -> str:
        """The prompt before a text: the query template without its "{text}". "" for the instruction ""."""
        if not instruction:
            return ""
        return self.query_template.removesuffix(_TEXT).replace(_INSTRUCTION, instruction)

    def encoder_prompt(self, prompt: str) -> str:
        """What the encoder reads before a text for which the decoder reads `prompt` ("" for no instruction)."""
        return self.encoder_query_prompt if prompt else self.encoder_document_prompt

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value or name not in _ADDED_SETTINGS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> Causal2VecConfig:
        """The config with these values. Raises ValueError, naming `source`, for an unknown or a missing setting.

        A missing setting is an error because a new default in a later version would silently change old models.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"{source} has settings this version does not know: {unknown}. Upgrade c2v-rag.")
        if missing := sorted(names - values.keys() - {*_ADDED_SETTINGS}):
            raise ValueError(f"{source} lacks the settings {missing}. Save the model again with this version.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def save(self, folder: Path) -> None:
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Causal2VecConfig:
        """Read `folder/c2v_config.json`. Raises ValueError if it is missing, is not JSON, or `from_dict` refuses it."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            names = sorted(entry.name for entry in folder.iterdir())[:8]
            raise ValueError(
                f"{folder} is not a Causal2Vec checkpoint: it has no {CONFIG_FILE} (found {names}). "
                "Give a folder written by save_pretrained; to build a new model from an encoder and a decoder, "
                "use Causal2Vec.from_parts."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}). Fetch or save the checkpoint again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}.")
        return cls.from_dict(values, source=str(path))
