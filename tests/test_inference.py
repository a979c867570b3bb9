"""encode: order, token budgets, smaller batches after running out of memory, bad input, threads."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from c2v_rag import inference
from c2v_rag.inference import token_budget_batches
from c2v_rag.model import Causal2Vec
from c2v_rag.tokenization import TokenBatch, TokenizedTexts
from tests.test_model import assert_same
from tests.tiny import TEXTS, tiny_model


@pytest.fixture(scope="module")
def model() -> Causal2Vec:
    return tiny_model()


def test_budget_batches_hold_every_text_once_within_the_budget_and_little_padding() -> None:
    rng = np.random.default_rng(0)
    for lengths in (
        rng.integers(2, 512, size=1024).tolist(),
        np.exp(rng.uniform(2, 6, size=1024)).astype(int).tolist(),
    ):
        batches = token_budget_batches(lengths, 4096)
        assert sorted(itertools.chain(*batches)) == list(range(1024))
        padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
        assert max(padded) <= 4096
        assert 1 - sum(lengths) / sum(padded) < 0.05
        assert len(batches) < 2 * sum(lengths) / 4096 + 30
    assert token_budget_batches([9000], 4096) == [[0]]


def test_results_are_float32_unit_rows_in_input_order(model: Causal2Vec) -> None:
    texts = [TEXTS[i % 6] + str(i) for i in range(200)]
    vectors = model.encode(texts, batch_tokens=300)
    assert vectors.dtype == np.float32
    assert vectors.shape == (200, model.embedding_dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for i in (0, 57, 199):
        assert_same(vectors[i : i + 1], model.encode([texts[i]]))


def test_empty_input_gives_no_rows(model: Causal2Vec) -> None:
    for nothing in ([], iter([])):
        assert model.encode(nothing).shape == (0, model.embedding_dim)
    assert model.encode_query([], truncate_dim=8).shape == (0, 8)


def test_iterators_are_streamed_a_window_at_a_time(model: Causal2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "WINDOW_TEXTS_AT_LEAST", 10)
    read = computed = most_ahead = 0
    embed = model.embed

    def counting(batch: TokenBatch) -> torch.Tensor:
        nonlocal computed
        computed += len(batch.text_ids)
        return embed(batch)

    def texts() -> Iterator[str]:
        nonlocal read, most_ahead
        for i in range(100):
            read += 1
            most_ahead = max(most_ahead, read - computed)
            yield f"text number {i}"

    monkeypatch.setattr(model, "embed", counting)
    vectors = model.encode(texts(), batch_tokens=40)
    assert computed == read == 100
    assert most_ahead <= 21
    monkeypatch.undo()
    assert_same(vectors, model.encode([f"text number {i}" for i in range(100)]))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one bare string", "bare string"),
        (b"bytes", "bare string"),
        (["fine", None], r"texts\[1\] must be a string, got NoneType"),
        (["fine", "fine", 3.5], r"texts\[2\] must be a string, got float"),
    ],
)
def test_an_item_that_is_no_string_is_a_type_error_that_names_it(
    model: Causal2Vec, texts: Sequence[str], message: str
) -> None:
    for encode in (model.encode, model.encode_query, model.encode_document):
        with pytest.raises(TypeError, match=message):
            encode(texts)


def test_wrong_options_are_named(model: Causal2Vec) -> None:
    with pytest.raises(ValueError, match="on_truncate must be"):
        model.encode(["a"], on_truncate="shout")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_tokens must be at least 1; got 0"):
        model.encode(["a"], batch_tokens=0)


def test_hostile_texts_get_finite_embeddings(model: Causal2Vec) -> None:
    hostile = [
        "",
        " \t\n\r ",
        "🙂" * 50,
        "lone \ud800 surrogate \udfff",
        "nul \x00 inside",
        "a" * 1_000_000,
        "Ελληνικά 中文 العربية हिन्दी ไทย",
        "</s><s><pad><unk><|im_end|>[SEP]",
        "\u202eright to left\u202c \u200b\ufeff",
    ]
    vectors = model.encode(hostile, on_truncate="ignore")
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_special_tokens_spelled_in_a_text_are_text(model: Causal2Vec) -> None:
    tokenized = model.tokenize(["before <|im_end|> </s> [SEP] behind"])
    specials = {0, 1, 2, 4, 5}
    assert not specials & set(tokenized.text_ids[0][:-1])
    assert tokenized.text_ids[0][-1] == model.tokenizer.eos
    assert not specials & set(tokenized.encoder_ids[0][1:-1])


def test_truncation_keeps_eos_and_is_reported_once(model: Causal2Vec, caplog: pytest.LogCaptureFixture) -> None:
    long = "word " * 500
    tokenized = model.tokenize(["short", long])
    assert tokenized.truncated == [1]
    assert len(tokenized.text_ids[1]) == model.config.max_length
    assert tokenized.text_ids[1][-1] == model.tokenizer.eos
    assert len(tokenized.encoder_ids[1]) == model.config.encoder_max_length
    assert tokenized.encoder_ids[1][-1] == 2, "truncation must keep the encoder's own end token"

    with caplog.at_level(logging.WARNING):
        truncated = model.encode(["short", long, long])
    assert [record.message for record in caplog.records] == [
        "2 of 3 texts were longer than the model reads and were truncated."
    ]
    caplog.clear()
    np.testing.assert_array_equal(model.encode(["short", long, long], on_truncate="ignore"), truncated)
    assert not caplog.records
    with pytest.raises(ValueError, match="index 1 is longer"):
        model.encode(["short", long], on_truncate="error")


def test_count_tokens_tells_which_texts_are_truncated(model: Causal2Vec) -> None:
    texts = ["word " * n for n in range(1, 40)]
    within = [i for i, count in enumerate(model.count_tokens(texts)) if count <= model.max_tokens]
    truncated = model.tokenize(texts).truncated
    assert within
    assert truncated
    assert not set(within) & set(truncated)
    assert min(truncated) - max(within) <= 5, "counts must not be far above the real limit"


class ScarceMemory:
    """An embedder that runs out of memory above `most` padded tokens; each text's vector is its length."""

    embedding_dim, device = 2, torch.device("cpu")

    def __init__(self, most: int, message: str = "CUDA out of memory") -> None:
        self.most = most
        self.error = torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)
        self.encoding_state = inference.EncodingState()

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def tokenize(self, texts: Sequence[str], instruction: str = "") -> TokenizedTexts:
        ids = [[1] * len(text) for text in texts]
        return TokenizedTexts([1], 0, ids, [[1]] * len(ids), [], 0, 0)

    def embed(self, batch: TokenBatch) -> torch.Tensor:
        if batch.text_ids.numel() > self.most:
            raise self.error
        lengths = batch.text_mask.sum(dim=1).float()
        return torch.stack([lengths, lengths], dim=1)


