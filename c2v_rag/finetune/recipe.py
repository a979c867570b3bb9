"""A training recipe: a YAML file, validated; unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from transformers.training_args import OptimizerNames

from c2v_rag.finetune.loss import LossWeights
from c2v_rag.projector import INITIAL_TOKEN_SCALE

PACKAGED = Path(__file__).parent / "recipes"  # recipes that come with the package
TrainedPart = Literal["projector", "llm_adapter", "encoder_adapter", "encoder"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModels(_Strict):
    """The model to train: a new one of `encoder` and `llm` (names for `Causal2Vec.from_parts`), or `checkpoint` (a
    name for `Causal2Vec.from_pretrained`).

    The `*_also` lists name further sources of the same weights (entries of base.json), which the finished checkpoint
    accepts too. `config` holds further settings of `Causal2VecConfig`. `initial_token_scale`: see
    `Causal2Vec.from_parts`. These settings, `num_llm_layers` and `encoder_max_length` belong to a new model; a
    checkpoint has its own.

    `dtype` is the dtype of frozen weights; trained ones are float32. Unless given, it is bfloat16 on a GPU that
    computes in it, and float32 elsewhere. `llm_kwargs` are passed to the decoder's `AutoModel.from_pretrained`:
    `attn_implementation`, `quantization_config` (`{load_in_4bit: true}` for QLoRA), ... `shard` divides the decoder's
    frozen weights over the GPUs (FSDP2), for one that does not fit into each of them.
    """

    checkpoint: str | None = None
    encoder: str | None = None
    llm: str | None = None
    num_llm_layers: PositiveInt | None = None
    encoder_max_length: PositiveInt = 512
    config: dict[str, Any] = {}
    encoder_also: list[dict[str, Any]] = []
    llm_also: list[dict[str, Any]] = []
    initial_token_scale: PositiveFloat = INITIAL_TOKEN_SCALE
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    llm_kwargs: dict[str, Any] = {}
    shard: bool = False

    @model_validator(mode="after")
    def _one_or_the_other(self) -> BaseModels:
        new = self.encoder is not None and self.llm is not None
        if (self.checkpoint is not None) == new or (self.checkpoint is not None and (self.encoder or self.llm)):
            raise ValueError("give either 'checkpoint', or both 'encoder' and 'llm'")
        settings = ("config", "encoder_max_length", "initial_token_scale", "num_llm_layers")
        ignored = [name for name in settings if getattr(self, name) != type(self).model_fields[name].default]
        if self.checkpoint is not None and ignored:
            raise ValueError(f"a checkpoint has its own settings: leave out {', '.join(ignored)}")
        return self


class SetOptions(_Strict):
    """`instruction` goes before the set's queries; None takes the one in NAME.json, or else the model's own."""

    weight: PositiveFloat = 1.0
    instruction: str | None = None


class Data(_Strict):
    """`sets` maps a set's name (NAME.parquet, NAME.jsonl or NAME.csv in the data folder) to its weight in the mixture,
    or to weight and instruction.

    A set is drawn in proportion to its weight times the square root of its rows, or with `sizes: proportional` times
    its rows. More bad rows than the share `max_bad_rows` are an error; fewer are left out and counted.

    `batches`: "random", or "neighbours", which makes negatives harder: the share `neighbour_share` of a batch has
    similar queries, drawn among the `neighbour_pool` x batch size nearest ones of a random query by the vectors of the
    model's encoder before the stage.
    """

    folder: Path | None = None
    sets: Annotated[dict[str, PositiveFloat | SetOptions], Field(min_length=1)]
    sizes: Literal["root", "proportional"] = "root"
    max_bad_rows: Annotated[float, Field(ge=0, le=1)] = 0.05
    batches: Literal["random", "neighbours"] = "random"
    neighbour_share: Annotated[float, Field(gt=0, le=1)] = 0.6
    neighbour_pool: PositiveFloat = 2.0

    @model_validator(mode="after")
    def _pool_holds_the_share(self) -> Data:
        if self.neighbour_pool < self.neighbour_share:
            raise ValueError(
                f"'neighbour_pool' must be at least 'neighbour_share', got {self.neighbour_pool} and "
                f"{self.neighbour_share}: neighbours are drawn from the pool"
            )
        return self

    def options(self, name: str) -> SetOptions:
        given = self.sets[name]
        return given if isinstance(given, SetOptions) else SetOptions(weight=given)


class Lora(_Strict):
    """Settings of a new adapter. `target_modules`: names of linear layers ("q_proj", ...), or "all-linear".

    A checkpoint's own adapter keeps its settings.
    """

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"


class Stage(_Strict):
    """One stage: the parts it trains, its sequences, and its number of steps.

    `sequences`: "context" ends every sequence at the Contextual token, so the decoder reads one token per text;
    "full" gives the decoder whole texts. `learning_rate`: per trained part, the peak of the `schedule`, which is
    reached after `warmup_steps` (5 % of the steps if None). `batch_size`: pairs per step over all processes, all of one
    set. `mini_batch_size`: texts whose activations are in memory of a process at the same time; the whole batch if
    None. `gradient_checkpointing`: compute the activations of the layers again in the backward pass, which saves most
    of their memory and costs about a third more time. `max_length`: longest text in tokens, for both tokenizers.
    `num_negatives`: hard negatives per pair. `minutes`: the stage ends after so many minutes of training (scoring does
    not count), even if it has not reached its `steps`; the learning rates then follow the time.

    `keep`: the stage ends with start + keep x (trained - start) of its trained weights, an average of those before and
    after it. Below 1 the model keeps more of what it could do, and often generalises better (WiSE-FT, arXiv
    2109.01903). Development scores are those of the average.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    sequences: Literal["context", "full"]
    train: Annotated[list[TrainedPart], Field(min_length=1)]
    steps: PositiveInt
    minutes: PositiveFloat | None = None
    batch_size: Annotated[int, Field(ge=2)]
    mini_batch_size: PositiveInt | None = None
    gradient_checkpointing: bool = False
    max_length: PositiveInt
    num_negatives: Annotated[int, Field(ge=0)] = 1
    learning_rate: dict[TrainedPart, PositiveFloat]
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt | None = None
    keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    loss: LossWeights = LossWeights()

    @model_validator(mode="after")
    def _fits(self) -> Stage:
        if set(self.train) != set(self.learning_rate):
            raise ValueError(f"'learning_rate' must name the trained parts {self.train}, got {[*self.learning_rate]}")
        return self


