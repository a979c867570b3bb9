"""Search in a collection by vectors, by words, or by both; scores, filters, groups, diversity.

N chunks of the collection, D embedding columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from c2v_rag.index.chunking import INTERNAL_KEYS
from c2v_rag.index.diversity import mmr_order, scaled
from c2v_rag.index.lexical import LexicalIndex
from c2v_rag.index.neighbours import with_neighbours
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

    `vector` (D,) is needed by a dense and a hybrid search. `sample` as in `hybrid_hits`.
    """
    where, mmr, first = options.get("where"), options.get("mmr"), options.get("offset", 0)

    def best(number: int) -> list[Hit]:
        if lexical is None:
            return dense_hits(collection, vector, number, where)
        if sample is None:
            return lexical_hits(collection, lexical, query, number, where)
        return hybrid_hits(collection, lexical, query, vector, sample, number, where)

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
    by_id = _get(collection, [hit.id for hit in hits])
    hits = [hit for hit in hits if hit.id in by_id]
    if not hits:
        return []
    scores = np.array([hit.score for hit in hits])
    embeddings = np.stack([by_id[hit.id][2] for hit in hits])
    return [hits[at] for at in mmr_order(scores if is_cosine else scaled(scores), embeddings, mmr, number)]


def dense_hits(
    collection: Collection, vector: np.ndarray | None, number: int, where: Mapping[str, Any] | None
) -> list[Hit]:
    """The chunks most similar to a query's embedding (D,), best first."""
    include: Any = ["documents", "metadatas", "distances"]
    query: Any = np.asarray(vector)[None]
    found = collection.query(query_embeddings=query, n_results=number, include=include, where=_filter(where))
    columns: Any = [found["ids"], found["distances"], found["documents"], found["metadatas"]]
    return [
        Hit(id, 1.0 - distance, text, _shown(metadata), {"cosine": 1.0 - distance})
        for id, distance, text, metadata in zip(*(column[0] for column in columns), strict=True)
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
        for text, metadata, _ in [by_id[id]]
    ]


def hybrid_hits(
    collection: Collection,
    lexical: LexicalIndex,
    query: str,
    vector: np.ndarray | None,
    sample: np.ndarray,
    number: int,
    where: Mapping[str, Any] | None,
) -> list[Hit]:
    """Candidates of both kinds, best first by `hybrid_scores`. `vector` is (D,).

    Mean and deviation of the query's cosines are estimated from `sample` (S, D), embeddings of random chunks.
    """
    assert vector is not None
    depth = max(CANDIDATES, number)
    dense = {hit.id: hit for hit in dense_hits(collection, vector, depth, where)}
    words, max_score = lexical.scores_and_max(query)
    allowed = _allowed_scores(collection, lexical, words, where)
    best = [lexical.ids[row] for row in np.argsort(-allowed, kind="stable")[:depth] if allowed[row] > 0]
    by_id = _get(collection, [id for id in best if id not in dense])
    found: list[tuple[str, str, dict[str, Any], float, float]] = []
    for id in dict.fromkeys([*dense, *by_id]):
        if id in dense:
            text, metadata, cosine = dense[id].text, dense[id].metadata, dense[id].score
        else:
            text, metadata, embedding = by_id[id]
            cosine = float(embedding @ vector)
        bm25 = float(words[lexical.rows[id]]) if id in lexical.rows else 0.0
        found.append((id, text, metadata, cosine, bm25))
    cosines, bm25_scores = (np.array([row[column] for row in found]) for column in (3, 4))
    scores = hybrid_scores(cosines, bm25_scores, sample @ vector, max_score)
    hits = [
        Hit(id, float(score), text, metadata, {"cosine": cosine, "bm25": bm25})
        for (id, text, metadata, cosine, bm25), score in zip(found, scores, strict=True)
    ]
    return sorted(hits, key=lambda hit: -hit.score)[:number]


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


def _get(collection: Collection, ids: list[str]) -> dict[str, tuple[str, dict[str, Any], np.ndarray]]:
    """Text, metadata and embedding by id."""
    if not ids:
        return {}
    include: Any = ["documents", "metadatas", "embeddings"]
    page = collection.get(ids=ids, include=include)
    columns: Any = zip(page["ids"], page["documents"], page["metadatas"], page["embeddings"], strict=True)  # type: ignore[arg-type]
    return {id: (text, _shown(metadata), np.asarray(embedding)) for id, text, metadata, embedding in columns}
