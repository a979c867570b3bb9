"""Search in a collection by vectors, by words, or by both; scores, filters, groups, diversity.

N chunks of the collection, D embedding columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from c2v_rag.index.chunking import INTERNAL_KEYS
from c2v_rag.index.diversity import mmr_order, scaled, unit_rows
from c2v_rag.index.lexical import LexicalIndex
from c2v_rag.index.neighbours import with_neighbours
from c2v_rag.index.pages import pages_of
from c2v_rag.index.query import MMR_DEPTH, RERANK_DEPTH, Hit, SearchOptions
from c2v_rag.index.reranking import rerank

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

CANDIDATES = 100  # best chunks by vectors and by words that a hybrid search scores
# Of the squared share of BM25's maximum. On held-out halves of the queries of three sets, this sum was better than
# every fixed weight of two standardised scores (docs/retrieval.md).
LEXICAL_WEIGHT = 40.0


def search_collection(
    collection: Collection,
    query: str,
    vector: np.ndarray | None,
    lexical: LexicalIndex | None,
    sample: np.ndarray | None,
    top_k: int,
    options: SearchOptions,
) -> list[Hit]:
    """The hits of one query: dense without `lexical`, lexical without `sample`, else hybrid.

    `vector` (D,) is needed by a dense and a hybrid search. `sample` as in `HybridRanking`.
    """
    where, mmr, first = options.get("where"), options.get("mmr"), options.get("offset", 0)
    best: Callable[[int], list[Hit]]
    if lexical is None:
        best = functools.partial(dense_hits, collection, vector, where=where)
    elif sample is None:
        best = functools.partial(lexical_hits, collection, lexical, query, where=where)
    else:
        assert vector is not None
        best = HybridRanking(collection, lexical, query, vector, sample, where).best
    wanted, total, reranker = first + top_k, collection.count(), options.get("rerank")
    ranked = best
    if reranker is not None and total:
        reranked = rerank(reranker, query, best(max(wanted, options.get("rerank_depth", RERANK_DEPTH))))
        ranked, total = (lambda number: reranked), len(reranked)
    number = wanted if mmr is None else max(wanted, options.get("mmr_depth", MMR_DEPTH))
    hits = select(ranked, total, number, options)
    if mmr is not None and hits:
        hits = _diverse(collection, hits, mmr, wanted, is_cosine=lexical is None and reranker is None)
    hits = hits[first:wanted]
    neighbours = options.get("neighbours", 0)
    return with_neighbours(collection, hits, neighbours) if neighbours else hits


def select(best: Callable[[int], list[Hit]], total: int, wanted: int, options: SearchOptions) -> list[Hit]:
    """Of the hits that `best(number)` gives, best first, the first `wanted` that `min_score` and `group_by` leave.

    More and more hits are asked for until there are `wanted` groups. `total`: number of chunks.
    """
    min_score, group_by = options.get("min_score"), options.get("group_by")
    number = wanted
    while total:
        hits = best(number)
        is_complete = len(hits) < number or number >= total
        if min_score is not None:
            is_complete = is_complete or hits[-1].score < min_score
            hits = [hit for hit in hits if hit.score >= min_score]
        if group_by is not None:
            hits = _best_of_each(hits, group_by)
        if is_complete or group_by is None or len(hits) >= wanted:
            return hits[:wanted]
        number *= 4
    return []


def _diverse(collection: Collection, hits: Sequence[Hit], mmr: float, number: int, *, is_cosine: bool) -> list[Hit]:
    """`number` of the hits, chosen by maximal marginal relevance; those deleted meanwhile are left out."""
    by_id = _get_embeddings(collection, [hit.id for hit in hits])
    hits = [hit for hit in hits if hit.id in by_id]
    if not hits:
        return []
    scores = np.array([hit.score for hit in hits])
    embeddings = np.stack([by_id[hit.id] for hit in hits])
    return [hits[at] for at in mmr_order(scores if is_cosine else scaled(scores), embeddings, mmr, number)]


def dense_hits(
    collection: Collection, vector: np.ndarray | None, number: int, where: Mapping[str, Any] | None
) -> list[Hit]:
    """The chunks most similar to a query's embedding (D,), best first."""
    query: Any = np.asarray(vector)[None]
    found: Any = collection.query(query_embeddings=query, n_results=number, include=["distances"], where=_filter(where))
    by_id = _get(collection, found["ids"][0])
    return [
        Hit(id, 1.0 - distance, *by_id[id], {"cosine": 1.0 - distance})
        for id, distance in zip(found["ids"][0], found["distances"][0], strict=True)
        if id in by_id
    ]


def lexical_hits(
    collection: Collection, lexical: LexicalIndex, query: str, number: int, where: Mapping[str, Any] | None
) -> list[Hit]:
    """The chunks that share words with the query, best first by BM25."""
    scores = _allowed_scores(collection, lexical, lexical.scores(query), where)
    rows = [int(row) for row in np.argsort(-scores, kind="stable")[:number] if scores[row] > 0]
    by_id = _get(collection, [lexical.ids[row] for row in rows])
    return [
        Hit(id, float(scores[row]), text, metadata, {"bm25": float(scores[row])})
        for row in rows
        if (id := lexical.ids[row]) in by_id
        for text, metadata in [by_id[id]]
    ]


