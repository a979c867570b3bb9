"""Sections of documents, and passages cut out of them."""

from __future__ import annotations

import itertools
import random

import pytest

from c2v_rag.index.cutting import count, cut, estimated_ends
from c2v_rag.index.sections import title_and_sections
from c2v_rag.sources.document import Format

MARKDOWN = """Before any heading.

# Bread

Needs yeast.

## Flour

### White flour

Ground without the bran.

```
# not a heading
```

Salt
====

Two grams.
"""
RST = """=====
Bread
=====

Needs yeast.

Flour
-----

+----+
|cell|
+----+

White flour
~~~~~~~~~~~

Ground.

Salt
----

Two grams.
"""
PYTHON = '''"""Bake."""

import os


@cached
def oven(heat):
    return heat


class Bread:
    """A loaf."""

    salt = 2

    async def rise(self):
        pass


loaf = Bread()
'''


@pytest.mark.parametrize(
    ("text", "format", "title", "paths"),
    [
        (MARKDOWN, "markdown", "", [(), ("Bread",), ("Bread", "Flour", "White flour"), ("Salt",)]),
        (RST, "rst", "Bread", [("Bread",), ("Bread", "Flour"), ("Bread", "Flour", "White flour"), ("Bread", "Salt")]),
        (PYTHON, "python", "", [(), ("oven",), ("Bread",), ("Bread", "rise"), ()]),
        ("# only\n\n## headings", "markdown", "only", [("only", "headings")]),
        ("def broken(:", "python", "", [()]),
        ("# Not Markdown", "text", "", [()]),
        ("", "markdown", "", [()]),
    ],
)
def test_sections_follow_the_structure_and_leave_nothing_out(
    text: str, format: Format, title: str, paths: list[tuple[str, ...]]
) -> None:
    found_title, found = title_and_sections(text, format)
    assert found_title == title
    assert [section.path for section in found] == paths
    assert "".join(text[section.start : section.end] for section in found) == text


def test_a_section_begins_with_its_heading_or_decorator() -> None:
    _, found = title_and_sections(MARKDOWN, "markdown")
    assert MARKDOWN[found[2].start : found[2].end].startswith("## Flour\n\n### White flour")
    _, found = title_and_sections(PYTHON, "python")
    assert PYTHON[found[1].start : found[1].end].strip().startswith("@cached\ndef oven")


@pytest.mark.parametrize("other", ["\f", "\v", "\x1c", "\x85", "\u2028"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_where_python_and_markdown_end_them(other: str, end: str) -> None:
    code = end.join(["import os", "\f", "def first():", f"    return '{other}'", "", "def last():", "    return 2"])
    _, found = title_and_sections(code, "python")
    assert code[found[-1].start :].strip() == f"def last():{end}    return 2"
    text = f"# One{end}{end}a{other}b{end}{end}# Two{end}{end}c"
    _, found = title_and_sections(text, "markdown")
    assert [text[one.start : one.end] for one in found] == [f"# One{end}{end}a{other}b{end}{end}", f"# Two{end}{end}c"]
    text = f"One{end}==={end}{end}a{other}b{end}{end}Two{end}==={end}{end}c"
    _, found = title_and_sections(text, "rst")
    assert text[found[-1].start :] == f"Two{end}==={end}{end}c"


def words_text(seed: int) -> str:
    rng = random.Random(seed)
    parts = [rng.choice(["word", "a", "longer-word", "end.", "Is it?", "\n", "\n\n", "汉字", "🙂"]) for _ in range(400)]
    return " ".join(parts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("overlap", [0, 4])
def test_passages_are_within_the_limit_and_together_hold_every_word(seed: int, overlap: int) -> None:
    text = words_text(seed)
    (ends,) = estimated_ends([text], None)
    start, end = 30, len(text) - 25
    passages = list(cut(text, start, end, ends, 20, overlap))
    assert len(passages) > 20
    assert all(count(ends, first, last) <= 20 for first, last in passages)
    assert all(text[first:last] == text[first:last].strip() for first, last in passages)
    covered = {offset for first, last in passages for offset in range(first, last)}
    assert all(text[offset].isspace() for offset in set(range(start, end)) - covered)
    overlapping = sum(second[0] < first[1] for first, second in itertools.pairwise(passages))
    assert overlapping > 0 if overlap else overlapping == 0
    assert all(count(ends, second[0], first[1]) <= max(overlap, 1) for first, second in itertools.pairwise(passages))


def test_a_passage_ends_with_a_paragraph_or_a_sentence_and_tears_only_long_words() -> None:
    text = "One two three. Four five six seven.\n\nEight nine ten. " + "x" * 200
    (ends,) = estimated_ends([text], None)
    passages = [text[first:last] for first, last in cut(text, 0, len(text), ends, 14, 0)]
    assert passages[0] == "One two three. Four five six seven."
    assert passages[1].startswith("Eight nine ten.")
    assert "".join(passages[1:]).replace("Eight nine ten.", "").strip() == "x" * 200

    text = "Bread needs yeast and time. A heap keeps the least item first in its list"
    (ends,) = estimated_ends([text], None)
    assert next(cut(text, 0, len(text), ends, 12, 0)) == (0, len("Bread needs yeast and time."))


def test_words_are_counted_once_by_an_embedder_without_offsets() -> None:
    calls = []

    def count_tokens(texts: list[str]) -> list[int]:
        calls.append(list(texts))
        return [2 + len(text) // 2 for text in texts]

    ends = estimated_ends(["four four", "six666"], count_tokens)  # type: ignore[arg-type]
    assert calls == [["", "four", "six666"]]
    assert ends == [[[2, 4, 7, 9]], [[2, 4, 6]]]
