"""The embedding function in Chroma: in memory, on disk, in another process and on a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import chromadb
import numpy as np
import pytest
from chromadb.api import ClientAPI

from c2v_rag import RemoteModel, embedders
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.model import Causal2Vec
from chroma_c2v import Causal2VecEmbeddingFunction
from tests.plain import recording_server
from tests.tiny import assert_ranked, tiny_model

TEXTS = ["A heap keeps its smallest item first.", "Bread needs yeast.", "The museum opens at nine."]


def fill_and_query(client: ClientAPI, folder: str, core: Causal2Vec) -> str:
    name = f"t{uuid4().hex}"
    collection = client.create_collection(name, embedding_function=Causal2VecEmbeddingFunction(folder, dtype="float32"))
    assert collection.configuration_json["hnsw"]["space"] == "cosine"
    collection.add(ids=["0", "1", "2"], documents=TEXTS)
    stored = collection.get(ids=["0", "1", "2"], include=["embeddings"])["embeddings"]
    np.testing.assert_allclose(stored, core.encode_document(TEXTS), atol=1e-6)
    found = client.get_collection(name).query(query_texts=["when does it open?"], n_results=3)
    scores = (core.encode_query(["when does it open?"]) @ core.encode_document(TEXTS).T)[0]
    assert_ranked([int(id) for id in found["ids"][0]], scores)
    assert found["distances"] is not None
    np.testing.assert_allclose(found["distances"][0], 1 - np.sort(scores)[::-1], atol=1e-5)
    return name


def test_a_collection_in_memory_gets_the_models_vectors(folder: str, core: Causal2Vec) -> None:
    fill_and_query(chromadb.EphemeralClient(), folder, core)


def test_a_collection_on_disk_is_reopened_in_a_new_process(folder: str, core: Causal2Vec, tmp_path: Path) -> None:
    name = fill_and_query(chromadb.PersistentClient(str(tmp_path)), folder, core)
    program = f"""
import sys, chromadb, chroma_c2v
assert "torch" not in sys.modules, "importing the function must not load torch"
collection = chromadb.PersistentClient({str(tmp_path)!r}).get_collection({name!r})
assert "torch" not in sys.modules, "opening a collection must not load the model"
print(collection.query(query_texts=[{TEXTS[1]!r}], n_results=1)["ids"])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    best = int(run.stdout.strip().removeprefix("[['").removesuffix("']]"))
    assert_ranked([best], (core.encode_query([TEXTS[1]]) @ core.encode_document(TEXTS).T)[0])


def test_a_collection_on_a_server_gets_the_models_vectors(folder: str, core: Causal2Vec, chroma_server: str) -> None:
    fill_and_query(chromadb.HttpClient(host="127.0.0.1", port=urlsplit(chroma_server).port or 0), folder, core)


def test_settings_are_saved_with_the_collection(folder: str, core: Causal2Vec, tmp_path: Path) -> None:
    client = chromadb.PersistentClient(str(tmp_path))
    function = Causal2VecEmbeddingFunction(
        folder, dtype="float32", query_instruction="", document_instruction="read", truncate_dim=16
    )
    client.create_collection("settings", embedding_function=function).add(ids=["0"], documents=["text"])
    reopened = client.get_collection("settings")
    expected = core.encode_document(["text"], instruction="read", truncate_dim=16)
    np.testing.assert_allclose(reopened.get(include=["embeddings"])["embeddings"], expected, atol=1e-6)
    distances = reopened.query(query_texts=["text"], n_results=1)["distances"]
    assert distances is not None
    query = core.encode_query(["text"], instruction="", truncate_dim=16)
    assert distances[0][0] == pytest.approx(1 - float((query @ expected.T)[0, 0]), abs=1e-5)


def test_wrong_settings_and_bad_input_are_clear_errors(folder: str, core: Causal2Vec) -> None:
    with pytest.raises(ValueError, match="exists in memory only"):
        Causal2VecEmbeddingFunction(model=tiny_model())
    with pytest.raises(ValueError, match="exists in memory only"):  # its name would open the whole model
        Causal2VecEmbeddingFunction(model=EncoderEmbedder(core))
    assert Causal2VecEmbeddingFunction(model=core).name_or_path == folder
    with pytest.raises(ValueError, match=r"unknown settings \['surprise'\]"):
        Causal2VecEmbeddingFunction.build_from_config({"surprise": 1})
    function = Causal2VecEmbeddingFunction(folder, dtype="float32")
    with pytest.raises(ValueError, match="truncate_dim cannot be changed"):
        function.validate_config_update(function.get_config(), function.get_config() | {"truncate_dim": 8})
    function.validate_config_update(function.get_config(), function.get_config() | {"device": "cpu"})
    for call in (function, function.embed_query):
        with pytest.raises(TypeError, match=r"texts\[1\] must be a string, got NoneType"):
            call(["a", None])  # type: ignore[list-item]


