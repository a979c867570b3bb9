"""What goes over the wire: OpenAI's embeddings API, and what it lacks for queries and documents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

QUERY_SUFFIX = ":query"
InputType = Literal["query", "search_query", "document", "search_document", "passage"]


def _texts(value: Any) -> Any:
    """One text or a list of them, as a list. Token ids are refused: they are another tokenizer's."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise ValueError(
            "token ids are not understood here, send text. "
            "With langchain-openai: OpenAIEmbeddings(check_embedding_ctx_length=False)"
        )
    return value


Texts = Annotated[list[str], BeforeValidator(_texts), Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EmbeddingsRequest(_Strict):
    """`POST /v1/embeddings`.

    `model`: NAME embeds documents, NAME:query queries; `input_type` says it too and goes before. `instruction` is put
    before every text, the model's own before queries unless given. `truncate` cuts what is too long instead of
    refusing it. `user` is OpenAI's and not used.
    """

    model: str
    input: Texts
    input_type: InputType | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    instruction: Annotated[str, Field(max_length=4000)] | None = None
    truncate: bool = False
    user: str | None = None


class TokenizeRequest(_Strict):
    """`POST /v1/tokenize`: how many tokens each text has."""

    model: str
    input: Texts


class Embedding(_Strict):
    """`embedding`: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Usage(_Strict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(_Strict):
    data: list[Embedding]
    model: str
    usage: Usage
    object: Literal["list"] = "list"


class TokenizeResponse(_Strict):
    """`max_tokens`: the longest text that no part of the model cuts."""

    counts: list[int]
    max_tokens: int


class Model(_Strict):
    """One entry of `GET /v1/models`. `stamp` tells models apart whose vectors must not be mixed."""

    id: str
    created: int
    embedding_dim: int
    max_tokens: int
    max_inputs: int
    stamp: dict[str, str | int]
    object: Literal["model"] = "model"
    owned_by: str = "c2v-rag"


class Models(_Strict):
    data: list[Model]
    object: Literal["list"] = "list"
