"""A stage can end between the weights before it and the trained ones; development scores are those of the average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from c2v_rag import Causal2Vec
from c2v_rag.finetune import scoring
from c2v_rag.finetune.averaging import StartAverage
from c2v_rag.finetune.opening import new_model
from c2v_rag.finetune.recipe import Recipe
from c2v_rag.finetune.run import train
from c2v_rag.finetune.trainer import part_of
from tests.pairs import pairs

PARTS = ("projector", "llm_adapter", "encoder_adapter")
DEV = {"every": 1, "max_queries": 3, "max_documents": 6, "min_queries": 1}


def recipe_for(checkpoint: str, *, keep: float, **changes: Any) -> Recipe:
    stage = {"name": "full", "sequences": "full", "steps": 2, "batch_size": 4, "max_length": 32, "keep": keep}
    stage |= {"train": [*PARTS], "learning_rate": dict.fromkeys(PARTS, 1e-2), "warmup_steps": 0}
    stage |= {"schedule": "constant", "loss": {"distill": 0.0, "info_nce": 1.0}}
    values = {"base": {"checkpoint": checkpoint}, "data": {"sets": {"docs": 1.0}}, "stages": [stage]}
    return Recipe.model_validate(values | {"lora": {"rank": 4}, "dev": "none", "report_to": []} | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("pairs")
    rows = [{"query": query, "positive": positive} for query, positive in pairs()[:60]]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(model: Causal2Vec) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def merged(model: Causal2Vec) -> dict[str, Tensor]:
    """The weights that the model computes with: adapters are multiplied out."""
    tensors = {name: one.detach().clone() for name, one in model.named_parameters()}
    for name in [name for name in tensors if ".lora_B" in name]:
        layer = name.split(".lora_B")[0]
        scaling = model.get_submodule(layer).scaling["default"]
        a, b = tensors.pop(name.replace("lora_B", "lora_A")), tensors.pop(name)
        tensors[f"{layer}.base_layer.weight"] += scaling * b @ a
    return tensors


def test_the_change_of_new_and_of_older_adapters_and_of_weights_is_scaled(tiny_checkpoint: str) -> None:
    model = new_model(recipe_for(tiny_checkpoint, keep=0.3), device="cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in PARTS)
    generator = torch.Generator().manual_seed(0)

    def change() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    before = merged(model)
    average = StartAverage(model, 0.3)
    change()
    own, after = trained(model), merged(model)
    with average.applied():
        inside = merged(model)
    for name, tensor in trained(model).items():
        assert torch.equal(tensor, own[name]), "the trained weights are restored exactly"
    average.apply()
    for name, tensor in merged(model).items():
        torch.testing.assert_close(tensor, before[name] + 0.3 * (after[name] - before[name]))
        assert torch.equal(tensor, inside[name])
    assert any("base_layer" in name and not torch.equal(after[name], before[name]) for name in before)

    first = trained(model)  # these adapters are no longer new
    average = StartAverage(model, 0.3)
    change()
    second = trained(model)
    average.apply()
    for name, tensor in trained(model).items():
        torch.testing.assert_close(tensor, first[name] + 0.3 * (second[name] - first[name]))


def test_a_stage_ends_with_the_average_and_its_scores_are_those_of_the_average(
    tiny_checkpoint: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[dict[str, Tensor]] = []
    monkeypatch.setattr(scoring, "score", lambda model, dev: [0.1 * len(scored.append(merged(model)) or scored)])
    found = {}
    for keep in (1.0, 0.5):
        recipe = recipe_for(tiny_checkpoint, keep=keep, dev=DEV)
        found[keep] = merged(train(recipe, data, tmp_path / str(keep), device="cpu"))
    before = scored[0]
    for name, start in before.items():
        torch.testing.assert_close(found[0.5][name], start + 0.5 * (found[1.0][name] - start), rtol=1e-3, atol=1e-5)
    assert max(float((found[1.0][name] - before[name]).abs().max()) for name in before) > 1e-3
    assert len(scored) == 6
    for name, tensor in scored[-1].items():
        torch.testing.assert_close(tensor, found[0.5][name])


def test_the_best_averaged_weights_are_kept(
    tiny_checkpoint: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[dict[str, Tensor]] = []
    means = iter([0.1, 0.9, 0.2])

    def score(model: Causal2Vec, dev: Any) -> list[float]:
        scored.append(merged(model))
        return [next(means)]

    monkeypatch.setattr(scoring, "score", score)
    recipe = recipe_for(tiny_checkpoint, keep=0.5, dev=DEV)
    found = merged(train(recipe, data, tmp_path / "out", device="cpu"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, scored[1][name])
    assert any(not torch.equal(found[name], scored[2][name]) for name in found)


def test_keep_must_be_a_share(tiny_checkpoint: str) -> None:
    for keep in (0.0, 1.1):
        with pytest.raises(ValueError, match="keep"):
            recipe_for(tiny_checkpoint, keep=keep)
