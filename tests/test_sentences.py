"""The best sentence of a passage, and how it is shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from c2v_rag.cli.hits import hits_json, hits_table
from c2v_rag.index import Hit
from c2v_rag.sentences import Sentence, best_sentences, sentences
from tests.plain import Letters
from tests.tiny import tiny_model

TEXTS = ["Bread needs yeast. The moon is far.", "", "Copper conducts. The moon is far. Glass breaks."]


def test_texts_are_split_into_sentences() -> None:
    text = "  One is here. Two, e.g. this?\n\n  Three has no end  "
    assert [text[start:end] for start, end in sentences(text)] == [
        "One is here.", "Two, e.g. this?", "Three has no end",
    ]  # fmt: skip
    assert sentences(" \n ") == []


def test_chinese_sentences_end_without_a_space() -> None:
    text = "要复制文件夹，请使用它。「堆是树。」是吗？ 不知道"
    assert [text[start:end] for start, end in sentences(text)] == [
        "要复制文件夹，请使用它。", "「堆是树。」是吗？", "不知道",
    ]  # fmt: skip
    (found,) = best_sentences("堆是什么", [text], None)
    assert found is not None
    assert found.text == "「堆是树。」是吗？"


@pytest.mark.parametrize("kind", ["causal2vec", "any embedder", "words"])
def test_the_sentence_most_similar_to_the_query_is_chosen(kind: str) -> None:
    model: Any = {"causal2vec": tiny_model, "any embedder": Letters, "words": lambda: None}[kind]()
    found = best_sentences("The moon is far.", TEXTS, model)
    assert [one and one.text for one in found] == ["The moon is far.", None, "The moon is far."]
    assert all(one is None or text[one.start : one.end] == one.text for text, one in zip(TEXTS, found, strict=True))
    assert best_sentences("anything", [], model) == []


def test_by_words_no_sentence_is_chosen_where_no_word_is_shared() -> None:
    assert best_sentences("zebra", TEXTS, None) == [None, None, None]


def hit(text: str, **fields: Any) -> Hit:
    return Hit(
        "1", 0.5, text, {"source": "[b]a.pdf[/b]", "page": 3, "section": "Baking > Bread"}, {"cosine": 0.5}, **fields
    )


def test_the_table_sends_no_control_characters_of_a_document_to_the_terminal() -> None:
    console = Console(force_terminal=True, width=200)
    with console.capture() as capture:
        console.print(hits_table("q", [hit("Before \x1b]0;title\x1b\\ after.\x9b2J", before="\x1b[31mred")], [None]))
    assert "]0;title" in capture.get()
    assert "\x1b]" not in capture.get()
    assert "\x1b[31m" not in capture.get()
    assert "\x9b" not in capture.get()


def test_json_holds_the_sentence_with_its_place_in_the_text() -> None:
    (row, other) = json.loads(hits_json([hit(TEXTS[0]), hit("")], [Sentence("The moon is far.", 19, 35), None]))
    assert row["sentence"] == {"text": "The moon is far.", "start": 19, "end": 35}
    assert row["text"][19:35] == row["sentence"]["text"]
    assert other["sentence"] is None


def test_the_table_marks_the_sentence_and_shows_place_and_neighbours() -> None:
    long = "word " * 200 + "The answer is [b]here[/b]." + " more" * 200
    start = long.index("The answer")
    console = Console(force_terminal=True, width=600, color_system="standard")
    with console.capture() as capture:
        console.print(
            hits_table(
                "[i]query[/i]",
                [hit(long, before="Just before.\n", after="Just after.")],
                [Sentence("The answer is [b]here[/b].", start, start + 26)],
            )
        )
    shown = capture.get()
    plain = Console(width=100)
    with plain.capture() as capture:
        plain.print(hits_table("q", [hit(long)], [Sentence("The answer is [b]here[/b].", start, start + 26)]))
    assert "[b]here[/b]." in " ".join(capture.get().split()), "texts are no markup, and the sentence is not cut off"
    assert capture.get().count("word") < 30
    assert "\x1b[1;33m" in shown
    for part in ("page 3", "Baking > Bread", "Just before.", "Just after.", "[i]query[/i]"):
        assert part in shown
