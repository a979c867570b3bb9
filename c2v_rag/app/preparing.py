"""Prepare a search method while the page shows the progress."""

from __future__ import annotations

from collections.abc import Iterator

from c2v_rag.app import render
from c2v_rag.app.search import Searcher
from c2v_rag.app.task import Task


def prepare(searcher: Searcher, method: str) -> Iterator[str]:
    """Yield the page's progress until the method is prepared; nothing if it is already. Raises the method's error."""
    if searcher.is_prepared(method):
        return
    preparing = Task[None](lambda task: searcher.prepare(method, task.report))
    for progress in preparing.watch():
        yield render.progress(progress.message, progress.done)
    preparing.result()
