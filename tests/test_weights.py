"""Weights: training is never lost, a base is never rewritten, and a model has one identity everywhere."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from c2v_rag import Document, VectorIndex, hashes, shared_model, weights
from c2v_rag.config import Causal2VecConfig
from c2v_rag.identity import sample_weights
from c2v_rag.model import Causal2Vec
from c2v_rag.parts import PartRecord, adapted_layers, base_tensors, is_base
from c2v_rag.tokenization import TextTokenizer
from tests.test_model import assert_same
from tests.tiny import ENCODERS, LLMS, TEXTS, tiny_model, tiny_module, tiny_tokenizer

DATA = Path(__file__).parent / "data"


def load(folder: Path | str, **options: Any) -> Causal2Vec:
    return Causal2Vec.from_pretrained(folder, **{"dtype": "float32", "device": "cpu"} | options)


def adapted_model(**settings: Any) -> Causal2Vec:
    """A tiny model in memory with an adapter in each part."""
    model = tiny_model(**settings)
    for part in (model.llm, model.encoder):
        torch.manual_seed(2)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        inject_adapter_in_model(lora, part)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plain_parts(tmp_path: Path) -> tuple[Path, Path]:
    """An encoder and a decoder of three layers as transformers writes them."""
    tiny_module(LLMS, "llama").save_pretrained(tmp_path / "llm")
    tiny_tokenizer("bpe").save_pretrained(tmp_path / "llm")
    tiny_module(ENCODERS, "bert").save_pretrained(tmp_path / "encoder")
    tiny_tokenizer("wordpiece").save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder", tmp_path / "llm"


def from_parts(parts: tuple[Path, Path], **options: Any) -> Causal2Vec:
    config = Causal2VecConfig(num_llm_layers=2, encoder_max_length=64, max_length=64)
    return Causal2Vec.from_parts(*parts, config=config, **{"dtype": "float32", "device": "cpu"} | options)


# Training is not lost


@pytest.mark.parametrize("part", ["encoder", "llm"])
def test_one_element_written_through_data_is_saved(
    part: str, plain_parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No version counter changes, and a sample of a few elements may miss it: every tensor is compared."""
    model = from_parts(plain_parts)
    for record in model.weights_record.parts.values():
        assert record.base is not None
        object.__setattr__(record.base, "reference", {"kind": "hub", "name": "a/b", "revision": None, "sha256": {}})
    module = getattr(model, part)
    name, weight = max(module.named_parameters(), key=lambda named: named[1].numel())
    before = weight.detach().clone()
    weight.data[3, 5] += 1
    model.save_pretrained(tmp_path / "saved")
    other = "llm" if part == "encoder" else "encoder"
    assert (tmp_path / "saved" / other / "base.json").is_file(), "what was not changed is named, not copied"
    saved = load_file(tmp_path / "saved" / part / "model.safetensors")[name]
    assert (saved - before).nonzero().tolist() == [[3, 5]]


def test_a_changed_buffer_is_saved_too(tmp_path: Path) -> None:
    model = tiny_model()
    model.encoder.register_buffer("counted", torch.zeros(3))
    identity = model.stamp["weights"]
    model.encoder.counted += 1
    assert model.stamp["weights"] != identity
    model.projector.scale.mul_(2)
    expected = model.encode(TEXTS)
    del model.encoder.counted
    model.save_pretrained(tmp_path / "model")
    assert_same(load(tmp_path / "model").encode(TEXTS), expected, at_least=1 - 1e-6)


