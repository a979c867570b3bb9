"""Cut a section into passages of limited length, at paragraphs, lines, sentences or words.

Lengths are counted in tokens, from the offsets of one tokenizer pass over the whole text.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence

# Places to cut, best first: after a paragraph, a line, a sentence, a word.
# Chinese and Japanese sentences end without a space.
_SENTENCE_END = r"[.!?…][\"')\]»”’]*\s+|[。！？][\"')\]»”’」』）]*\s*"
_PLACES = tuple(map(re.compile, (r"\n\s*\n", r"\n", _SENTENCE_END, r"\s+")))
# A cut leaves at least this share of the limit, so that passages are not short because of an early paragraph.
_LEAST_SHARE = 0.5
_WORD = re.compile(r"\w+|[^\w\s]")

TokenEnds = Sequence[Sequence[int]]  # for each tokenizer, the end offset of each token


def cut(text: str, start: int, end: int, ends: TokenEnds, limit: int, overlap: int) -> Iterator[tuple[int, int]]:
    """(start, end) of passages of `text[start:end]` without white space around them, of at most `limit` tokens.

    A passage begins up to `overlap` tokens before the end of the one before, at a line, sentence or word. A word that
    is longer than the limit is torn.
    """
    while start < end:
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if start >= end:
            return
        last = _reach(ends, start, end, limit)
        stop = end if last >= end else _best_place(text, start + int((last - start) * _LEAST_SHARE), last)
        stop = max(stop, start + 1)
        yield start, start + len(text[start:stop].rstrip())
        if stop >= end:
            return
        start = max(start + 1, _overlap_start(text, start, stop, ends, overlap))


def estimated_ends(
    texts: Sequence[str], count_tokens: Callable[[Sequence[str]], Sequence[int]] | None
) -> list[TokenEnds]:
    """Token ends for an embedder without `token_ends`: every word as many tokens as it has alone.

    Without `count_tokens`, a word has a token for every 4 characters.
    """
    found = [list(_WORD.finditer(text)) for text in texts]
    words = sorted({word[0] for one in found for word in one})
    if count_tokens is None:
        tokens = {word: len(word) // 4 + 1 for word in words}
    else:
        (empty, *counts) = count_tokens(["", *words])
        tokens = {word: max(1, number - empty) for word, number in zip(words, counts, strict=True)}
    return [
        [
            [
                word.start() + (part + 1) * len(word[0]) // tokens[word[0]]
                for word in one
                for part in range(tokens[word[0]])
            ]
        ]
        for one in found
    ]


def count(ends: TokenEnds, start: int, end: int) -> int:
    """Number of tokens that end in `start` < offset <= `end`, the largest of the tokenizers."""
    return max((bisect_right(one, end) - bisect_right(one, start) for one in ends), default=0)


def _reach(ends: TokenEnds, start: int, end: int, limit: int) -> int:
    """The largest offset up to which no tokenizer has more than `limit` tokens from `start`."""
    reach = end
    for one in ends:
        first_too_many = bisect_right(one, start) + limit
        if first_too_many < len(one) and one[first_too_many] <= end:
            before = bisect_left(one, one[first_too_many]) - 1  # a character may be several tokens with one end
            reach = min(reach, one[before] if before >= 0 else start)
    return max(reach, start + 1)


def _best_place(text: str, least: int, most: int) -> int:
    """The last of the best places to cut between two offsets; `most` if there is none."""
    for place in _PLACES:
        found = 0
        for match in place.finditer(text, least, most + 1):
            if match.end() <= most or text[match.start() : most].isspace():
                found = min(match.end(), most)
        if found > least:
            return found
    return most


def _overlap_start(text: str, start: int, stop: int, ends: TokenEnds, overlap: int) -> int:
    """The first line, sentence or word that begins at most `overlap` tokens before `stop`; `stop` if none does."""
    if not overlap:
        return stop
    earliest = max(
        (one[max(0, bisect_left(one, stop) - overlap)] for one in ends if one and one[0] < stop), default=stop
    )
    earliest = max(earliest, start + 1)
    for place in _PLACES[1:]:
        for match in place.finditer(text, max(start, earliest - 1), stop):
            if earliest <= match.end() < stop:
                return match.end()
    return stop
