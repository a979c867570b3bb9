"""Embed texts as a float32 array, with any model that tokenises texts and embeds token batches.

A batch is limited by a budget of tokens, not by a number of texts. Texts are sorted by length within a window, so that
batches have little padding. A thread tokenises the next window while the current one is embedded. Results are in input
order.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from c2v_rag.allocator import keep_freed_memory
from c2v_rag.tokenization import TokenBatch, TokenizedTexts

OnTruncate = Literal["warn", "error", "ignore"]

logger = logging.getLogger(__name__)

# A window has one text for every 4 tokens of the batch budget, but at least 1,024 texts, and at most 4 million
# characters (or one text). Two windows are in memory at the same time.
WINDOW_BUDGET_SHARE = 4
WINDOW_TEXTS_AT_LEAST = 1024
WINDOW_CHARACTERS = 4_000_000
MUCH_SHORTER = 0.92  # of the longest text in a batch


class EncodeOptions(TypedDict, total=False):
    """Options that `encode` and every method named encode_* take; `Causal2Vec.encode` describes them."""

    batch_tokens: int | None
    truncate_dim: int | None
    on_truncate: OnTruncate
    show_progress: bool


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


def default_device() -> torch.device:
    """The first available device of CUDA, MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware supports it, else float32.

    On a CPU without bfloat16 units, emulated bfloat16 ran 150 times slower than float32.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device of an argument; the default device for None."""
    return torch.device(device) if device is not None else default_device()


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    """The dtype for an argument: a dtype, its name with or without "torch.", or None for the default. "auto" stays.

    Raises ValueError for a name that torch does not know.
    """
    if dtype is None:
        return default_dtype(device)
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    torch_dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype, its name (float32, bfloat16, ...) or 'auto'; got {dtype!r}.")
    return torch_dtype


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch. On a CPU, more than a few thousand do not fit into the processor's caches."""
    return 32_768 if device.type == "cuda" else 4_096


def encode(
    embedder: TokenBatchEmbedder,
    texts: Iterable[str],
    *,
    instruction: str = "",
    batch_tokens: int | None = None,
    truncate_dim: int | None = None,
    on_truncate: OnTruncate = "warn",
    show_progress: bool = False,
) -> np.ndarray:
    """Embeddings of `texts`, in their order: float32 (n, embedding_dim), rows of length 1.

    `texts` may be any iterable. It is read window by window, so that memory grows with the results only.
    Raises TypeError for a bare string or an item that is not a string, ValueError for a text whose embedding is not
    finite and, with `on_truncate="error"`, for a text that is too long; each names the item's index.
    """
    if isinstance(texts, str | bytes):
        raise TypeError("texts must be a list of strings, got one bare string. Wrap it: [text].")
    if on_truncate not in ("warn", "error", "ignore"):
        raise ValueError(f"on_truncate must be 'warn', 'error' or 'ignore'; got {on_truncate!r}.")
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1; got {batch_tokens}.")
    dim = embedder.embedding_dim if truncate_dim is None else truncate_dim
    if not 1 <= dim <= embedder.embedding_dim:
        raise ValueError(f"truncate_dim must be from 1 to {embedder.embedding_dim}, this model's; got {truncate_dim}.")

    budget = batch_tokens or default_batch_tokens(embedder.device)
    if embedder.device.type == "cpu":
        keep_freed_memory()

    results: list[np.ndarray] = [np.empty((0, dim), dtype=np.float32)]
    done = num_truncated = 0
    total = len(texts) if isinstance(texts, Sequence) else None
    bar: tqdm[Any] = tqdm(total=total, unit="text", disable=not show_progress)
    with (
        bar as progress,
        embedder.encoding_state.encode_call(),
        ThreadPoolExecutor(1, thread_name_prefix="tokenize") as executor,
    ):
        windows = text_windows(texts, window_texts(budget))
        pending = None
        for window in chain(windows, [None]):
            upcoming = executor.submit(embedder.tokenize, window, instruction) if window else None
            if pending is not None:
                tokenized = pending.result()
                if tokenized.truncated and on_truncate == "error":
                    raise ValueError(
                        f"The text at index {done + tokenized.truncated[0]} is longer than the model reads. "
                        "Split it into chunks, or allow truncation with on_truncate='warn'."
                    )
                num_truncated += len(tokenized.truncated)
                rows = _embed_window(embedder, tokenized, done, dim, budget, progress)
                results.append(rows)
                done += len(rows)
            pending = upcoming
    if num_truncated and on_truncate == "warn":
        logger.warning("%d of %d texts were longer than the model reads and were truncated.", num_truncated, done)
    return np.concatenate(results)


