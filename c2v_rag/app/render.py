"""HTML of results, map and messages. All texts are escaped in this module."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

import numpy as np

from c2v_rag.app.adding import FILE_NAME, UPLOAD
from c2v_rag.index import Chunk, Hit, location
from c2v_rag.sentences import Sentence

# Okabe and Ito's palette, which colour-blind people can tell apart; grey for all further groups.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#b8a500", "#795548")
OTHER_COLOUR = "#9e9e9e"
PASSAGE_SHOWN = 600  # characters
MAP_WIDTH, MAP_HEIGHT = 900, 560
NOTHING_INDEXED = "Nothing is indexed yet. Open “Add documents” and give it some files."

CSS = """
.c2v-columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 1.2rem; }
.c2v-columns h3 { margin: 0 0 .1rem; }
.c2v-how { opacity: .7; font-size: .85rem; margin-bottom: .6rem; }
.c2v-hit { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .8rem;
           margin-bottom: .7rem; }
.c2v-head { display: flex; gap: .6rem; align-items: baseline; flex-wrap: wrap; }
.c2v-rank { font-weight: 700; }
.c2v-source { font-family: var(--font-mono); font-size: .85rem; overflow-wrap: anywhere; flex: 1; }
.c2v-place { opacity: .75; font-size: .85rem; }
.c2v-score { font-variant-numeric: tabular-nums; opacity: .75; font-size: .85rem; }
.c2v-text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; margin-top: .4rem; }
.c2v-text summary { cursor: pointer; opacity: .7; font-size: .8rem; }
.c2v-text mark { background: #ffe08a; color: #222; padding: 0 .1rem; border-radius: 3px; }
.c2v-moved { font-size: .75rem; border-radius: 9px; padding: 0 .5rem; background: var(--background-fill-secondary); }
.c2v-up { background: #c9f0d8; color: #14532d; } .c2v-down { background: #fbdcc4; color: #7c2d12; }
.c2v-only { background: #d6e4ff; color: #1e3a8a; }
.c2v-message { padding: .7rem .9rem; border-radius: 8px; background: var(--background-fill-secondary); }
.c2v-error { border-left: 4px solid #d55e00; } .c2v-done { border-left: 4px solid #009e73; }
.c2v-busy { border-left: 4px solid #0072b2; }
.c2v-message progress { display: block; width: 100%; height: .5rem; margin-top: .5rem; appearance: none; border: none;
                        border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
.c2v-message progress::-webkit-progress-bar { background: var(--border-color-primary); }
.c2v-message progress::-webkit-progress-value { background: #0072b2; }
.c2v-message progress::-moz-progress-bar { background: #0072b2; }
.c2v-map circle { cursor: pointer; stroke: white; stroke-width: .6; fill-opacity: .85; }
.c2v-map circle:hover { stroke: black; stroke-width: 1.5; }
.c2v-legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .85rem; margin-top: .4rem; }
.c2v-legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .3rem; }
.c2v-about td { padding: .2rem 1.2rem .2rem 0; vertical-align: top; overflow-wrap: anywhere; }
"""


def message(text: str, kind: str = "") -> str:
    """A message box. `kind` is "error", "done" or "". Line breaks are kept."""
    return f'<div class="c2v-message c2v-{kind}" role="status">{escape(text).replace(chr(10), "<br>")}</div>'


def progress(text: str, done: float | None) -> str:
    """A message with a progress bar, filled to the share `done`. If that is None, the bar moves without an end."""
    value = "" if done is None else f' value="{done:.3f}"'
    return (
        f'<div class="c2v-message c2v-busy" role="status">{escape(text or "Starting …")}'
        f"<progress{value}></progress></div>"
    )


def results(
    columns: Sequence[tuple[str, str, str, Sequence[Hit], Sequence[Sentence | None]]], notices: Sequence[str] = ()
) -> str:
    """One or two columns of hits; each is (method, its scoring, its timing, hits, sentences to highlight)."""
    parts = []
    for number, (method, how, timing, hits, sentences) in enumerate(columns):
        other_ranks = (
            {hit.id: rank for rank, hit in enumerate(columns[1 - number][3], 1)} if len(columns) == 2 else None
        )
        hits_html = "".join(
            _hit(rank, hit, sentence, _rank_change(rank, hit.id, other_ranks))
            for rank, (hit, sentence) in enumerate(zip(hits, sentences, strict=True), 1)
        )
        hits_html = hits_html or message("Nothing found: no passage shares a word with the query.")
        parts.append(
            f'<section><h3>{escape(method)}</h3><div class="c2v-how">{escape(how)} · {escape(timing)}</div>'
            f"{hits_html}</section>"
        )
    return "".join(map(message, notices)) + f'<div class="c2v-columns">{"".join(parts)}</div>'


def _rank_change(rank: int, id: str, other_ranks: Mapping[str, int] | None) -> str:
    """A badge with this passage's rank in the other column, compared with its rank here."""
    if other_ranks is None:
        return ""
    if id not in other_ranks:
        return '<span class="c2v-moved c2v-only" title="not among the other method’s results">only here</span>'
    other_rank = other_ranks[id]
    difference = other_rank - rank
    if not difference:
        return '<span class="c2v-moved" title="the same rank in both columns">=</span>'
    arrow, kind = ("▲", "up") if difference > 0 else ("▼", "down")
    title = f"rank {other_rank} in the other column"
    return f'<span class="c2v-moved c2v-{kind}" title="{title}">{arrow} {abs(difference)}</span>'


def _hit(rank: int, hit: Hit, sentence: Sentence | None, badge: str) -> str:
    source, name = escape(str(hit.metadata["source"])), escape(source_name(hit.metadata))
    return (
        f'<article class="c2v-hit"><div class="c2v-head"><span class="c2v-rank">{rank}</span>'
        f'<span class="c2v-source" title="{source}">{name}</span>{_place(hit.metadata)}{badge}'
        f'<span class="c2v-score">{hit.score:.3f}</span></div>{passage(hit.text, sentence)}</article>'
    )


def _place(metadata: Mapping[str, Any]) -> str:
    """The passage's page, row and heading, if it has any."""
    place = location(metadata)
    return f'<span class="c2v-place">{escape(place)}</span>' if place else ""


def passage(text: str, sentence: Sentence | None = None) -> str:
    """A text with `sentence` marked. A long text is cut around it; a click shows the whole text."""
    span = (sentence.start, sentence.end) if sentence else (0, 0)
    if len(text) <= PASSAGE_SHOWN:
        return f'<div class="c2v-text">{_marked(text, span, 0, len(text))}</div>'
    first = max(0, min(span[0] - PASSAGE_SHOWN // 3, len(text) - PASSAGE_SHOWN))
    first = text.rfind(" ", 0, first) + 1 if first else 0
    last = max(span[1], first + PASSAGE_SHOWN)
    return (
        f'<div class="c2v-text">{"… " * (first > 0)}{_marked(text, span, first, last)}{" …" * (last < len(text))}</div>'
        f'<details class="c2v-text"><summary>whole passage</summary>{_marked(text, span, 0, len(text))}</details>'
    )


def _marked(text: str, span: tuple[int, int], first: int, last: int) -> str:
    """text[first:last], escaped, with the sentence at `span` marked."""
    start, end = span
    if end <= start:
        return escape(text[first:last])
    return f"{escape(text[first:start])}<mark>{escape(text[start:end])}</mark>{escape(text[end:last])}"


def chunk(one: Chunk) -> str:
    """A passage with its source, for a click on the map."""
    return (
        f'<article class="c2v-hit"><div class="c2v-head"><span class="c2v-source">{escape(source_name(one.metadata))}'
        f"</span></div>{passage(one.text)}</article>"
    )


def source_name(metadata: Mapping[str, Any]) -> str:
    """A passage's source as the page shows it: the file name of an upload, else the source unchanged."""
    source = str(metadata["source"])
    return str(metadata.get(FILE_NAME, source)) if source.startswith(UPLOAD) else source


def source_group(source: str) -> str:
    """The group of a source; a group has one colour on the map: a file's folder, or the first part of a dotted name."""
    if "/" in source or "\\" in source:
        return PurePath(source).parent.name or source
    return source.partition(".")[0]


def map_svg(chunks: Sequence[Chunk], points: np.ndarray) -> str:
    """An SVG scatter plot of `points` (n, 2), coloured by group of source; each circle's data-id is its chunk's id."""
    groups = [source_group(source_name(chunk.metadata)) for chunk in chunks]
    if len(set(groups)) == 1:  # all in one folder: one colour for each file
        groups = [PurePath(source_name(chunk.metadata)).name for chunk in chunks]
    named = [group for group, _ in Counter(groups).most_common(len(COLOURS))]
    colour = dict(zip(named, COLOURS, strict=False))
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 14
    unit = (points - low) / np.where(high > low, high - low, 1.0)
    x = margin + unit[:, 0] * (MAP_WIDTH - 2 * margin)
    y = margin + (1 - unit[:, 1]) * (MAP_HEIGHT - 2 * margin)
    radius = 5 if len(chunks) < 500 else 3.5
    circles = "".join(
        f'<circle cx="{x[i]:.1f}" cy="{y[i]:.1f}" r="{radius}" fill="{colour.get(groups[i], OTHER_COLOUR)}" '
        f'data-id="{escape(chunk.id)}"><title>{escape(source_name(chunk.metadata))}</title></circle>'
        for i, chunk in enumerate(chunks)
    )
    legend = [(colour[name], name) for name in named]
    if len(set(groups)) > len(named):
        legend.append((OTHER_COLOUR, "other"))
    swatches = "".join(f'<span><i style="background:{one}"></i>{escape(name)}</span>' for one, name in legend)
    return (
        f'<svg class="c2v-map" viewBox="0 0 {MAP_WIDTH} {MAP_HEIGHT}" width="100%" role="img" '
        f'aria-label="Map of passages">{circles}</svg><div class="c2v-legend">{swatches}</div>'
    )


def table(rows: Mapping[str, Any]) -> str:
    body = "".join(
        f"<tr><td><b>{escape(name)}</b></td><td>{escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f'<table class="c2v-about">{body}</table>'


def milliseconds(seconds: float) -> str:
    return f"{math.ceil(1000 * seconds):,} ms"
