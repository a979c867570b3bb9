"""An embedder whose model runs in another process: `c2v-rag serve`, reached over HTTP. Needs no torch."""

from __future__ import annotations

import base64
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack
from weakref import WeakValueDictionary

import numpy as np
from tqdm.auto import tqdm

from c2v_rag.protocols import is_url

if TYPE_CHECKING:
    import httpx

    from c2v_rag.inference import EncodeOptions, OnTruncate

API_KEY_VARIABLE = "C2V_RAG_API_KEY"
WEIGHTS_HEADER = "c2v-weights"  # of every answer: the hash of the weights behind it
_REQUEST_TEXTS = 256
_REQUEST_CHARACTERS = 1_000_000
_TRIES = 5
_WORTH_ANOTHER_TRY = {429, 502, 503, 504}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class RemoteModel:
    """The model behind a `c2v-rag serve`; gives its vectors, and can be used wherever a loaded model can.

    Example:
        >>> from c2v_rag import RemoteModel, VectorIndex
        >>> index = VectorIndex("store", RemoteModel("http://127.0.0.1:8000"))  # doctest: +SKIP

    `base_url`: the server's address, without /v1. `api_key`: unless given, what the environment variable
    C2V_RAG_API_KEY holds. `timeout`: seconds to wait for an answer.

    The first use asks the server what its model is. A server that is busy or away is asked again, up to 5 times with
    growing pauses (tenacity). Raises ConnectionError when it stays away, PermissionError for a wrong key, ValueError
    for what it refuses, with its own words, and when its model has changed since the first use.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, timeout: float = 180.0) -> None:
        if not is_url(base_url):
            raise ValueError(f"base_url must start with http:// or https://; got {base_url!r}.")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._timeout = timeout
        self._weights = ""  # the served model's hash, once it has answered
        _opened[self.base_url] = self

    def __repr__(self) -> str:
        return f"RemoteModel({self.base_url!r})"

    @property
    def name(self) -> str:
        """The server's address, by which `load_embedder` finds it again."""
        return self.base_url

    @property
    def embedding_dim(self) -> int:
        return int(self._model["embedding_dim"])

    @property
    def max_tokens(self) -> int:
        """The longest text, in `count_tokens`, that the model reads whole."""
        return int(self._model["max_tokens"])

    @property
    def stamp(self) -> dict[str, str | int]:
        """The served model's, under the server's address as its name."""
        return {**self._model["stamp"], "name": self.name}

    def count_tokens(self, texts: Iterable[str]) -> list[int]:
        """Length of each text in the model's tokens."""
        return [
            count
            for some in _slices(texts, self._most_texts)
            for count in self._ask("/v1/tokenize", {"model": self._model["id"], "input": some})["counts"]
        ]

    def encode(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> np.ndarray:
        """As `Causal2Vec.encode`: float32 (n, embedding_dim), in input order. `batch_tokens` is the server's to choose.

        Texts are cut without a warning unless `on_truncate` is "error".
        """
        return self._embed("document", texts, instruction, **options)

    encode_document = encode  # neither has an instruction unless one is given

    def encode_query(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> np.ndarray:
        """As `Causal2Vec.encode_query`: with the model's own instruction unless given, none with ""."""
        return self._embed("query", texts, instruction, **options)

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
    ) -> np.ndarray:
        if isinstance(texts, str | bytes):
            raise TypeError("texts must be a list of strings, got one bare string. Wrap it: [text].")
        dim = self.embedding_dim if truncate_dim is None else truncate_dim
        if not 1 <= dim <= self.embedding_dim:
            raise ValueError(f"truncate_dim must be from 1 to {self.embedding_dim}, this model's; got {truncate_dim}.")
        body: dict[str, Any] = {
            "model": self._model["id"],
            "input_type": kind,
            "encoding_format": "base64",
            "truncate": on_truncate != "error",
        }
        body |= {} if truncate_dim is None else {"dimensions": truncate_dim}
        body |= {} if instruction is None else {"instruction": instruction}
        parts = [np.empty((0, dim), dtype=np.float32)]
        total = len(texts) if isinstance(texts, Sequence) else None
        with tqdm(total=total, unit="text", disable=not show_progress) as progress:
            for some in _slices(texts, self._most_texts):
                answer = self._ask("/v1/embeddings", body | {"input": some})
                rows = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer["data"]]
                parts.append(np.stack(rows).astype(np.float32, copy=False))
                progress.update(len(some))
        return np.concatenate(parts)

    @property
    def _most_texts(self) -> int:
        return min(_REQUEST_TEXTS, int(self._model["max_inputs"]))

    @functools.cached_property
    def _model(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = self._ask("/v1/models", None)["data"]
        if len(found) != 1 or "stamp" not in found[0]:
            raise ValueError(f"{self.base_url} is no c2v-rag server: its list of models says nothing of their vectors.")
        return found[0]

    @functools.cached_property
    def _client(self) -> httpx.Client:
        import httpx

        key = self._api_key or os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=httpx.Timeout(self._timeout, connect=10))

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The server's answer, after as many tries as it takes."""
        import httpx
        from tenacity import (
            Retrying,
            retry_if_exception_type,
            retry_if_result,
            stop_after_attempt,
            wait_random_exponential,
        )

        tries = Retrying(
            retry=retry_if_exception_type(httpx.TransportError)
            | retry_if_result(lambda response: response.status_code in _WORTH_ANOTHER_TRY),
            stop=stop_after_attempt(_TRIES),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        try:
            response = tries(self._client.request, "GET" if body is None else "POST", path, json=body)
        except httpx.TransportError as error:
            raise ConnectionError(
                f"No answer from {self.base_url} ({error or type(error).__name__}). Is `c2v-rag serve` running there?"
            ) from error
        if response.status_code == 200:
            self._check_weights(response.headers.get(WEIGHTS_HEADER, ""))
            answer: dict[str, Any] = response.json()
            return answer
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text[:200]
        message = f"{self.base_url} answered {response.status_code}: {message}"
        if response.status_code == 401:
            raise PermissionError(f"{message} Give it as api_key, or in {API_KEY_VARIABLE}.")
        if response.status_code in _WORTH_ANOTHER_TRY or response.status_code >= 500:
            raise ConnectionError(message)
        raise ValueError(message)

    def _check_weights(self, weights: str) -> None:
        """Vectors of two models must not be mixed: a server may be started again with another."""
        if self._weights and weights != self._weights:
            raise ValueError(
                f"The model at {self.base_url} is another one now (weights {weights}, before {self._weights}). "
                "Make a new RemoteModel, and index anew what the old one embedded."
            )
        self._weights = weights

    def __getstate__(self) -> dict[str, Any]:
        """Without the open connection, and without what was learned over it."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_client", "_model")}


def _slices(texts: Iterable[str], most: int) -> Iterator[list[str]]:
    """Texts of one request each: not too many, and not too long together."""
    some: list[str] = []
    characters = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] must be a string, got {type(text).__name__}.")
        if some and (len(some) == most or characters + len(text) > _REQUEST_CHARACTERS):
            yield some
            some, characters = [], 0
        some.append(_LONE_SURROGATE.sub("\ufffd", text))  # JSON has none; the model reads them so too
        characters += len(text)
    if some:
        yield some


_opened: WeakValueDictionary[str, RemoteModel] = WeakValueDictionary()


def opened_model(address: str) -> RemoteModel | None:
    """The latest `RemoteModel` that this process made for this address and still uses; None where there is none."""
    return _opened.get(address)
