"""Language models that write text: one in this process, or one behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx

if TYPE_CHECKING:
    import torch

API_KEY_VARIABLE = "C2V_RAG_WRITER_API_KEY"


def open_language_model(name: str, device: torch.device) -> tuple[Any, Any]:
    """(causal language model, tokenizer) of a folder or Hub id; safetensors only, and no code of the model is run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from c2v_rag.bases import quiet_transformers
    from c2v_rag.inference import default_dtype

    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=default_dtype(device), use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return loaded.to(device).eval(), tokenizer


class ChatTokenizer:
    """Turns a chat into the token ids of a prompt, with the tokenizer's template if it has one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)

    @property
    def pad_token_id(self) -> int:
        """The padding token, or EOS where there is none."""
        pad = self._tokenizer.pad_token_id
        return int(self._tokenizer.eos_token_id if pad is None else pad)

    def without_special(self, text: str) -> str:
        """The text without the names of special tokens, which would end its message."""
        for token in self._special:
            text = text.replace(token, " ")
        return text

    def token_ids(self, messages: Sequence[Mapping[str, str]], plain: str) -> list[int]:
        """The ids of `messages`; of the text `plain` where the tokenizer has no chat template."""
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer(plain, verbose=False)["input_ids"])
        text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"])


def max_positions(model: Any) -> int | None:
    """The longest sequence of a model; None if its config does not say."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


class ChatServer:
    """A model behind an OpenAI-compatible server; `url` ends before /chat/completions.

    What is asked is sent to this server. The key is read from the environment variable C2V_RAG_WRITER_API_KEY.
    Redirects are not followed. `model=None` takes the server's only model.

    Raises ValueError for a URL with a password, for a server with several models when none is named, and with the
    server's message when it refuses; ConnectionError when it does not answer.
    """

    def __init__(self, url: str, model: str | None, *, timeout_seconds: float) -> None:
        if urlsplit(url).username is not None:
            raise ValueError(f"Give the writer's key in the environment variable {API_KEY_VARIABLE}, not in its URL.")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(headers=headers, timeout=timeout_seconds, follow_redirects=False)
        self.model = model or self._only_model()
        self.name = f"{self.model} at {self.url}"

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON value that the server answers with."""
        try:
            response = self.send(method, path, body)
        except httpx.HTTPError as error:
            raise self.no_answer(error) from error
        self.check(response)
        try:
            return response.json()
        except ValueError as error:
            raise ValueError(f"{self.url} did not answer with JSON: {response.text[:200]!r}") from error

    def send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """Send one request. A subclass may repeat it."""
        return self.client.request(method, self.url + path, json=body)

    def no_answer(self, error: httpx.HTTPError) -> ConnectionError:
        return ConnectionError(f"No answer from {self.url} ({error or type(error).__name__}).")

    def check(self, response: httpx.Response) -> None:
        """Raise ValueError for an answer that is not 200."""
        if response.status_code == 200:
            return
        hint = f" Give the key in {API_KEY_VARIABLE}." if response.status_code in (401, 403) else ""
        text = response.read().decode("utf-8", "replace")[:200]
        raise ValueError(f"{self.url} answered {response.status_code}: {text}{hint}")

    def _only_model(self) -> str:
        listed = self.request("GET", "/models")
        names = [str(entry["id"]) for entry in listed.get("data") or []] if isinstance(listed, dict) else []
        if len(names) != 1:
            raise ValueError(
                f"{self.url} has {len(names)} models{': ' if names else ''}{', '.join(names[:8])}. "
                "Name one with --writer-model."
            )
        return names[0]