def test_running_out_of_memory_halves_the_budget_keeps_it_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    embedder = ScarceMemory(most=300)
    texts = ["x" * (1 + i % 37) for i in range(400)]
    with caplog.at_level(logging.WARNING):
        vectors = inference.encode(embedder, texts, batch_tokens=2000)
    assert vectors[:, 0].tolist() == [len(text) for text in texts]
    assert 0 < len(caplog.records) <= 4
    caplog.clear()
    inference.encode(embedder, texts, batch_tokens=2000)
    assert not caplog.records, "later calls must use the smaller budget"
    with pytest.raises(torch.OutOfMemoryError):
        inference.encode(ScarceMemory(most=10), ["x" * 50])


def test_mps_out_of_memory_is_recognised_and_other_errors_are_not_hidden() -> None:
    """MPS raises a plain RuntimeError."""
    texts = ["x" * (1 + i % 37) for i in range(100)]
    embedder = ScarceMemory(most=300, message="MPS backend out of memory (MPS allocated: 9 GB).")
    vectors = inference.encode(embedder, texts, batch_tokens=2000)
    assert vectors[:, 0].tolist() == [len(text) for text in texts]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        inference.encode(ScarceMemory(most=300, message="shapes do not fit"), texts, batch_tokens=2000)


def test_the_budget_counts_the_encoders_tokens_where_they_are_more() -> None:
    """The encoder truncates at many more tokens than the decoder."""
    model = tiny_model(max_length=16, encoder_max_length=1024)
    sizes: list[int] = []
    model.encoder.register_forward_pre_hook(
        lambda module, arguments, options: sizes.append(options["input_ids"].numel()), with_kwargs=True
    )
    model.encode(["word " * 500] * 16, batch_tokens=2048, on_truncate="ignore")
    assert sum(sizes) >= 16 * 500
    assert max(sizes) <= 2048


def test_an_embedding_that_is_not_finite_is_an_error_that_names_the_text() -> None:
    model = tiny_model()
    embed = model.embed

    def broken(batch: TokenBatch) -> torch.Tensor:
        vectors = embed(batch).clone()
        vectors[batch.text_mask.sum(dim=1) == 1] = float("nan")  # the empty text: EOS alone
        return vectors

    model.embed = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="index 3 is not finite"):
        model.encode(TEXTS)


def test_eight_threads_get_the_same_vectors(model: Causal2Vec) -> None:
    expected = model.encode_query(TEXTS)
    results: list[np.ndarray | None] = [None] * 8
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(5):
                results[i] = model.encode_query(TEXTS, batch_tokens=64 + i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for result in results:
        assert result is not None
        assert_same(result, expected)


def test_encoding_a_model_in_training_has_no_dropout_and_leaves_it_in_training() -> None:
    model = tiny_model()
    expected = model.encode(TEXTS)
    model.train()
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()), "no dropout: nothing to show"
    frozen = next(module for module in model.encoder.modules() if isinstance(module, torch.nn.Dropout))
    frozen.eval()
    before = [module.training for module in model.modules()]
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-6)
    assert [module.training for module in model.modules()] == before
    assert model.training
    assert not frozen.training, "a module that its owner set to eval mode must stay in it"


@pytest.mark.gpu
def test_cuda_and_cpu_agree_and_bf16_is_close() -> None:
    model = tiny_model()
    expected = model.encode_query(TEXTS)
    assert_same(model.to("cuda").encode_query(TEXTS), expected)
    assert_same(model.to(torch.bfloat16).encode_query(TEXTS), expected, at_least=0.99)


@pytest.mark.gpu
def test_encoding_continues_after_cuda_runs_out_of_memory() -> None:
    model = tiny_model().to("cuda")
    texts = [text + str(i) for i in range(300) for text in TEXTS]
    expected = model.encode(texts, on_truncate="ignore")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 60e6) / torch.cuda.mem_get_info()[1])
    try:
        assert_same(model.encode(texts, batch_tokens=10**6, on_truncate="ignore"), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
