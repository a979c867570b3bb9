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
from itertools import chain, islice
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from tqdm.auto import tqdm

from c2v_rag.allocator import keep_freed_memory
from c2v_rag.running import EncodingState as EncodingState  # for embedders
from c2v_rag.running import TokenBatchEmbedder, free_cached_memory, start_batch
from c2v_rag.tokenization import TokenizedTexts

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
    devices: Sequence[torch.device | str] | None


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
    replicas: Sequence[TokenBatchEmbedder] = (),
) -> np.ndarray:
    """Embeddings of `texts`, in their order: float32 (n, embedding_dim), rows of length 1.

    `texts` may be any iterable. It is read window by window, so that memory grows with the results only. `replicas`:
    copies of the embedder on further devices, each of which embeds batches in a thread of its own.
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

    embedders = [embedder, *replicas]
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
        windows = text_windows(texts, window_texts(budget) * len(embedders))
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
                limit = min(budget, *(one.encoding_state.batch_tokens or budget for one in embedders))
                work = _Window(tokenized, done, dim, limit, progress)
                if replicas:
                    _embed_on_devices(embedders, work)
                else:
                    _embed_window(embedder, work)
                results.append(work.rows)
                done += len(work.rows)
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


class _Window:
    """Batches of one window that are not started yet, and the embeddings that are done; several threads take batches.

    `offset`: index of the window's first text, for error messages.
    """

    def __init__(
        self, tokenized: TokenizedTexts, offset: int, dim: int, batch_tokens: int, progress: tqdm[Any]
    ) -> None:
        self.tokenized = tokenized
        self.dim = dim
        self.rows = np.empty((len(tokenized.text_ids), dim), dtype=np.float32)
        self._lengths = tokenized.lengths
        self._offset = offset
        self._budget = batch_tokens
        self._progress = progress
        self._lock = threading.Lock()
        # The longest batch is last, and taken first.
        self._batches = token_budget_batches(self._lengths, batch_tokens)[::-1]

    def take(self) -> list[int] | None:
        """The positions of the texts of the next batch; None if no batch is left."""
        with self._lock:
            return self._batches.pop() if self._batches else None

    def stop(self) -> None:
        """Leave no batch for any thread."""
        with self._lock:
            self._batches.clear()

    def make_smaller(self, positions: list[int]) -> int:
        """Give back a batch that needs too much memory. All that are left become smaller; returns the new budget."""
        with self._lock:
            size = len(positions) * self._lengths[positions[0]]
            self._budget = max(1, min(self._budget, size) // 2)
            remaining = [*positions, *(i for batch in reversed(self._batches) for i in batch)]
            regrouped = token_budget_batches([self._lengths[i] for i in remaining], self._budget)
            self._batches = [[remaining[i] for i in batch] for batch in regrouped][::-1]
            return self._budget

    def store(self, positions: list[int], values: np.ndarray) -> None:
        """Store the embeddings of a batch. Raises ValueError if one is not finite."""
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise ValueError(
                f"The embedding of the text at index {self._offset + positions[int(bad.argmax())]} is not finite. "
                "Load the model with dtype=torch.float32; if that does not help, its weights are damaged."
            )
        with self._lock:
            self.rows[positions] = values
            self._progress.update(len(positions))


def _embed_window(embedder: TokenBatchEmbedder, window: _Window) -> None:
    """Embed batches of the window until none is left."""
    running: deque[tuple[list[int], Callable[[], np.ndarray]]] = deque()
    while (positions := window.take()) is not None or running:
        if positions is not None:
            started = start_batch(embedder, window.tokenized, positions, window.dim)
            if started is None:
                free_cached_memory(embedder.device)
                budget = embedder.encoding_state.batch_tokens = window.make_smaller(positions)
                logger.warning("Out of device memory: batch_tokens is %d from now on.", budget)
                continue
            running.append((positions, started))
        # The host fetches a result when the next batch is running, so that a GPU never waits for it.
        if len(running) > 1 or positions is None:
            done, fetch = running.popleft()
            window.store(done, fetch())


def _embed_on_devices(embedders: Sequence[TokenBatchEmbedder], window: _Window) -> None:
    """`_embed_window` in one thread for each embedder. If one fails, the others stop, and its error is raised."""

    def run(embedder: TokenBatchEmbedder) -> None:
        try:
            with embedder.encoding_state.encode_call():
                _embed_window(embedder, window)
        except BaseException:
            window.stop()
            raise

    with ThreadPoolExecutor(len(embedders), thread_name_prefix="embed") as threads:
        for future in [threads.submit(run, embedder) for embedder in embedders]:
            future.result()
