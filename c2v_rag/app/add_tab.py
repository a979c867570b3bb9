"""The tab "Add documents": uploads, folders and Python's documentation, with progress and Cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from c2v_rag.app import render
from c2v_rag.app.adding import Added, add
from c2v_rag.app.collections import Collections
from c2v_rag.app.errors import reason
from c2v_rag.app.task import Stopped, Task
from c2v_rag.sources import PYTHON_DOCS

_FILE_TYPES = [".txt", ".md", ".rst", ".html", ".htm", ".pdf", ".py"]


class AddTab:
    """`is_local`: whether only this machine reaches the page; then folders can be indexed and collections created."""

    def __init__(self, collections: Collections, is_local: Callable[[], bool]) -> None:
        self._collections = collections
        self._is_local = is_local
        self._runs: dict[str, Task[Added]] = {}  # by session id: the run that the Cancel button of this session stops

    def build(self, collection: gr.Dropdown, examples: gr.Row, choices: Callable[[str], tuple[Any, Any]]) -> None:
        """Create the components inside the current tab. After a run, `choices` updates `collection` and `examples`."""
        files = gr.File(label="Files: txt, md, rst, html, pdf, py", file_count="multiple", file_types=_FILE_TYPES)
        folder = gr.Textbox(label="Folder on this computer", placeholder="/home/me/notes", visible=self._is_local())
        python = gr.Checkbox(label="Also add the documentation of Python's standard library")
        replace = gr.Checkbox(label="Replace earlier uploads of the same file names")
        into = gr.Textbox(label="Add to this collection", value=self._collections.first)
        with gr.Row():
            start = gr.Button("Add", variant="primary")
            stop = gr.Button("Cancel", variant="stop")
        progress = gr.HTML(elem_id="progress")
        event = start.click(
            self.add,
            [files, folder, python, into, replace],
            progress,
            concurrency_limit=None,
            show_progress="hidden",
        )
        stop.click(self.cancel, None, None, queue=False)
        event.then(choices, into, [collection, examples])

    def add(
        self, files: list[str] | None, folder: str, python: bool, into: str, replace: bool, request: gr.Request
    ) -> Iterator[str]:
        """Index uploaded files, a folder or Python's documentation. Yield progress messages, then a report."""
        sources = [folder.strip()] if self._is_local() and folder.strip() else []
        sources += [PYTHON_DOCS] if python else []
        uploads = [Path(file) for file in files or []]
        if not uploads and not sources:
            yield render.message("Choose files, a folder or Python's documentation first.")
            return
        session = str(request.session_hash)
        if session in self._runs:
            yield render.message("This page is adding documents already. Cancel that first, or wait until it is done.")
            return
        try:
            searcher = self._collections.to_add(into.strip(), may_be_new=self._is_local())
            run = Task[Added](lambda task: add(task, searcher.index, uploads, sources, replace_uploads=replace))
        except Exception as error:
            yield render.message(reason(error), "error")
            return
        self._runs[session] = run
        try:
            for progress in run.watch():
                yield render.progress(progress.message, progress.done)
            yield render.message(_report(run.result(), len(searcher.index)), "done")
        except Stopped:
            kept = f"{len(searcher.index):,} passages are in the collection"
            yield render.message(f"Cancelled; {kept}. Add the same documents again to continue.", "done")
        except Exception as error:
            yield render.message(reason(error), "error")
        finally:
            del self._runs[session]

    def cancel(self, request: gr.Request) -> None:
        """Stop the run of this session. Passages that are written already stay."""
        if run := self._runs.get(str(request.session_hash)):
            run.stop()


def _report(added: Added, passages: int) -> str:
    report = added.report
    lines = [
        f"Done in {report.seconds:.1f} s: {report.added:,} passages added, {report.unchanged:,} were there, "
        f"{report.replaced + report.removed:,} outdated ones deleted; {passages:,} in the collection."
    ]
    lines += [f"Left out: {line}" for line in added.left_out]
    lines += [
        f"Earlier uploads named {name} stay in the collection. To delete them, add it again and tick “Replace”."
        for name in added.kept
    ]
    lines += [f"No text found in {name} (a scan without a text layer?)." for name in added.empty]
    return "\n".join(lines)
