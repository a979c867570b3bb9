"""Questions made without a model: the heading, the title, the summary line or the first sentence of a passage."""

from __future__ import annotations

import re
from collections.abc import Sequence

from c2v_rag.adapt.passages import MIN_WORDS, Passage
from c2v_rag.adapt.questions import Written

_MARKDOWN = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
_UNDERLINED = re.compile(r"^(\S.*)\n([=\-~^\"'`*+#])\2{2,}[ \t]*$", re.MULTILINE)  # reStructuredText, Markdown
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
    """The best line of these, in this order, and the passage without it: a heading in the passage, the summary line
    of a docstring, the section or the title of its document, the first sentence."""
    text = passage.text.strip()
    if passage.metadata.get("kind") in ("module", "class", "function", "property"):
        signature, _, doc = text.partition("\n\n")
        summary, rest = _first_sentence(doc)
        found = summary, f"{signature}\n\n{rest}"
        if len(rest.split()) < MIN_WORDS:
            return None  # the signature alone does not answer a question
    elif heading := _MARKDOWN.search(text) or _UNDERLINED.search(text):
        found = heading[1], text[: heading.start()] + text[heading.end() :]
    elif section := str(passage.metadata.get("section") or passage.metadata.get("title") or ""):
        found = section.rpartition(" > ")[2], text
    else:
        found = _first_sentence(text)
    question, rest = " ".join(found[0].split()), found[1].strip()
    if len(rest.split()) < MIN_WORDS or not question:
        return None
    return Written(question, rest)


def _first_sentence(text: str) -> tuple[str, str]:
    sentence, *rest = _SENTENCE_END.split(text.strip(), maxsplit=1)
    return sentence, rest[0] if rest else ""