def test_a_name_together_with_a_loaded_model_is_refused(folder: str, core: Causal2Vec) -> None:
    for name, value in {"name_or_path": folder, "revision": "main", "device": "cpu", "dtype": "float32"}.items():
        with pytest.raises(ValueError, match=f"not both: model and {name}"):
            Causal2VecEmbeddingFunction(model=core, **{name: value})
    assert Causal2VecEmbeddingFunction().name_or_path == "default"


def test_another_width_is_refused_before_anything_is_written(folder: str) -> None:
    client = chromadb.EphemeralClient()
    name = f"t{uuid4().hex}"
    client.create_collection(name, embedding_function=Causal2VecEmbeddingFunction(folder, dtype="float32")).add(
        ids=["0"], documents=["a"]
    )
    other = client.get_collection(
        name, embedding_function=Causal2VecEmbeddingFunction(folder, dtype="float32", truncate_dim=8)
    )
    with pytest.raises(Exception, match="dimension of 64, got 8"):
        other.add(ids=["1"], documents=["b"])
    assert other.count() == 1


def test_saved_settings_include_the_dtype_and_the_weights_stamp(folder: str) -> None:
    """With the name only, Chroma would rebuild the function with another dtype or other weights."""
    half = Causal2Vec.from_pretrained(folder, dtype="bfloat16", device="cpu")
    config = Causal2VecEmbeddingFunction(model=half).get_config()
    assert config["dtype"] == "bfloat16"
    assert config["weights"] == half.stamp["weights"]
    rebuilt = Causal2VecEmbeddingFunction.build_from_config(json.loads(json.dumps(config)))
    np.testing.assert_array_equal(rebuilt(["a heap"])[0], half.encode_document(["a heap"])[0])
    assert rebuilt.get_config() == config


def test_a_collection_refuses_a_folder_that_was_retrained(tmp_path: Path) -> None:
    tiny_model(seed=0).save_pretrained(tmp_path / "model")
    client = chromadb.PersistentClient(str(tmp_path / "store"))
    function = Causal2VecEmbeddingFunction(str(tmp_path / "model"), dtype="float32")
    client.create_collection("notes", embedding_function=function).add(ids=["a"], documents=["a heap"])
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    embedders.release_shared_models()  # as in a new process
    reopened = client.get_collection("notes")
    for use in (
        lambda: reopened.add(ids=["b"], documents=["a heap"]),
        lambda: reopened.query(query_texts=["a heap"], n_results=1),
    ):
        with pytest.raises(
            ValueError, match=r"made with another model: weights .* retrained|trained or replaced since"
        ):
            use()
    assert reopened.count() == 1


def test_settings_stored_by_version_0_1_are_opened(folder: str, core: Causal2Vec) -> None:
    config = {"name_or_path": folder, "revision": None, "device": None, "dtype": "float32"}
    config |= {"query_instruction": None, "document_instruction": None, "truncate_dim": None}
    function = Causal2VecEmbeddingFunction.build_from_config(config)
    np.testing.assert_array_equal(function(["a heap"])[0], core.encode_document(["a heap"])[0])


def test_a_saved_address_is_opened_only_if_this_process_made_a_remote_model_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise an attacker who can write to a store could get the key and the texts of its readers."""
    monkeypatch.setenv("C2V_RAG_API_KEY", "secret")
    with recording_server() as (address, requests):
        function = Causal2VecEmbeddingFunction.build_from_config({"name_or_path": address, "weights": "0123"})
        assert function.get_config()["weights"] == "0123"
        for call in (function, function.embed_query):
            with pytest.raises(ValueError, match=r"address that comes out of stored data is not opened.*RemoteModel\("):
                call(["a private text"])
        assert requests == []
        mine = RemoteModel(address, api_key="mine")
        with pytest.raises(Exception, match=r"(?i)404|not here"):
            function(["a text"])
        assert set(requests) == {"Bearer mine"}
        assert mine.name == address
