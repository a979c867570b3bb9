"""Questions made without a model: the heading, the title, the summary line or the first sentence of a passage."""

from __future__ import annotations

import re
from collections.abc import Sequence

from c2v_rag.adapt.passages import MIN_WORDS, Passage
from c2v_rag.adapt.questions import Written
from c2v_rag.index.chunking import SECTION_SEPARATOR
from c2v_rag.sentences import one_line

_MARKDOWN = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
_UNDERLINED = re.compile(r"^(\S.*)\n([=\-~^\"'`*+#])\2{2,}[ \t]*$", re.MULTILINE)  # reStructuredText, Markdown
_DOCSTRINGS = ("module", "class", "function", "property")  # kinds of documents of "python-docs"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


class HeadingWriter:
    """Takes a line of the passage as its question, and removes this line from the passage.

    Without the removal the question would be a copy of a line of its passage, which teaches nothing.
    """

    name = "headings"
    kinds: tuple[str, ...] = ("heading",)

    def write(self, passages: Sequence[Passage], kinds: Sequence[str]) -> list[Written | None]:
        """For each passage its heading and the rest; None where no heading or no rest is left."""
        return [take_heading(passage) for passage in passages]


def take_heading(passage: Passage) -> Written | None:
    """The best line of these, in this order, and the passage without it: the summary line of a docstring, a heading in
    the passage, the heading above it or the title of its document, the first sentence."""
    path = passage.header.split(SECTION_SEPARATOR) if passage.header else []
    body = passage.body.strip()
    is_docstring = passage.metadata.get("kind") in _DOCSTRINGS
    if is_docstring and not passage.metadata.get("start"):
        signature, _, doc = body.partition("\n\n")
        question, rest = _first_sentence(doc)
        if len(rest.split()) < MIN_WORDS:
            return None  # the signature alone does not answer a question
        body = f"{signature}\n\n{rest}"
    elif heading := _MARKDOWN.search(body) or _UNDERLINED.search(body):
        question = heading[1]
        body = body[: heading.start()] + body[heading.end() :]
        path = [part for part in path if part.casefold() != question.casefold()]
    elif path and not is_docstring:
        question = path.pop()
    else:
        question, body = _first_sentence(body)
    question, body = one_line(question), body.strip()
    if len(body.split()) < MIN_WORDS or not question:
        return None
    header = SECTION_SEPARATOR.join(path)
    return Written(question, f"{header}\n\n{body}" if header else body)


def _first_sentence(text: str) -> tuple[str, str]:
    sentence, *rest = _SENTENCE_END.split(text.strip(), maxsplit=1)
    return sentence, rest[0] if rest else ""
