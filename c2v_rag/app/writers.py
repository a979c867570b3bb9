"""Language models that write the page's answers as a stream: a decoder here, or an OpenAI-compatible server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypedDict

import httpx

from c2v_rag.language_models import ChatServer, ChatTokenizer, max_positions, open_language_model
from c2v_rag.model import Causal2Vec
from c2v_rag.protocols import Embedder, is_url

DEFAULT = "default"
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
        self._chat = ChatTokenizer(tokenizer)

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

        inputs = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode():
            self._model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                repetition_penalty=1.1,  # small models repeat themselves
                pad_token_id=self._chat.pad_token_id,
                streamer=streamer,
                stopping_criteria=stop,
            )

    def _token_ids(self, messages: Sequence[Message]) -> list[int]:
        # A passage may contain the name of a special token, which would end its message.
        chat = [{"role": one["role"], "content": self._chat.without_special(one["content"])} for one in messages]
        ids = self._chat.token_ids(chat, "\n\n".join(one["content"] for one in chat) + "\n\nAnswer:")
        longest = max_positions(self._model)
        return ids if longest is None else ids[-max(1, longest - NEW_TOKENS) :]


class EndpointWriter(ChatServer):
    """Writes with a model behind an OpenAI-compatible server, which gets question and passages; see `ChatServer`."""

    def __init__(self, url: str, model: str | None = None) -> None:
        super().__init__(url, model, timeout_seconds=_TIMEOUT_S)

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """See `AnswerWriter.stream`."""
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "stream": True}
        try:
            with self.client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                self.check(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    yield self._piece(data)
        except httpx.HTTPError as error:
            raise self.no_answer(error) from error

    def _piece(self, data: str) -> str:
        try:
            event = json.loads(data)
            if "error" in event:
                raise ValueError(f"{self.url} stopped: {str(event['error'])[:200]}")
            choices = event["choices"]
            return str(choices[0]["delta"].get("content") or "") if choices else ""
        except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.url} sent an event that is not OpenAI's: {data[:200]!r}") from error


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
    from c2v_rag.inference import default_device

    return DecoderWriter(name, *open_language_model(name, default_device()))
