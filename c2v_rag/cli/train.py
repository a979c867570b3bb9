"""Commands for training and evaluation: train, mine, evaluate."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from c2v_rag.cli.options import Collection, Device, DType, Json, ModelName
from c2v_rag.cli.shared import load_model, out, requires_extra


def train(
    recipe: Annotated[
        Path, typer.Argument(help='A YAML file, or "adapt": trains the default further on pairs of yours.')
    ],
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets that the recipe names.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the finished checkpoint.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Shorten every stage, for a dry run.")] = None,
    device: Device = None,
) -> None:
    """Fine-tune a model on pairs of query and positive, with optional negatives."""
    with requires_extra("train"):
        from c2v_rag.finetune import run
        from c2v_rag.finetune.recipe import Recipe
        from c2v_rag.finetune.scoring import DevReport

    read = Recipe.load(recipe)
    folder, target = data or read.data.folder, output or read.output
    if folder is None or target is None:
        raise ValueError(
            "Say where the data is and where to save the model: "
            f"--data and --output, or data.folder and output in {recipe}."
        )
    run.train(read, folder, target, device=device, max_steps=max_steps, resume=resume)
    out.print(
        f"The model is in {target}; {target}.training has the loss of every step and its plot.",
        markup=False,
        soft_wrap=True,
    )
    report = target.with_name(f"{target.name}.training") / "dev.json"
    if report.is_file():
        for line in DevReport.load(report).lines():
            out.print(line, markup=False, soft_wrap=True)


def mine(
    data: Annotated[Path, typer.Argument(help="A .parquet, .jsonl or .csv file with query and positive.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="OUT.jsonl, with negatives.")],
    model: ModelName = "default",
    num_negatives: Annotated[int, typer.Option(min=1, help="Negatives per pair.")] = 4,
    range_min: Annotated[int, typer.Option(min=0, help="Number of top ranks to leave out.")] = 0,
    range_max: Annotated[int, typer.Option(min=1, help="Last rank from which negatives are taken.")] = 50,
    relative_margin: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out passages that score above (1 - this) x the positive's score.")
    ] = 0.05,
    max_similarity: Annotated[
        float | None, typer.Option(min=0, max=1, help="Leave out passages more similar than this to the positive.")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="Instruction instead of the data set's own.")] = None,
    corpus: Annotated[
        list[Path] | None, typer.Option(help="Repeatable: a file or folder whose passages are searched too.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Folder or URL of an index whose chunks are searched too.")] = None,
    collection: Collection = "documents",
    bm25: Annotated[bool, typer.Option("--bm25", help="Take candidates by BM25 too.")] = False,
    teacher: Annotated[
        str, typer.Option(help='Who scores: "model", "hybrid" (vectors and BM25), a sentence-transformers model.')
    ] = "model",
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Find hard negatives among the positives of the other pairs, and in a corpus of yours."""
    with requires_extra("train"):
        from c2v_rag.finetune import mining
    from c2v_rag.index import VectorIndex
    from c2v_rag.index.stores import missing_index

    loaded = load_model(model, device, dtype)
    chunks = mining.corpus_of(corpus or [], loaded)
    if store is not None:
        index = VectorIndex(store, loaded, collection)
        if not len(index):
            raise missing_index(store, collection)
        chunks = itertools.chain(chunks, index.chunks(embeddings=True))
    found = mining.mine(
        data,
        output,
        loaded,
        num_negatives=num_negatives,
        range_min=range_min,
        range_max=range_max,
        relative_margin=relative_margin,
        max_similarity=max_similarity,
        instruction=instruction,
        corpus=chunks,
        bm25=bm25,
        teacher=teacher,
    )
    out.print(f"{output}: {found} pairs got {num_negatives} negatives each.", markup=False, soft_wrap=True)


def evaluate(
    data: Annotated[list[str], typer.Argument(help="Folders of evaluation data, or names of mteb's own tasks.")],
    model: ModelName = "default",
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help='Repeatable: "encoder", "contextual", "eos", "bm25", "hybrid", "default", the folder of another '
            "checkpoint, or a sentence-transformers model."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write all results to this JSON file.")] = None,
    device: Device = None,
    dtype: DType = None,
    json_output: Json = False,
) -> None:
    """Score a model on retrieval and similarity data, and compare it with baselines."""
    with requires_extra("eval"):
        import datasets

        from c2v_rag.evaluate import run, tasks

    datasets.disable_progress_bars()

    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.parent} to write {output.name} into.")
    read = [tasks.read_task(Path(one)) if Path(one).is_dir() else tasks.mteb_task(one) for one in data]
    command = shlex.join(["c2v-rag", *sys.argv[1:]])
    result = run.evaluate(load_model(model, device, dtype), read, baseline or [], command=command)
    if output is not None:
        unfinished = output.with_name(f".{output.name}.part")
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(output)
    if json_output:
        print(json.dumps(result))
        return
    header, *rows = run.rows_of(result)
    table = Table(
        *header,
        title="scores x 100; lead = difference from a baseline, with its 95 % bootstrap interval",
        title_justify="left",
    )
    for row in rows:
        table.add_row(*row)
    Console(width=max(out.width, 40 + 26 * len(header))).print(table)
    for name, system in result["systems"].items():
        speed = f", {system['tokens_per_second']:,} tokens/s" if system["tokens_per_second"] else ""
        out.print(f"{name}: {system['dimension']} columns{speed}", markup=False)
