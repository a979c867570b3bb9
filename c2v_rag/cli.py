"""c2v-rag: index, search, embed, info, train, mine, evaluate, serve, app.

Results go to stdout, everything else to stderr. An error is one message and exit code 1; `--debug` shows where.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from c2v_rag import __version__

if TYPE_CHECKING:
    import numpy as np

    from c2v_rag.index import IndexReport
    from c2v_rag.model import Causal2Vec
    from c2v_rag.protocols import Embedder

app = typer.Typer(
    help="Causal2Vec embeddings: index what you have, search it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console(soft_wrap=False)
err = Console(stderr=True, soft_wrap=True)  # a wrapped path cannot be copied

Store = Annotated[str, typer.Option(help="Folder of the index, or the http(s) URL of a Chroma server.")]
Collection = Annotated[str, typer.Option(help="Name of the Chroma collection.")]
ModelName = Annotated[str, typer.Option(help='"default", a checkpoint folder, or a Hugging Face Hub id.')]
EmbedderName = Annotated[
    str, typer.Option("--model", help='"default", a checkpoint folder, a Hugging Face Hub id, or the URL of a server.')
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; the first there is unless given.")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; what the hardware computes in unless given.")]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help='Work on a Ray cluster; "local" starts one on this machine, "auto" where none is found.'
    ),
]
RayWorkers = Annotated[int | None, typer.Option(min=1, help="With --ray: processes that embed; one a GPU, or one.")]
RayGpus = Annotated[float | None, typer.Option(min=0, help="With --ray: GPUs of each; 1 where there are any.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass  # the options act by themselves: --version in its callback, --debug in main


@app.command()
def index(
    sources: Annotated[list[str], typer.Argument(help='Files, folders, or "python-docs", the standard library.')],
    store: Store,
    model: EmbedderName = "default",
    collection: Collection = "documents",
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many documents, for a first look.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of a table that holds the text.")] = "text",
    ray: Ray = None,
    workers: RayWorkers = None,
    num_gpus_per_worker: RayGpus = None,
    device: Device = None,
    dtype: DType = None,
    json_output: Json = False,
) -> None:
    """Embed documents into a Chroma collection; run again, it embeds only what is new."""
    from c2v_rag.index import VectorIndex, remove_vanished
    from c2v_rag.sources import PYTHON_DOCS, python_docs, read_sources

    if ray is not None:
        if limit is not None or device is not None:
            raise ValueError("--limit and --device are not for --ray: it indexes everything, on what its workers have.")
        with _needs("ray"):
            from c2v_rag.scale.cluster import Workers
            from c2v_rag.scale.indexing import index_on_ray

        report, unread = index_on_ray(
            sources, store, model=model, collection=collection, text_column=text_column, address=ray,
            workers=Workers(count=workers, gpus=num_gpus_per_worker), dtype=dtype,
        )  # fmt: skip
        for line in unread:
            err.print(f"Left out: {line}", style="yellow", markup=False)
        _print_report(report, store, collection, unread, json_output)
        return

    left_out: list[str] = []

    def leave_out(path: Path, error: Exception) -> None:
        left_out.append(str(path))
        err.print(f"Left out: {error}", style="yellow", markup=False)

    documents = read_sources(sources, limit=limit, text_column=text_column, on_error=leave_out)
    total = len(python_docs()) if sources == [PYTHON_DOCS] else None
    total = min(total, limit) if total and limit else total
    vectors = VectorIndex(store, _open(model, device, dtype), collection)
    # A first look has not seen everything, so what it has not seen stays.
    report = vectors.add(documents, prune=limit is None, total=total, show_progress=True)
    if limit is None:
        removed = sum(remove_vanished(vectors, Path(source)) for source in sources if Path(source).is_dir())
        report = dataclasses.replace(report, removed=removed)
    _print_report(report, store, collection, left_out, json_output)


def _print_report(report: IndexReport, store: str, collection: str, left_out: list[str], json_output: bool) -> None:
    from c2v_rag.index import count_chunks

    chunks = count_chunks(store, collection)
    if json_output:
        print(json.dumps({**dataclasses.asdict(report), "chunks": chunks, "left_out": left_out}))
        return
    out.print(
        f"{report.added} chunks added, {report.unchanged} unchanged, {report.replaced} replaced, {report.removed} "
        f"removed in {report.seconds:.1f} s; {chunks} in {store}, collection {collection!r}.",
        markup=False,
    )


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    store: Store,
    k: Annotated[int, typer.Option("-k", "--top-k", min=1, help="How many passages.")] = 5,
    model: Annotated[
        str | None, typer.Option(help="The index's own model unless given; another one is refused.")
    ] = None,
    collection: Collection = "documents",
    device: Device = None,
    dtype: DType = None,
    json_output: Json = False,
) -> None:
    """Print the passages that answer a query best."""
    from c2v_rag.index import VectorIndex, stored_stamp

    name = model or str(stored_stamp(store, collection)["name"])
    if not name:
        raise ValueError(
            "The model that made this index was never saved under a name. Save it and give it with --model."
        )
    vectors = VectorIndex(store, _open(name, device, dtype), collection)
    started = time.perf_counter()
    hits = vectors.search(query, k)
    milliseconds = 1000 * (time.perf_counter() - started)
    if json_output:
        print(json.dumps([dataclasses.asdict(hit) for hit in hits], ensure_ascii=False))
        return
    table = Table("score", "source", "passage", title=Text(query), title_justify="left", pad_edge=False)
    for hit in hits:
        passage = " ".join(hit.text.split())
        table.add_row(
            f"{hit.score:.3f}", Text(str(hit.metadata["source"])), Text(passage[:300] + "…" * (len(passage) > 300))
        )
    out.print(table)
    out.print(f"{len(hits)} of {len(vectors)} chunks, {milliseconds:.0f} ms")


@app.command()
def embed(
    file: Annotated[str, typer.Argument(help='A .jsonl, .csv or .parquet table, a text file (a text a line), or "-".')],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="OUT.npy, OUT.parquet or OUT.jsonl; with --ray a folder.")
    ],
    model: EmbedderName = "default",
    query: Annotated[bool, typer.Option("--query", help="Embed as queries, with the instruction.")] = False,
    instruction: Annotated[str | None, typer.Option(help="Instead of the model's own.")] = None,
    truncate_dim: Annotated[int | None, typer.Option(min=1, help="Shorter embeddings.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of a table that holds the text.")] = "text",
    half: Annotated[bool, typer.Option("--half", help="With --ray: store float16.")] = False,
    ray: Ray = None,
    workers: RayWorkers = None,
    num_gpus_per_worker: RayGpus = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Write the embeddings of many texts to a file, in their order; with --ray to the parquet files of a folder."""
    if ray is not None:
        with _needs("ray"):
            from c2v_rag.scale.cluster import Workers
            from c2v_rag.scale.embedding import embed_on_ray

        embedded, rows = embed_on_ray(
            [Path(file)], output, model=model, query=query, instruction=instruction, truncate_dim=truncate_dim,
            text_column=text_column, precision="float16" if half else "float32", address=ray,
            workers=Workers(count=workers, gpus=num_gpus_per_worker), dtype=dtype,
        )  # fmt: skip
        out.print(f"{embedded} texts embedded now, {rows} in {output}", markup=False, soft_wrap=True)
        return
    if output.suffix not in (".npy", ".parquet", ".jsonl"):
        raise ValueError(f"{output}: the output must end in .npy, .parquet or .jsonl.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.parent} to write {output.name} into.")
    texts = list(_texts(file, text_column))
    embedder = _open(model, device, dtype)
    encode: Any = embedder.encode_query if query else embedder.encode_document
    embeddings = encode(texts, instruction=instruction, truncate_dim=truncate_dim, show_progress=True)
    _write_embeddings(output, texts, embeddings)
    out.print(f"{len(texts)} embeddings of {embeddings.shape[1]} columns in {output}", markup=False)


