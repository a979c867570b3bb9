"""Training in stages: each stage is one run of sentence-transformers' trainer.

A stage can train the Contextual half alone, on sequences that end at the Contextual token. Under the causal mask its
state does not depend on the text behind it, so the decoder reads one token per text. Later stages use whole texts.

Run as `c2v-rag train RECIPE.yaml --data FOLDER --output FOLDER`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers
from transformers.trainer_callback import PrinterCallback

from c2v_rag import inference, weights
from c2v_rag.checkpoint import check_target
from c2v_rag.finetune.averaging import StartAverage
from c2v_rag.finetune.batches import PreparedBatches, in_neighbour_batches
from c2v_rag.finetune.bm25 import BatchBM25
from c2v_rag.finetune.data import WITH_NEGATIVES, PairSet, draw_stage, read_pair_set
from c2v_rag.finetune.dev import DevSet, prepare_dev
from c2v_rag.finetune.loss import Causal2VecLoss
from c2v_rag.finetune.module import (
    StageVectors,
    TrainingModule,
    encoder_is_frozen,
    encoder_vectors,
    stage_vectors,
)
from c2v_rag.finetune.monitor import Monitor
from c2v_rag.finetune.opening import frozen_dtype, new_model
from c2v_rag.finetune.recipe import BaseModels, Recipe, Stage
from c2v_rag.finetune.reports import plot_losses, trackers
from c2v_rag.finetune.scoring import DevCallback, DevReport
from c2v_rag.finetune.sharding import check_sharding, shard_decoder, sharded_names
from c2v_rag.finetune.trainer import (
    ProgressCallback,
    StageTrainer,
    last_complete_checkpoint,
    load_trained,
    name_pattern,
    part_of,
    trained_tensors,
    use_one_gpu,
)
from c2v_rag.model import Causal2Vec
from c2v_rag.prefix import is_checkpointing

logger = logging.getLogger(__name__)

WARM_UP = 0.05  # share of a stage's steps


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

    Under `torchrun` or `accelerate launch` each process takes an equal share of the `batch_size` pairs of a step
    (DDP); the negatives are those of the whole step. The folder `OUTPUT.training` beside `output` keeps what `resume`
    needs, the values of every step (log.json, loss.png, tensorboard), the development scores (dev.json, see
    `DevReport.load`) and the cached vectors. `max_steps` shortens each stage, for a dry run.

    Raises ValueError for data or a recipe that cannot be used, or an `output` that holds other files; ImportError for a
    tracker that is not installed, FileExistsError when there is a run already and `resume` is false, FloatingPointError
    when the loss is not finite.
    """
    if max_steps is not None:
        stages = [stage.model_copy(update={"steps": min(stage.steps, max_steps)}) for stage in recipe.stages]
        recipe = recipe.model_copy(update={"stages": stages})
    options = {name: recipe.data.options(name) for name in recipe.data.sets}
    sets = [
        read_pair_set(data, name, instruction=option.instruction, max_bad_rows=recipe.data.max_bad_rows)
        for name, option in options.items()
    ]
    if any(stage.loss.list_distill for stage in recipe.stages) and not any(p.scores for s in sets for p in s.pairs):
        raise ValueError("list_distill needs a teacher's scores, but no set holds positive_score and negative_scores.")
    report_to = trackers(recipe.report_to)
    sets, dev_sets = _hold_out(recipe, data, sets)
    work = output.with_name(f"{output.name}.training")
    processes = PartialState(cpu=device == "cpu")
    if processes.is_main_process:
        check_target(output)
        _claim_folder(work, recipe, sets, dev_sets, resume)
    processes.wait_for_everyone()
    model = _open(recipe, torch.device(device or processes.device))
    instructions = _instructions(sets, model)
    log: dict[str, list[dict[str, float]]] = {}
    scored: dict[str, DevCallback] = {}
    for number, stage in enumerate(recipe.stages, start=1):
        finished = _weights_file(work, number, stage)
        rows_file = finished.with_suffix(".json")
        if recipe.dev != "none" and dev_sets:
            scored[stage.name] = DevCallback(model, dev_sets, recipe.dev, finished.with_suffix(".dev.json"))
        if rows_file.is_file():
            load_trained(model, finished)
            log[stage.name] = json.loads(rows_file.read_text(encoding="utf-8"))
            continue
        seed = recipe.seed + number
        datasets = draw_stage(
            sets,
            {name: option.weight for name, option in options.items()},
            batch_size=stage.batch_size,
            steps=stage.steps,
            num_negatives=stage.num_negatives,
            seed=seed,
            exponent=1.0 if recipe.data.sizes == "proportional" else 0.5,
        )
        prompts = {name: model.config.prompt(instruction) for name, instruction in instructions.items()}
        vectors = stage_vectors(model, recipe, stage, work, texts_of(datasets), prompted_texts(datasets, prompts))
        if stage.loss.needs_bm25:
            vectors = dataclasses.replace(vectors, bm25=BatchBM25(texts_of(datasets), documents_of(datasets)))
        if recipe.data.batches == "neighbours":
            datasets = in_neighbour_batches(
                datasets,
                encoder_vectors(model, stage.max_length, work),
                {one: model.config.encoder_prompt(prompts[one.removesuffix(WITH_NEGATIVES)]) for one in datasets},
                batch_size=stage.batch_size,
                share=recipe.data.neighbour_share,
                pool=recipe.data.neighbour_pool,
                seed=seed,
                device=model.device,
            )
        # The trainer reads tensorboard's folder from the environment only.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(work / "tensorboard" / stage.name)
        log[stage.name] = run_stage(
            model, stage, datasets, instructions, vectors, work / f"{number}-{stage.name}",
            seed=seed, save_steps=recipe.save_steps, resume=resume, optimizer=recipe.optimizer,
            dev=scored.get(stage.name), report_to=report_to,
            batches_are_prepared=recipe.data.batches == "neighbours", workers=recipe.workers,
        )  # fmt: skip
        if processes.is_main_process:
            unfinished = finished.with_suffix(".part")
            save_file(trained_tensors(model), unfinished)
            unfinished.rename(finished)
            rows_file.write_text(json.dumps(log[stage.name]), encoding="utf-8")
            shutil.rmtree(work / f"{number}-{stage.name}")
        processes.wait_for_everyone()
    if recipe.base.shard:  # the weights are spread over the processes: open the model again
        model = _open_whole(recipe, model.device)
        for number, stage in enumerate(recipe.stages, start=1):
            load_trained(model, _weights_file(work, number, stage))
    if processes.is_main_process:
        (work / "log.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json"), "steps": log}, indent=1))
        plot_losses(log, work / "loss.png")
        if scored:
            DevReport.of_stages(dev_sets, scored).save(work / "dev.json")
        write_checkpoint(model, recipe.base, output)
    return model


