"""Training in stages, each one run of sentence-transformers' trainer.

The Contextual token's half can be trained first, on sequences that end at it: under a causal mask its state depends
on nothing behind it, so that a text costs the decoder one token. Whole texts come after.

Run as `c2v-rag train RECIPE.yaml --data FOLDER --output FOLDER`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from c2v_rag import inference, weights
from c2v_rag.config import Causal2VecConfig, Pooling
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.finetune.data import WITH_NEGATIVES, PairSet, draw_stage, read_pair_set
from c2v_rag.finetune.loss import Causal2VecLoss
from c2v_rag.finetune.recipe import Recipe, Stage, TrainedPart
from c2v_rag.finetune.vectors import LexicalEmbedder, TextVectors
from c2v_rag.model import Causal2Vec
from c2v_rag.parts import adapted_layers
from c2v_rag.tokenization import TextTokenizer
from sentence_transformers_c2v.module import Causal2VecModule, to_features, to_token_batch

logger = logging.getLogger(__name__)

# Among a recipe's teachers: the encoder inside the model, and which words a text holds.
ENCODER, LEXICAL = "encoder", "lexical"
WARM_UP = 0.05
_SAMPLE = 256
_COMPLETE = "complete"
_TRAINED_FILE = "trained.safetensors"
# Which parameters of a Causal2Vec model belong to a part: of these names, with or without LoRA in them.
_PART_PREFIX: dict[TrainedPart, tuple[str, bool]] = {
    "projector": ("projector.", False),
    "llm_adapter": ("llm.", True),
    "encoder_adapter": ("encoder.", True),
    "encoder": ("encoder.", False),
}


def part_of(name: str) -> TrainedPart | None:
    """The part that a parameter of this name belongs to; None for the decoder's own weights, which stay."""
    for part, (prefix, low_rank) in _PART_PREFIX.items():
        if name.startswith(prefix) and (".lora_" in name) == low_rank:
            return part
    return None


def new_model(recipe: Recipe, *, device: str | None = None, kind: type[Causal2Vec] = Causal2Vec) -> Causal2Vec:
    """The recipe's model before training, in float32, with fresh LoRA where a stage trains one.

    A checkpoint's own adapter is trained further where it has one. `kind`: a class to make it of. Raises what
    `from_parts`, `from_pretrained` raise.
    """
    base = recipe.base
    if base.checkpoint is not None:
        model = kind.from_pretrained(base.checkpoint, device=device, dtype=torch.float32)
    else:
        config = Causal2VecConfig(
            num_llm_layers=base.num_llm_layers, encoder_max_length=base.encoder_max_length, **base.config
        )
        model = kind.from_parts(
            str(base.encoder), str(base.llm), config=config, device=device, dtype=torch.float32, seed=recipe.seed
        )
    trained = {part for stage in recipe.stages for part in stage.train}
    for part, module in (("llm_adapter", model.llm), ("encoder_adapter", model.encoder)):
        if part not in trained:
            continue
        if adapted_layers(module):
            model.unmerge_adapter("llm" if part == "llm_adapter" else "encoder")
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            lora = LoraConfig(
                r=recipe.lora.rank,
                lora_alpha=recipe.lora.alpha,
                lora_dropout=recipe.lora.dropout,
                target_modules="all-linear",
            )
            inject_adapter_in_model(lora, module)
    return model


@dataclasses.dataclass(frozen=True)
class StageVectors:
    """Vectors of a stage's texts, all at the same rows: the encoder's; the teachers', none where nothing is distilled;
    and, where the loss has `words`, which words each text holds."""

    encoder: TextVectors
    teachers: Sequence[TextVectors]
    words: TextVectors | None


