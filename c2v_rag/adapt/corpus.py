"""The passages that questions are searched in, embedded by one model; scores by vectors, and by vectors and words.

N passages, D embedding columns, Q questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from c2v_rag.adapt.passages import Passage, Split, split_documents
from c2v_rag.adapt.questions import Question
from c2v_rag.adapt.work import Work
from c2v_rag.index import LexicalIndex
from c2v_rag.index.searching import hybrid_scores
from c2v_rag.protocols import Embedder

_BLOCK = 256  # passages that are embedded at a time; a killed run loses at most one block


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Passages, and questions with the positions (Q,) of their passages. Every question has a split."""

    passages: list[Passage]
    questions: list[Question]
    positions: list[int]

    @property
    def texts(self) -> list[str]:
        return [passage.text for passage in self.passages]


def assemble(passages: Sequence[Passage], questions: Sequence[Question], seed: int) -> Corpus:
    """The corpus of drawn passages and of the questions' own passages.

    A question with the `passage_id` of a drawn passage replaces its text: a passage without its heading, or one that a
    person has edited. Splits that a question does not name are chosen here. Raises what `split_documents` raises.
    """
    by_id = {passage.id: position for position, passage in enumerate(passages)}
    by_text = {(passage.document, passage.text): position for position, passage in enumerate(passages)}
    found, positions = list(passages), list[int]()
    for question in questions:
        position = by_id.get(question.passage_id, by_text.get((question.document, question.passage)))
        if position is None:
            position = by_text[question.document, question.passage] = len(found)
            name = question.passage_id or f"question {len(positions) + 1}"
            found.append(Passage(name, question.passage, question.document, {"source": question.document}))
        elif found[position].text != question.passage:
            found[position] = dataclasses.replace(found[position], header="", body=question.passage)
        positions.append(position)
    named: dict[str, Split] = {question.document: question.split for question in questions if question.split}
    # Passages that were drawn have their split already, unless there were none.
    drawn = {passage.document: passage.split for passage in passages}
    if any(question.document not in named | drawn for question in questions):
        drawn = {passage.document: passage.split for passage in split_documents(found, seed)}
    split_of = drawn | named
    return Corpus(
        [dataclasses.replace(passage, split=split_of[passage.document]) for passage in found],
        [dataclasses.replace(question, split=split_of[question.document]) for question in questions],
        positions,
    )


class Ranker:
    """Scores of all passages for a question. `embeddings` (N, D), rows of length 1."""

    def __init__(self, texts: Sequence[str], embeddings: np.ndarray) -> None:
        self._embeddings = embeddings
        self._lexical = LexicalIndex.build([str(position) for position in range(len(texts))], texts)

    def dense(self, vector: np.ndarray) -> np.ndarray:
        """(N,) cosine similarities; `vector` (D,)."""
        scores: np.ndarray = self._embeddings @ vector
        return scores

    def hybrid(self, question: str, vector: np.ndarray) -> np.ndarray:
        """(N,) the scores of a hybrid search (`index.searching.hybrid_scores`), for all passages."""
        cosines = self.dense(vector)
        bm25, max_score = self._lexical.scores_and_max(question)
        return hybrid_scores(cosines, bm25, cosines, max_score)


def rank_of(scores: np.ndarray, position: int) -> int:
    """The rank, from 1, of the passage at `position`; passages with the same score rank in their order."""
    own = scores[position]
    return 1 + int((scores > own).sum()) + int((scores[:position] == own).sum())


def embed_passages(model: Embedder, texts: Sequence[str], work: Work, name: str) -> np.ndarray:
    """(N, D) embeddings. Finished blocks are kept in `work`."""
    blocks = []
    for start in range(0, len(texts), _BLOCK):
        part = list(texts[start : start + _BLOCK])
        blocks.append(work.array(f"{name}/{start // _BLOCK:05d}", lambda part=part: model.encode_document(part)))  # type: ignore[misc]
    return np.concatenate(blocks)
