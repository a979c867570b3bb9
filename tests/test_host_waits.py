"""While a batch is computed, the host reads nothing from the device; it copies once each way, and fetches late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from c2v_rag import inference, prefix, running
from c2v_rag.model import Causal2Vec
from c2v_rag.pooling import pool
from c2v_rag.tokenization import TokenBatch, TokenizedTexts
from tests.tiny import INSTRUCTION, TEXTS, passages, tiny_model

READS_VALUES = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "equal", "unique_consecutive"}


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch, lists those that read values on the host, and sums what is cast to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.copies, self.elements_to_float = 0, 0, 0
        self.reads: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        result = operation(*args, **kwargs or {})
        self.count += 1
        if name in READS_VALUES or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.reads.append(name)
        if name in ("_to_copy", "to"):  # in inference mode it is "to"
            self.copies += args[0].device != result.device
            self.elements_to_float += result.numel() if result.dtype == torch.float32 != args[0].dtype else 0
        return result


def test_the_counter_sees_reads() -> None:
    with Operations() as operations:
        bool(torch.ones(2).all())
        torch.ones(2).sum().item()
        torch.ones(2)[torch.tensor([True, False])]
    assert len(operations.reads) >= 3


@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
@pytest.mark.parametrize("encoder", ["bert", "roberta", "xlm_roberta"])
def test_the_forward_of_a_batch_reads_no_value_on_the_host(
    encoder: str, instruction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(encoder=encoder)
    batch = model.tokenize(TEXTS, instruction).collate(range(len(TEXTS)))
    expected = model.embed(batch)
    weights = prefix.weights_state(model.llm)
    monkeypatch.setattr(model.encoding_state, "once_per_encode", lambda compute: weights)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a value was read on the host")

    with Operations() as operations, monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__"):
            patch.setattr(Tensor, name, refuse)
        embeddings = model.embed(batch)
    assert operations.count > 100
    assert operations.reads == []
    torch.testing.assert_close(embeddings, expected)


class CountingEmbedder:
    """An embedder whose inputs go to the device "meta"; each text's vector is (1, 0)."""

    embedding_dim, device = 2, torch.device("meta")

    def __init__(self) -> None:
        self.encoding_state = inference.EncodingState()
        self.events: list[str] = []

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def tokenize(self, texts: Sequence[str], instruction: str = "") -> TokenizedTexts:
        ids = [[1] * len(text) for text in texts]
        return TokenizedTexts([1], 0, ids, [[1]] * len(ids), [], 0, 0)

    def embed(self, batch: TokenBatch) -> Tensor:
        assert batch.text_ids.device == batch.prefix_ids.device == self.device
        self.events.append("start")
        return torch.tensor([[1.0, 0.0]] * len(batch.text_ids))


def test_a_batch_is_copied_once_each_way_and_fetched_when_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = CountingEmbedder()
    start_copy = running._start_copy

    def logged(embeddings: Tensor) -> Callable[[], np.ndarray]:
        fetch = start_copy(embeddings)
        return lambda: (embedder.events.append("fetch"), fetch())[1]

    monkeypatch.setattr(running, "_start_copy", logged)
    with Operations() as operations:
        inference.encode(embedder, ["x" * 8] * 12, batch_tokens=36)
    assert operations.copies == 3
    assert embedder.events == ["start", "start", "fetch", "start", "fetch", "fetch"]


def test_the_decoders_weights_are_sampled_once_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    sampled: list[object] = []
    batches: list[TokenBatch] = []
    sample, embed = prefix.sample_weights, model.embed
    monkeypatch.setattr(prefix, "sample_weights", lambda llm: (sampled.append(llm), sample(llm))[1])
    monkeypatch.setattr(model, "embed", lambda batch: (batches.append(batch), embed(batch))[1])
    model.encode_query(passages(60), batch_tokens=200)
    assert len(batches) > 5
    assert len(sampled) == 1
    model.encode_query(["again"])
    assert len(sampled) == 2


