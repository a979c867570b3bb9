"""Training fits the machine: dtypes, checkpointing, quantised weights, several processes, and the recipes we ship."""

from __future__ import annotations

import json
import logging
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, MistralConfig

from c2v_rag import Causal2Vec, Causal2VecConfig, inference
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.finetune import run
from c2v_rag.finetune.data import Pair, PairSet, draw_stage
from c2v_rag.finetune.memory import activation_bytes, step_memory
from c2v_rag.finetune.opening import new_model
from c2v_rag.finetune.recipe import BaseModels, Recipe
from c2v_rag.finetune.run import train, use_checkpointing
from c2v_rag.finetune.sharding import check_sharding
from c2v_rag.finetune.trainer import last_complete_checkpoint, part_of, use_one_gpu
from c2v_rag.finetune.vectors import TextVectors
from c2v_rag.projector import mean_token_norm
from sentence_transformers_c2v.module import to_features
from tests.pairs import pairs
from tests.tiny import ENCODERS, LLMS, TEXTS, projector_gradient, tiny_model, tiny_module, tiny_tokenizer

RECIPES = Path(__file__).parent.parent / "recipes"
TRAINED = {"projector": 1e-2, "llm_adapter": 1e-2}


def recipe_for(base: dict[str, Any], **stage: Any) -> Recipe:
    """One stage of three steps on whole texts; `stage` replaces its settings."""
    rates = stage.pop("learning_rate", TRAINED)
    settings = {"name": "full", "sequences": "full", "steps": 3, "batch_size": 8, "max_length": 48}
    settings |= {"train": [*rates], "learning_rate": rates, "loss": {"distill": 0.0, "info_nce": 1.0}}
    return Recipe.model_validate(
        {
            "base": base,
            "data": {"sets": {"docs": 1.0}},
            "lora": {"rank": 4},
            "dev": "none",
            "stages": [settings | stage],
        }
    )


