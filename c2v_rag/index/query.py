"""A search's options and its hits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, cast, get_args, runtime_checkable

SearchMode = Literal["dense", "lexical", "hybrid"]
DEFAULT_MODE: SearchMode = "hybrid"  # of index, command line, page, server and retrievers
MMR_DEPTH = 50
RERANK_DEPTH = 50


@runtime_checkable
class PairScorer(Protocol):
    """The member of sentence-transformers' `CrossEncoder` that is used: a score for each pair of query and text."""

    def predict(self, pairs: Any, /, **options: Any) -> Any: ...


Scorer: TypeAlias = Callable[[str, Sequence[str]], Any]
Reranker: TypeAlias = str | PairScorer | Scorer


@dataclasses.dataclass(frozen=True)
class Hit:
    """A chunk that was found. `metadata`: its "source" and the document's metadata.

    `score`: the cosine similarity of a dense search, BM25's score of a lexical one, a sum of both of a hybrid one, the
    reranker's score if there is one. Hits are sorted by it, except with `mmr`. `scores` has those that were computed,
    as "cosine", "bm25" and "rerank".
    `before`, `after`: the text around the passage in its source, if `neighbours` were asked for; else empty.
    """

    id: str
    score: float
    text: str
    metadata: dict[str, Any]
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    before: str = ""
    after: str = ""

    @property
    def context(self) -> str:
        """`before`, `text` and `after` as one text."""
        return self.before + self.text + self.after


class SearchOptions(TypedDict, total=False):
    """Options of every search.

    `where`: Chroma's metadata filter, such as {"source": "a.txt"}. `min_score`: leave out hits with a lower score.
    `group_by`: only the best chunk for each value of a metadata key, such as "source". `offset`: skip the first hits.

    `mmr`: from 0 to 1; choose hits that differ from each other by maximal marginal relevance (Carbonell and Goldstein,
    1998). Each next hit has the largest `mmr` x relevance - (1 - `mmr`) x its largest cosine similarity to a hit chosen
    before. 1 keeps the order by score. It chooses among the `mmr_depth` best hits (50 unless given). Relevance is the
    cosine of a dense search; other scores are scaled to the range 0 to 1 over these hits.

    `rerank`: score the `rerank_depth` best hits again (50 unless given) and sort them by these scores, before all other
    options apply; only these hits can be found then. A sentence-transformers `CrossEncoder`, its name or folder (needs
    c2v-rag[rerank]), or a function `(query, texts) -> scores`.

    `neighbours`: also read this number of chunks before and after each hit, from the same source, as `Hit.before` and
    `Hit.after`. Chunks are ordered by their metadata "start". Hits of collections whose chunks have no "start" get no
    neighbours; the log says so.
    """

    where: Mapping[str, Any] | None
    min_score: float | None
    group_by: str | None
    offset: int
    mmr: float | None
    mmr_depth: int
    neighbours: int
    rerank: Reranker | None
    rerank_depth: int


def location(metadata: Mapping[str, Any]) -> str:
    """A chunk's place in its source for people: its page, its row, its heading; "" if its metadata has none of them."""
    named = [f"{key} {metadata[key]}" for key in ("page", "row") if metadata.get(key) is not None]
    return ", ".join([*named, *([str(metadata["section"])] if metadata.get("section") else [])])


def check_mode(mode: str | None) -> SearchMode:
    """The mode; for None the default mode. ValueError for one that does not exist."""
    if mode is None:
        return DEFAULT_MODE
    if mode not in get_args(SearchMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(SearchMode))}; got {mode!r}.")
    return cast(SearchMode, mode)


def check_options(top_k: int, options: SearchOptions) -> None:
    """Raise TypeError for an option that does not exist, ValueError for a number that is out of its range."""
    if unknown := sorted(options.keys() - SearchOptions.__annotations__.keys()):
        known = ", ".join(SearchOptions.__annotations__)
        raise TypeError(f"There is no search option {', '.join(map(repr, unknown))}. The options are {known}.")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}.")
    for name, least in (("offset", 0), ("neighbours", 0), ("mmr_depth", 1), ("rerank_depth", 1)):
        value = cast(int, options.get(name, least))
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")
    mmr = options.get("mmr")
    if mmr is not None and not 0 <= mmr <= 1:
        raise ValueError(f"mmr must be from 0 (only diversity) to 1 (only relevance); got {mmr}.")