class TrainingModule(Causal2VecModule):
    """`Causal2VecModule` that cuts, shows and caches what a stage says.

    Beside those of the base class there are the features "rows" (B,), the places in `texts`; "pooled" (B, 1, E), the
    encoder's vectors where it is frozen; "teacher" (B, K), the teachers' side by side; and "target" (B, D), what EOS's
    half is to become where the loss has `words`.
    """

    def __init__(self, model: Causal2Vec, stage: Stage, vectors: StageVectors) -> None:
        super().__init__(model)
        self._stage = stage
        self._cutter = cutter(model, stage.max_length)
        self.texts = vectors.encoder
        self.pooling: Pooling = "context" if stage.sequences == "context" else model.config.pooling
        self._teachers = vectors.teachers
        self._encoder_is_frozen = not {"encoder", "encoder_adapter"} & set(stage.train)
        self._words = vectors.words
        self._shared = torch.empty(0)
        if self._words is not None:
            if self.pooling not in ("context_eos", "eos"):
                raise ValueError(f"'words' is a loss of EOS's half, and pooling {self.pooling!r} has none.")
            self._shared = self._mean_eos()

    @torch.no_grad()
    def _mean_eos(self) -> Tensor:
        """(D,) of length 1: the direction that the EOS states of all texts share before the stage."""
        texts = self.texts.texts
        some = texts[:: max(1, len(texts) // _SAMPLE)][:_SAMPLE]
        batch = self._cutter(some).collate(range(len(some))).to(self.model.device)
        with fast(self.model.device):
            vectors = self.model(batch, pooled=self.texts(self.texts.rows(some)).to(self.model.device))
        eos = vectors[:, 1::2] if self.pooling == "context_eos" else vectors
        return normalize(normalize(eos.float().cpu(), dim=1).mean(dim=0), dim=0)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        # Other sequences hold no text. The encoder still reads it, unless its vectors are cached.
        tokenized = self._cutter(inputs, prompt or "")
        if self._stage.sequences != "full":
            empty = self._cutter([""], prompt or "").text_ids
            tokenized = dataclasses.replace(tokenized, text_ids=empty * len(inputs))
        features = to_features(tokenized.collate(range(len(inputs))))
        features["rows"] = self.texts.rows(inputs)
        if self._encoder_is_frozen:
            features["pooled"] = self.texts(features["rows"]).unsqueeze(1)
        if self._teachers:
            features["teacher"] = side_by_side(self._teachers, features["rows"])
        if self._words is not None:
            share = self._stage.loss.words_share
            features["target"] = math.sqrt(1 - share) * self._shared + math.sqrt(share) * self._words(features["rows"])
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        pooled = features["pooled"].squeeze(1) if "pooled" in features else None
        features["sentence_embedding"] = self.model(to_token_batch(features), pooled=pooled, pooling=self.pooling)
        return features


def side_by_side(teachers: Sequence[TextVectors], rows: Tensor) -> Tensor:
    """(n, K) vectors whose cosine similarity is the mean of the teachers'."""
    return torch.cat([teacher(rows) for teacher in teachers], dim=1) / math.sqrt(len(teachers))


def cutter(model: Causal2Vec, max_length: int) -> TextTokenizer:
    """The model's tokenizers, cutting at `max_length`."""
    config = dataclasses.replace(
        model.config, max_length=max_length, encoder_max_length=min(max_length, model.config.encoder_max_length)
    )
    return TextTokenizer(config, model.tokenizer.encoder, model.tokenizer.llm)


class _Trainer(SentenceTransformerTrainer):
    """Saves the trained parameters alone, and stops at a loss that is not finite."""

    tokens = 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        self.tokens += sum(int(mask.sum()) for name, mask in inputs.items() if name.endswith("attention_mask"))
        rows = {name.removesuffix("_rows"): rows for name, rows in inputs.items() if name.endswith("_rows")}
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        value = loss[0] if isinstance(loss, tuple) else loss
        if not torch.isfinite(value):
            texts = self._module.texts.texts
            path = Path(str(self.args.output_dir)) / f"bad-batch-{self.state.global_step}.json"
            batch = {column: [texts[row] for row in found.tolist()] for column, found in rows.items()}
            path.write_text(json.dumps(batch, indent=1, ensure_ascii=False), encoding="utf-8")
            raise FloatingPointError(
                f"The loss is {value.item()} at step {self.state.global_step}. The batch is in {path}. Lower the "
                "learning rates; --resume goes on from the last checkpoint before it."
            )
        return loss

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the card is ours."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_tensors(self._module.model), folder / _TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self._module.model, Path(resume_from_checkpoint) / _TRAINED_FILE)

    @property
    def _module(self) -> TrainingModule:
        return cast(TrainingModule, self.model[0])


class _Watch(TrainerCallback):
    """A progress bar with loss and tokens a second, and a mark in every checkpoint that was written to its end."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.trainer: _Trainer | None = None
        self._bar: tqdm[Any] | None = None
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self._stage.name,
            unit="step",
            mininterval=5,
            disable=not state.is_world_process_zero,
        )
        self._started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._bar is not None and self.trainer is not None and "loss" in (logs or {}):
            speed = self.trainer.tokens / (time.perf_counter() - self._started)
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def trained_tensors(model: Causal2Vec) -> dict[str, Tensor]:
    """The parameters that any recipe can train and this model has, apart from an encoder that is as it was read."""
    tensors = {name: parameter for name, parameter in model.named_parameters() if part_of(name) is not None}
    if not any(parameter.requires_grad for name, parameter in tensors.items() if part_of(name) == "encoder"):
        tensors = {name: parameter for name, parameter in tensors.items() if part_of(name) != "encoder"}
    return {name: parameter.detach().cpu().contiguous() for name, parameter in tensors.items()}


@torch.no_grad()
def load_trained(model: Causal2Vec, path: Path) -> None:
    """Write the tensors of a file that `trained_tensors` filled into the model."""
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        parameters[name].copy_(tensor)


def run_stage(
    model: Causal2Vec,
    stage: Stage,
    datasets: Mapping[str, Dataset],
    instructions: Mapping[str, str],
    vectors: StageVectors,
    folder: Path,
    *,
    seed: int = 0,
    save_steps: int = 50,
    resume: bool = False,
) -> list[dict[str, float]]:
    """Train one stage in place; returns a row a step: loss, gradient norm, learning rate.

    `instructions` by data set. With `resume`, go on from the last complete checkpoint in `folder`. Raises
    FloatingPointError when the loss is not finite, and writes the batch beside the checkpoints.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in stage.train)
    module = TrainingModule(model, stage, vectors)
    on_cpu = model.device.type == "cpu"
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=max(stage.learning_rate.values()),
        learning_rate_mapping={_pattern(part): rate for part, rate in stage.learning_rate.items()},
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(stage.steps * WARM_UP)),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=inference.default_dtype(model.device) == torch.bfloat16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and PartialState().num_processes > 1 else None,
        ddp_find_unused_parameters=False,
        seed=seed,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
        prompts={
            name: {"query": model.config.lead(instructions[name.removesuffix(WITH_NEGATIVES)])} for name in datasets
        },
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=not on_cpu,
    )
    loaded = SentenceTransformer(modules=[module], device=str(model.device))
    weights = stage.loss if module.pooling == "context_eos" else stage.loss.model_copy(update={"halves": 0.0})
    loss = Causal2VecLoss(loaded, weights, stage.mini_batch_size)
    watch = _Watch(stage)
    trainer = _Trainer(model=loaded, args=arguments, train_dataset=dict(datasets), loss=loss, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    watch.trainer = trainer
    trainer.train(resume_from_checkpoint=_last_complete(folder) if resume else None)
    model.eval()
    return [
        {"step": row["step"], "loss": row["loss"], "grad_norm": row["grad_norm"], "learning_rate": row["learning_rate"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]


def _pattern(part: TrainedPart) -> str:
    """Of the names of a part's parameters inside the trainer's loss: model.0.model.NAME."""
    prefix, low_rank = _PART_PREFIX[part]
    return rf"^model\.0\.model\.{prefix[:-1]}\." + (r".*\.lora_" if low_rank else r"(?!.*\.lora_)")


def _last_complete(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; unfinished ones are deleted."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / _COMPLETE).is_file():
            complete.append(path)
        elif PartialState().is_main_process:
            shutil.rmtree(path)
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def train(
    recipe: Recipe,
    data: Path,
    output: Path,
    *,
    device: str | None = None,
    max_steps: int | None = None,
    resume: bool = False,
) -> Causal2Vec:
    """Run every stage, save the checkpoint to `output`, and return the model.

    Under `torchrun` or `accelerate launch` each process takes `batch_size` pairs a step (DDP); negatives are those of
    its own batch. `OUTPUT.training` beside `output` keeps what a stopped run needs to go on (`resume`), the loss of
    every step as log.json and loss.png, and the vectors of the texts. `max_steps` shortens each stage, for a dry run.

    Raises ValueError for data or a recipe that cannot be used, FileExistsError when there is a run already and
    `resume` was not asked for, FloatingPointError for a loss that is not finite.
    """
    if max_steps is not None:
        stages = [stage.model_copy(update={"steps": min(stage.steps, max_steps)}) for stage in recipe.stages]
        recipe = recipe.model_copy(update={"stages": stages})
    options = {name: recipe.data.options(name) for name in recipe.data.sets}
    sets = [
        read_pair_set(data, name, instruction=option.instruction, max_bad_rows=recipe.data.max_bad_rows)
        for name, option in options.items()
    ]
    work = output.with_name(f"{output.name}.training")
    processes = PartialState(cpu=device == "cpu")
    if processes.is_main_process:
        _claim(work, recipe, sets, resume)
    processes.wait_for_everyone()
    model = new_model(recipe, device=device or str(processes.device))
    log: dict[str, list[dict[str, float]]] = {}
    for number, stage in enumerate(recipe.stages, start=1):
        finished = work / f"{number}-{stage.name}.safetensors"
        rows_file = finished.with_suffix(".json")
        if rows_file.is_file():
            load_trained(model, finished)
            log[stage.name] = json.loads(rows_file.read_text(encoding="utf-8"))
            continue
        seed = recipe.seed + number
        datasets = draw_stage(
            sets,
            {name: option.weight for name, option in options.items()},
            batch_size=stage.batch_size,
            steps=stage.steps * processes.num_processes,
            num_negatives=stage.num_negatives,
            seed=seed,
        )
        every = [text for one in datasets.values() for column in one.column_names for text in one[column]]
        with processes.main_process_first():  # the others find its vectors on disk
            vectors = stage_vectors(model, recipe, stage, work, every)
        log[stage.name] = run_stage(
            model, stage, datasets, {one.name: one.instruction for one in sets}, vectors,
            work / f"{number}-{stage.name}", seed=seed, save_steps=recipe.save_steps, resume=resume,
        )  # fmt: skip
        if processes.is_main_process:
            aside = finished.with_suffix(".part")
            save_file(trained_tensors(model), aside)
            aside.rename(finished)
            rows_file.write_text(json.dumps(log[stage.name]), encoding="utf-8")
            shutil.rmtree(work / f"{number}-{stage.name}")
        processes.wait_for_everyone()
    if not processes.is_main_process:
        return model
    (work / "log.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json"), "steps": log}, indent=1))
    plot_losses(log, work / "loss.png")
    weights.save(
        model,
        output,
        trained_dtype=torch.float16,
        further_bases={"encoder": recipe.base.encoder_also, "llm": recipe.base.llm_also},
    )
    return model


def _claim(work: Path, recipe: Recipe, sets: list[PairSet], resume: bool) -> None:
    """Make the run's folder, or check that the run in it is this one."""
    digest = hashlib.sha256()
    for one in sets:
        digest.update(
            json.dumps([one.name, one.instruction, [dataclasses.astuple(pair) for pair in one.pairs]]).encode()
        )
    run = {"recipe": recipe.model_dump(mode="json", exclude={"output"}), "data": digest.hexdigest()}
    path = work / "run.json"
    if path.is_file():
        if not resume:
            raise FileExistsError(f"{work} holds a run already. Go on with it (--resume), or delete the folder.")
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if changed := [key for key in run if run[key] != earlier[key]]:
            raise ValueError(f"{work} holds a run of another {' and other '.join(changed)}: it cannot be resumed.")
        return
    if resume:
        logger.warning("There is no run in %s yet: starting one.", work)
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1), encoding="utf-8")


