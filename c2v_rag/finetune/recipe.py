"""A training recipe: a YAML file, validated; unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from c2v_rag.finetune.loss import LossWeights

TrainedPart = Literal["projector", "llm_adapter", "encoder_adapter", "encoder"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModels(_Strict):
    """The model to train: a new one of `encoder` and `llm` (names for `Causal2Vec.from_parts`), or `checkpoint` (a
    name for `Causal2Vec.from_pretrained`).

    The `*_also` lists name further sources of the same weights (entries of base.json), which the finished checkpoint
    accepts too. `config` holds further settings of `Causal2VecConfig`.
    """

    checkpoint: str | None = None
    encoder: str | None = None
    llm: str | None = None
    num_llm_layers: PositiveInt | None = None
    encoder_max_length: PositiveInt = 512
    config: dict[str, Any] = {}
    encoder_also: list[dict[str, Any]] = []
    llm_also: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _one_or_the_other(self) -> BaseModels:
        new = self.encoder is not None and self.llm is not None
        if (self.checkpoint is not None) == new or (self.checkpoint is not None and (self.encoder or self.llm)):
            raise ValueError("give either 'checkpoint', or both 'encoder' and 'llm'")
        return self


class SetOptions(_Strict):
    """`instruction` goes before the set's queries; None takes the one in NAME.json."""

    weight: PositiveFloat = 1.0
    instruction: str | None = None


class Data(_Strict):
    """`sets` maps a set's name (NAME.parquet, NAME.jsonl or NAME.csv in the data folder) to its weight in the mixture,
    or to weight and instruction.

    A set is drawn in proportion to its weight times the square root of its rows. More bad rows than the share
    `max_bad_rows` are an error; fewer are left out and counted.
    """

    folder: Path | None = None
    sets: Annotated[dict[str, PositiveFloat | SetOptions], Field(min_length=1)]
    max_bad_rows: Annotated[float, Field(ge=0, le=1)] = 0.05

    def options(self, name: str) -> SetOptions:
        given = self.sets[name]
        return given if isinstance(given, SetOptions) else SetOptions(weight=given)


class Lora(_Strict):
    """Settings of a new adapter on every linear layer. A checkpoint's own adapter keeps its settings."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Stage(_Strict):
    """One stage: the parts it trains, its sequences, and its number of steps.

    `sequences`: "context" ends every sequence at the Contextual token, so the decoder reads one token per text;
    "full" gives the decoder whole texts. `learning_rate`: per trained part, the peak of a cosine schedule with 5 %
    warm-up. `batch_size`: pairs per step, all of one set. `mini_batch_size`: texts whose activations are in memory at
    the same time; the whole batch if None. `max_length`: longest text in tokens, for both tokenizers.
    `num_negatives`: hard negatives per pair.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    sequences: Literal["context", "full"]
    train: Annotated[list[TrainedPart], Field(min_length=1)]
    steps: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    mini_batch_size: PositiveInt | None = None
    max_length: PositiveInt
    num_negatives: Annotated[int, Field(ge=0)] = 1
    learning_rate: dict[TrainedPart, PositiveFloat]
    loss: LossWeights = LossWeights()

    @model_validator(mode="after")
    def _fits(self) -> Stage:
        if set(self.train) != set(self.learning_rate):
            raise ValueError(f"'learning_rate' must name the trained parts {self.train}, got {[*self.learning_rate]}")
        return self


class Recipe(_Strict):
    """A whole training run.

    `teachers`: the mean of their similarities is distilled. Each is "encoder" (the one inside the model), "lexical"
    (`LexicalEmbedder`), or the name of a sentence-transformers model.
    """

    base: BaseModels
    data: Data
    stages: Annotated[list[Stage], Field(min_length=1)]
    lora: Lora = Lora()
    teachers: Annotated[list[str], Field(min_length=1)] = ["encoder"]
    seed: int = 0
    save_steps: PositiveInt = 50
    output: Path | None = None

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