def _weights_file(work: Path, number: int, stage: Stage) -> Path:
    """The file of a finished stage's trained weights."""
    return work / f"{number}-{stage.name}.safetensors"


def _open(recipe: Recipe, device: torch.device) -> Causal2Vec:
    """The recipe's model on `device`, or with `base.shard` this process's share of it."""
    if not recipe.base.shard:
        return new_model(recipe, device=str(device))
    check_sharding(recipe, PartialState().num_processes)
    model = _open_whole(recipe, device)
    shard_decoder(model, device)
    return model


def _open_whole(recipe: Recipe, device: torch.device) -> Causal2Vec:
    """The recipe's model in the CPU's memory, with the dtype that it has on `device`."""
    dtype = str(frozen_dtype(recipe.base, device)).removeprefix("torch.")
    base = recipe.base.model_copy(update={"dtype": dtype})
    return new_model(recipe.model_copy(update={"base": base}), device="cpu")


def texts_of(datasets: Mapping[str, Dataset]) -> list[str]:
    """All texts of a stage's datasets, with repetitions."""
    columns = [dataset[name] for dataset in datasets.values() for name in dataset.column_names if name != "scores"]
    return [text for column in columns for text in column]


def documents_of(datasets: Mapping[str, Dataset]) -> dict[str, list[str]]:
    """The documents of a stage's datasets by the name of their set, with repetitions."""
    found: dict[str, list[str]] = {}
    for name, dataset in datasets.items():
        for column in dataset.column_names:
            if column not in ("query", "scores"):
                found.setdefault(name.removesuffix(WITH_NEGATIVES), []).extend(dataset[column])
    return found


