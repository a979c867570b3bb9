"""HTML of an answer with citations and its passages. All texts are escaped in this module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from c2v_rag.app import render
from c2v_rag.app.asking import CITATION, cited, holds_no_answer
from c2v_rag.index import Hit, location

CSS = """
.c2v-answer { border: 1px solid var(--border-color-primary); border-left: 4px solid #0072b2; border-radius: 8px;
              padding: .9rem 1.1rem; margin-bottom: .5rem; }
.c2v-answer p { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 1.02rem; line-height: 1.55; margin: 0; }
.c2v-by { opacity: .7; font-size: .82rem; margin-top: .7rem; }
.c2v-no-answer { border-left-color: #e69f00; }
a.c2v-cite { background: #d6e4ff; color: #1e3a8a; border-radius: 4px; padding: 0 .3rem; font-size: .82em;
             font-weight: 600; text-decoration: none; margin: 0 .1rem; }
a.c2v-cite:hover { background: #1e3a8a; color: white; }
.c2v-read { opacity: .7; font-size: .85rem; margin: .9rem 0 .4rem; }
.c2v-hit:target { border-color: #0072b2; box-shadow: 0 0 0 2px #0072b2; }
.c2v-uncited { opacity: .65; } .c2v-uncited:target { opacity: 1; }
.c2v-caret { display: inline-block; width: .5em; height: 1em; background: currentColor; opacity: .5;
             vertical-align: text-bottom; animation: c2v-blink 1s steps(2) infinite; }
@keyframes c2v-blink { 50% { opacity: 0; } }
"""


def answer(text: str, hits: Sequence[Hit], writer: str, *, is_complete: bool) -> str:
    """The answer with links to the passages that it cites, the model that wrote it, and the passages it read.

    A citation of a passage that does not exist is no link. While the answer is not complete, a caret shows it.
    """
    has_none = is_complete and (holds_no_answer(text) or not text.strip())
    numbers = cited(text, len(hits))
    caret = "" if is_complete else '<span class="c2v-caret"></span>'
    body = f"<p>{_linked(text.strip(), len(hits))}{caret}</p>"
    notes = []
    if writer:
        notes.append(f"Written by {escape(writer)} from the passages below")
    if has_none:
        body = "<p>The passages that were found do not answer this question.</p>"
    elif is_complete and not numbers:
        notes.append("it cites no passage, so check it against them")
    by = (
        f'<div class="c2v-by">{"; ".join(notes)}.</div>'
        if notes
        else '<div class="c2v-by">Reading the passages …</div>'
    )
    passages = "".join(
        _passage(number, hit, is_dim=is_complete and bool(numbers) and number not in numbers)
        for number, hit in enumerate(hits, start=1)
    )
    kind = " c2v-no-answer" if has_none else ""
    return (
        f'<div class="c2v-answer{kind}" role="status">{body}{by}</div>'
        f'<div class="c2v-read">Passages that the model read</div>{passages}'
    )


def _linked(text: str, number: int) -> str:
    """The escaped text; the numbers in brackets that are passages are links to them."""

    def link(match: re.Match[str]) -> str:
        parts = re.split(r"\s*[,;]\s*", match[1])
        if not any(1 <= int(one) <= number for one in parts):
            return match[0]
        return "".join(
            f'<a class="c2v-cite" href="#c2v-passage-{int(one)}">{int(one)}</a>'
            if 1 <= int(one) <= number
            else f"[{one}]"
            for one in parts
        )

    return CITATION.sub(link, escape(text))


def _passage(number: int, hit: Hit, *, is_dim: bool) -> str:
    place = location(hit.metadata)
    where = f'<span class="c2v-place">{escape(place)}</span>' if place else ""
    dim = " c2v-uncited" if is_dim else ""
    return (
        f'<article class="c2v-hit{dim}" id="c2v-passage-{number}"><div class="c2v-head"><span class="c2v-rank">{number}'
        f'</span><span class="c2v-source">{escape(render.source_name(hit.metadata))}</span>{where}'
        f'<span class="c2v-score">{hit.score:.3f}</span></div>{render.passage(hit.text)}</article>'
    )
