"""The server's metrics, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from c2v_rag.protocols import Embedder

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The Prometheus metrics of one server, in their own registry: several servers may run in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "c2v_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "c2v_request_seconds", "Time to an answer.", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self.inputs = Counter("c2v_inputs", "Texts embedded, by kind.", ["kind"], registry=self.registry)
        self.tokens = Counter("c2v_tokens", "Tokens of the texts embedded.", registry=self.registry)
        self.searches = Counter("c2v_searches", "Searches, by mode.", ["mode"], registry=self.registry)
        self.waiting = Gauge("c2v_waiting_inputs", "Texts accepted and not answered yet.", registry=self.registry)
        self.batch_texts = Histogram(
            "c2v_batch_texts", "Texts embedded in one call of the model.", buckets=_TEXTS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "c2v_batch_seconds", "Time of one call of the model.", buckets=_SECONDS, registry=self.registry
        )


class Metered:
    """An embedder that records the duration and the number of texts of every call of `model`."""

    def __init__(self, model: Embedder, metrics: Metrics) -> None:
        self._model = model
        self._metrics = metrics

    @property
    def embedding_dim(self) -> int:
        return self._model.embedding_dim

    @property
    def stamp(self) -> dict[str, str | int]:
        return self._model.stamp

    def encode_query(self, texts: Iterable[str], **options: Any) -> np.ndarray:
        return self._call(self._model.encode_query, texts, options)

    def encode_document(self, texts: Iterable[str], **options: Any) -> np.ndarray:
        return self._call(self._model.encode_document, texts, options)

    def _call(self, encode: Any, texts: Iterable[str], options: dict[str, Any]) -> np.ndarray:
        texts = list(texts)
        started = time.perf_counter()
        vectors: np.ndarray = encode(texts, **options)
        self._metrics.batch_seconds.observe(time.perf_counter() - started)
        self._metrics.batch_texts.observe(len(texts))
        return vectors