def prompted_texts(datasets: Mapping[str, Dataset], prompts: Mapping[str, str]) -> dict[str, list[str]]:
    """The texts of a stage's datasets by the prompt before them: "" for documents; `prompts` by the name of a set."""
    found = {"": [text for documents in documents_of(datasets).values() for text in documents]}
    for name, dataset in datasets.items():
        found.setdefault(prompts[name.removesuffix(WITH_NEGATIVES)], []).extend(dataset["query"])
    return found


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
    optimizer: str = "adamw_torch_fused",
    dev: DevCallback | None = None,
    report_to: Sequence[str] = (),
    batches_are_prepared: bool = False,
    workers: int = 0,
) -> list[dict[str, float]]:
    """Train one stage in place; returns one row per step: step, loss, grad_norm, learning_rate, `Monitor.values`.

    With `dev` the model has the weights of `dev.kept_step` afterwards. `report_to`: names of trackers.
    `batches_are_prepared`: each `batch_size` consecutive rows of a dataset are a batch; otherwise the trainer draws
    batches without equal texts. `workers`: see `Recipe`.

    `instructions`: by the name of a data set. With `resume`, training goes on from the last complete checkpoint in
    `folder`. Raises FloatingPointError when the loss is not finite; the batch is then in a file in `folder`.
    ValueError when `batch_size` cannot be divided by the number of processes.
    """
    num_processes = PartialState().num_processes
    if stage.batch_size % num_processes:
        raise ValueError(
            f"batch_size is {stage.batch_size} in stage {stage.name!r}, which {num_processes} processes cannot share "
            "equally. It is the number of pairs of a whole step."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in stage.train)
    average = StartAverage(model, stage.keep)
    use_checkpointing(model, stage)
    module = TrainingModule(model, stage, vectors)
    on_cpu = model.device.type == "cpu"
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=max(stage.learning_rate.values()),
        learning_rate_mapping={name_pattern(part): rate for part, rate in stage.learning_rate.items()},
        lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        warmup_steps=max(1, round(stage.steps * WARM_UP)) if stage.warmup_steps is None else stage.warmup_steps,
        optim=optimizer,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=inference.default_dtype(model.device) == torch.bfloat16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and num_processes > 1 else None,
        # A batch is drawn for the whole step, from one set, and each process takes its share of it.
        accelerator_config={"split_batches": num_processes > 1},
        dataloader_drop_last=num_processes > 1,
        ddp_find_unused_parameters=False,
        seed=seed,
        batch_sampler=PreparedBatches if batches_are_prepared else BatchSamplers.NO_DUPLICATES,
        multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
        prompts={
            name: {"query": model.config.prompt(instructions[name.removesuffix(WITH_NEGATIVES)])} for name in datasets
        },
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(report_to) or "none",
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=workers,
    )
    use_one_gpu(arguments)
    loaded = SentenceTransformer(modules=[module], device=str(model.device))
    vars(loaded)["_ddp_params_and_buffers_to_ignore"] = sharded_names(loaded)  # read by DDP
    loss_weights = stage.loss if module.pooling == "context_eos" else stage.loss.model_copy(update={"halves": 0.0})
    loss = Causal2VecLoss(loaded, loss_weights, stage.mini_batch_size, vectors.bm25)
    progress = ProgressCallback(stage.name)
    paused = (lambda: dev.seconds) if dev is not None else (lambda: 0.0)
    monitor = Monitor(model, loss, part_of, paused=paused, minutes=stage.minutes)
    callbacks = [progress, monitor, *([dev] if dev is not None else [])]
    trainer = StageTrainer(model=loaded, args=arguments, train_dataset=dict(datasets), loss=loss, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    progress.trainer = trainer
    trainer.monitor = monitor
    best = folder / "best.safetensors"
    if dev is not None:
        dev.save_best = lambda: save_file(trained_tensors(model), best)
        dev.log = trainer.log
        dev.applied = average.applied
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if resume else None)
    model.eval()
    if trainer.state.global_step < stage.steps and monitor.time_share < 1 and not (dev and dev.is_patience_over):
        logger.warning(
            "Stage %r ended after %d of %d steps: its sets have too few different texts for batches of %d.",
            stage.name, trainer.state.global_step, stage.steps, stage.batch_size,
        )  # fmt: skip
    if dev is not None and dev.kept_step != trainer.state.global_step:
        PartialState().wait_for_everyone()
        load_trained(model, best)
        logger.info("Stage %s ends with the weights of step %d, its best.", stage.name, dev.kept_step)
    else:
        average.apply()
    return [{k: v for k, v in row.items() if k != "epoch"} for row in trainer.state.log_history if "loss" in row]


