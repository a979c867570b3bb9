"""Writers that use a language model: the model's own decoder, another local model, or an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from c2v_rag import inference
from c2v_rag.adapt.headings import HeadingWriter
from c2v_rag.adapt.passages import Passage
from c2v_rag.adapt.prompts import Prompt, read_prompts
from c2v_rag.adapt.questions import Writer, Written, clean
from c2v_rag.bases import quiet_transformers
from c2v_rag.generation import causal_lm
from c2v_rag.model import Causal2Vec
from c2v_rag.protocols import is_url

DEFAULT, HEADINGS = "default", "headings"
API_KEY_VARIABLE = "C2V_RAG_WRITER_API_KEY"
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
        self._special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)

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
        text = passage.text[:_PASSAGE_CHARACTERS]
        for token in self._special:
            text = text.replace(token, " ")
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        ids = self._tokenize(prompt, text)
        while longest is not None and len(ids) + _NEW_TOKENS > longest and prompt.examples:
            prompt = prompt.model_copy(update={"examples": prompt.examples[1:]})
            ids = self._tokenize(prompt, text)
        return ids if longest is None else ids[: longest - _NEW_TOKENS]

    def _tokenize(self, prompt: Prompt, text: str) -> list[int]:
        if self._tokenizer.chat_template is None:
            ids: Any = self._tokenizer(prompt.text(text), verbose=False)["input_ids"]
        else:
            chat = self._tokenizer.apply_chat_template(
                prompt.messages(text), add_generation_prompt=True, tokenize=False
            )
            ids = self._tokenizer(str(chat), add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]]) -> list[str]:
        width = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._model.device)
        generate: Any = self._model.generate
        written = generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=pad
        )
        return list(self._tokenizer.batch_decode(written[:, width:], skip_special_tokens=True))


class EndpointWriter:
    """Writes with a model behind an OpenAI-compatible server; `url` ends before /chat/completions.

    The passages are sent to this server. The key is read from the environment variable C2V_RAG_WRITER_API_KEY.
    Redirects are not followed. A request that the server cannot take is sent again, up to five times.

    Raises ValueError for a URL with a password, for a server with several models when none is named, and with the
    server's message when it refuses; ConnectionError when it does not answer.
    """

    def __init__(self, url: str, model: str | None, prompts: Mapping[str, Prompt]) -> None:
        import httpx

        if urlsplit(url).username is not None:
            raise ValueError(f"Give the writer's key in the environment variable {API_KEY_VARIABLE}, not in its URL.")
        self._url = url.rstrip("/").removesuffix("/chat/completions")
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=False)
        self._prompts = prompts
        self._model = model or self._only_model()
        self.name = f"{self._model} at {self._url}"
        self.kinds = tuple(prompts)

    def write(self, passages: Sequence[Passage], kinds: Sequence[str]) -> list[Written | None]:
        """See `Writer.write`. Up to four requests run at the same time."""
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as threads:
            answers = list(threads.map(self._answer, passages, kinds))
        return [_written(answer, passage) for answer, passage in zip(answers, passages, strict=True)]

    def _answer(self, passage: Passage, kind: str) -> str:
        messages = self._prompts[kind].messages(passage.text[:_PASSAGE_CHARACTERS])
        found = self._request(
            "POST", "/chat/completions", {"model": self._model, "messages": messages, "temperature": 0}
        )
        try:
            return str(found["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self._url} gave an answer without choices[0].message.content.") from error

    def _only_model(self) -> str:
        listed = self._request("GET", "/models", None)
        names = [str(entry["id"]) for entry in listed.get("data") or []] if isinstance(listed, dict) else []
        if len(names) != 1:
            raise ValueError(
                f"{self._url} has {len(names)} models{': ' if names else ''}{', '.join(names[:8])}. "
                "Name one with --writer-model."
            )
        return names[0]

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        import httpx
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
        try:
            response = retrying(self._client.request, method, self._url + path, json=body)
        except httpx.HTTPError as error:
            raise ConnectionError(f"No answer from {self._url} ({error or type(error).__name__}).") from error
        if response.status_code != 200:
            hint = f" Give the key in {API_KEY_VARIABLE}." if response.status_code in (401, 403) else ""
            raise ValueError(f"{self._url} answered {response.status_code}: {response.text[:200]}{hint}")
        try:
            return response.json()
        except ValueError as error:
            raise ValueError(f"{self._url} did not answer with JSON: {response.text[:200]!r}") from error


def writer_kinds(writer: str, prompts: Path | None) -> tuple[str, ...]:
    """The kinds of questions that a writer of this name writes. Raises ValueError for a file of prompts that is bad."""
    return HeadingWriter.kinds if writer == HEADINGS else tuple(read_prompts(prompts))


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
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            writer, dtype=inference.default_dtype(model.device), use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(writer, trust_remote_code=False)
    return DecoderWriter(writer, loaded.to(model.device).eval(), tokenizer, read)


def _written(answer: str, passage: Passage) -> Written | None:
    question = clean(answer)
    return Written(question, passage.text) if question else None
