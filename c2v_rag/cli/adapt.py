"""The command adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from c2v_rag.cli.options import Collection, Device, DType, Json, WriterModel
from c2v_rag.cli.shared import out, requires_extra


def adapt(
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder for model, questions and report.")],
    sources: Annotated[
        list[str] | None, typer.Argument(help='Files, folders, or "python-docs"; or give --store.')
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Adapt to the chunks of this index: its folder, or the URL of a Chroma server.")
    ] = None,
    collection: Collection = "documents",
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint to adapt; unless given, the one that made the collection, or the default."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="How long all of it may take, by an estimate.")] = 20,
    questions: Annotated[int, typer.Option(min=1, help="Most passages to draw, and questions to write.")] = 2000,
    writer: Annotated[
        str,
        typer.Option(
            help='Who writes the questions. "headings": no model, headings and first sentences; "default": the '
            "decoder inside the model; the folder or Hub id of a language model; or the URL of an OpenAI-compatible "
            "server, to which the passages are sent (key: C2V_RAG_WRITER_API_KEY)."
        ),
    ] = "headings",
    writer_model: WriterModel = None,
    prompts: Annotated[Path | None, typer.Option(help="YAML file with prompts for the writer.")] = None,
    questions_only: Annotated[
        bool, typer.Option("--questions-only", help="Stop after writing, so that you can edit questions.jsonl.")
    ] = False,
    from_questions: Annotated[Path | None, typer.Option(help="Train on the questions in this JSONL file.")] = None,
    general: Annotated[
        list[Path] | None,
        typer.Option(help="Repeatable: folder of a retrieval set that shows what the model forgets."),
    ] = None,
    reindex: Annotated[
        bool, typer.Option("--reindex", help="If there is a gain, embed the collection again into NAME-adapted.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, instead of what the minutes allow.")] = None,
    found_among: Annotated[
        int, typer.Option(min=1, help="Keep a question if its passage is among this many first hits.")
    ] = 10,
    soft_labels: Annotated[
        float,
        typer.Option(min=0, help="Weight of the hybrid search's scores as a target; 0: hard negatives alone."),
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Decides which passages are drawn and which documents are held out.")] = 0,
    text_column: Annotated[str, typer.Option(help="Column of a table that holds the text.")] = "text",
    device: Device = None,
    dtype: DType = None,
    json_output: Json = False,
) -> None:
    """Train a model on questions about your documents, and report what it gained on documents it was not trained on."""
    with requires_extra("adapt"):
        from c2v_rag import adapt as package

    report = package.adapt(
        sources or [], output=output, store=store, collection=collection, model=model, minutes=minutes,
        questions=questions, writer=writer, writer_model=writer_model, prompts=prompts, questions_only=questions_only,
        from_questions=from_questions, general=general or [], reindex=reindex, resume=resume, steps=steps,
        found_among=found_among, soft_labels=soft_labels, seed=seed, text_column=text_column, device=device,
        dtype=dtype, show_progress=True,
    )  # fmt: skip
    if json_output:
        print(report.to_json(), end="")
        return
    out.print(report.to_text(), end="", markup=False, highlight=False, soft_wrap=True)
    out.print(f"Report: {output / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
