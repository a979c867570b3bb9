"""Run one batch on a device: start it, start to copy its embeddings to the host, and wait for them later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from c2v_rag.tokenization import TokenBatch, TokenizedTexts


class EncodingState:
    """State of a model while it encodes: the lock around its forward, and the batch budget after running out of memory.

    It belongs to the model. All embedders that use the same parts share it. A pickle or copy is a new, empty state.
    """

    def __init__(self) -> None:
        self.compute_lock = threading.Lock()
        self.batch_tokens: int | None = None  # set after running out of memory, and lowered each time
        self._call = threading.local()

    @contextmanager
    def encode_call(self) -> Iterator[None]:
        """A block in which `once_per_encode` of this thread computes once. A model must not change in it."""
        self._call.values = []
        try:
            yield
        finally:
            del self._call.values

    def once_per_encode(self, compute: Callable[[], object]) -> object:
        """The value of `compute()`, which is called for the first batch of an `encode` only; outside, always."""
        values: list[object] | None = getattr(self._call, "values", None)
        if values is None:
            return compute()
        if not values:
            values.append(compute())
        return values[0]

    def __reduce__(self) -> tuple[type[EncodingState], tuple[()]]:
        return EncodingState, ()


class TokenBatchEmbedder(Protocol):
    """The members of a model that `encode` uses. Dropout is switched off in `modules`, those that `embed` runs."""

    @property
    def encoding_state(self) -> EncodingState: ...
    def modules(self) -> Iterator[nn.Module]: ...
    @property
    def embedding_dim(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def tokenize(self, texts: Sequence[str], instruction: str = "") -> TokenizedTexts: ...
    def embed(self, batch: TokenBatch) -> Tensor: ...


def start_batch(
    embedder: TokenBatchEmbedder, tokenized: TokenizedTexts, positions: list[int], dim: int
) -> Callable[[], np.ndarray] | None:
    """Start to embed a batch; returns a function that waits for its embeddings (B, dim). None: out of memory.

    On a GPU all is queued, and nothing is waited for. The lock is held for one batch, not for the whole call: threads
    take turns.
    """
    batch = tokenized.collate(positions)
    try:
        with embedder.encoding_state.compute_lock, _inference(embedder):
            embeddings = embedder.embed(batch.to(embedder.device)).float()
            if dim < embeddings.shape[1]:
                embeddings = torch.nn.functional.normalize(embeddings[:, :dim], dim=1)
            return _start_copy(embeddings)
    except RuntimeError as error:
        if not _is_out_of_memory(error) or len(positions) == 1:
            raise
    # The caller frees memory after this handler: until then the exception refers to the tensors of the forward.
    return None


def _start_copy(embeddings: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy embeddings to the host; returns a function that waits for the copy."""
    if embeddings.device.type != "cuda":
        return lambda: embeddings.cpu().numpy()
    on_host = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
    on_host.copy_(embeddings, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(embeddings.device))

    def fetch() -> np.ndarray:
        copied.synchronize()
        return on_host.numpy()

    return fetch


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device ran out of memory. CUDA raises `OutOfMemoryError`, MPS a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def free_cached_memory(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.empty_cache()
    else:
        torch.cuda.empty_cache()


@contextmanager
def _inference(embedder: TokenBatchEmbedder) -> Iterator[None]:
    """Switch off gradients and dropout inside the `with` block; then restore the training mode of each module."""
    in_training = [module for module in embedder.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in in_training:
            module.training = True
