"""The sentence-transformers package: loading, saving, training, mteb, and other libraries' classes on top of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from langchain_huggingface import HuggingFaceEmbeddings
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from c2v_rag import Causal2Vec
from sentence_transformers_c2v import Causal2VecModule, load
from tests.tiny import TEXTS, tiny_model

TOLERANCE = 1e-5


def test_a_saved_folder_opens_with_the_sentence_transformer_class(folder: str, core: Causal2Vec) -> None:
    model = SentenceTransformer(folder, trust_remote_code=True, model_kwargs={"dtype": "float32"})
    np.testing.assert_allclose(model.encode_query(TEXTS), core.encode_query(TEXTS), atol=TOLERANCE)
    np.testing.assert_allclose(model.encode_document(TEXTS), core.encode_document(TEXTS), atol=TOLERANCE)
    np.testing.assert_allclose(model.encode(TEXTS), core.encode(TEXTS), atol=TOLERANCE)
    assert model.get_embedding_dimension() == core.embedding_dim
    assert model.max_seq_length == core.config.max_length
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(folder)


def test_load_needs_no_flag_and_keeps_prompts(folder: str, core: Causal2Vec) -> None:
    model = load(folder, dtype="float32")
    np.testing.assert_allclose(model.encode_query(TEXTS), core.encode_query(TEXTS), atol=TOLERANCE)
    assert not np.allclose(model.encode_query(TEXTS), model.encode_document(TEXTS), atol=0.01)
    other = model.encode(TEXTS, prompt=core.config.prompt("Find a duplicate"))
    np.testing.assert_allclose(other, core.encode(TEXTS, instruction="Find a duplicate"), atol=TOLERANCE)
    short = load(folder, dtype="float32", truncate_dim=16).encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(short, core.encode(TEXTS, truncate_dim=16), atol=TOLERANCE)
    similarity = model.similarity(model.encode(TEXTS[:2]), model.encode(TEXTS[:3]))
    np.testing.assert_allclose(similarity, core.encode(TEXTS[:2]) @ core.encode(TEXTS[:3]).T, atol=TOLERANCE)


def test_an_instruction_after_the_contextual_token_gives_the_models_vectors() -> None:
    model = tiny_model(contextual_token="before_instruction")
    sentence_transformer = SentenceTransformer(modules=[Causal2VecModule(model)], device="cpu")
    prompt = model.config.prompt(model.config.instruction)
    np.testing.assert_allclose(
        sentence_transformer.encode(TEXTS, prompt=prompt), model.encode_query(TEXTS), atol=TOLERANCE
    )


def test_a_process_pool_gives_the_same_vectors(folder: str, core: Causal2Vec) -> None:
    model = load(folder, device="cpu", dtype="float32")
    pool = model.start_multi_process_pool(["cpu"])  # one process: more would only take longer
    try:
        found = model.encode_query(TEXTS, pool=pool, chunk_size=3)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(found, core.encode_query(TEXTS), atol=TOLERANCE)


def test_checkpoints_saved_by_either_class_are_read_by_the_other(folder: str, core: Causal2Vec, tmp_path: Path) -> None:
    model = load(folder, dtype="float32")
    model.save_pretrained(str(tmp_path / "saved"))
    again = Causal2Vec.from_pretrained(tmp_path / "saved", dtype="float32")
    np.testing.assert_array_equal(again.encode_query(TEXTS), core.encode_query(TEXTS))
    assert again.stamp["weights"] == core.stamp["weights"]
    for name in ("modules.json", "config_sentence_transformers.json"):
        by_core, by_library = (json.loads((Path(path) / name).read_text()) for path in (folder, tmp_path / "saved"))
        if name == "modules.json":
            assert by_core == by_library
        else:
            assert by_core == {key: by_library[key] for key in by_core}
    reopened = SentenceTransformer(
        str(tmp_path / "saved"), trust_remote_code=True, model_kwargs={"dtype": "float32"}, local_files_only=True
    )
    np.testing.assert_allclose(reopened.encode_query(TEXTS), core.encode_query(TEXTS), atol=TOLERANCE)


def test_bad_input_is_a_type_error_and_pickles_are_not_read(folder: str, tmp_path: Path) -> None:
    model = load(folder, dtype="float32")
    for bad in (None, 3, ("a", "pair")):
        with pytest.raises(TypeError, match="must be a string"):
            model.encode(["a", bad])
    with pytest.raises(FileNotFoundError):
        Causal2VecModule.load(str(tmp_path / "nothing"), local_files_only=True)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="not a Causal2Vec checkpoint"):
        Causal2VecModule.load(str(tmp_path / "pickled"))


@pytest.mark.parametrize("width", ["equal", "other"])
def test_the_cached_loss_and_its_gradient_equal_the_plain_ones(width: str) -> None:
    """A cached loss slices batches and cuts each slice's padding off; it must not cut tokens of the encoder off."""
    model = tiny_model()
    module = Causal2VecModule(model)
    # "thethe" has two decoder tokens and seven encoder tokens: the slice of the first two texts is the shorter one for
    # the decoder, but not for the encoder.
    texts = [["thethethethe", "thethe", "an ox, a fox, a box", "b c d e"], ["thethethe", "the", "i j k l m n o p", "q"]]
    columns = [module.preprocess(column) for column in texts]
    if width == "equal":
        # Both are padded to the same width: only then would a slice of shorter texts lose encoder tokens.
        columns = [padded_to_one_width(column) for column in columns]
        assert columns[0]["input_ids"].shape[-1] == columns[0]["encoder_ids"].shape[-1]
    sentence_transformer = SentenceTransformer(modules=[module], device="cpu")
    parameters = list(model.projector.parameters())

    def gradient(loss: Any) -> tuple[float, torch.Tensor]:
        for parameter in parameters:
            parameter.grad = None
        value = loss([{name: tensor.clone() for name, tensor in column.items()} for column in columns], None)
        value.backward()
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert grads
        return value.item(), torch.cat([grad.flatten() for grad in grads])

    plain, plain_gradient = gradient(MultipleNegativesRankingLoss(sentence_transformer))
    cached, cached_gradient = gradient(CachedMultipleNegativesRankingLoss(sentence_transformer, mini_batch_size=2))
    assert plain_gradient.norm() > 1e-4
    assert cached == pytest.approx(plain, rel=1e-4)
    torch.testing.assert_close(cached_gradient, plain_gradient, rtol=1e-3, atol=1e-5)


