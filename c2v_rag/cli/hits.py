"""Print the hits of a search: a table for people, or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from c2v_rag.index import Hit
    from c2v_rag.sentences import Sentence

SHOWN = 300  # characters of a passage
CONTEXT = 100  # of them, before its best sentence
_SENTENCE_STYLE = "bold yellow"


def hits_json(hits: Sequence[Hit], sentences: Sequence[Sentence | None]) -> str:
    """One JSON list; each hit has the field "sentence": an object with text, start and end, or null."""
    rows = [
        {**dataclasses.asdict(hit), "sentence": sentence and dataclasses.asdict(sentence)}
        for hit, sentence in zip(hits, sentences, strict=True)
    ]
    return json.dumps(rows, ensure_ascii=False)


def hits_table(query: str, hits: Sequence[Hit], sentences: Sequence[Sentence | None]) -> Table:
    """A row for each hit: score, source and place, and the passage with its best sentence marked."""
    from c2v_rag.index import location
    from c2v_rag.sentences import one_line

    table = Table("score", "source", "passage", title=Text(query), title_justify="left", pad_edge=False)
    for hit, sentence in zip(hits, sentences, strict=True):
        source = Text("\n".join(filter(None, map(one_line, (str(hit.metadata["source"]), location(hit.metadata))))))
        passage = _passage(hit.text, sentence)
        if hit.before or hit.after:
            passage = Text.assemble((one_line(hit.before), "dim"), " ", passage, " ", (one_line(hit.after), "dim"))
        table.add_row(f"{hit.score:.3f}", source, passage)
    return table


def _passage(text: str, sentence: Sentence | None) -> Text:
    """At most about 300 characters of the passage in one line, so that the marked sentence is among them."""
    from c2v_rag.sentences import one_line

    start, end = (sentence.start, sentence.end) if sentence else (0, 0)
    before, best, after = one_line(text[:start]), one_line(text[start:end]), one_line(text[end:])
    if len(before) > CONTEXT and len(before) + len(best) > SHOWN:
        before = "…" + before[-CONTEXT:]
    room = max(0, SHOWN - len(before) - len(best))
    if len(after) > room:
        after = after[:room] + "…"
    return Text(" ").join(part for part in (Text(before), Text(best, _SENTENCE_STYLE), Text(after)) if part)
