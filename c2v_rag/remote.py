"""`RemoteModel`: an embedder whose model runs in another process, `c2v-rag serve`, over HTTP. Needs no torch."""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, Unpack
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import numpy as np
from tqdm.auto import tqdm

from c2v_rag.protocols import is_url

if TYPE_CHECKING:
    import httpx

    from c2v_rag.inference import EncodeOptions, OnTruncate

API_KEY_VARIABLE = "C2V_RAG_API_KEY"
WEIGHTS_HEADER = "c2v-weights"  # response header: the hash of the weights that made the answer
MAX_PARALLEL_REQUESTS = 4  # in one call
_MAX_ASYNC_CALLS = 32  # that run at the same time; further calls wait until one of them ends
_MAX_REQUEST_TEXTS = 256
_MAX_REQUEST_CHARACTERS = 1_000_000
_CONNECT_SECONDS = 10.0
_MAX_TRIES = 5
_RETRIED_STATUSES = {429, 502, 503, 504}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class ApiKeyError(ValueError):
    """The server requires a key and got none, or it refused the key that was sent."""


class RemoteModel:
    """A model that runs in a `c2v-rag serve` process. It can be used wherever a loaded model can.

    Examples:
        >>> from c2v_rag import RemoteModel, VectorIndex
        >>> index = VectorIndex("store", RemoteModel("http://127.0.0.1:8000"))  # doctest: +SKIP

    `base_url`: the server's address, without /v1. `api_key`: unless given, the environment variable C2V_RAG_API_KEY is
    read at the first request. The key is sent to this address only; redirects are not followed. `timeout`: seconds for
    each request, its retries included. `transport`: how requests are sent, for a proxy, a certificate authority or a
    client certificate of your own: `httpx.HTTPTransport(proxy=..., verify=ssl_context)`. Unless given, httpx's default
    is used, which reads the environment (HTTPS_PROXY, SSL_CERT_FILE).

    The first use requests the model's description. A request that the server could not take (no connection, or the
    status 429, 502, 503 or 504) is sent again, up to 5 times with growing pauses. A request that got no answer in time
    is not sent again. Long lists of texts are sent in several requests, up to 4 at the same time. Threads may share a
    `RemoteModel`.

    Pickling keeps a given `api_key`: such a pickle is as secret as the key. A key from the environment is not kept; it
    is read again where the pickle is loaded. The connection is not kept. A `transport` is kept, so the model can be
    pickled only if its transport can; an `httpx.HTTPTransport` cannot.

    Raises ConnectionError when the server does not answer, `ApiKeyError` (a ValueError) for a missing or wrong key,
    ValueError with the server's message when the server refuses a request, and ValueError when the server's model has
    changed since the first use.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float = 180.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not is_url(base_url):
            raise ValueError(f"base_url must start with http:// or https://; got {base_url!r}.")
        if "@" in urlsplit(base_url).netloc:  # the address is printed and stored as the model's name
            raise ValueError("base_url must not hold a user or password. Give the server's key as api_key.")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._timeout = timeout
        self._transport = transport
        self._weights = ""  # hash of the served model's weights, known after the first answer
        _opened[next(_serial_numbers)] = self

    def __repr__(self) -> str:
        return f"RemoteModel({self.base_url!r})"

    @property
    def name(self) -> str:
        """The server's address."""
        return self.base_url

    @property
    def embedding_dim(self) -> int:
        return int(self._model["embedding_dim"])

    @property
    def max_tokens(self) -> int:
        """The largest result of `count_tokens` for which no part of a text is cut off."""
        return int(self._model["max_tokens"])

    @property
    def stamp(self) -> dict[str, str | int]:
        """The served model's stamp, with the server's address as its name."""
        return {**self._model["stamp"], "name": self.name}

    def count_tokens(self, texts: Iterable[str]) -> list[int]:
        """The number of tokens of each text."""
        return [count for answer in self._tokenize(texts) for count in answer["counts"]]

    def token_ends(self, texts: Iterable[str]) -> list[list[list[int]]]:
        """For each text, for decoder and encoder, the offset at which each token ends, as `Causal2Vec.token_ends`.

        With it, documents are cut as the served model itself would cut them. Raises ValueError for a server of a
        version that does not give them.
        """
        ends: list[list[list[int]]] = []
        for answer in self._tokenize(texts, ends=True):
            if answer.get("ends") is None:
                raise ValueError(
                    f"The c2v-rag at {self.base_url} is an older version, which does not say where tokens end. "
                    "Documents would be cut differently: update the server."
                )
            ends += answer["ends"]
        return ends

    def _tokenize(self, texts: Iterable[str], **options: bool) -> Iterator[dict[str, Any]]:
        model = self._model["id"]
        bodies = ({"model": model, "input": part, **options} for part in _split(texts, self._max_texts))
        return self._request_all("/v1/tokenize", bodies)

    def encode(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> np.ndarray:
        """Embeddings (n, embedding_dim) in float32 and in input order, as `Causal2Vec.encode`.

        `batch_tokens` and `devices` have no effect: the server chooses its own.

        Long texts are truncated without a warning unless `on_truncate` is "error".
        """
        return self._embed("document", texts, instruction, **options)

    encode_document = encode  # documents have no instruction unless one is given

    def encode_query(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> np.ndarray:
        """Embeddings of queries, as `Causal2Vec.encode_query`.

        `instruction`: the model's own unless given; "" for none.
        """
        return self._embed("query", texts, instruction, **options)

    async def aencode_document(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> np.ndarray:
        """The result of `encode_document`; the event loop is not blocked, because a thread waits for the server.

        Up to 32 calls run at the same time, so that the server can embed their texts together. Cancelling the
        coroutine does not stop a request that was already sent.
        """
        encode = functools.partial(self.encode_document, texts, instruction=instruction, **options)
        return await asyncio.get_running_loop().run_in_executor(self._async_threads, encode)

    async def aencode_query(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> np.ndarray:
        """The result of `encode_query`; the event loop is not blocked, as in `aencode_document`."""
        encode = functools.partial(self.encode_query, texts, instruction=instruction, **options)
        return await asyncio.get_running_loop().run_in_executor(self._async_threads, encode)

    def _embed(
        self,
        kind: Literal["query", "document"],
        texts: Iterable[str],
        instruction: str | None,
        *,
        batch_tokens: int | None = None,
        truncate_dim: int | None = None,
        on_truncate: OnTruncate = "warn",
        show_progress: bool = False,
        devices: object = None,
    ) -> np.ndarray:
        if isinstance(texts, str | bytes):
            raise TypeError("texts must be a list of strings, got one bare string. Wrap it: [text].")
        dim = self.embedding_dim if truncate_dim is None else truncate_dim
        if not 1 <= dim <= self.embedding_dim:
            raise ValueError(f"truncate_dim must be from 1 to {self.embedding_dim}, this model's; got {truncate_dim}.")
        settings: dict[str, Any] = {
            "model": self._model["id"],
            "input_type": kind,
            "encoding_format": "base64",
            "truncate": on_truncate != "error",
        }
        settings |= {} if truncate_dim is None else {"dimensions": truncate_dim}
        settings |= {} if instruction is None else {"instruction": instruction}
        bodies = (settings | {"input": part} for part in _split(texts, self._max_texts))
        parts = [np.empty((0, dim), dtype=np.float32)]
        total = len(texts) if isinstance(texts, Sequence) else None
        with tqdm(total=total, unit="text", disable=not show_progress) as progress:
            for answer in self._request_all("/v1/embeddings", bodies):
                rows = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer["data"]]
                parts.append(np.stack(rows).astype(np.float32, copy=False))
                progress.update(len(rows))
        return np.concatenate(parts)

    @property
    def _max_texts(self) -> int:
        return min(_MAX_REQUEST_TEXTS, int(self._model["max_inputs"]))

    @functools.cached_property
    def _model(self) -> dict[str, Any]:
        models: list[dict[str, Any]] = self._request("/v1/models", None)["data"]
        if len(models) != 1 or "stamp" not in models[0]:
            raise ValueError(f"{self.base_url} is no c2v-rag server: its list of models has no stamp of their weights.")
        return models[0]

    @functools.cached_property
    def _client(self) -> httpx.Client:
        import httpx

        key = (self._api_key or os.environ.get(API_KEY_VARIABLE, "")).strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.base_url, headers=headers, follow_redirects=False, transport=self._transport)

    @functools.cached_property
    def _async_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_MAX_ASYNC_CALLS, "c2v-remote-async")

    def _request_all(self, path: str, bodies: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The answers to `bodies` in their order. Up to 4 requests run at the same time; the first error is raised."""
        running: deque[Future[dict[str, Any]]] = deque()
        threads = ThreadPoolExecutor(MAX_PARALLEL_REQUESTS, "c2v-remote")
        try:
            for body in bodies:
                running.append(threads.submit(self._request, path, body))
                if len(running) == MAX_PARALLEL_REQUESTS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The server's answer to one request. The request is sent again while the server cannot take it."""
        import httpx
        from tenacity import (
            Retrying,
            retry_if_exception,
            retry_if_result,
            stop_after_attempt,
            stop_before_delay,
            wait_random_exponential,
        )

        deadline = time.monotonic() + self._timeout

        def send() -> httpx.Response:
            left = max(deadline - time.monotonic(), 0.1)
            timeout = httpx.Timeout(left, connect=min(left, _CONNECT_SECONDS))
            return self._client.request("GET" if body is None else "POST", path, json=body, timeout=timeout)

        retrying = Retrying(
            retry=retry_if_exception(_was_not_received)
            | retry_if_result(lambda response: response.status_code in _RETRIED_STATUSES),
            stop=stop_after_attempt(_MAX_TRIES) | stop_before_delay(self._timeout),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        try:
            response = retrying(send)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise ConnectionError(
                f"{self.base_url} gave no answer within {self._timeout:g} s. It was not asked again, because it may be "
                "busy with this request. Send fewer texts at a time, or give a longer timeout."
            ) from error
        except httpx.TransportError as error:
            raise ConnectionError(
                f"No answer from {self.base_url} ({error or type(error).__name__}). Is `c2v-rag serve` running there?"
            ) from error
        if response.status_code == 200:
            self._check_weights(response.headers.get(WEIGHTS_HEADER, ""))
            answer: dict[str, Any] = response.json()
            return answer
        raise _error(self.base_url, response)

    def _check_weights(self, weights: str) -> None:
        """Raise ValueError if the weights differ from those of the first answer: the server was restarted."""
        if self._weights and weights != self._weights:
            raise ValueError(
                f"The model at {self.base_url} is another one now (weights {weights}, before {self._weights}). "
                "Make a new RemoteModel, and embed all documents of the old one again."
            )
        self._weights = weights

    def __getstate__(self) -> dict[str, Any]:
        """The state without connection, threads and the served model's description, which is requested again."""
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_client", "_model", "_async_threads")
        }


def _was_not_received(error: BaseException) -> bool:
    """Whether the server did not get the request. After a read or write timeout it may still be working on it."""
    import httpx

    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout)


def _error(base_url: str, response: httpx.Response) -> Exception:
    """The exception for an answer whose status is not 200. It has the server's message."""
    status = response.status_code
    if response.is_redirect:
        return ValueError(
            f"{base_url} answered {status}: it redirects to {response.headers.get('location')!r}. Redirects are not "
            "followed, because the key is for this address only. Give the final address as base_url."
        )
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    message = f"{base_url} answered {status}: {message}"
    if status in (401, 403):
        return ApiKeyError(f"{message} Give it as api_key, or in {API_KEY_VARIABLE}.")
    if status in _RETRIED_STATUSES or status >= 500:
        return ConnectionError(message)
    return ValueError(message)


def _split(texts: Iterable[str], max_texts: int) -> Iterator[list[str]]:
    """Lists of texts, one for each request, limited in number of texts and of characters."""
    part: list[str] = []
    characters = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] must be a string, got {type(text).__name__}.")
        if part and (len(part) == max_texts or characters + len(text) > _MAX_REQUEST_CHARACTERS):
            yield part
            part, characters = [], 0
        part.append(_LONE_SURROGATE.sub("\ufffd", text))  # JSON cannot hold one; the model reads it as U+FFFD
        characters += len(text)
    if part:
        yield part


_opened: WeakValueDictionary[int, RemoteModel] = WeakValueDictionary()  # keys: serial numbers, oldest first
_serial_numbers = itertools.count()


def opened_model(address: str) -> RemoteModel | None:
    """The newest `RemoteModel` for this address that this process still uses; None if there is none."""
    newest_first = sorted(_opened.items(), key=lambda item: item[0], reverse=True)
    return next((model for _, model in newest_first if model.base_url == address), None)