def padded_to_one_width(column: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(column["input_ids"].shape[-1], column["encoder_ids"].shape[-1])
    same = ("input_ids", "attention_mask", "encoder_ids", "encoder_mask")
    pad = torch.nn.functional.pad
    return {n: pad(t, (0, width - t.shape[-1])) if n in same else t for n, t in column.items()}


def test_the_sentence_transformers_trainer_trains_the_module(tmp_path: Path) -> None:
    model = tiny_model()
    sentence_transformer = SentenceTransformer(modules=[Causal2VecModule(model)], device="cpu")
    before = model.projector.output.weight.detach().clone()
    data = Dataset.from_dict({"query": ["a heap", "bread"] * 4, "positive": ["smallest first", "needs yeast"] * 4})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3,
        report_to="none", use_cpu=True, prompts={"query": model.config.prompt("Find it")}, save_steps=2,
        disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=sentence_transformer,
        args=arguments,
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(sentence_transformer),
    ).train()
    assert not torch.equal(before, model.projector.output.weight)
    again = Causal2Vec.from_pretrained(tmp_path / "out" / "checkpoint-2", dtype="float32")
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=TOLERANCE)


def test_langchains_and_llama_indexs_own_classes_open_the_folder(folder: str, core: Causal2Vec) -> None:
    """They need two arguments: trust_remote_code, for a module class of another package, and the query prompt."""
    lines = ["a heap keeps its smallest item first", "bread needs yeast"]  # LangChain's class replaces line breaks
    chain = HuggingFaceEmbeddings(
        model=folder,
        model_kwargs={"trust_remote_code": True, "model_kwargs": {"dtype": "float32"}},
        query_encode_kwargs={"prompt_name": "query"},
    )
    np.testing.assert_allclose(chain.embed_documents(lines), core.encode_document(lines), atol=TOLERANCE)
    np.testing.assert_allclose(chain.embed_query(lines[0]), core.encode_query(lines[:1])[0], atol=TOLERANCE)

    llama = HuggingFaceEmbedding(
        folder,
        trust_remote_code=True,
        query_instruction=core.config.prompt(core.config.instruction),
        text_instruction="",
        model_kwargs={"dtype": "float32"},
    )
    np.testing.assert_allclose(llama.get_text_embedding_batch(lines), core.encode_document(lines), atol=TOLERANCE)
    np.testing.assert_allclose(llama.get_query_embedding(lines[0]), core.encode_query(lines[:1])[0], atol=TOLERANCE)


def test_mteb_scores_the_model_on_local_data(
    folder: str, core: Causal2Vec, passages: list[str], queries: list[str], tmp_path: Path
) -> None:
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.cache import ResultCache

    queries = queries[:15]
    # A random model finds no meaning. So the relevant passage of each query is chosen by its rank: 1st for the first
    # query, ... 15th for the last. Other vectors, prompts or similarities would change the ranks and the score.
    scores = core.encode_query(queries) @ core.encode_document(passages).T
    relevant, ranks = zip(*(clear_rank(row, first) for first, row in enumerate(scores)), strict=True)
    assert 5 < sum(rank < 10 for rank in ranks) < 15, "some relevant passages must be in the top 10 and some not"

    class LocalData(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalData", description="passages at known ranks", type="Retrieval",
            dataset={"path": "local/data", "revision": "1"}, eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )  # fmt: skip

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            if self.data_loaded:
                return
            corpus = [{"id": f"d{i}", "title": "", "text": passage} for i, passage in enumerate(passages)]
            self.dataset = {"default": {"test": {
                "corpus": Dataset.from_list(corpus),
                "queries": Dataset.from_list([{"id": f"q{i}", "text": query} for i, query in enumerate(queries)]),
                "relevant_docs": {f"q{i}": {f"d{document}": 1} for i, document in enumerate(relevant)},
                "top_ranked": None,
            }}}  # fmt: skip
            self.data_loaded = True

    model = load(folder, dtype="float32")
    cache = ResultCache(tmp_path / "cache")
    result = mteb.evaluate(model, [LocalData()], cache=cache, co2_tracker=False, overwrite_strategy="always")
    by_hand = np.mean([1 / np.log2(2 + rank) if rank < 10 else 0 for rank in ranks])
    assert result.task_results[0].scores["test"][0]["ndcg_at_10"] == pytest.approx(by_hand, abs=1e-4)


def clear_rank(scores: np.ndarray, first: int, margin: float = 1e-4) -> tuple[int, int]:
    """(document, rank) of the first rank from `first` whose score differs from both neighbours' by the margin."""
    order = np.argsort(-scores)
    gaps = np.array([np.inf, *-np.diff(scores[order])])
    rank = next(rank for rank in range(first, len(order) - 1) if min(gaps[rank : rank + 2]) > margin)
    return int(order[rank]), rank
