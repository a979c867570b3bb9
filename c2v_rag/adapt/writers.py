"""Writers that use a language model: the model's own decoder, another local model, or an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from c2v_rag.adapt.headings import HeadingWriter, take_heading
from c2v_rag.adapt.passages import Passage
from c2v_rag.adapt.prompts import Prompt, read_prompts
from c2v_rag.adapt.questions import Writer, Written, clean
from c2v_rag.generation import causal_lm
from c2v_rag.language_models import ChatServer, ChatTokenizer, max_positions, open_language_model
from c2v_rag.model import Causal2Vec
from c2v_rag.protocols import is_url

DEFAULT, HEADINGS = "default", "headings"
_PASSAGE_CHARACTERS = 1500  # shown to the writer
_NEW_TOKENS = 48
_BATCH = 8
_PARALLEL_REQUESTS = 4
_TIMEOUT_SECONDS = 180.0
_RETRIED_STATUSES = {429, 500, 502, 503, 504}


class DecoderWriter:
    """Writes with a causal language model in this process, greedily, so that equal passages give equal questions."""

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Mapping[str, Prompt]
    ) -> None:
        self.name = name
        self.kinds = tuple(prompts)
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._chat = ChatTokenizer(tokenizer)

    def write(self, passages: Sequence[Passage], kinds: Sequence[str]) -> list[Written | None]:
        """See `Writer.write`. Prompts of similar lengths are computed together."""
        prompts = [self._token_ids(self._prompts[kind], passage) for passage, kind in zip(passages, kinds, strict=True)]
        order = sorted(range(len(prompts)), key=lambda position: len(prompts[position]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), _BATCH):
            positions = order[start : start + _BATCH]
            for position, answer in zip(positions, self._generate([prompts[i] for i in positions]), strict=True):
                answers[position] = answer
        return [_written(answer, passage) for answer, passage in zip(answers, passages, strict=True)]

    def _token_ids(self, prompt: Prompt, passage: Passage) -> list[int]:
        # A passage may contain the name of a special token, which would end its message.
        text = self._chat.without_special(passage.text[:_PASSAGE_CHARACTERS])
        longest = max_positions(self._model)
        ids = self._chat.token_ids(prompt.messages(text), prompt.text(text))
        while longest is not None and len(ids) + _NEW_TOKENS > longest and prompt.examples:
            prompt = prompt.model_copy(update={"examples": prompt.examples[1:]})
            ids = self._chat.token_ids(prompt.messages(text), prompt.text(text))
        return ids if longest is None else ids[: longest - _NEW_TOKENS]

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]]) -> list[str]:
        width = max(map(len, prompts))
        pad = self._chat.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._model.device)
        generate: Any = self._model.generate
        written = generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=pad
        )
        return list(self._tokenizer.batch_decode(written[:, width:], skip_special_tokens=True))


class EndpointWriter(ChatServer):
    """Writes with a model behind an OpenAI-compatible server. The passages are sent to it; see `ChatServer`.

    A request that the server cannot take is sent again, up to five times.
    """

    def __init__(self, url: str, model: str | None, prompts: Mapping[str, Prompt]) -> None:
        super().__init__(url, model, timeout_seconds=_TIMEOUT_SECONDS)
        self._prompts = prompts
        self.kinds = tuple(prompts)

    def write(self, passages: Sequence[Passage], kinds: Sequence[str]) -> list[Written | None]:
        """See `Writer.write`. Up to four requests run at the same time."""
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as threads:
            answers = list(threads.map(self._answer, passages, kinds))
        return [_written(answer, passage) for answer, passage in zip(answers, passages, strict=True)]

    def _answer(self, passage: Passage, kind: str) -> str:
        messages = self._prompts[kind].messages(passage.text[:_PASSAGE_CHARACTERS])
        found = self.request("POST", "/chat/completions", {"model": self.model, "messages": messages, "temperature": 0})
        try:
            return str(found["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.url} gave an answer without choices[0].message.content.") from error

    def send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        from tenacity import (
            Retrying,
            retry_if_exception_type,
            retry_if_result,
            stop_after_attempt,
            wait_random_exponential,
        )

        retrying = Retrying(
            retry=retry_if_exception_type(httpx.ConnectError)
            | retry_if_result(lambda response: response.status_code in _RETRIED_STATUSES),
            stop=stop_after_attempt(5),
            wait=wait_random_exponential(multiplier=0.5, max=20),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        response: httpx.Response = retrying(super().send, method, path, body)
        return response


def writer_kinds(writer: str, prompts: Path | None) -> tuple[str, ...]:
    """The kinds of questions that a writer of this name writes. Raises ValueError for a file of prompts that is bad."""
    return HeadingWriter.kinds if writer == HEADINGS else tuple(read_prompts(prompts))


def can_be_asked(writer: str | None) -> Callable[[Passage], bool]:
    """Which passages a writer of this name can write a question for; None: the questions are written already."""
    return (lambda passage: take_heading(passage) is not None) if writer == HEADINGS else (lambda _: True)


def open_writer(writer: str, writer_model: str | None, prompts: Path | None, load: Callable[[], Causal2Vec]) -> Writer:
    """The writer of this name: "headings", "default" (the decoder of the model), a URL, or a language model's name.

    `load` returns the model that is adapted. "default" changes how this object computes (see `generation.causal_lm`).
    Raises the errors of opening a model.
    """
    if writer == HEADINGS:
        return HeadingWriter()
    read = read_prompts(prompts)
    if is_url(writer):
        return EndpointWriter(writer, writer_model, read)
    model = load()
    if writer == DEFAULT:
        return DecoderWriter(f"decoder of {model.name or 'the model'}", causal_lm(model), model.tokenizer.llm, read)
    return DecoderWriter(writer, *open_language_model(writer, model.device), read)


def _written(answer: str, passage: Passage) -> Written | None:
    question = clean(answer)
    return Written(question, passage.text) if question else None
