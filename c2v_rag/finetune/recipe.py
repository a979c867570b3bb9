"""A training recipe: a YAML file, validated; unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from c2v_rag.finetune.loss import LossWeights


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModels(_Strict):
    """`encoder`, `llm`: what `Causal2Vec.from_parts` takes. The `*_also` lists name further sources of the same
    model (entries of base.json) that the finished checkpoint accepts."""

    encoder: str
    llm: str
    num_llm_layers: PositiveInt | None = None
    encoder_max_length: PositiveInt = 512
    encoder_also: list[dict[str, Any]] = []
    llm_also: list[dict[str, Any]] = []


class Data(_Strict):
    """`sets` maps a set's name (NAME.parquet, NAME.json in the data folder) to its weight in the mixture.

    A set is drawn with probability in proportion to its weight times the square root of its rows.
    """

    sets: Annotated[dict[str, PositiveFloat], Field(min_length=1)]


class Lora(_Strict):
    rank: PositiveInt = 16
    alpha: PositiveInt = 32


class Stage(_Strict):
    """One stage: what is trained, on sequences of which kind, for how long.

    `sequences`: "context" ends every sequence at the Contextual token, one token per text through the decoder;
    "full" runs whole texts. `learning_rate`: per trained part, the peak of a cosine with a 5 % warm-up.
    `max_length`: tokens at which a text is cut, in both tokenizers. `num_negatives`: hard negatives taken a pair.
    """

    name: str
    sequences: Literal["context", "full"]
    train: Annotated[list[Literal["projector", "llm_adapter"]], Field(min_length=1)]
    steps: PositiveInt
    batch_size: PositiveInt
    max_length: PositiveInt
    num_negatives: Annotated[int, Field(ge=0)] = 1
    learning_rate: dict[Literal["projector", "llm_adapter"], PositiveFloat]
    loss: LossWeights = LossWeights()


class Recipe(_Strict):
    base: BaseModels
    data: Data
    stages: Annotated[list[Stage], Field(min_length=1)]
    lora: Lora = Lora()
    seed: int = 0

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe. ValueError names the file and every key that is unknown, missing or out of range."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        except ValidationError as error:
            lines = [f"- {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise ValueError(f"{path} is not a valid recipe:\n" + "\n".join(lines)) from error