class Dev(_Strict):
    """Development data, which is scored by nDCG@10 before training, every `every` steps and at the end of a stage.

    `folders`: retrieval folders as for `c2v-rag evaluate`. `pairs`: names of sets in the data folder that are not
    trained on. `hold_out`: the share of each training set's documents that is kept for scoring; unless given, 0.05
    without `folders` and `pairs`, else 0. `max_queries` and `max_documents`: the most that are scored of each folder
    and of each set in `pairs`, and of all held-out documents together.

    `keep_best`: a stage ends with the weights of its best score, which can be those it began with; otherwise with its
    last. `patience`: a stage stops after so many scores in a row without a new best; None never stops early.
    `min_queries`: with fewer queries, chance decides which score is the best: a stage ends with its last weights and
    never early, and the scores are only reported.
    """

    folders: list[Path] = []
    pairs: list[str] = []
    hold_out: Annotated[float, Field(ge=0, lt=1)] | None = None
    every: PositiveInt = 100
    max_queries: PositiveInt = 200
    max_documents: PositiveInt = 1000
    patience: PositiveInt | None = 5
    keep_best: bool = True
    min_queries: PositiveInt = 50


class Recipe(_Strict):
    """A whole training run.

    `dev`: development data; "none" trains on everything and scores nothing. `report_to`: where every step is logged
    while the run goes on; unless given, tensorboard if it is installed.

    `teachers`: the mean of their similarities is distilled. Each is "encoder" (the one inside the model), "start" (the
    model before the stage, so that it forgets less), or the name of a sentence-transformers model. `optimizer`: a name
    of transformers' `OptimizerNames`, such as "adamw_torch" or "adamw_8bit" (needs bitsandbytes). `workers`: processes
    that tokenise the next batches while a GPU computes, for each training process; 0 tokenises in the training process
    itself.
    """

    base: BaseModels
    data: Data
    stages: Annotated[list[Stage], Field(min_length=1)]
    lora: Lora = Lora()
    teachers: Annotated[list[str], Field(min_length=1)] = ["encoder"]
    dev: Dev | Literal["none"] = Dev()
    optimizer: str = "adamw_torch_fused"
    seed: int = 0
    save_steps: PositiveInt = 50
    workers: NonNegativeInt = 0
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] | None = None
    output: Path | None = None

    @field_validator("optimizer")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in {*OptimizerNames}:
            raise ValueError(f"transformers knows no optimizer {name!r}; it knows {', '.join(OptimizerNames)}")
        return name

    @field_validator("stages")
    @classmethod
    def _have_names_of_their_own(cls, stages: list[Stage]) -> list[Stage]:
        names = [stage.name for stage in stages]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"each stage needs a name of its own; repeated: {', '.join(sorted(repeated))}")
        return stages

    @property
    def trained_parts(self) -> set[TrainedPart]:
        """The parts that any stage trains."""
        return {part for stage in self.stages for part in stage.train}

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe: a file, or the name of one that comes with the package ("adapt").

        FileNotFoundError for a name that is neither; ValueError names the file and every key that is unknown, missing
        or out of range.
        """
        if not path.is_file():
            packaged = PACKAGED / f"{path}.yaml"
            if len(path.parts) != 1 or not packaged.is_file():
                names = ", ".join(sorted(one.stem for one in PACKAGED.glob("*.yaml")))
                raise FileNotFoundError(f"There is no recipe {path}: give a YAML file, or one of {names}.")
            path = packaged
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        except ValidationError as error:
            lines = [f"- {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise ValueError(f"{path} is not a valid recipe:\n" + "\n".join(lines)) from error