@pytest.mark.parametrize("change", ["projector", "llm_adapter", "encoder_adapter", "llm"])
def test_training_a_loaded_model_changes_its_identity_and_is_saved(change: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = model.stamp["weights"]
    module = getattr(model, change.removesuffix("_adapter"))
    if module is not model.projector:
        model.unmerge_adapter("encoder" if module is model.encoder else "llm")
    for name, parameter in module.named_parameters():
        if change == "projector" or (".lora_" in name) == ("adapter" in change):
            parameter.data.mul_(1.01)
    assert model.stamp["weights"] != before
    model.save_pretrained(tmp_path / "trained")
    again = load(tmp_path / "trained")
    assert again.stamp["weights"] == model.stamp["weights"]
    assert_same(again.encode_query(TEXTS), model.encode_query(TEXTS), at_least=1 - 1e-6)
    assert np.abs(again.encode_query(TEXTS) - load(folder).encode_query(TEXTS)).max() > 1e-4


def test_a_model_that_is_saved_where_it_was_loaded_has_the_identity_of_its_new_weights(
    folder: Path, tmp_path: Path
) -> None:
    model = load(folder)
    before = model.stamp["weights"]
    for scale in (1.01, 1.02):
        model.unmerge_adapter("llm")
        for name, parameter in model.llm.named_parameters():
            if ".lora_" not in name:
                parameter.data.mul_(scale)
        model.save_pretrained(folder)
        assert model.stamp["weights"] != before
        assert load(folder).stamp["weights"] == model.stamp["weights"]
        model.save_pretrained(tmp_path / "copy")
        assert load(tmp_path / "copy").stamp["weights"] == model.stamp["weights"]
        before = model.stamp["weights"]


# A base is never rewritten


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_loading_in_any_precision_and_saving_keeps_every_value(dtype: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder, dtype=dtype)
    assert all(layer.merged for layer in adapted_layers(model.llm)), "no merged adapter: nothing to show"
    model.save_pretrained(tmp_path / "again")
    files = [*folder.rglob("*.safetensors")]
    assert len(files) == 5
    for file in files:
        expected, found = load_file(file), load_file(tmp_path / "again" / file.relative_to(folder))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert load(tmp_path / "again").stamp["weights"] == model.stamp["weights"] == load(folder).stamp["weights"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unmerging_gives_the_bases_values_back_exactly(dtype: str, folder: Path) -> None:
    model = load(folder, dtype=dtype)
    expected, identity = model.encode_query(TEXTS), model.stamp["weights"]
    original = load_file(folder / "llm" / "model.safetensors")
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in model.llm.state_dict().items()}
    assert any(not torch.equal(merged[name], tensor.to(model.dtype)) for name, tensor in original.items())
    model.unmerge_adapter("llm")
    for name, tensor in base_tensors(model.llm).items():
        assert torch.equal(tensor, original[name].to(model.dtype)), name
    assert model.stamp["weights"] == identity
    assert_same(model.encode_query(TEXTS), expected, at_least=0.9999 if dtype == "float32" else 0.99)


def test_a_changed_base_is_written_without_its_merged_adapter_and_stays_merged(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.llm.layers[1].mlp.down_proj.base_layer.weight.add_(0.5)
    expected = model.encode(TEXTS)
    identity = model.stamp["weights"]
    model.save_pretrained(tmp_path / "changed")
    np.testing.assert_array_equal(model.encode(TEXTS), expected)
    before, after = (load_file(one / "llm" / "model.safetensors") for one in (folder, tmp_path / "changed"))
    name = "layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(after[name], before[name] + 0.5, atol=1e-5, rtol=0)
    again = load(tmp_path / "changed")
    assert again.stamp["weights"] == identity
    assert_same(again.encode(TEXTS), expected, at_least=1 - 1e-6)


# One identity


def test_an_index_built_in_memory_is_read_after_save_and_load(tmp_path: Path) -> None:
    model = adapted_model()
    VectorIndex(tmp_path / "store", model).add([Document(text, str(i)) for i, text in enumerate(TEXTS)])
    model.save_pretrained(tmp_path / "model")
    assert tiny_model(seed=1).stamp["weights"] != tiny_model().stamp["weights"]
    for loaded in (load(tmp_path / "model"), load(tmp_path / "model", dtype="bfloat16")):
        assert loaded.stamp["weights"] == model.stamp["weights"]
        assert len(VectorIndex(tmp_path / "store", loaded).search("a heap", top_k=3)) == 3


def test_a_model_made_of_folders_keeps_its_identity_when_it_is_saved(
    plain_parts: tuple[Path, Path], tmp_path: Path
) -> None:
    model = from_parts(plain_parts)
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert model.stamp["weights"] == again.stamp["weights"] == load(tmp_path / "two").stamp["weights"]
    other = from_parts(plain_parts, seed=1)
    assert other.stamp["weights"] != model.stamp["weights"]


def test_an_adapters_scale_belongs_to_the_identity(folder: Path) -> None:
    before = load(folder).stamp["weights"]
    path = folder / "llm_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 2}))
    hashes.write_sums(folder)
    assert load(folder).stamp["weights"] != before


def test_checkpoints_and_stamps_of_version_0_1_are_read(tmp_path: Path) -> None:
    """Version 0.1 wrote the folder, its vectors, and the identity below, which its stores contain."""
    model = load(DATA / "checkpoint_0_1")
    assert model.stamp["weights_0_1"] == "41cfc2b7f4e274a9"
    np.testing.assert_allclose(model.encode_query(TEXTS), np.load(DATA / "checkpoint_0_1_queries.npy"), atol=1e-5)
    np.testing.assert_allclose(model.encode_document(TEXTS), np.load(DATA / "checkpoint_0_1_documents.npy"), atol=1e-5)

    class Former:
        """The same model, with the stamp of version 0.1."""

        embedding_dim, encode_query, encode_document = model.embedding_dim, model.encode_query, model.encode_document
        stamp = {key: value for key, value in model.stamp.items() if key != "weights_0_1"} | {
            "weights": "41cfc2b7f4e274a9"
        }

    VectorIndex(tmp_path, Former()).add([Document(text, str(i)) for i, text in enumerate(TEXTS)])
    index = VectorIndex(tmp_path, model)
    assert len(index.search("a heap", top_k=3)) == 3
    with torch.no_grad():
        model.projector.hidden.bias.add_(0.1)
    assert "weights_0_1" not in model.stamp
    with pytest.raises(ValueError, match="made with another model"):
        index.search("a heap")


def test_a_base_whose_files_are_gone_is_saved_from_memory(plain_parts: tuple[Path, Path], tmp_path: Path) -> None:
    model = from_parts(plain_parts)
    expected = model.encode(TEXTS)
    shutil.rmtree(plain_parts[1])
    model.save_pretrained(tmp_path / "saved")
    assert_same(load(tmp_path / "saved").encode(TEXTS), expected, at_least=1 - 1e-6)
    assert not is_base(model.llm, PartRecord())


# Loading


def test_a_model_loaded_under_inference_mode_can_be_trained_and_used(folder: Path) -> None:
    with torch.inference_mode():
        model = load(folder)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert_same(model.encode_query(TEXTS), load(folder).encode_query(TEXTS), at_least=1 - 1e-6)
    model.projector.requires_grad_()
    model(model.tokenize(TEXTS).collate(range(len(TEXTS)))).sum().backward()
    assert model.projector.hidden.weight.grad is not None


def test_dtype_auto_takes_what_the_files_hold_and_a_wrong_dtype_is_named(folder: Path) -> None:
    assert load(folder, dtype="auto").dtype == torch.float32
    assert load(folder, dtype="torch.bfloat16").dtype == torch.bfloat16
    for wrong in ("no_dtype", "nn"):
        with pytest.raises(ValueError, match=f"dtype must be a torch dtype.*got '{wrong}'"):
            load(folder, dtype=wrong)


def test_the_input_device_of_an_offloaded_embedding_table_is_the_one_of_its_hook(folder: Path, tmp_path: Path) -> None:
    places = {"embed_tokens": "disk", "layers": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    tiny_model().save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", device_map=places, offload_folder=str(tmp_path / "offloaded"))
    assert model.llm.get_input_embeddings().weight.device.type == "meta", "nothing was offloaded"
    assert model.device.type == "cpu"
    assert_same(model.encode_query(TEXTS), load(tmp_path / "plain").encode_query(TEXTS))
    assert model.stamp["weights"] == load(tmp_path / "plain").stamp["weights"]


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_num_llm_layers_reaches_nested_configurations(family: str, tmp_path: Path) -> None:
    """Models of text and images have the decoder's settings in `text_config`."""
    from transformers import AutoModel, Gemma3Config, Mistral3Config

    text = LLMS["gemma3" if family == "gemma3" else "mistral"][1]
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 8, "patch_size": 4}
    config = (
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        if family == "gemma3"
        else Mistral3Config(
            text_config={"model_type": "mistral", **text}, vision_config={"model_type": "pixtral", **vision}
        )
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "llm")
    tiny_tokenizer("bpe").save_pretrained(tmp_path / "llm")
    tiny_module(ENCODERS, "bert").save_pretrained(tmp_path / "encoder")
    tiny_tokenizer("wordpiece").save_pretrained(tmp_path / "encoder")
    model = from_parts((tmp_path / "encoder", tmp_path / "llm"))
    assert model.llm.config.get_text_config().num_hidden_layers == 2
    expected = model.encode_query(TEXTS, on_truncate="ignore")
    assert np.isfinite(expected).all()
    model.save_pretrained(tmp_path / "saved")
    assert_same(load(tmp_path / "saved").encode_query(TEXTS, on_truncate="ignore"), expected, at_least=1 - 1e-6)


def test_a_shared_model_is_loaded_once_for_every_spelling_of_device_and_dtype(folder: Path) -> None:
    model = shared_model(folder, dtype="float32")
    assert shared_model(str(folder), dtype=torch.float32, device="cpu") is model
    assert shared_model(folder, dtype="torch.float32", device=torch.device("cpu")) is model
    assert shared_model(folder, dtype="bfloat16") is not model
    assert shared_model(folder) is shared_model(folder, dtype=weights.inference.default_dtype(torch.device("cpu")))


def test_loading_one_model_does_not_block_loading_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shared_model(folder, dtype="float32")
    started, go_on = threading.Event(), threading.Event()

    def slow(name: str, **options: Any) -> Causal2Vec:
        started.set()
        assert go_on.wait(60)
        return other

    monkeypatch.setattr(Causal2Vec, "from_pretrained", slow)
    loaded: list[Causal2Vec] = []
    thread = threading.Thread(target=lambda: loaded.append(shared_model("slow/one")))
    thread.start()
    assert started.wait(60)
    assert shared_model(folder, dtype="float32") is other
    go_on.set()
    thread.join()
    assert loaded == [other]


# State


def test_locks_budget_and_prefix_cache_are_neither_pickled_nor_copied() -> None:
    model = tiny_model()
    model.encode_query(TEXTS)
    model.encoding_state.batch_tokens = 100
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert other.encoding_state.batch_tokens is None
        assert other.encoding_state.compute_lock is not model.encoding_state.compute_lock
        assert_same(other.encode_query(TEXTS), model.encode_query(TEXTS))
        assert other.stamp == model.stamp


def test_two_tokenizers_over_the_same_vocabulary_never_mix_their_lengths() -> None:
    model = tiny_model()
    config = Causal2VecConfig(max_length=256, encoder_max_length=16)
    short = TextTokenizer(config, model.tokenizer.encoder, model.tokenizer.llm)
    texts = ["word " * 100] * 20
    longest: dict[int, set[int]] = {16: set(), 64: set()}

    def work(tokenizer: TextTokenizer, expected: int) -> None:
        for _ in range(60):
            longest[expected] |= {len(ids) for ids in tokenizer(texts).encoder_ids}

    threads = [
        threading.Thread(target=work, args=pair) for pair in ((short, 16), (model.tokenizer, 64)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert longest == {16: {16}, 64: {64}}


def test_a_sample_follows_writes_in_place_and_tensors_that_are_replaced() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 200))
    transposed = torch.nn.Parameter(torch.randn(8, 8).T)  # reshape copies it
    module.register_parameter("transposed", transposed)
    samples = [sample_weights(module)]
    assert sample_weights(module) == samples[0]
    with torch.no_grad():
        module[1].weight.data[0, 0] += 1
        samples.append(sample_weights(module))
        transposed.data[0, 0] += 1
        samples.append(sample_weights(module))
        module[0].weight.data = module[0].weight.data + 1
        samples.append(sample_weights(module))
        module[0].bias = torch.nn.Parameter(module[0].bias + 1)
        samples.append(sample_weights(module))
        module.double()
        samples.append(sample_weights(module))
    assert len(set(samples)) == 6


def test_a_loaded_model_is_in_eval_mode(tmp_path: Path) -> None:
    adapted_model().save_pretrained(tmp_path / "model")
    assert not any(module.training for module in Causal2Vec.from_pretrained(tmp_path / "model").modules())