class HybridRanking:
    """The candidates of both kinds for one query, best first by `hybrid_scores`. `vector` is (D,).

    Mean and deviation of the query's cosines are estimated from `sample` (S, D), embeddings of random chunks with
    length 1. Ids are ranked once; texts and metadata are read only of the chunks that `best` returns.
    """

    def __init__(
        self,
        collection: Collection,
        lexical: LexicalIndex,
        query: str,
        vector: np.ndarray,
        sample: np.ndarray,
        where: Mapping[str, Any] | None,
    ) -> None:
        self._collection = collection
        self._lexical = lexical
        self._vector = unit_rows(vector)  # Chroma's cosines do not depend on lengths
        self._where = where
        self._sample = sample
        self._words, self._max_score = lexical.scores_and_max(query)
        self._allowed = _allowed_scores(collection, lexical, self._words, where)
        self._depth = 0
        self._ranked: list[tuple[str, float, dict[str, float]]] = []
        self._texts: dict[str, tuple[str, dict[str, Any]]] = {}

    def best(self, number: int) -> list[Hit]:
        """The first `number` hits, without those that are deleted meanwhile."""
        if (depth := max(CANDIDATES, number)) > self._depth:
            self._depth = depth
            self._ranked = self._rank(depth)
        ranked = self._ranked[:number]
        missing = [id for id, _, _ in ranked if id not in self._texts]
        self._texts |= _get(self._collection, missing)
        return [Hit(id, score, *self._texts[id], parts) for id, score, parts in ranked if id in self._texts]

    def _rank(self, depth: int) -> list[tuple[str, float, dict[str, float]]]:
        """(id, score, its parts) of the `depth` best chunks by vectors and of the `depth` best by words."""
        query: Any = self._vector[None]
        found: Any = self._collection.query(
            query_embeddings=query, n_results=depth, include=["distances"], where=_filter(self._where)
        )
        cosines = {id: 1.0 - distance for id, distance in zip(found["ids"][0], found["distances"][0], strict=True)}
        best = np.argsort(-self._allowed, kind="stable")[:depth]
        by_words = [self._lexical.ids[row] for row in best if self._allowed[row] > 0]
        others = _get_embeddings(self._collection, [id for id in by_words if id not in cosines])
        cosines |= {id: float(unit_rows(embedding) @ self._vector) for id, embedding in others.items()}
        rows = self._lexical.rows
        bm25 = [float(self._words[rows[id]]) if id in rows else 0.0 for id in cosines]
        scores = hybrid_scores(
            np.array([*cosines.values()]), np.array(bm25), self._sample @ self._vector, self._max_score
        )
        parts = [{"cosine": cosine, "bm25": words} for cosine, words in zip(cosines.values(), bm25, strict=True)]
        ranked = zip(cosines, scores.tolist(), parts, strict=True)
        return sorted(ranked, key=lambda one: -one[1])


def hybrid_scores(cosines: np.ndarray, bm25: np.ndarray, all_cosines: np.ndarray, max_score: float) -> np.ndarray:
    """(K,) of K passages: z(cosine) + `LEXICAL_WEIGHT` x (BM25 / its maximum for the query)^2.

    z: shifted and scaled by the mean and standard deviation of `all_cosines`, the query's with the whole collection or
    a sample of it. `max_score`: `LexicalIndex.max_score`. If a query's words are rare in the passages, its BM25 scores
    are far below the maximum and hardly count.
    """
    mean, deviation = (float(all_cosines.mean()), float(all_cosines.std())) if len(all_cosines) else (0.0, 0.0)
    standardised = (cosines - mean) / deviation if deviation > 0 else np.zeros(len(cosines))
    share = bm25 / max_score if max_score > 0 else np.zeros(len(bm25))
    scores: np.ndarray = standardised + LEXICAL_WEIGHT * share**2
    return scores


def _best_of_each(hits: Sequence[Hit], key: str) -> list[Hit]:
    """The first hit for each value of the metadata `key`; hits without it are groups of their own."""
    found: dict[object, Hit] = {}
    for hit in hits:
        found.setdefault(hit.metadata.get(key, (hit.id,)), hit)
    return list(found.values())


def _shown(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A chunk's metadata without the entries that only the index uses."""
    return {key: value for key, value in metadata.items() if key not in INTERNAL_KEYS}


def _filter(where: Mapping[str, Any] | None) -> Any:
    return dict(where) if where else None


def _allowed_scores(
    collection: Collection, lexical: LexicalIndex, scores: np.ndarray, where: Mapping[str, Any] | None
) -> np.ndarray:
    """(N,) BM25 scores; 0 for chunks that the filter excludes."""
    if not where:
        return scores
    ids = collection.get(where=_filter(where), include=[])["ids"]
    rows = [lexical.rows[id] for id in ids if id in lexical.rows]
    allowed = np.zeros_like(scores)
    allowed[rows] = scores[rows]
    return allowed


def _get(collection: Collection, ids: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Text and metadata by id."""
    return {
        id: (text, _shown(metadata))
        for page in pages_of(collection, ids, ["documents", "metadatas"])
        for id, text, metadata in zip(page["ids"], page["documents"], page["metadatas"], strict=True)
    }


def _get_embeddings(collection: Collection, ids: list[str]) -> dict[str, np.ndarray]:
    """Embeddings (D,) by id."""
    return {
        id: np.asarray(embedding)
        for page in pages_of(collection, ids, ["embeddings"])
        for id, embedding in zip(page["ids"], page["embeddings"], strict=True)
    }
