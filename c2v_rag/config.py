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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal2VecConfig:
    """Settings of a Causal2Vec model; frozen, because the weights were trained with them.

    `pooling`: which last hidden states make the embedding. `"context_eos"` (the paper's) concatenates the
    Contextual token's and EOS's, column by column, into 2 x D; the others give D. `"mean"` averages the states of
    the text and EOS, without prefix and Contextual token.
    `contextual_token`: its place in `BOS instruction C text EOS` ("after_instruction"), before the instruction, or
    nowhere.
    `num_llm_layers`: keep the decoder's first N layers and its final norm; None keeps all.
    `truncate_dim`: length of a Matryoshka-shortened embedding; None keeps the full one.
    `encoder_pooling`: how the encoder's states become one vector: attention-masked mean, or the first token.
    `max_length`: tokens of a text in the decoder, EOS included; prefix and Contextual token come on top.
    `encoder_max_length`: tokens of a text in the encoder, its special tokens included.
    `query_template`: the prompt and the text, for a text with an instruction. It must end in "{text}", because the
    prompt is tokenised separately and its keys and values are reused. With the instruction "" there is no prompt.
    `instruction`: the default of `encode_query`.

    Raises ValueError for a value outside what is listed here.
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
        for name in ("query_template", "instruction"):
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
        """The prompt of a text that is embedded with `instruction`: the template up to the text; "" for ""."""
        if not instruction:
            return ""
        return self.query_template.removesuffix(_TEXT).replace(_INSTRUCTION, instruction)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> Causal2VecConfig:
        """Strict: an unknown or a missing setting is a ValueError that names `source`, the file it came from.

        A missing setting is an error too, since a default that changes later would silently change old models.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"{source} has settings this version does not know: {unknown}. Upgrade c2v-rag.")
        if missing := sorted(names - values.keys()):
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
        """Read `folder/c2v_config.json`. ValueError when it is missing, not JSON, or not ours."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            found = sorted(entry.name for entry in folder.iterdir())[:8]
            raise ValueError(
                f"{folder} is not a Causal2Vec checkpoint: it has no {CONFIG_FILE} (found {found}). "
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