@app.command()
def info(model: ModelName = "default", device: Device = None, dtype: DType = None, json_output: Json = False) -> None:
    """Say what the model is, where its weights came from, and what it runs on."""
    import c2v_rag.model  # noqa: F401  (the time to import torch is not the model's)

    started = time.perf_counter()
    loaded = _load(model, device, dtype)
    config = loaded.config
    rows: dict[str, Any] = {
        "c2v-rag": __version__,
        "model": loaded.name,
        "weights": loaded.stamp["weights"],
        "encoder": loaded.sources["encoder"],
        "decoder": f"{loaded.sources['llm']}, {loaded.llm.config.get_text_config().num_hidden_layers} layers",
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "dimensions": loaded.embedding_dim,
        "pooling": config.pooling,
        "instruction": config.instruction,
        "longest text": f"{config.max_length} tokens in the decoder, {config.encoder_max_length} in the encoder",
        "loaded in": f"{time.perf_counter() - started:.1f} s",
    }
    if json_output:
        print(json.dumps(rows, ensure_ascii=False))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, Text(f"{value:,}" if isinstance(value, int) else str(value)))
    out.print(table)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; recipes/ has examples.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the sets that the recipe names.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the finished checkpoint.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Shorten every stage, for a dry run.")] = None,
    device: Device = None,
) -> None:
    """Fine-tune on pairs: query, positive, optional negatives."""
    with _needs("train"):
        from c2v_rag.finetune import train as training
        from c2v_rag.finetune.recipe import Recipe

    read = Recipe.load(recipe)
    folder, target = data or read.data.folder, output or read.output
    if folder is None or target is None:
        raise ValueError(
            f"Say where the data is and where to: --data and --output, or data.folder and output in {recipe}."
        )
    training.train(read, folder, target, device=device, max_steps=max_steps, resume=resume)
    out.print(
        f"{target} holds the model; {target}.training the loss of every step and its plot.",
        markup=False,
        soft_wrap=True,
    )


