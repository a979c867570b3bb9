"""Sentence-transformers' trainer for one stage: it saves only trained parameters and stops when the loss is not finite.

A part is a named group of parameters that a recipe can train: projector, llm_adapter, encoder_adapter, encoder.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments

from c2v_rag.finetune.data import WITH_NEGATIVES
from c2v_rag.finetune.loss import Causal2VecLoss
from c2v_rag.finetune.module import TrainingModule
from c2v_rag.finetune.monitor import Monitor
from c2v_rag.finetune.recipe import TrainedPart
from c2v_rag.model import Causal2Vec

logger = logging.getLogger(__name__)

_COMPLETE = "complete"  # an empty file of each process: it has written its part of the checkpoint
_TRAINED_FILE = "trained.safetensors"
# Of each part: the prefix of its parameters' names, and whether they are LoRA's.
_PART_NAMES: dict[TrainedPart, tuple[str, bool]] = {
    "projector": ("projector.", False),
    "llm_adapter": ("llm.", True),
    "encoder_adapter": ("encoder.", True),
    "encoder": ("encoder.", False),
}


def part_of(name: str) -> TrainedPart | None:
    """The part that the parameter `name` belongs to; None for one that is never trained.

    These are the decoder's own weights, and the encoder's pooler, which this package does not use.
    """
    if name.startswith("encoder.pooler."):
        return None
    for part, (prefix, is_lora) in _PART_NAMES.items():
        if name.startswith(prefix) and (".lora_" in name) == is_lora:
            return part
    return None


def name_pattern(part: TrainedPart) -> str:
    """Regular expression of a part's parameter names inside the trainer's loss module: model.0.model.NAME."""
    prefix, is_lora = _PART_NAMES[part]
    return rf"^model\.0\.model\.{prefix[:-1]}\." + (r".*\.lora_" if is_lora else r"(?!.*\.lora_)")


def trained_tensors(model: Causal2Vec) -> dict[str, Tensor]:
    """Name to tensor (CPU) of every parameter that a recipe can train; without the encoder's while it is frozen."""
    tensors = {name: parameter for name, parameter in model.named_parameters() if part_of(name) is not None}
    if not any(parameter.requires_grad for name, parameter in tensors.items() if part_of(name) == "encoder"):
        tensors = {name: parameter for name, parameter in tensors.items() if part_of(name) != "encoder"}
    return {name: parameter.detach().cpu().contiguous() for name, parameter in tensors.items()}


@torch.no_grad()
def load_trained(model: Causal2Vec, path: Path) -> None:
    """Copy the tensors of a file written from `trained_tensors` into the model."""
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        parameters[name].copy_(tensor)


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, None where there is none; unfinished ones are deleted."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if _is_complete(path):
            complete.append(path)
        elif PartialState().is_main_process:
            shutil.rmtree(path)
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def _complete_file(process: int, num_processes: int) -> str:
    return _COMPLETE if num_processes == 1 else f"{_COMPLETE}-{process}-of-{num_processes}"


def _is_complete(checkpoint: Path) -> bool:
    """Whether every process has written its part."""
    files = [path.name for path in checkpoint.glob(f"{_COMPLETE}*")]
    counts = {int(name.rpartition("-")[2]) for name in files if name != _COMPLETE}
    return _COMPLETE in files or any(
        all(_complete_file(process, count) in files for process in range(count)) for count in counts
    )


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Without a launcher, train on one GPU; the trainer would divide each batch over all of them (DataParallel)."""
    if arguments.n_gpu > 1:
        logger.warning(
            "This machine has %d GPUs, and one is used. To use all: "
            "torchrun --nproc-per-node %d -m c2v_rag.cli train ...",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        arguments._n_gpu = 1


class StageTrainer(SentenceTransformerTrainer):
    """Counts tokens, saves the trained parameters only, and raises FloatingPointError when the loss is not finite.

    Set `monitor` before training: its values are logged with each step's loss, and the learning rates of a stage with a
    time limit follow the time where it is further than the steps.
    """

    tokens = 0
    monitor: Monitor | None = None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if (monitor := self.monitor) is not None:

            def by_time(factor: Callable[[int], float], step: int) -> float:
                return factor(max(step, int(monitor.time_share * num_training_steps)))

            scheduler.lr_lambdas = [functools.partial(by_time, factor) for factor in scheduler.lr_lambdas]
        return scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.monitor is not None:
            logs |= self.monitor.values(logs.get("grad_norm", 0.0)) | {"tokens": self.tokens}
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        counted = self._module.text_mask
        self.tokens += sum(int(mask.sum()) for name, mask in inputs.items() if name.endswith(counted))
        rows = {name.removesuffix("_rows"): rows for name, rows in inputs.items() if name.endswith("_rows")}
        if isinstance(self.loss, Causal2VecLoss):
            self.loss.data_set = inputs.get("dataset_name", "").removesuffix(WITH_NEGATIVES)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        value = loss[0] if isinstance(loss, tuple) else loss
        if not torch.isfinite(value):
            path = Path(str(self.args.output_dir)) / f"bad-batch-{self.state.global_step}.json"
            batch = {column: self._module.batch_texts(indices) for column, indices in rows.items()}
            path.write_text(json.dumps(batch, indent=1, ensure_ascii=False), encoding="utf-8")
            raise FloatingPointError(
                f"The loss is {value.item()} at step {self.state.global_step}. The batch is in {path}. Lower the "
                "learning rates; --resume goes on from the last checkpoint before it."
            )
        return loss

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add nothing: the checkpoint gets this package's own model card."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_tensors(self._module.model), folder / _TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self._module.model, Path(resume_from_checkpoint) / _TRAINED_FILE)

    @property
    def _module(self) -> TrainingModule:
        return cast(TrainingModule, self.model[0])


class ProgressCallback(TrainerCallback):
    """Shows a progress bar with loss and tokens/s, and marks each checkpoint that was written to its end.

    Set `trainer` before training: the bar reads its token count.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self.trainer: StageTrainer | None = None
        self._bar: tqdm[Any] | None = None
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self._description,
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
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / _complete_file(args.process_index, args.world_size)).touch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