def write_pairs(folder: Path, name: str = "docs", *, negatives: bool = False) -> None:
    rows: list[dict[str, Any]] = [{"query": query, "positive": positive} for query, positive in pairs()[:60]]
    if negatives:
        rows = [
            row | {"negatives": [f"Not {row['positive']}"], "positive_score": i / 60, "negative_scores": [0.1]}
            for i, row in enumerate(rows)
        ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.json").write_text(json.dumps({"instruction": "find the guide"}))


def save_parts(folder: Path, llm: str, encoder: str, **changes: Any) -> dict[str, str]:
    """Tiny parts of these families as folders for `from_parts`, by the names of a recipe's base."""
    tables = {"encoder": (ENCODERS, encoder, "wordpiece"), "llm": (LLMS, llm, "bpe")}
    for part, (table, family, tokenizer) in tables.items():
        tiny_module(table, family, **(changes if part == "encoder" else {})).save_pretrained(folder / part)
        tiny_tokenizer(tokenizer).save_pretrained(folder / part)
    return {part: str(folder / part) for part in tables}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny Mistral and a tiny BERT without dropout, so that two runs can be compared."""
    folder = tmp_path_factory.mktemp("parts")
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return save_parts(folder, "mistral", "bert", **without_dropout) | {"encoder_max_length": 48}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    return folder


def test_every_feature_owns_its_memory_so_that_it_can_be_pinned_for_a_gpu() -> None:
    model = tiny_model()
    features = to_features(model.tokenize(TEXTS, "find").collate(range(len(TEXTS))))
    assert features["prefix_ids"].shape[0] == len(TEXTS)
    for name, tensor in features.items():
        assert tensor.is_contiguous(), name
        # Pinning copies into a tensor of the same strides, which raises for the overlapping rows of `expand`.
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


# Dtypes and memory


def test_frozen_weights_have_the_recipes_dtype_and_trained_ones_are_float32(base: dict[str, Any]) -> None:
    for rates, float32 in (
        (TRAINED, {"projector", "llm_adapter"}),
        ({"encoder": 1e-3, "llm_adapter": 1e-3}, {"projector", "llm_adapter", "encoder"}),
    ):
        model = new_model(recipe_for(base | {"dtype": "bfloat16"}, learning_rate=rates), device="cpu")
        dtypes: dict[str | None, set[torch.dtype]] = {}
        for name, parameter in model.named_parameters():
            dtypes.setdefault("encoder" if name.startswith("encoder.") else part_of(name), set()).add(parameter.dtype)
        assert dtypes.pop(None) == {torch.bfloat16}, "the decoder's own weights"
        assert {part: {torch.float32} if part in float32 else {torch.bfloat16} for part in dtypes} == dtypes
    assert new_model(recipe_for(base), device="cpu").dtype == torch.float32, "the default on a CPU"


@pytest.mark.parametrize("family", sorted(LLMS))
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    gradients: list[Tensor] = []
    for checkpointing in (False, True):
        model = tiny_model(family)
        stage = recipe_for({"checkpoint": "x"}, gradient_checkpointing=checkpointing).stages[0]
        use_checkpointing(model, stage)
        model.llm.train()
        for module in model.llm.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch = model.tokenize(TEXTS[:3], "find").collate(range(3))
        assert (model.compute_prefix(batch.prefix_ids) is None) == checkpointing, "an unused prefix is not computed"
        gradients.append(projector_gradient(model, batch))
    assert gradients[0].norm() > 1e-6
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_checkpointing_and_bfloat16_train_what_the_plain_run_trains(
    base: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(base | {"dtype": "bfloat16"}, gradient_checkpointing=True, mini_batch_size=4)
    model = train(recipe, data, tmp_path / "out", device="cpu")
    losses = [row["loss"] for row in json.loads((tmp_path / "out.training" / "log.json").read_text())["steps"]["full"]]
    assert len(losses) == 3
    assert model.projector.output.weight.dtype == torch.float32
    again = Causal2Vec.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, device="cpu")
    cosines = (again.encode(TEXTS) * model.encode(TEXTS)).sum(axis=1)
    assert cosines.min() > 0.99


def test_llm_kwargs_reach_the_decoder(base: dict[str, Any]) -> None:
    model = new_model(recipe_for(base | {"llm_kwargs": {"attn_implementation": "eager"}}), device="cpu")
    assert model.llm.config._attn_implementation == "eager"
    assert model.encoder.config._attn_implementation != "eager"


def test_a_decoder_in_four_bits_trains_its_adapter(base: dict[str, Any], data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    kwargs = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}}
    recipe = recipe_for(base | {"dtype": "bfloat16", "llm_kwargs": kwargs}, steps=2)
    model = train(recipe, data, tmp_path / "out", device="cpu")
    assert model.llm.is_loaded_in_4bit
    adapters = [parameter for name, parameter in model.named_parameters() if ".lora_B" in name]
    assert adapters
    assert all(bool(parameter.abs().max() > 0) for parameter in adapters)
    assert Causal2Vec.from_pretrained(tmp_path / "out", dtype="float32", device="cpu").encode(["x"]).shape == (1, 64)


# Settings of a recipe


def test_a_recipe_reaches_the_initial_token_scale(base: dict[str, Any]) -> None:
    for scale in (1.0, 1024.0):
        model = new_model(recipe_for(base | {"initial_token_scale": scale}), device="cpu")
        norm = model.projector(torch.randn(400, 24)).norm(dim=1).mean() / mean_token_norm(model.llm)
        assert float(norm) == pytest.approx(scale, rel=0.6)


def test_settings_beside_a_checkpoint_are_an_error_and_not_ignored() -> None:
    assert BaseModels(checkpoint="x").checkpoint == "x"
    for given in ({"config": {"pooling": "eos"}}, {"num_llm_layers": 3}, {"encoder_max_length": 64}):
        with pytest.raises(ValueError, match=f"a checkpoint has its own settings: leave out {next(iter(given))}"):
            BaseModels(checkpoint="x", **given)  # type: ignore[arg-type]


def test_a_stages_max_length_above_the_models_is_an_error(base: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'full' has max_length 48, but the model cuts texts at 32"):
        new_model(recipe_for(base | {"config": {"max_length": 32}}), device="cpu")


def test_an_optimizer_that_transformers_does_not_know_is_an_error(base: dict[str, Any]) -> None:
    values = recipe_for(base).model_dump()
    assert Recipe.model_validate(values | {"optimizer": "adamw_8bit"}).optimizer == "adamw_8bit"
    with pytest.raises(ValueError, match="knows no optimizer 'adam_w'"):
        Recipe.model_validate(values | {"optimizer": "adam_w"})


def test_an_adapter_can_be_limited_to_chosen_layers(base: dict[str, Any]) -> None:
    values = recipe_for(base).model_dump() | {"lora": {"target_modules": ["q_proj", "v_proj"]}}
    model = new_model(Recipe.model_validate(values), device="cpu")
    adapted = {
        name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.llm.named_parameters() if "lora_" in name
    }
    assert adapted == {"q_proj", "v_proj"}


def test_warm_up_and_schedule_set_the_learning_rate_of_every_step(
    base: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    found = {}
    for schedule in ("constant", "linear"):
        recipe = recipe_for(base, steps=4, schedule=schedule, warmup_steps=2, learning_rate={"projector": 1e-3})
        train(recipe, data, tmp_path / schedule, device="cpu")
        log = json.loads((tmp_path / f"{schedule}.training" / "log.json").read_text())
        found[schedule] = [row["learning_rate"] for row in log["steps"]["full"]]
    assert found["constant"] == pytest.approx([0, 5e-4, 1e-3, 1e-3])
    assert found["linear"] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_sets_can_be_drawn_in_proportion_to_their_rows_and_leftovers_are_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sets = [
        PairSet(name, "", [Pair(f"{name}{i}", f"answer {name}{i}", ("no",) * (i == 0)) for i in range(rows)], {})
        for name, rows in (("a", 10), ("b", 990))
    ]
    options: dict[str, Any] = {"batch_size": 2, "steps": 1000, "seed": 0}
    drawn = draw_stage(sets, {"a": 1.0, "b": 1.0}, num_negatives=0, exponent=1.0, **options)
    assert len(drawn["a"]) / 2 < 30
    drawn = draw_stage(sets, {"a": 1.0, "b": 1.0}, num_negatives=0, **options)
    assert len(drawn["a"]) / 2 > 60, "the default is the square root"
    with caplog.at_level(logging.WARNING):
        draw_stage(sets[1:], {"b": 1.0}, num_negatives=1, **options | {"steps": 400})
    assert "b: 1 pairs with 1 negatives are left out of this stage: they are fewer than a batch of 2." in caplog.text


# Prompts of the encoder


def test_the_encoder_reads_its_prompts_in_the_model_alone_and_in_training(tmp_path: Path) -> None:
    prompts = {"encoder_query_prompt": "query: ", "encoder_document_prompt": "passage: "}
    with_prompts, plain = tiny_model(**prompts, pooling="context"), tiny_model(pooling="context")
    texts = [TEXTS[0], TEXTS[1], TEXTS[6]]
    for prefix, encode in (("query: ", "encode_query"), ("passage: ", "encode_document")):
        by_hand = EncoderEmbedder(plain).encode([prefix + text for text in texts], on_truncate="ignore")
        alone = getattr(EncoderEmbedder(with_prompts), encode)(texts, on_truncate="ignore")
        np.testing.assert_allclose(alone, by_hand, atol=1e-5)
    differ = with_prompts.encode_document(texts) - plain.encode_document(texts)
    assert np.abs(differ).max() > 1e-3
    with_prompts.save_pretrained(tmp_path / "model")
    again = Causal2Vec.from_pretrained(tmp_path / "model", dtype="float32", device="cpu")
    assert again.config.encoder_query_prompt == "query: "
    np.testing.assert_allclose(again.encode_query(texts), with_prompts.encode_query(texts), atol=1e-5)
    assert again.stamp["weights"] == with_prompts.stamp["weights"] != plain.stamp["weights"]


def test_a_model_without_encoder_prompts_keeps_its_config_file_and_identity() -> None:
    config = Causal2VecConfig()
    assert not {key for key in config.to_dict() if key.startswith("encoder_") and "prompt" in key}
    assert Causal2VecConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"settings this version does not know: \['encoder_prompt'\]"):
        Causal2VecConfig.from_dict(config.to_dict() | {"encoder_prompt": "query: "})


def test_cached_vectors_of_a_frozen_encoder_have_the_prompt_of_each_role(
    base: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    config = {"encoder_query_prompt": "query: ", "encoder_document_prompt": "passage: "}
    recipe = recipe_for(base | {"config": config}, steps=1)
    model = train(recipe, data, tmp_path / "out", device="cpu")
    (file,) = (tmp_path / "out.training" / "vectors").glob("encoder-*/*.vectors.npy")
    cached = np.load(file)
    embedder = EncoderEmbedder(model)
    for texts in ((embedder.encode_query, embedder.encode_document),):
        queries, documents = (
            encode([pair[i] for pair in pairs()[:60]], on_truncate="ignore") for i, encode in enumerate(texts)
        )
        for vectors in (queries, documents):
            assert ((cached @ vectors.T).max(axis=0) > 0.9999).sum() >= 8


# Several processes


def test_vectors_are_shared_between_processes_and_none_waits_in_a_collective(tmp_path: Path) -> None:
    embedded: list[list[str]] = [[], []]

    def table(process: int) -> TextVectors:
        def embed(texts: Any) -> np.ndarray:
            embedded[process].extend(texts)
            return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

        return TextVectors(tmp_path / "v", embed, process=process, num_processes=2)

    texts = ["x" * i for i in range(1, 30)]
    tables = [table(process) for process in range(2)]
    threads = [threading.Thread(target=one.prepare, args=(texts,)) for one in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(embedded[0] + embedded[1]) == texts
    assert min(map(len, embedded)) > 4
    for one in tables:
        np.testing.assert_array_equal(one(one.rows(texts))[:, 0], range(1, 30))
        assert all(isinstance(array, np.memmap) for array in one._arrays), "the processes share the memory"


def test_no_vectors_are_computed_for_an_encoder_that_is_trained(
    base: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(base, steps=1, learning_rate={"encoder": 1e-3})
    train(recipe, data, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out.training" / "vectors").exists()


def test_a_checkpoint_counts_only_when_every_process_has_written_its_part(tmp_path: Path) -> None:
    for step, files in ((2, ["complete"]), (4, ["complete-0-of-2", "complete-1-of-2"]), (6, ["complete-0-of-2"])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for file in files:
            (tmp_path / f"checkpoint-{step}" / file).touch()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-6").exists()


def test_without_a_launcher_one_gpu_is_used_and_the_log_says_how_to_use_all(caplog: pytest.LogCaptureFixture) -> None:
    arguments: Any = SimpleNamespace(n_gpu=8, _n_gpu=8)
    with caplog.at_level(logging.WARNING):
        use_one_gpu(arguments)
    assert arguments._n_gpu == 1
    assert "has 8 GPUs, and one is used. To use all: torchrun --nproc-per-node 8" in caplog.text


# Trains one step in every process; process 0 writes the gradients that the optimizer would use.
ONE_STEP = """
import json, sys
from pathlib import Path
import torch
from c2v_rag import inference
from c2v_rag.finetune import run, trainer
from c2v_rag.finetune.recipe import Recipe

inference.default_dtype = lambda device: torch.float32

class Recording(trainer.StageTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        model = self._module.model
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        folder = Path(self.args.output_dir).parents[1]
        if self.args.process_index == 0:
            torch.save((loss, found), folder / f"{Path(self.args.output_dir).parent.name}-{self.state.global_step}.pt")
        return loss

run.StageTrainer = Recording
recipes, data, folder = sys.argv[1:]
for name, values in json.loads(Path(recipes).read_text()).items():
    run.train(Recipe.model_validate(values), Path(data), Path(folder) / name, device="cpu")
"""


@pytest.mark.slow
def test_two_processes_compute_the_gradient_of_one_process_with_the_whole_batch(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without GradCache, each for two steps, with hard negatives, BM25 and a teacher.

    With a trained encoder in neighbour batches that workers tokenise; with a frozen one with masks, scores in the data
    and the start teacher; with a decoder that is divided over the processes, and development scores.
    """
    write_pairs(tmp_path, negatives=True)
    write_pairs(tmp_path, "plain")
    recipes = {}
    for rates in ({"encoder": 1e-3, "projector": 1e-3}, TRAINED):
        for mini_batch_size in (None, 3):
            loss = {"distill": 0.5, "info_nce": 1.0, "halves": 0.5, "residual": 0.5, "fused_distill": 0.5}
            if rates is TRAINED:
                loss |= {"mask_margin": 0.02, "list_distill": 0.5}
            options = {"mini_batch_size": mini_batch_size, "learning_rate": rates, "steps": 2, "loss": loss}
            values = recipe_for(base, **options).model_dump(mode="json")
            values["data"]["sets"] = {"docs": 1.0, "plain": 1.0}
            if rates is TRAINED:
                values["teachers"] = ["encoder", "start"]
            else:
                values["data"]["batches"] = "neighbours"
                values["workers"] = 1
            recipes[f"{next(iter(rates))}-{mini_batch_size}"] = values
    options = {"mini_batch_size": 3, "learning_rate": TRAINED, "steps": 2, "gradient_checkpointing": True}
    recipes["divided"] = recipe_for(base, **options).model_dump(mode="json")
    recipes["divided"]["dev"] = {"every": 1, "max_queries": 3, "max_documents": 5}
    script = tmp_path / "one_step.py"
    script.write_text(ONE_STEP)
    gradients = {}
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        recipes["divided"]["base"]["shard"] = count > 1
        (tmp_path / "recipes.json").write_text(json.dumps(recipes))
        arguments = [str(script), str(tmp_path / "recipes.json"), str(tmp_path), str(tmp_path / str(count))]
        if count == 1:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", arguments)
                patch.setattr(run, "StageTrainer", run.StageTrainer)  # the script replaces both
                patch.setattr(inference, "default_dtype", inference.default_dtype)
                runpy.run_path(str(script))
        else:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            done = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, done.stderr[-9000:]
        for name in recipes:
            for step in (0, 1):
                gradients[count, name, step] = torch.load(tmp_path / str(count) / f"{name}.training-{step}.pt")
    for name in recipes:
        for step in (0, 1):
            (loss, expected), (other_loss, found) = (gradients[count, name, step] for count in (1, 2))
            assert float(other_loss) == pytest.approx(float(loss), rel=1e-4), (name, step)
            assert expected.keys() == found.keys()
            assert max(float(gradient.norm()) for gradient in expected.values()) > 1e-4
            for parameter, gradient in expected.items():
                torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-5)
    whole, divided = (Causal2Vec.from_pretrained(tmp_path / str(count) / "divided", device="cpu") for count in (1, 2))
    texts = ["a heap", "yeast"]
    start = new_model(Recipe.model_validate(recipes["divided"]), device="cpu").encode(texts)
    difference, change = (np.linalg.norm(one - whole.encode(texts)) for one in (divided.encode(texts), start))
    assert difference < 0.1 * change  # Adam divides by the gradients, so their rounding is not small beside them
    scores = json.loads((tmp_path / "2" / "divided.training" / "dev.json").read_text())
    assert [row["step"] for row in scores["history"]] == [0, 1, 2]


def test_a_recipe_that_cannot_be_divided_is_an_error(base: dict[str, Any], data: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base | {"shard": True}, gradient_checkpointing=True).model_copy(update={"teachers": ["start"]})
    with pytest.raises(ValueError, match=r"divides the decoder over several processes, and this is one"):
        train(recipe, data, tmp_path / "out", device="cpu")
    with pytest.raises(ValueError, match=r"The teacher 'start' cannot be used with base.shard"):
        check_sharding(recipe, 2)
    with pytest.raises(ValueError, match=r"base.shard needs gradient_checkpointing: true in every stage"):
        check_sharding(recipe.model_copy(update={"stages": recipe_for(base).stages}), 2)
    quantised = recipe.base.model_copy(update={"llm_kwargs": {"quantization_config": {"load_in_4bit": True}}})
    with pytest.raises(ValueError, match="A quantised decoder cannot be divided"):
        check_sharding(recipe.model_copy(update={"base": quantised}), 2)


def test_a_batch_that_processes_cannot_share_is_an_error(
    base: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PartialState", lambda **_: SimpleNamespace(num_processes=3))
    recipe = recipe_for(base)
    with pytest.raises(ValueError, match="batch_size is 8 in stage 'full', which 3 processes cannot share"):
        run.run_stage(new_model(recipe, device="cpu"), recipe.stages[0], {}, {}, None, tmp_path)  # type: ignore[arg-type]


# The recipes we ship


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.yaml"))])
def test_a_shipped_recipe_runs_with_tiny_parts_of_the_same_families(name: str, tmp_path: Path) -> None:
    """The recipe's own file; only the names of the models are replaced, and it is cut after one step."""
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    if recipe.base.checkpoint:
        tiny_model("llama").save_pretrained(tmp_path / "tiny")
        named = {"checkpoint": str(tmp_path / "tiny")}
    else:
        named = save_parts(tmp_path, "mistral", "bert")
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update=named)})
    for one in recipe.data.sets:
        write_pairs(tmp_path, one, negatives=True)
    model = train(recipe, tmp_path, tmp_path / "out", device="cpu", max_steps=1)
    log = json.loads((tmp_path / "out.training" / "log.json").read_text())
    assert [len(rows) for rows in log["steps"].values()] == [1] * len(recipe.stages)
    assert np.isfinite(log["steps"][recipe.stages[0].name][0]["loss"])
    assert Causal2Vec.from_pretrained(tmp_path / "out", device="cpu").embedding_dim == model.embedding_dim
    if name == "mistral-7b-e5-8gpu":
        assert recipe.stages[0].batch_size % 8 == 0
    if not recipe.base.checkpoint:
        assert model.config.encoder_query_prompt == "query: "
        assert recipe.base.initial_token_scale == 1
        assert model.dtype == torch.bfloat16


