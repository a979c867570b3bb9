"""Requests and responses of the server: OpenAI's embeddings API, extended for queries and documents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

TOP_K = 5
QUERY_SUFFIX = ":query"
InputType = Literal["query", "search_query", "document", "search_document", "passage"]


def check_model_name(name: str) -> str:
    """Return the name. Raise ValueError if it ends in ":query", the suffix that asks for query embeddings."""
    if name.endswith(QUERY_SUFFIX):
        raise ValueError(
            f"A served model cannot be called {name!r}: clients add {QUERY_SUFFIX!r} to its name for query embeddings. "
            f"Choose another with --name, such as {name.removesuffix(QUERY_SUFFIX) or 'model'!r}."
        )
    return name


def _texts(value: Any) -> Any:
    """A list of texts from one text or a list of texts.

    Raises ValueError for token ids: they come from another tokenizer.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise ValueError(
            "token ids are not understood here, send text. "
            "With langchain-openai: OpenAIEmbeddings(check_embedding_ctx_length=False)"
        )
    return value


Texts = Annotated[list[str], BeforeValidator(_texts), Field(min_length=1)]


class _Request(BaseModel):
    """Base of the request models. Unknown fields are ignored: OpenAI's clients and proxies send fields of their own."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class EmbeddingsRequest(_Request):
    """Body of `POST /v1/embeddings`. Optional fields may be null, as OpenAI's clients send them.

    `model`: NAME embeds documents, NAME:query embeds queries; `input_type` has precedence over the name.
    `encoding_format`: "float" unless given. `instruction`: the text before every input; unless given, queries get the
    model's own and documents get none. `truncate`: texts that are too long are cut instead of refused.
    """

    model: str
    input: Texts
    input_type: InputType | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    instruction: Annotated[str, Field(max_length=4000)] | None = None
    truncate: bool | None = None


class TokenizeRequest(_Request):
    """Body of `POST /v1/tokenize`, answered with the number of tokens of each text. `ends`: where they end instead."""

    model: str
    input: Texts
    ends: bool = False


class SearchRequest(BaseModel):
    """Body of `POST /v1/search`. Optional fields may be null. Unknown fields are refused.

    `top_k`: number of hits, 5 unless given. `collection`: the server's own unless given. `sentences`: false leaves out
    the best sentence of each passage. The other fields are options of `VectorIndex.search`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    query: Annotated[str, Field(min_length=1)]
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None
    mode: Literal["dense", "lexical", "hybrid"] | None = None
    where: dict[str, Any] | None = None
    min_score: float | None = None
    group_by: str | None = None
    offset: Annotated[int, Field(ge=0, le=10_000)] | None = None
    mmr: Annotated[float, Field(ge=0, le=1)] | None = None
    neighbours: Annotated[int, Field(ge=0, le=20)] | None = None
    collection: str | None = None
    sentences: bool | None = None


class _Response(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Embedding(_Response):
    """One embedding of a response. `embedding`: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Usage(_Response):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(_Response):
    data: list[Embedding]
    model: str
    usage: Usage
    object: Literal["list"] = "list"


class TokenizeResponse(_Response):
    """`counts`: tokens of each text. `max_tokens`: a text of up to so many tokens is not cut.

    `ends`: of each text, for decoder and encoder, the offset in characters at which each token ends, without special
    tokens. A request gets `ends` if it asked for them, else `counts`; the other is null, so that a text is tokenised
    once.
    """

    counts: list[int] | None = None
    max_tokens: int
    ends: list[list[list[int]]] | None = None


class Model(_Response):
    """One entry of `GET /v1/models`. Vectors of models with different `stamp` must not be mixed."""

    id: str
    created: int
    embedding_dim: int
    max_tokens: int
    max_inputs: int
    stamp: dict[str, str | int]
    object: Literal["model"] = "model"
    owned_by: str = "c2v-rag"


class Models(_Response):
    data: list[Model]
    object: Literal["list"] = "list"


class Sentence(_Response):
    """The best sentence of a passage: `text` is passage[start:end], in characters."""

    text: str
    start: int
    end: int


class SearchHit(_Response):
    """A passage that was found; the fields of `c2v_rag.Hit`, and its best sentence."""

    id: str
    score: float
    scores: dict[str, float]
    text: str
    metadata: dict[str, Any]
    before: str
    after: str
    sentence: Sentence | None


class SearchResponse(_Response):
    """`mode`, `collection`: what was searched, also where the request did not say it."""

    hits: list[SearchHit]
    mode: str
    collection: str
