"""The work behind the routes: check a request against the limits, queue its texts, build the response."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import HTTPException

from c2v_rag.gatherer import batches_of, gather, gather_token_counts
from c2v_rag.model import Causal2Vec
from c2v_rag.server import schema
from c2v_rag.server.metrics import Metered, Metrics

Kind = Literal["query", "document"]
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request, so that one client cannot occupy the server, and the status of an answer beyond each.

    `body_bytes`: length of a request (413). `inputs`: texts of a request (400). `tokens`: tokens of a text (400, unless
    the request says `truncate`), if less than the model's `max_tokens`. `waiting`: texts of all requests that are
    accepted and not answered yet (429). `seconds`: time until the answer (504).
    """

    body_bytes: int = 16 * 2**20
    inputs: int = 2048
    tokens: int | None = None
    waiting: int = 8192
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.inputs > self.waiting:
            raise ValueError(
                f"A request of {self.inputs} texts could never be accepted: only {self.waiting} may wait. "
                "Raise the queue's length or lower the texts a request."
            )


class EmbeddingService:
    """Embeds the texts of requests with one model, within the limits."""

    def __init__(self, model: Causal2Vec, name: str, limits: Limits) -> None:
        self.model = model
        self.name = name
        self.limits = limits
        self.metrics = Metrics()
        self.waiting = 0
        self._max_tokens = min(limits.tokens or model.max_tokens, model.max_tokens)
        self.embedder = Metered(model, self.metrics)
        stamp = model.stamp | {"name": name} | {part: _without_path(origin) for part, origin in model.sources.items()}
        self.description = schema.Model(
            id=name,
            created=int(time.time()),
            embedding_dim=model.embedding_dim,
            max_tokens=model.max_tokens,
            max_inputs=limits.inputs,
            stamp=stamp,
        )

    def kind_of(self, name: str, input_type: schema.InputType | None) -> Kind:
        """The kind of texts that a request asks for. HTTPException 404 for the name of another model."""
        if name not in (self.name, self.name + schema.QUERY_SUFFIX):
            raise HTTPException(404, f"There is no model {name!r} here. Ask for {self.name!r}, or list /v1/models.")
        if input_type is not None:
            return "query" if input_type in ("query", "search_query") else "document"
        return "document" if name == self.name else "query"

    async def count_tokens(self, texts: list[str]) -> list[int]:
        """The number of tokens of each text. HTTPException 400 or 429 as in `Limits`."""
        with self._accepted(texts):
            return await _results(gather_token_counts(self.model, texts))

    async def token_ends(self, texts: list[str]) -> list[list[list[int]]]:
        """`Causal2Vec.token_ends`. HTTPException 400 or 429 as in `Limits`, and 400 for a tokenizer without offsets."""
        with self._accepted(texts):
            try:
                return await asyncio.to_thread(self.model.token_ends, texts)
            except ValueError as error:
                raise HTTPException(400, str(error)) from error

    @contextmanager
    def _accepted(self, texts: list[str]) -> Iterator[None]:
        """`reserve`, and HTTPException 400 if these are too many texts for one request."""
        if len(texts) > self.limits.inputs:
            raise HTTPException(400, f"{len(texts)} texts in one request; at most {self.limits.inputs} are allowed.")
        with self.reserve(len(texts)):
            yield

    async def check_lengths(self, texts: list[str], advice: str) -> list[int]:
        """The number of tokens of each text. HTTPException 400, with `advice`, if one has too many; see `Limits`."""
        counts = await self.count_tokens(texts)
        longest = max(counts)
        if longest > self._max_tokens:
            raise HTTPException(
                400,
                f"The text at index {counts.index(longest)} has {longest} tokens; at most {self._max_tokens} are "
                f"read. {advice}",
            )
        return counts

    @asynccontextmanager
    async def time_limit(self) -> AsyncIterator[None]:
        """HTTPException 504 if the block takes longer than `Limits.seconds`."""
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError:
            raise HTTPException(
                504, f"No answer within {self.limits.seconds:g} s: the server is busy. Send fewer texts, or try later."
            ) from None

    async def embed(self, body: schema.EmbeddingsRequest) -> schema.EmbeddingsResponse:
        """The response with the embeddings. If the call is cancelled, its texts leave the queue.

        Raises HTTPException: 404 for another model's name; 400, 429 and 504 as in `Limits`.
        """
        kind = self.kind_of(body.model, body.input_type)
        if body.dimensions is not None and body.dimensions > self.model.embedding_dim:
            raise HTTPException(400, f"dimensions must be at most {self.model.embedding_dim}, got {body.dimensions}.")
        if body.truncate:
            counts = await self.count_tokens(body.input)
        else:
            counts = await self.check_lengths(body.input, 'Cut it into chunks, or send "truncate": true.')
        options = {"truncate_dim": body.dimensions, "instruction": body.instruction, "on_truncate": "ignore"}
        options = {key: value for key, value in options.items() if value is not None}
        with self.reserve(len(counts)):
            async with self.time_limit():
                rows = await self._embed_texts(kind, body.input, options)
        self.metrics.inputs.labels(kind).inc(len(rows))
        self.metrics.tokens.inc(sum(counts))
        return schema.EmbeddingsResponse(
            data=[
                schema.Embedding.model_construct(index=index, embedding=_encoded(row, body.encoding_format))
                for index, row in enumerate(rows)
            ],
            model=body.model,
            usage=schema.Usage(prompt_tokens=sum(counts), total_tokens=sum(counts)),
        )

    async def _embed_texts(self, kind: Kind, texts: list[str], options: dict[str, Any]) -> list[np.ndarray]:
        """Embeddings of one request, queued one batch at a time: short requests need not wait for all of a long one."""
        rows: list[np.ndarray] = []
        for batch in batches_of(self.embedder, texts):
            rows += await _results([gather(self.embedder, kind, text, **options) for text in batch])
        return rows

    @contextmanager
    def reserve(self, num_texts: int) -> Iterator[None]:
        """Count `num_texts` as waiting while the block runs. HTTPException 429 when the queue has no room for them."""
        if self.waiting + num_texts > self.limits.waiting:
            raise HTTPException(
                429,
                f"{self.waiting} texts wait already; at most {self.limits.waiting} may wait. Send it again later.",
                {"Retry-After": "1"},
            )
        self.waiting += num_texts
        self.metrics.waiting.set(self.waiting)
        try:
            yield
        finally:
            self.waiting -= num_texts
            self.metrics.waiting.set(self.waiting)


def public_name(model: Causal2Vec) -> str:
    """A model's name for clients: a checkpoint folder's name without its path; "model" if the model has no name."""
    name = str(model.stamp["name"])
    return (Path(name).resolve().name if Path(name).is_dir() else name) or "model"


def _without_path(origin: str) -> str:
    """The origin of weights; of a path on this machine only the last part."""
    kind, _, path = origin.partition(" ")
    return f"{kind} {PurePath(path).name}" if kind in ("folder", "file") else origin


async def _results(futures: list[Future[_Result]]) -> list[_Result]:
    """The futures' results in order. If one fails or the call is cancelled, the other texts leave the queue."""
    try:
        return [await asyncio.wrap_future(future) for future in futures]
    finally:
        for future in futures:
            future.cancel()


def _encoded(row: np.ndarray, encoding: Literal["float", "base64"] | None) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = row.tolist()
    return numbers
