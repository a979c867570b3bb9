"""Mining of hard negatives: passages that a model or BM25 ranks high for a query although they do not answer it.

Q queries, N passages of the corpus, D columns of an embedding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from c2v_rag.finetune.data import Pair, PairSet, read_pair_set
from c2v_rag.fusion import reciprocal_rank_fusion
from c2v_rag.index import Chunk, ChunkSettings, LexicalIndex, Present, new_chunks
from c2v_rag.index.searching import hybrid_scores
from c2v_rag.model import Causal2Vec
from c2v_rag.sources import read_sources

MODEL, HYBRID = "model", "hybrid"  # names of teachers: the model's cosine, and the score of a hybrid search
_QUERIES_AT_ONCE = 256


def mine(
    data: Path,
    output: Path,
    model: Causal2Vec,
    *,
    num_negatives: int = 4,
    range_min: int = 0,
    range_max: int = 50,
    relative_margin: float = 0.05,
    max_similarity: float | None = None,
    instruction: str | None = None,
    corpus: Iterable[Chunk] = (),
    bm25: bool = False,
    teacher: str = MODEL,
) -> int:
    """Write the pairs of `data` with `negatives` and scores to `output` (JSONL); returns how many pairs got them.

    `data` is one file as `read_pair_set` reads it. The passages that are searched are its positives and `corpus`, whose
    embeddings are computed where they are missing. Candidates are the passages at ranks `range_min` to `range_max` by
    the model's vectors and, with `bm25`, also those by BM25; the positives of the query are not ranked. They are sorted
    by cosine, and with `bm25` by the reciprocal rank fusion of both.

    A candidate is left out if it probably answers the query: the teacher scores it above (1 - `relative_margin`) x the
    positive's score, or its similarity to the positive is above `max_similarity`. `teacher`: "model", its cosine;
    "hybrid", the score of a hybrid search; or the name of a sentence-transformers model. The teacher's scores are
    written as `positive_score` and `negative_scores`. A pair with fewer than `num_negatives` left is written without
    any. If the set has an instruction, it is written to the .json file beside `output`.

    Raises ValueError for ranks or an output that cannot be, FileNotFoundError if the output's folder does not exist.
    """
    if output.suffix != ".jsonl":
        raise ValueError(f"{output}: the output must end in .jsonl.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output}: the folder {output.parent} does not exist. Create it first.")
    if not 0 <= range_min < range_max:
        raise ValueError(f"range_min must be from 0 to below range_max; got {range_min} and {range_max}.")
    pairs = read_pair_set(data.parent, data.stem, instruction=instruction)
    passages = _Passages(pairs, corpus, model, bm25=bm25 or teacher == HYBRID)
    scorer = _Scorer(teacher, passages, model)
    positives: dict[str, set[str]] = {}
    for pair in pairs.pairs:
        positives.setdefault(pair.query, set()).add(pair.positive)
    found = 0
    aside = output.with_name(f".{output.name}.part")
    with aside.open("w", encoding="utf-8") as file:
        for pair, vector in _embedded(pairs, model):
            row: dict[str, object] = {"query": pair.query, "positive": pair.positive}
            if pair.document:
                row["document"] = pair.document
            cosines = passages.vectors @ vector
            lexical = passages.lexical
            words, max_score = (None, 0.0) if lexical is None else lexical.scores_and_max(pair.query)
            answers = [passages.rows[text] for text in {*positives[pair.query], pair.query} if text in passages.rows]
            candidates = _candidates(cosines, words if bm25 else None, answers, range_min, range_max)
            positive = passages.rows[pair.positive]
            scores = scorer(pair.query, [positive, *candidates], cosines, words, max_score)
            limit = scores[0] - relative_margin * abs(scores[0])  # scores of a hybrid search can be negative
            usable = [
                (candidate, score)
                for candidate, score in zip(candidates, scores[1:], strict=True)
                if score <= limit and not passages.is_near(candidate, positive, max_similarity)
            ][:num_negatives]
            if len(usable) == num_negatives:
                found += 1
                row["negatives"] = [passages.texts[candidate] for candidate, _ in usable]
                row["positive_score"] = round(float(scores[0]), 5)
                row["negative_scores"] = [round(float(score), 5) for _, score in usable]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    aside.replace(output)
    if pairs.instruction is not None:
        about = output.with_suffix(".json")
        known = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        about.write_text(json.dumps(known | {"instruction": pairs.instruction}, ensure_ascii=False), encoding="utf-8")
    return found


def corpus_of(sources: Sequence[Path], model: Causal2Vec) -> Iterator[Chunk]:
    """The chunks of files and folders, as `c2v-rag index --no-header` cuts them. Errors as in `read_sources`."""
    present, settings = Present(), ChunkSettings(header=False)
    for document in read_sources(sources):
        for chunks in new_chunks([document], model, settings, None, present, Counter()):
            yield from chunks


class _Passages:
    """The different passages that are searched, with their vectors (N, D) and BM25 index; `rows`: their positions."""

    def __init__(self, pairs: PairSet, corpus: Iterable[Chunk], model: Causal2Vec, *, bm25: bool) -> None:
        known: dict[str, np.ndarray | None] = dict.fromkeys(pair.positive for pair in pairs.pairs)
        for chunk in corpus:
            if known.get(chunk.text) is None:
                known[chunk.text] = chunk.embedding
        self.texts = list(known)
        self.rows = {text: row for row, text in enumerate(self.texts)}
        self.vectors = np.empty((len(known), model.embedding_dim), dtype=np.float32)
        missing = [row for row, vector in enumerate(known.values()) if vector is None]
        for row, vector in enumerate(known.values()):
            if vector is not None:
                self.vectors[row] = vector
        self.vectors[missing] = model.encode_document(
            [self.texts[row] for row in missing], on_truncate="ignore", show_progress=True
        )
        ids = [str(row) for row in range(len(self.texts))]
        self.lexical = LexicalIndex.build(ids, self.texts) if bm25 else None

    def is_near(self, candidate: int, positive: int, max_similarity: float | None) -> bool:
        if max_similarity is None:
            return False
        return float(self.vectors[candidate] @ self.vectors[positive]) > max_similarity


class _Scorer:
    """A teacher's scores of passages for a query."""

    def __init__(self, teacher: str, passages: _Passages, model: Causal2Vec) -> None:
        self._teacher = teacher
        if teacher not in (MODEL, HYBRID):
            from sentence_transformers import SentenceTransformer

            self._model = SentenceTransformer(teacher, device=str(model.device))
            self._vectors = self._model.encode_document(
                passages.texts, normalize_embeddings=True, show_progress_bar=True
            )

    def __call__(
        self, query: str, rows: Sequence[int], cosines: np.ndarray, words: np.ndarray | None, max_score: float
    ) -> np.ndarray:
        """The scores of the passages at `rows`; `cosines` and BM25's `words` (N,) and `max_score` are known already."""
        if self._teacher == MODEL:
            return cosines[rows]
        if self._teacher == HYBRID:
            assert words is not None
            return hybrid_scores(cosines[rows], words[rows], cosines, max_score)
        vector = self._model.encode_query([query], normalize_embeddings=True, show_progress_bar=False)[0]
        return np.asarray(self._vectors[rows] @ vector)


