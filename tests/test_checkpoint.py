"""Saving and loading: equal vectors, and one clear error for each way a checkpoint can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from c2v_rag import bases, hashes, weights
from c2v_rag.config import Causal2VecConfig
from c2v_rag.embedders import shared_model
from c2v_rag.model import Causal2Vec
from tests.test_model import assert_same
from tests.tiny import TEXTS, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path | str) -> Causal2Vec:
    return Causal2Vec.from_pretrained(folder, dtype="float32", device="cpu")


def resum(folder: Path) -> None:
    hashes.write_sums(folder)


@pytest.mark.parametrize("llm", ["llama", "gpt2"])
@pytest.mark.parametrize("adapted", [False, True])
def test_save_then_load_gives_equal_vectors(llm: str, adapted: bool, tmp_path: Path) -> None:
    model = tiny_model(llm=llm, pooling="mean", instruction="its own")
    if adapted:
        for part in (model.llm, model.encoder):
            lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            inject_adapter_in_model(lora, part)
    expected = model.encode_query(TEXTS)
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert again.config == model.config
    assert_same(again.encode_query(TEXTS), expected, at_least=1 - 1e-6)
    # A loaded adapter is merged. Saving must separate base and adapter again.
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "llm_adapter").is_dir() is adapted
    assert_same(load(tmp_path / "two").encode_query(TEXTS), expected, at_least=1 - 1e-6)


def test_parts_of_a_checkpoint_open_with_plain_transformers_and_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    model = tiny_model()
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), model.llm)
    model.save_pretrained(tmp_path / "model")
    llm = PeftModel.from_pretrained(
        AutoModel.from_pretrained(tmp_path / "model" / "llm"), tmp_path / "model/llm_adapter"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "llm")
    ids = tokenizer("a heap", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        torch.testing.assert_close(llm(ids).last_hidden_state, model.llm(ids).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_trained_dtype_halves_the_trained_parts(tmp_path: Path) -> None:
    model = tiny_model()
    weights.save(model, tmp_path / "half", trained_dtype=torch.float16)
    tensors = load_file(tmp_path / "half" / "projector.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert_same(load(tmp_path / "half").encode(TEXTS), model.encode(TEXTS))


def test_num_llm_layers_keeps_the_first_layers_and_the_final_norm(folder: Path) -> None:
    model = Causal2Vec.from_parts(
        folder / "encoder",
        folder / "llm",
        config=Causal2VecConfig(num_llm_layers=2, encoder_max_length=64),
        dtype="float32",
    )
    assert len(model.llm.layers) == 2
    full = load(folder).llm
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        states = full(ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(model.llm(ids).last_hidden_state, full.norm(states), atol=1e-5, rtol=1e-4)
    model.save_pretrained(folder.parent / "short")
    assert_same(load(folder.parent / "short").encode(TEXTS), model.encode(TEXTS), at_least=1 - 1e-6)
    with pytest.raises(ValueError, match="num_llm_layers is 9, but the decoder has 3 layers"):
        Causal2Vec.from_parts(folder / "encoder", folder / "llm", config=Causal2VecConfig(num_llm_layers=9))


def test_layer_types_have_one_entry_per_layer_that_is_used(tmp_path: Path) -> None:
    tiny_model(llm="gemma3").save_pretrained(tmp_path / "model")
    config = Causal2VecConfig(num_llm_layers=2, encoder_max_length=64)
    parts = tmp_path / "model" / "encoder", tmp_path / "model" / "llm"
    model = Causal2Vec.from_parts(*parts, config=config, dtype="float32")
    assert len(model.llm.config.layer_types) == len(model.llm.layers) == 2
    assert np.isfinite(model.encode(TEXTS)).all()


def test_options_for_large_models_reach_transformers(folder: Path) -> None:
    model = Causal2Vec.from_pretrained(folder, dtype="float32", device_map="cpu", attn_implementation="eager")
    assert model.llm.config._attn_implementation == "eager"
    assert model.encoder.config._attn_implementation == "sdpa"
    assert_same(model.encode(TEXTS), load(folder).encode(TEXTS))
    with pytest.raises(ValueError, match="trust_remote_code is not supported"):
        Causal2Vec.from_pretrained(folder, trust_remote_code=True)


def test_stamp_depends_on_weights_and_settings_not_on_folder_or_dtype(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    shutil.copytree(folder, tmp_path / "copy")
    copy, half = load(tmp_path / "copy"), Causal2Vec.from_pretrained(folder, dtype="bfloat16", device="cpu")
    assert copy.stamp["weights"] == half.stamp["weights"] == model.stamp["weights"]
    assert copy.stamp["name"] != model.stamp["name"]
    json.dumps(model.stamp)
    stamp = model.stamp
    assert model.to("cpu").stamp == stamp
    with torch.no_grad():
        model.projector.hidden.bias.add_(0.1)
    assert model.stamp["weights"] != stamp["weights"]
    other = tiny_model(max_length=50)
    assert other.stamp["weights"] != tiny_model().stamp["weights"]
    assert tiny_model().stamp == tiny_model().stamp


def test_shared_model_is_loaded_once(folder: Path) -> None:
    assert shared_model(folder, dtype="float32") is shared_model(str(folder), dtype="float32")
    assert shared_model(folder, dtype="bfloat16") is not shared_model(folder, dtype="float32")


def test_a_folder_that_is_no_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a Causal2Vec checkpoint: it has no c2v_config.json.*from_parts"):
        load(folder / "encoder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no Causal2Vec checkpoint"):
        tiny_model().save_pretrained(tmp_path / "full")
    assert (tmp_path / "full" / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "maximum"}, "pooling must be one of context_eos, eos, context, mean; got 'maximum'"),
        ({"surprise": 1}, r"settings this version does not know: \['surprise'\]"),
        ({"max_length": 0}, "max_length must be a positive whole number; got 0"),
        ({"query_template": "{text} {instruction}"}, "must end in '{text}'"),
        ({"pooling": None}, "pooling must be one of"),
    ],
)
def test_a_wrong_setting_is_named(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "c2v_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    resum(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "c2v_config.json" in str(caught.value)


def test_a_missing_setting_is_named(folder: Path) -> None:
    path = folder / "c2v_config.json"
    values = json.loads(path.read_text())
    del values["pooling"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"lacks the settings \['pooling'\]"):
        load(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(folder)


@pytest.mark.parametrize("name", ["projector.safetensors", "encoder/model.safetensors", "llm/model.safetensors"])
def test_an_altered_or_truncated_file_is_named(folder: Path, name: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"truncated or altered: expected SHA-256 [0-9a-f]{64}, found") as caught:
        load(folder)
    assert name in str(caught.value)
    path.write_bytes(data[: len(data) // 2])
    resum(folder)
    with pytest.raises(ValueError, match=r"truncated or altered|damaged") as caught:
        load(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"is missing\.") as caught:
        load(folder)
    assert name in str(caught.value)


def test_wrong_tensors_are_named(folder: Path) -> None:
    path = folder / "projector.safetensors"
    tensors = load_file(path)
    tensors["hidden.weight"] = torch.zeros(5, 24)
    del tensors["output.bias"]
    tensors["surprise"] = torch.zeros(1)
    save_file(tensors, path)
    resum(folder)
    with pytest.raises(
        ValueError, match=r"output.bias is missing; surprise is unknown; hidden.weight has shape \(5, 24\)"
    ):
        load(folder)


def test_a_decoder_that_lacks_tensors_is_refused(folder: Path) -> None:
    path = folder / "llm" / "model.safetensors"
    tensors = load_file(path)
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    resum(folder)
    with pytest.raises(ValueError, match=r"lacks the tensors \['layers.1.mlp.up_proj.weight'\]"):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "encoder" / "model.safetensors")
    (folder / "encoder" / "model.safetensors").unlink()
    torch.save(tensors, folder / "encoder" / "pytorch_model.bin")
    resum(folder)
    with pytest.raises(ValueError, match=r"no .safetensors file. Pickled weights"):
        load(folder)


def test_sums_cannot_name_files_outside_the_folder(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../../etc/passwd\n")
    with pytest.raises(ValueError, match="SHA256SUMS:1: expected"):
        load(folder)


def test_encoder_max_length_beyond_the_encoder_is_refused() -> None:
    model = tiny_model()
    model.tokenizer.encoder.model_max_length = 32
    with pytest.raises(ValueError, match=r"encoder_max_length is 64, but the encoder reads 32"):
        type(model.tokenizer)(model.config, model.tokenizer.encoder, model.tokenizer.llm)


# The hub and installed packages


def test_a_hub_id_is_fetched_with_its_revision_and_saved_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []
    commit = "0123456789abcdef0123456789abcdef01234567"
    for part in ("encoder", "llm"):
        shutil.copytree(folder / part, tmp_path / "hub" / part / commit)

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not any(pattern in allow_patterns for pattern in ("*", "*.bin", "*.py", "*.pt"))
        asked.append((name, revision))
        return str(tmp_path / "hub" / name.split("/")[1] / commit)

    monkeypatch.setattr(bases, "snapshot_download", snapshot_download)
    config = Causal2VecConfig(encoder_max_length=64)
    parts = "someone/encoder", "someone/llm"
    model = Causal2Vec.from_parts(*parts, llm_revision="a-branch", config=config, dtype="float32")
    assert asked == [("someone/encoder", None), ("someone/llm", "a-branch")]
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "llm" / "model.safetensors").exists(), "a base from the hub is named, not copied"
    assert sum(file.stat().st_size for file in (tmp_path / "saved").rglob("*")) < 50_000
    again = load(tmp_path / "saved")
    assert asked[2:] == [("someone/encoder", commit), ("someone/llm", commit)]
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))

    # The base has changed on the hub: its hash is not the accepted one.
    path = tmp_path / "hub" / "llm" / commit / "model.safetensors"
    original = path.read_bytes()
    tensors = load_file(path)
    tensors["norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not the file that .*base.json accepts: expected SHA-256"):
        load(tmp_path / "saved")
    path.write_bytes(original)
    # A part that was trained in full differs from its base: it is written in full.
    with torch.no_grad():
        model.encoder.embeddings.word_embeddings.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "trained")
    assert (tmp_path / "trained" / "encoder" / "model.safetensors").is_file()
    assert not (tmp_path / "trained" / "llm" / "model.safetensors").exists()


def test_the_error_for_a_missing_model_names_where_it_was_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(bases, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"'someone/model' is no folder .* Hub did not give it .*no network"):
        load("someone/model")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="cannot be a hub id"):
        load("no/such/../model")


def test_a_missing_base_names_every_way_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(bases, "snapshot_download", offline)
    shutil.rmtree(folder / "llm")
    (folder / "llm").mkdir()
    accepted = [
        {"kind": "package", "name": "no-such-package-with-weights", "version": "1.0", "sha256": {}},
        {"kind": "hub", "name": "someone/llm", "revision": "main", "sha256": {}},
    ]
    (folder / "llm" / "base.json").write_text(json.dumps({"accepted": accepted}))
    resum(folder)
    with pytest.raises(FileNotFoundError, match=r"(?s)--no-deps no-such-package-with-weights==1.0.*'someone/llm'"):
        load(folder)


def test_push_to_hub_uploads_a_complete_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    class Api:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            assert (repo_id, private, exist_ok) == ("me/model", True, True)

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = tiny_model()
    assert model.push_to_hub("me/model", private=True) == "https://hub/commit"
    np.testing.assert_allclose(load(tmp_path / "uploaded").encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_a_gguf_that_another_process_converts_is_waited_for_and_not_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`write_converted_gguf` is replaced, so no weights are needed; the other process waits until told to go on."""
    program = """
import sys
from pathlib import Path
from c2v_rag import bases, hashes
def convert(path, folder):
    made = folder.with_name("made"); made.mkdir()
    print("converting", flush=True)
    sys.stdin.readline()
    (made / "model.safetensors").write_bytes(b"w"); hashes.write_sums(made); made.rename(folder)
bases.write_converted_gguf = convert
print(bases.convert_gguf(Path("model.gguf"), "a" * 64))
"""
    monkeypatch.setenv("C2V_RAG_CACHE", str(tmp_path / "cache"))
    converted: list[Path] = []
    monkeypatch.setattr(bases, "write_converted_gguf", lambda path, folder: converted.append(folder))
    pipe = subprocess.PIPE
    with (
        subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "converting\n"
        ours = pool.submit(bases.convert_gguf, Path("model.gguf"), "a" * 64)
        assert wait([ours], timeout=0.5).not_done, "it did not wait for the other process"
        other.stdin.write("go on\n")
        other.stdin.close()
        assert f"{ours.result()}\n" == other.stdout.readline()
    assert converted == []


def test_a_damaged_conversion_is_named_and_can_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("C2V_RAG_CACHE", str(tmp_path))
    folder = tmp_path / f"gguf-{'a' * 16}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    hashes.write_sums(folder)
    assert bases.convert_gguf(Path("model.gguf"), "a" * 64) == folder
    (folder / "model.safetensors").write_bytes(b"weight")
    with pytest.raises(ValueError, match=r"altered.*Delete .*gguf-aaaaaaaaaaaaaaaa; it is made again from model.gguf"):
        bases.convert_gguf(Path("model.gguf"), "a" * 64)