def fast(device: torch.device) -> torch.autocast:
    """Computing in bfloat16 where the hardware does."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=inference.default_dtype(device) == torch.bfloat16)


def stage_vectors(model: Causal2Vec, recipe: Recipe, stage: Stage, work: Path, every: Sequence[str]) -> StageVectors:
    """The vectors of `every` text, cut as the stage says; the encoder's and other models' are kept in `work`."""
    encoder = EncoderEmbedder(model, cutter(model, stage.max_length))

    def by_encoder(some: Sequence[str]) -> np.ndarray:
        with fast(model.device):
            return encoder.encode_document(some, on_truncate="ignore", show_progress=True)

    def by_teacher(name: str, some: Sequence[str]) -> np.ndarray:
        teacher = SentenceTransformer(name, device=str(model.device))
        teacher.max_seq_length = min(stage.max_length, teacher.max_seq_length or stage.max_length)
        with fast(model.device):
            vectors = teacher.encode(list(some), normalize_embeddings=True, show_progress_bar=True)
        return np.asarray(vectors, dtype=np.float32)

    digest = hashlib.sha256()  # an earlier stage may have trained the encoder
    for tensor in model.encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    vectors = work / "vectors"
    made = {ENCODER: TextVectors(vectors / f"encoder-{digest.hexdigest()[:8]}-{stage.max_length}", by_encoder)}
    teachers = recipe.teachers if stage.loss.distill else []
    for name in {*teachers, *([LEXICAL] if stage.loss.words else [])} - {ENCODER}:
        if name == LEXICAL:
            table = cast(Tensor, model.llm.get_input_embeddings().weight)
            made[name] = TextVectors(None, LexicalEmbedder(table, model.tokenizer.llm, every, stage.max_length))
        else:
            folder = f"teacher-{hashlib.sha256(name.encode()).hexdigest()[:8]}-{stage.max_length}"
            made[name] = TextVectors(vectors / folder, functools.partial(by_teacher, name))
    for one in made.values():
        one.prepare(every)
    return StageVectors(made[ENCODER], [made[name] for name in teachers], made[LEXICAL] if stage.loss.words else None)


def plot_losses(log: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """The loss of every step, stage after stage, and its running mean, as an image."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(log), figsize=(5 * len(log), 3.5), squeeze=False, layout="constrained")
    for axis, (name, rows) in zip(axes[0], log.items(), strict=True):
        losses = np.array([row["loss"] for row in rows])
        window = max(1, len(losses) // 20)
        axis.plot(losses, linewidth=0.6, alpha=0.5, color="tab:blue", label="each step")
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axis.plot(np.arange(window - 1, len(losses)), smooth, color="tab:blue", label=f"mean of {window}")
        axis.set(title=f"stage {name}", xlabel="step", ylabel="loss")
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
