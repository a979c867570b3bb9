"""The tab "Ask": an answer to a question, written by a language model from passages, with citations of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import gradio as gr

from c2v_rag.app import render, render_answer
from c2v_rag.app.asking import chat
from c2v_rag.app.collections import Collections
from c2v_rag.app.errors import reason
from c2v_rag.app.preparing import prepare
from c2v_rag.app.search import DEFAULT_METHODS
from c2v_rag.app.writers import AnswerWriter
from c2v_rag.index import check_mode

_REDRAW_S = 0.1


class AskTab:
    """`open_writer` returns the language model; it is called at the first question."""

    def __init__(self, collections: Collections, open_writer: Callable[[], AnswerWriter]) -> None:
        self._collections = collections
        self._open_writer = open_writer

    def build(self, collection: gr.Dropdown) -> None:
        """Create the components inside the current tab. `collection`: the page's list of collections."""
        with gr.Row(equal_height=True):
            question = gr.Textbox(
                label="Question",
                placeholder="Ask your documents; a language model answers from the passages that are found",
                scale=6,
            )
            top_k = gr.Slider(1, 10, value=4, step=1, label="Passages to read", scale=2, min_width=150)
            with gr.Column(scale=1, min_width=90):
                ask = gr.Button("Ask", variant="primary")
                stop = gr.Button("Stop", variant="stop", size="sm")
        answer = gr.HTML(elem_id="answer")
        event = gr.on(
            [question.submit, ask.click],
            self.ask,
            [question, collection, top_k],
            answer,
            trigger_mode="always_last",
            show_progress="hidden",
            concurrency_limit=4,
            concurrency_id="ask",
        )
        stop.click(None, None, None, cancels=[event])

    def ask(self, question: str, collection: str | None, top_k: int) -> Iterator[str]:
        """Yield the passages, then the growing answer. An error is shown as a message."""
        question = question.strip()
        if not question:
            yield render.message("Type a question first, then press Enter.")
            return
        if collection is None:
            yield render.message(render.NOTHING_INDEXED)
            return
        try:
            searcher = self._collections.to_search(collection)
            method = DEFAULT_METHODS[check_mode(None)]
            yield from prepare(searcher, method)
            hits = searcher.search(method, question, int(top_k))
            if not hits:
                yield render.message("No passage was found, so there is nothing to answer from.")
                return
            yield render_answer.answer("", hits, "", is_complete=False)
            writer = self._open_writer()
            written, shown = "", 0.0
            for piece in writer.stream(chat(question, hits)):
                written += piece
                if time.monotonic() - shown >= _REDRAW_S:
                    yield render_answer.answer(written, hits, writer.name, is_complete=False)
                    shown = time.monotonic()
            yield render_answer.answer(written, hits, writer.name, is_complete=True)
        except Exception as error:
            yield render.message(reason(error), "error")