def test_pooling_casts_only_the_states_that_it_takes() -> None:
    hidden = torch.randn(4, 50, 8, dtype=torch.bfloat16)
    mask = torch.ones(4, 50, dtype=torch.long)
    for pooling, states in (("context", 1), ("eos", 1), ("context_eos", 2)):
        with Operations() as operations:
            pooled = pool(hidden, mask, pooling, text_start=1)  # type: ignore[arg-type]
        assert operations.elements_to_float == states * 4 * 8
        assert pooled.dtype == torch.float32


def test_batches_have_few_widths_and_stay_within_the_budget() -> None:
    model = tiny_model()
    shapes: dict[str, list[tuple[int, int]]] = {"llm": [], "encoder": []}
    model.encoder.register_forward_pre_hook(
        lambda module, arguments, options: shapes["encoder"].append(options["input_ids"].shape), with_kwargs=True
    )
    model.llm.register_forward_pre_hook(
        lambda module, arguments, options: shapes["llm"].append(options["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    texts = ["ab " * n for n in range(1, 60)]
    model.encode_document(texts, batch_tokens=400, on_truncate="ignore")
    widths = {part: {width for _, width in found} for part, found in shapes.items()}
    longest = model.tokenize(texts)._longest
    assert all((width - 2) % 8 == 0 or width - 2 == longest[0] for width in widths["llm"])  # BOS, Contextual token
    assert all(width % 8 == 0 or width == longest[1] for width in widths["encoder"])
    assert len(widths["llm"]) > 5
    assert all(rows * (width - 1) <= 400 for rows, width in shapes["llm"])
    assert all(rows * width <= 400 for rows, width in shapes["encoder"])


def test_a_batch_of_other_makers_gets_its_encoder_slices_from_its_mask() -> None:
    model: Causal2Vec = tiny_model()
    batch = model.tokenize(TEXTS, INSTRUCTION).collate(range(len(TEXTS)))
    bare = TokenBatch(*(getattr(batch, name) for name in list(TokenBatch.__dataclass_fields__)[:6]))
    assert bare.encoder_slices is None
    assert bare.with_encoder_order().encoder_slices == batch.encoder_slices
    torch.testing.assert_close(model.embed(bare), model.embed(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
def test_cuda_is_not_waited_for_until_a_result_is_fetched(instruction: str) -> None:
    model = tiny_model().to("cuda")
    expected = model.encode(TEXTS, instruction=instruction, on_truncate="ignore")
    tokenized = model.tokenize(TEXTS, instruction)
    positions = list(range(len(TEXTS)))
    with model.encoding_state.encode_call():
        model.encoding_state.once_per_encode(lambda: prefix.weights_state(model.llm))  # waits, once in a call
        first = running.start_batch(model, tokenized, positions, model.embedding_dim)
        assert first is not None
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = running.start_batch(model, tokenized, positions, model.embedding_dim)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert second is not None
    for fetch in (first, second):
        np.testing.assert_allclose(fetch(), expected, atol=1e-4)


@pytest.mark.gpu
def test_two_copies_on_one_gpu_give_the_vectors_of_one() -> None:
    model, texts = tiny_model().to("cuda"), passages(120)
    expected = model.encode_query(texts)
    np.testing.assert_allclose(
        model.encode_query(texts, devices=["cuda", "cuda:0"], batch_tokens=300), expected, atol=1e-4
    )


@pytest.mark.gpu
def test_on_cuda_documents_run_in_flash_attention() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = tiny_model().to("cuda", torch.bfloat16)
    batch = model.tokenize(TEXTS).collate(range(len(TEXTS))).to(torch.device("cuda"))
    pooled = model.pooled_encoder_states(batch)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises if a forward cannot use it
        vectors = model.embed_with_prefix(None, batch, pooled=pooled, pooling=model.config.pooling)
    assert torch.isfinite(vectors).all()