def _embedded(pairs: PairSet, model: Causal2Vec) -> Iterator[tuple[Pair, np.ndarray]]:
    """Each pair with the embedding (D,) of its query."""
    for start in range(0, len(pairs.pairs), _QUERIES_AT_ONCE):
        part = pairs.pairs[start : start + _QUERIES_AT_ONCE]
        queries = [pair.query for pair in part]
        yield from zip(
            part, model.encode_query(queries, instruction=pairs.instruction, on_truncate="ignore"), strict=True
        )


def _candidates(
    cosines: np.ndarray, words: np.ndarray | None, answers: Sequence[int], range_min: int, range_max: int
) -> list[int]:
    """Positions of the passages at these ranks by `cosines` (N,) and by BM25's `words` (N,), best first."""

    def best(scores: np.ndarray) -> list[int]:
        scores = scores.astype(np.float64)
        scores[list(answers)] = -np.inf
        number = min(range_max, len(scores) - len(answers))
        first = np.argpartition(-scores, number - 1)[:number] if 0 < number < len(scores) else np.arange(len(scores))
        ranked = first[np.argsort(-scores[first], kind="stable")][:number]
        return [int(row) for row in ranked[range_min:]]

    if words is None:
        return best(cosines)
    by_words = [row for row in best(words) if words[row] > 0]
    rankings = [[str(row) for row in ranking] for ranking in (best(cosines), by_words)]
    return [int(row) for row in reciprocal_rank_fusion(rankings)]
