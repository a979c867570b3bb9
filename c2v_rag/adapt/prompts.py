"""The file of prompts: for each kind of question an instruction and examples."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

NAME = "prompts.yaml"
_Text = Annotated[str, Field(min_length=1)]


class Example(BaseModel):
    """A passage and the answer that is wanted for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passage: _Text
    answer: _Text


class Prompt(BaseModel):
    """How to ask for one kind of question."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: _Text
    examples: tuple[Example, ...] = ()

    def messages(self, passage: str) -> list[dict[str, str]]:
        """The chat that asks for a question on `passage`. The passage is only ever the text of a user's message."""
        chat = [{"role": "system", "content": self.instruction}]
        for example in self.examples:
            chat += [
                {"role": "user", "content": example.passage},
                {"role": "assistant", "content": example.answer},
            ]
        return [*chat, {"role": "user", "content": passage}]

    def text(self, passage: str) -> str:
        """The same for a model without a chat template."""
        shown = [f"Passage: {example.passage}\nAnswer: {example.answer}\n" for example in self.examples]
        return "\n".join([f"{self.instruction}\n", *shown, f"Passage: {passage}\nAnswer:"])


def read_prompts(path: Path | None = None) -> dict[str, Prompt]:
    """The prompts by kind; those of this package unless a file is given.

    Raises FileNotFoundError, ValueError that names the file and what is wrong in it.
    """
    file = resources.files("c2v_rag.adapt") / NAME if path is None else path
    try:
        return TypeAdapter(Annotated[dict[str, Prompt], Field(min_length=1)]).validate_python(
            yaml.safe_load(file.read_text(encoding="utf-8"))
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [f"- {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ValueError(f"{file} is not a valid file of prompts:\n" + "\n".join(lines)) from error
