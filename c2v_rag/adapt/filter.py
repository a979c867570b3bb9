"""Keep the questions that teach something: a hybrid search finds their passage, and they fit few other passages."""

from __future__ import annotations

import dataclasses
import logging
import re
import unicodedata
from collections import Counter

import numpy as np

from c2v_rag.adapt.corpus import Corpus, Ranker, rank_of
from c2v_rag.adapt.questions import Question
from c2v_rag.index.lexical import character_pairs

logger = logging.getLogger(__name__)

SHORT = "too short"
COPY = "copies a sentence of its passage"
LOOP = "repeats the same words"
REPEATED = "the same question was written for several passages"
LANGUAGE = "not in the language of its passage"
NOT_FOUND = "a hybrid search does not find its passage"
UNSPECIFIC = "fits many passages equally well"
REASONS = (SHORT, COPY, LOOP, REPEATED, LANGUAGE, NOT_FOUND, UNSPECIFIC)
FOUND_AMONG = 10  # first hits of a hybrid search that must contain the passage
_LENIENCY = 5  # times as many for dev and held-out questions, so that those the model does not answer well yet stay
_SAME_SCORE = 0.25  # difference of hybrid scores, in standard deviations of the cosines, that distinguishes nothing
_COPIED_WORDS = 5
_LOOP_WORDS = 6  # a small language model can repeat itself until its answer is cut off
_MIN_LETTERS_OF_LANGUAGE = 12
_LANGUAGE_MARGIN = 15.0  # log-likelihood; short lists of technical words differ by up to about 6 at random


@dataclasses.dataclass(frozen=True)
class Filtered:
    """`kept`: positions of the questions in the corpus; `dropped`: each other question with the reason."""

    kept: list[int]
    dropped: list[tuple[Question, str]]

    def counts(self) -> dict[str, int]:
        """The number of dropped questions by reason; reasons that dropped nothing are left out."""
        found = Counter(reason for _, reason in self.dropped)
        return {reason: found[reason] for reason in REASONS if found[reason]}


def filter_questions(
    corpus: Corpus, ranker: Ranker, vectors: np.ndarray, *, found_among: int = FOUND_AMONG
) -> Filtered:
    """Check every question; `vectors` (Q, D) are the embeddings of the questions.

    `found_among`: the passage must be among this many first hits of the hybrid ranking, five times as many for dev and
    held-out questions.
    """
    repeated = Counter(_words(question.question) for question in corpus.questions)
    kept: list[int] = []
    dropped: list[tuple[Question, str]] = []
    language = _LanguageCheck()
    for number, (question, position) in enumerate(zip(corpus.questions, corpus.positions, strict=True)):
        reason = _text_reason(question, language)
        if reason is None and repeated[_words(question.question)] > 1:
            reason = REPEATED
        if reason is None:
            depth = found_among if question.split == "training" else _LENIENCY * found_among
            scores = ranker.hybrid(question.question, vectors[number])
            if rank_of(scores, position) > depth:
                reason = NOT_FOUND
            elif int((scores >= scores[position] - _SAME_SCORE).sum()) > depth:
                reason = UNSPECIFIC
        if reason is None:
            kept.append(number)
        else:
            dropped.append((question, reason))
    return Filtered(kept, dropped)


def _text_reason(question: Question, language: _LanguageCheck) -> str | None:
    text = _words(question.question)
    words = text.split()
    if len(words) < (1 if question.kind == "heading" else 2) or len(text) < 3:
        return SHORT
    if len(words) >= _COPIED_WORDS and f" {text} " in f" {_words(question.passage)} ":
        return COPY
    if len(words) >= _LOOP_WORDS and len(set(words)) <= len(words) / 2:
        return LOOP
    if not language.agree(question.question, question.passage):
        return LANGUAGE
    return None


def _words(text: str) -> str:
    """The words in lower case with single spaces, without punctuation; see `character_pairs`."""
    return " ".join(re.findall(r"\w+", character_pairs(unicodedata.normalize("NFKC", text).casefold())))


class _LanguageCheck:
    """Compares the languages of two texts with py3langid; without that package, everything agrees."""

    def __init__(self) -> None:
        try:
            import py3langid
        except ModuleNotFoundError as error:
            if error.name != "py3langid":
                raise
            logger.warning(
                'Languages of questions are not checked, which needs py3langid: pip install "c2v-rag[adapt]"'
            )
            self._rank = None
        else:
            self._rank = py3langid.rank

    def agree(self, question: str, passage: str) -> bool:
        """False only if another language explains the question much better than the passage's language does."""
        if self._rank is None or sum(letter.isalpha() for letter in question) < _MIN_LETTERS_OF_LANGUAGE:
            return True
        of_passage = self._rank(passage)[0][0]
        likelihoods = dict(self._rank(question))
        return bool(max(likelihoods.values()) - likelihoods[of_passage] < _LANGUAGE_MARGIN)