def test_the_two_recipes_of_7b_differ_in_nothing_but_their_comments() -> None:
    one, eight = (Recipe.load(RECIPES / f"{name}.yaml") for name in ("mistral-7b-e5", "mistral-7b-e5-8gpu"))
    assert one == eight


# Memory


def test_the_7b_recipe_fits_80_gb_and_would_not_without_gradient_checkpointing() -> None:
    recipe = Recipe.load(RECIPES / "mistral-7b-e5.yaml")
    stage = recipe.stages[0]
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    fits = step_memory(recipe, stage, BertConfig(), MistralConfig(), **options)
    assert fits.frozen_weights == pytest.approx(2 * 7.11e9, rel=0.01)
    assert fits.optimizer == 2 * fits.gradients == 2 * fits.trained_weights
    assert fits.total < 40e9
    without = stage.model_copy(update={"gradient_checkpointing": False})
    assert step_memory(recipe, without, BertConfig(), MistralConfig(), **options).total > 80e9


def test_computed_activations_are_the_memory_that_a_forward_pass_keeps() -> None:
    settings = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 160}
    module = tiny_module(LLMS, "llama", **settings).train().requires_grad_(False)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    embeds = torch.randn(8, 96, 64, requires_grad=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(inputs_embeds=embeds, use_cache=False)
    measured = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    computed = activation_bytes(module.to("meta"), 8, 96, torch.float32, False)
    # Attention keeps its probabilities where the kernel is not fused, which depends on the device.
    assert measured <= computed < 2.5 * measured
    assert activation_bytes(module, 8, 96, torch.float32, True) < 0.6 * computed


# With a GPU: two steps of every kind of stage. All together take under two minutes on one card.


STAGES: dict[str, dict[str, Any]] = {
    "context": {"sequences": "context"},
    "full": {"mini_batch_size": 4},
    "checkpointing": {"mini_batch_size": 4, "gradient_checkpointing": True},
    "encoder": {"learning_rate": {"projector": 1e-3, "encoder": 1e-3}, "gradient_checkpointing": True},
    "encoder_adapter": {"learning_rate": {"encoder_adapter": 1e-3}},
    "distilled": {"loss": {"distill": 1.0, "info_nce": 0.0}},
    "bm25": {"loss": {"distill": 0.0, "info_nce": 0.1, "residual": 1.0, "fused_distill": 1.0}, "mini_batch_size": 4},
    "neighbours": {"learning_rate": {"encoder": 1e-3}, "keep": 0.5},
    "four_bits": {"gradient_checkpointing": True},
    "adamw_8bit": {},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(STAGES))
def test_two_steps_of_every_kind_of_stage_run_on_a_gpu(
    kind: str, base: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    kwargs: dict[str, Any] = {}
    if kind in ("four_bits", "adamw_8bit"):
        pytest.importorskip("bitsandbytes")
    if kind == "four_bits":
        kwargs = {"llm_kwargs": {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}}}
    recipe = recipe_for(base | {"dtype": "bfloat16"} | kwargs, **{"steps": 2} | STAGES[kind])
    if kind == "neighbours":
        changed = {"data": recipe.data.model_copy(update={"batches": "neighbours"}), "workers": 2}
        recipe = recipe.model_copy(update=changed)
    if kind == "adamw_8bit":
        recipe = recipe.model_copy(update={"optimizer": "adamw_8bit"})
    model = train(recipe, data, tmp_path / "out", device="cuda")
    assert model.device.type == "cuda"
    log = json.loads((tmp_path / "out.training" / "log.json").read_text())["steps"]["full"]
    assert len(log) == 2
    assert all(row["grad_norm"] > 0 for row in log)
    for name, parameter in model.named_parameters():
        if part_of(name) in recipe.stages[0].train:
            assert parameter.dtype == torch.float32, name
    assert np.isfinite(Causal2Vec.from_pretrained(tmp_path / "out", device="cuda").encode(TEXTS)).all()