def use_checkpointing(model: Causal2Vec, stage: Stage) -> None:
    """Switch gradient checkpointing on or off in the parts whose activations the stage needs."""
    for part, is_used in ((model.llm, True), (model.encoder, not encoder_is_frozen(stage))):
        if stage.gradient_checkpointing and is_used:
            part.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        elif is_checkpointing(part):
            part.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]


def write_checkpoint(model: Causal2Vec, base: BaseModels, output: Path) -> None:
    """Save the trained model: projector and adapters in float16, with the further sources of its bases."""
    weights.save(
        model,
        output,
        trained_dtype=torch.float16,
        further_bases={"encoder": base.encoder_also, "llm": base.llm_also},
    )


def _hold_out(recipe: Recipe, data: Path, sets: list[PairSet]) -> tuple[list[PairSet], list[DevSet]]:
    """(the sets to train on, the development sets) of a recipe; says what is held out."""
    if recipe.dev == "none":
        return sets, []
    named = {name: read_pair_set(data, name, max_bad_rows=recipe.data.max_bad_rows) for name in recipe.dev.pairs}
    kept, dev_sets = prepare_dev(sets, recipe.dev, named, seed=recipe.seed)
    held = sum(len(one.pairs) for one in sets) - sum(len(one.pairs) for one in kept)
    if held:
        logger.info("%d pairs are not trained on: their documents are held out to score the model.", held)
    if not dev_sets:
        logger.warning("There is too little data to hold out a part of it: no development scores, no early stopping.")
    return kept, dev_sets


def _instructions(sets: Sequence[PairSet], model: Causal2Vec) -> dict[str, str]:
    """The instruction before the queries of each set, by its name; says where it is not the one of `encode_query`."""
    usual = model.config.instruction
    found = {one.name: usual if one.instruction is None else one.instruction for one in sets}
    if other := {name: instruction for name, instruction in found.items() if instruction != usual}:
        logger.warning(
            "encode_query uses the model's own instruction, %r. These sets are trained with another one, which has to "
            "be given to encode_query for such queries:\n%s",
            usual,
            "\n".join(f"- {name}: {instruction!r}" for name, instruction in other.items()),
        )
    return found


def _claim_folder(
    work: Path, recipe: Recipe, sets: Sequence[PairSet], dev_sets: Sequence[DevSet], resume: bool
) -> None:
    """Create the run's folder, or check that the run in it has the same recipe and data."""
    digest = hashlib.sha256(json.dumps([dataclasses.astuple(one) for one in dev_sets]).encode())
    for pairs in sets:
        rows = [dataclasses.astuple(pair) for pair in pairs.pairs]
        digest.update(json.dumps([pairs.name, pairs.instruction, rows]).encode())
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