def window_texts(batch_tokens: int) -> int:
    """Number of texts in a window, for this token budget."""
    return max(WINDOW_TEXTS_AT_LEAST, batch_tokens // WINDOW_BUDGET_SHARE)


def text_windows(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """The texts in lists of up to `size`, or of 4 million characters. TypeError for an item that is no string."""
    iterator = enumerate(texts)
    while True:
        window: list[str] = []
        characters = 0
        for index, text in islice(iterator, size):
            if not isinstance(text, str):
                raise TypeError(
                    f"texts[{index}] must be a string, got {type(text).__name__}. "
                    "Leave it out, or convert it to the text you want to find it by."
                )
            window.append(text)
            characters += len(text)
            if characters >= WINDOW_CHARACTERS:
                break
        if not window:
            return
        yield window


def token_budget_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Batches of text positions, longest texts first. The padded size of a batch is at most `batch_tokens`.

    A text that is longer than the budget is a batch of its own. A batch that is at least a quarter full takes no text
    that is much shorter than its longest one, because that text would be mostly padding.
    """
    batches: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = len(batches[-1]) * longest if batches else 0
        too_short = size >= batch_tokens / 4 and lengths[position] < MUCH_SHORTER * longest
        if not batches or size + longest > batch_tokens or too_short:
            batches.append([])
            longest = max(1, lengths[position])
        batches[-1].append(position)
    return batches


def _embed_window(
    embedder: TokenBatchEmbedder,
    tokenized: TokenizedTexts,
    offset: int,
    dim: int,
    batch_tokens: int,
    progress: tqdm[Any],
) -> np.ndarray:
    """Embeddings (n, dim) of one window, in its order. `offset`: index of its first text, for error messages."""
    state, lengths = embedder.encoding_state, tokenized.lengths
    rows = np.empty((len(lengths), dim), dtype=np.float32)
    budget = min(batch_tokens, state.batch_tokens or batch_tokens)
    batches = token_budget_batches(lengths, budget)[::-1]  # the longest batch is last, and popped first
    running: deque[tuple[list[int], Callable[[], np.ndarray]]] = deque()
    while batches or running:
        if batches:
            positions = batches.pop()
            started = _start(embedder, tokenized, positions, dim)
            if started is None:
                _free_cached_memory(embedder.device)
                budget = state.batch_tokens = max(1, min(budget, len(positions) * lengths[positions[0]]) // 2)
                logger.warning("Out of device memory: batch_tokens is %d from now on.", budget)
                remaining = [*positions, *(i for batch in reversed(batches) for i in batch)]
                regrouped = token_budget_batches([lengths[i] for i in remaining], budget)
                batches = [[remaining[i] for i in batch] for batch in regrouped][::-1]
                continue
            running.append((positions, started))
        # The host fetches a result when the next batch is running, so that a GPU never waits for it.
        if len(running) > 1 or not batches:
            positions, fetch = running.popleft()
            values = fetch()
            bad = ~np.isfinite(values).all(axis=1)
            if bad.any():
                raise ValueError(
                    f"The embedding of the text at index {offset + positions[int(bad.argmax())]} is not finite. "
                    "Load the model with dtype=torch.float32; if that does not help, its weights are damaged."
                )
            rows[positions] = values
            progress.update(len(positions))
    return rows


def _start(
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


def _free_cached_memory(device: torch.device) -> None:
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