@app.command()
def mine(
    data: Annotated[Path, typer.Argument(help="A .parquet, .jsonl or .csv file with query and positive.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="OUT.jsonl, with negatives.")],
    model: ModelName = "default",
    num_negatives: Annotated[int, typer.Option(min=1, help="Negatives a pair.")] = 4,
    range_min: Annotated[int, typer.Option(min=0, help="Leave out the first so many ranks.")] = 0,
    range_max: Annotated[int, typer.Option(min=1, help="Look at ranks up to this.")] = 50,
    relative_margin: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out what scores above (1 - this) x the positive.")
    ] = 0.05,
    instruction: Annotated[str | None, typer.Option(help="Instead of the set's own.")] = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Find hard negatives among the positives of the other pairs."""
    with _needs("train"):
        from c2v_rag.finetune import mining

    found = mining.mine(
        data,
        output,
        _load(model, device, dtype),
        num_negatives=num_negatives,
        range_min=range_min,
        range_max=range_max,
        relative_margin=relative_margin,
        instruction=instruction,
    )
    out.print(f"{output}: {found} pairs got {num_negatives} negatives each.", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    data: Annotated[list[str], typer.Argument(help="Folders of evaluation data, or names of mteb's own tasks.")],
    model: ModelName = "default",
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help='Repeatable: "encoder", "contextual", "eos", "bm25", "hybrid", a sentence-transformers folder.'
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write everything to this JSON file.")] = None,
    device: Device = None,
    dtype: DType = None,
    json_output: Json = False,
) -> None:
    """Score a model on retrieval and similarity data, side by side with baselines."""
    with _needs("eval"):
        import datasets

        from c2v_rag.evaluate import run, tasks

    datasets.disable_progress_bars()

    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.parent} to write {output.name} into.")
    read = [tasks.read_task(Path(one)) if Path(one).is_dir() else tasks.mteb_task(one) for one in data]
    command = shlex.join(["c2v-rag", *sys.argv[1:]])
    result = run.evaluate(_load(model, device, dtype), read, baseline or [], command=command)
    if output is not None:
        aside = output.with_name(f".{output.name}.part")
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        aside.replace(output)
    if json_output:
        print(json.dumps(result))
        return
    header, *rows = run.rows_of(result)
    table = Table(*header, title="scores x 100; leads with their 95 % bootstrap interval", title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(out.width, 40 + 26 * len(header))).print(table)
    for name, system in result["systems"].items():
        speed = f", {system['tokens_per_second']:,} tokens/s" if system["tokens_per_second"] else ""
        out.print(f"{name}: {system['dimension']} columns{speed}", markup=False)


@app.command()
def serve(
    model: ModelName = "default",
    host: Annotated[str, typer.Option(help="Address to listen at; any but this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="File with a key a line; clients must send one.")] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let everyone who reaches the address use it.")] = False,
    name: Annotated[str, typer.Option(help="What clients call the model, its own name unless given.")] = "",
    max_body: Annotated[int, typer.Option(min=1, help="MiB a request.")] = 16,
    max_inputs: Annotated[int, typer.Option(min=1, help="Texts a request.")] = 2048,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens a text; what the decoder reads unless given.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Texts accepted and not answered yet.")] = 8192,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Until an answer.")] = 120.0,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Embed for other programs, over HTTP as OpenAI does; NAME embeds documents, NAME:query queries."""
    with _needs("server"):
        from c2v_rag.server import run
        from c2v_rag.server.api import Limits

    if not (_is_loopback(host) or api_key_file or no_key):
        raise ValueError(
            f"Whoever reaches {host} could use this server. Give --api-key-file, or say --no-key if that is meant."
        )
    keys = run.read_keys(api_key_file) if api_key_file else []
    limits = Limits(
        body_bytes=max_body * 2**20, inputs=max_inputs, tokens=max_tokens, waiting=max_waiting, seconds=max_seconds
    )
    run.serve(_load(model, device, dtype), host=host, port=port, name=name, api_keys=keys, limits=limits)


@app.command("app")
def search_app(
    store: Store,
    collection: Collection = "documents",
    model: Annotated[
        str | None, typer.Option(help="The collection's own model unless given, the default for a new one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; with another one than this, others can see it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Search in the browser, side by side with other methods; add documents, look at a map."""
    with _needs("demo"):
        from c2v_rag.app.page import SearchApp

    from c2v_rag.index import stored_stamps

    stamp = stored_stamps(store).get(collection, {})
    name = model or str(stamp.get("name") or "default")
    is_local = _is_loopback(host)
    if not is_local:
        err.print(
            f"Whoever reaches {host} can search this store and add files to it; there is no password.", style="yellow"
        )
    page = SearchApp(store, _open(name, device, dtype), collection=collection, is_local=is_local)
    page.launch(host=host, port=port or None)


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """What is imported inside comes with an extra; without it, an ImportError that names the pip line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "c2v_rag":
            raise
        raise ImportError(f'This command needs {error.name}: pip install "c2v-rag[{extra}]"') from error


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open(name: str, device: str | None, dtype: str | None) -> Embedder:
    """A model to embed with, here or behind a server's URL."""
    with err.status("Loading the model"):
        from c2v_rag.remote import load_embedder

        return load_embedder(name, device=device, dtype=dtype)


def _load(name: str, device: str | None, dtype: str | None) -> Causal2Vec:
    with err.status("Loading the model"):
        from c2v_rag.model import Causal2Vec

        return Causal2Vec.from_pretrained(name, device=device, dtype=dtype)


def _texts(file: str, text_column: str) -> Iterator[str]:
    from c2v_rag.sources import read_sources

    if file == "-":
        yield from (line.rstrip("\n") for line in sys.stdin)
    elif Path(file).suffix in (".jsonl", ".csv", ".parquet"):
        yield from (document.text for document in read_sources([file], text_column=text_column))
    else:
        yield from Path(file).read_text(encoding="utf-8").splitlines()


def _write_embeddings(path: Path, texts: list[str], embeddings: np.ndarray) -> None:
    """Written aside and renamed, so that a file under this name is complete."""
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.suffix == ".npy":
        import numpy as np

        np.save(aside, embeddings)
    elif path.suffix == ".parquet":
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            if error.name != "pyarrow":
                raise
            raise ImportError('Writing parquet needs pyarrow: pip install "c2v-rag[files]"') from error
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
        pq.write_table(pa.table({"text": texts, "embedding": vectors}), aside)
    else:
        with aside.open("w", encoding="utf-8") as file:
            for text, embedding in zip(texts, embeddings, strict=True):
                row = {"text": text, "embedding": embedding.tolist()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    aside.replace(path)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "chromadb", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message = f"Error: {error}"
        if not isinstance(error, ValueError | TypeError | OSError | ImportError | MemoryError):
            # A library's own kind of error, or a mistake of ours: its text alone may say little.
            message = (
                f"Error: {type(error).__name__}: {error}\nTo see where it came from, run it with --debug in front."
            )
        err.print(message, style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("Stopped. What was written so far is kept; run the same command to go on.")
        sys.exit(130)


if __name__ == "__main__":
    main()
