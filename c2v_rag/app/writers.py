"""Language models that write the page's answers as a stream: a decoder here, or an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypedDict
from urllib.parse import urlsplit

import httpx

from c2v_rag.model import Causal2Vec
from c2v_rag.protocols import Embedder, is_url

DEFAULT = "default"
API_KEY_VARIABLE = "C2V_RAG_WRITER_API_KEY"
NEW_TOKENS = 300
_TIMEOUT_S = 120.0


class Message(TypedDict):
    role: str
    content: str


class AnswerWriter(Protocol):
    """A language model. `name` is shown with what it writes."""

    @property
    def name(self) -> str: ...

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer to a chat, piece by piece. Closing the iterator stops the model."""
        ...


class DecoderWriter:
    """Writes with a causal language model of transformers in this process, greedily. Questions take turns."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """See `AnswerWriter.stream`. Of a prompt that is too long for the model, the beginning is left out."""
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        stopped = threading.Event()
        errors: list[Exception] = []

        class Stop(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
                import torch

                return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device, dtype=torch.bool)

        streamer: Any = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)

        def generate() -> None:
            try:
                self._generate(self._token_ids(messages), streamer, StoppingCriteriaList([Stop()]))
            except Exception as error:
                errors.append(error)
            finally:
                streamer.end()

        with self._lock:
            thread = threading.Thread(target=generate, daemon=True)
            thread.start()
            try:
                yield from streamer
            finally:
                stopped.set()
                thread.join()
        if errors:
            raise errors[0]

    def _generate(self, ids: list[int], streamer: Any, stop: Any) -> None:
        import torch

        pad = self._tokenizer.pad_token_id
        inputs = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode():
            self._model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                repetition_penalty=1.1,  # small models repeat themselves
                pad_token_id=self._tokenizer.eos_token_id if pad is None else pad,
                streamer=streamer,
                stopping_criteria=stop,
            )

    def _token_ids(self, messages: Sequence[Message]) -> list[int]:
        # A passage may contain the name of a special token, which would end its message.
        chat = [{"role": one["role"], "content": self._without_special(one["content"])} for one in messages]
        if self._tokenizer.chat_template is None:
            text = "\n\n".join(one["content"] for one in chat) + "\n\nAnswer:"
            ids = list(self._tokenizer(text, verbose=False)["input_ids"])
        else:
            text = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return ids if longest is None else ids[-max(1, longest - NEW_TOKENS) :]

    def _without_special(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, " ")
        return text


class EndpointWriter:
    """Writes with a model behind an OpenAI-compatible server; `url` ends before /chat/completions.

    Question and passages are sent to this server. The key is read from the environment variable
    C2V_RAG_WRITER_API_KEY. Redirects are not followed. `model=None` takes the server's only model.

    Raises ValueError for a URL with a password, for a server with several models when none is named, and with the
    server's message when it refuses; ConnectionError when it does not answer.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        if urlsplit(url).username is not None:
            raise ValueError(f"Give the writer's key in the environment variable {API_KEY_VARIABLE}, not in its URL.")
        self._url = url.rstrip("/").removesuffix("/chat/completions")
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT_S, follow_redirects=False)
        self._model = model or self._only_model()
        self.name = f"{self._model} at {self._url}"

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """See `AnswerWriter.stream`."""
        body = {"model": self._model, "messages": list(messages), "temperature": 0, "stream": True}
        try:
            with self._client.stream("POST", f"{self._url}/chat/completions", json=body) as response:
                self._check(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    yield self._piece(data)
        except httpx.HTTPError as error:
            raise ConnectionError(f"No answer from {self._url} ({error or type(error).__name__}).") from error

    def _piece(self, data: str) -> str:
        try:
            event = json.loads(data)
            if "error" in event:
                raise ValueError(f"{self._url} stopped: {str(event['error'])[:200]}")
            choices = event["choices"]
            return str(choices[0]["delta"].get("content") or "") if choices else ""
        except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self._url} sent an event that is not OpenAI's: {data[:200]!r}") from error

    def _only_model(self) -> str:
        try:
            response = self._client.get(f"{self._url}/models")
            self._check(response)
            names = [str(entry["id"]) for entry in response.json().get("data") or []]
        except httpx.HTTPError as error:
            raise ConnectionError(f"No answer from {self._url} ({error or type(error).__name__}).") from error
        if len(names) != 1:
            raise ValueError(f"{self._url} has {len(names)} models: {', '.join(names[:8])}. Name one: --writer-model.")
        return names[0]

    def _check(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            return
        hint = f" Give the key in {API_KEY_VARIABLE}." if response.status_code in (401, 403) else ""
        text = response.read().decode("utf-8", "replace")[:200]
        raise ValueError(f"{self._url} answered {response.status_code}: {text}{hint}")


def writer_opener(writer: str, writer_model: str | None, model: Embedder) -> Callable[[], AnswerWriter]:
    """A function that opens the writer of this name at its first call.

    `writer`: "default", the decoder of `model`; a URL; or the folder or Hub id of a language model. A server is asked
    for its model at once, so that a wrong address is reported before anybody asks.
    """
    lock = threading.Lock()
    opened: list[AnswerWriter] = [EndpointWriter(writer, writer_model)] if is_url(writer) else []

    def open_writer() -> AnswerWriter:
        with lock:
            if not opened:
                opened.append(_decoder_of(model) if writer == DEFAULT else _local(writer))
            return opened[0]

    return open_writer


def _decoder_of(model: Embedder) -> DecoderWriter:
    if not isinstance(model, Causal2Vec):
        raise ValueError(
            "The embedding model runs in another process, so its decoder cannot write here. Name a language model: "
            "c2v-rag app --writer FOLDER_OR_URL"
        )
    from c2v_rag.generation import causal_lm

    return DecoderWriter(f"the decoder of {model.name or 'this model'}", causal_lm(model), model.tokenizer.llm)


def _local(name: str) -> DecoderWriter:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from c2v_rag.inference import default_device, default_dtype

    device = default_device()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=default_dtype(device), use_safetensors=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return DecoderWriter(name, loaded.to(device).eval(), tokenizer)
