"""Commands that embed: index, search, embed, info."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from c2v_rag import __version__
from c2v_rag.cli.hits import hits_json, hits_table
from c2v_rag.cli.options import (
    Collection,
    Device,
    DType,
    EmbedderName,
    Json,
    ModelName,
    Ray,
    RayGpus,
    RayWorkers,
    Store,
)
from c2v_rag.cli.shared import err, load_model, open_embedder, out, requires_extra

if TYPE_CHECKING:
    import numpy as np

    from c2v_rag.index import IndexReport
    from c2v_rag.sentences import Sentence


def index(
    sources: Annotated[list[str], typer.Argument(help='Files, folders, or "python-docs", the standard library.')],
    store: Store,
    model: EmbedderName = "default",
    collection: Collection = "documents",
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this number of documents, for a trial.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of a table that holds the text.")] = "text",
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Also delete chunks of files whose folder is empty now; otherwise they stay, as the disk may not be "
            "mounted.",
        ),
    ] = False,
    splitter: Annotated[
        str | None,
        typer.Option(help="structure: along headings, functions, paragraphs; characters: as version 0.1 did."),
    ] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Longest chunk; 256 unless given.")] = None,
    overlap: Annotated[float | None, typer.Option(help="Share of a chunk that the next one repeats; 0.1.")] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Embed a chunk behind its title and headings.")
    ] = None,
    ray: Ray = None,
    workers: RayWorkers = None,
    num_gpus_per_worker: RayGpus = None,
    device: Device = None,
    dtype: DType = None,
    json_output: Json = False,
) -> None:
    """Embed documents into a Chroma collection. Another run embeds new documents and deletes those that are gone.

    Chunks of a deleted file are deleted too, unless its folder exists and is empty (see --prune). A file that cannot be
    read is reported, and its chunks stay in the index. How documents are cut is a setting of the collection: give it
    when the collection is new.
    """
    from c2v_rag.index import ChunkSettings, KnownFiles, VectorIndex, remove_vanished
    from c2v_rag.sentences import one_line
    from c2v_rag.sources import PYTHON_DOCS, python_docs, read_sources

    given: dict[str, Any] = {"splitter": splitter, "max_tokens": chunk_tokens, "overlap": overlap, "header": header}
    given = {name: value for name, value in given.items() if value is not None}
    if splitter == "characters":
        given.setdefault("header", False)

    if ray is not None:
        if limit is not None or device is not None:
            raise ValueError(
                "--limit and --device do not work with --ray: it indexes all documents, on the devices of its workers."
            )
        with requires_extra("ray"):
            from c2v_rag.scale.cluster import Workers
            from c2v_rag.scale.indexing import index_on_ray

        report, unread = index_on_ray(
            sources, store, model=model, collection=collection, text_column=text_column, address=ray,
            workers=Workers(count=workers, gpus=num_gpus_per_worker), dtype=dtype, prune=prune,
            chunking=dataclasses.replace(ChunkSettings(), **given) if given else None,
        )  # fmt: skip
        for line in unread:
            err.print(f"Left out: {one_line(line)}", style="yellow", markup=False)
        _print_report(report, store, collection, unread, json_output)
        return

    left_out: list[Path] = []

    def leave_out(path: Path, error: Exception) -> None:
        left_out.append(path)
        err.print(f"Left out: {one_line(str(error))}", style="yellow", markup=False)

    read_sources(sources, limit=0)  # a wrong path is reported before the model is opened
    total = len(python_docs()) if sources == [PYTHON_DOCS] else None
    total = min(total, limit) if total and limit else total
    embedder = open_embedder(model, device, dtype)
    vectors = VectorIndex(store, embedder, collection)
    if given:
        chunking = dataclasses.replace(vectors.chunking, **given)
        vectors = VectorIndex(store, embedder, collection, chunking=chunking)
    # With a limit some documents are not read, so it is unknown which are gone.
    known = KnownFiles(vectors, sources, text_column) if limit is None else None
    skip = () if known is None else known.paths
    documents = read_sources(sources, limit=limit, text_column=text_column, on_error=leave_out, skip=skip)
    report = vectors.add(documents, prune=limit is None, total=total, show_progress=True)
    if known is not None:
        known.save(left_out)
        removed = sum(
            remove_vanished(vectors, Path(source), prune=prune) for source in sources if Path(source).is_dir()
        )
        report = dataclasses.replace(report, removed=removed, unchanged=report.unchanged + known.num_chunks)
    _print_report(report, store, collection, [str(path) for path in left_out], json_output)


def _print_report(report: IndexReport, store: str, collection: str, left_out: list[str], json_output: bool) -> None:
    from c2v_rag.index import count_chunks, store_name

    chunks = count_chunks(store, collection)
    if json_output:
        print(json.dumps({**dataclasses.asdict(report), "chunks": chunks, "left_out": left_out}))
        return
    out.print(
        f"{report.added} chunks added, {report.unchanged} unchanged, {report.replaced} replaced, {report.removed} "
        f"removed in {report.seconds:.1f} s; {chunks} in {store_name(store)}, collection {collection!r}.",
        markup=False,
    )


def search(
    query: Annotated[str, typer.Argument(help="The question or words to search for.")],
    store: Store,
    k: Annotated[int, typer.Option("-k", "--top-k", min=1, help="How many passages.")] = 5,
    model: Annotated[
        str | None, typer.Option(help="Unless given, the model that made the index; another model is refused.")
    ] = None,
    collection: Collection = "documents",
    mode: Annotated[
        str | None,
        typer.Option(help="dense: by embeddings; lexical: by words (BM25); hybrid: by both, unless given."),
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="""Chroma's metadata filter as JSON: '{"kind": "function"}'.""")
    ] = None,
    by_source: Annotated[
        bool,
        typer.Option("--by-source/--all-chunks", help="Only the best passage of each source, or all."),
    ] = True,
    mmr: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Passages that differ from each other: 1 is relevance only, 0 diversity only; try 0.7."
        ),
    ] = None,
    neighbours: Annotated[
        int, typer.Option(min=0, help="Also print this number of chunks before and after each passage.")
    ] = 0,
    rerank: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A sentence-transformers cross-encoder (folder or Hub id) that sorts the best passages again; needs "
            "c2v-rag[rerank].",
        ),
    ] = None,
    rerank_depth: Annotated[int, typer.Option(min=1, help="With --rerank: how many passages it reads.")] = 50,
    sentences: Annotated[
        bool,
        typer.Option(
            help="Mark the best sentence of each passage; this embeds the sentences, or counts words in mode lexical."
        ),
    ] = True,
    device: Device = None,
    dtype: DType = None,
    json_output: Json = False,
) -> None:
    """Print the passages that answer a query best."""
    from c2v_rag.index import VectorIndex, check_mode, stored_stamp
    from c2v_rag.sentences import best_sentences

    stamp = stored_stamp(store, collection)  # before the model is loaded: a wrong store is reported at once
    name = model or str(stamp["name"])
    if not name:
        raise ValueError(
            "The model that made this index has no name: it was never saved. Save it and give its folder with --model."
        )
    chosen = check_mode(mode)
    embedder = open_embedder(name, device, dtype, is_stored=not model)
    vectors = VectorIndex(store, embedder, collection)
    started = time.perf_counter()
    hits = vectors.search(
        query, k, mode=chosen, where=_metadata_filter(where), group_by="source" if by_source else None,
        mmr=mmr, neighbours=neighbours, rerank=rerank, rerank_depth=rerank_depth,
    )  # fmt: skip
    milliseconds = 1000 * (time.perf_counter() - started)
    best: list[Sentence | None] = [None] * len(hits)
    if sentences:
        best = best_sentences(query, [hit.text for hit in hits], None if chosen == "lexical" else embedder)
    if json_output:
        print(hits_json(hits, best))
        return
    out.print(hits_table(query, hits, best))
    out.print(f"{len(hits)} of {len(vectors)} chunks, {milliseconds:.0f} ms")


def _metadata_filter(where: str | None) -> dict[str, Any] | None:
    if where is None:
        return None
    try:
        value = json.loads(where)
    except json.JSONDecodeError as error:
        raise ValueError(f'--where must be a JSON object, such as \'{{"kind": "function"}}\': {error}') from error
    if not isinstance(value, dict):
        raise ValueError(f'--where must be a JSON object, such as \'{{"kind": "function"}}\'; got {where}.')
    return value


def embed(
    file: Annotated[
        str,
        typer.Argument(help='A .jsonl, .csv or .parquet table, a text file with one text per line, or "-" for stdin.'),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="OUT.npy, OUT.parquet or OUT.jsonl; with --ray a folder.")
    ],
    model: EmbedderName = "default",
    query: Annotated[bool, typer.Option("--query", help="Embed the texts as queries, with the instruction.")] = False,
    instruction: Annotated[str | None, typer.Option(help="Instruction instead of the model's own.")] = None,
    truncate_dim: Annotated[int | None, typer.Option(min=1, help="Number of columns of shorter embeddings.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of a table that holds the text.")] = "text",
    half: Annotated[bool, typer.Option("--half", help="With --ray: write float16.")] = False,
    ray: Ray = None,
    workers: RayWorkers = None,
    num_gpus_per_worker: RayGpus = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Write the embeddings of many texts to a file, in their order; with --ray to the parquet files of a folder."""
    if ray is not None:
        with requires_extra("ray"):
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
    embedder = open_embedder(model, device, dtype)
    encode: Any = embedder.encode_query if query else embedder.encode_document
    embeddings = encode(texts, instruction=instruction, truncate_dim=truncate_dim, show_progress=True)
    _write_embeddings(output, texts, embeddings)
    out.print(f"{len(texts)} embeddings of {embeddings.shape[1]} columns in {output}", markup=False)


def info(model: ModelName = "default", device: Device = None, dtype: DType = None, json_output: Json = False) -> None:
    """Print the model's settings, the origin of its weights, and its device."""
    import c2v_rag.model  # noqa: F401  (before the clock starts: importing torch takes seconds)

    started = time.perf_counter()
    loaded = load_model(model, device, dtype)
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


def _texts(file: str, text_column: str) -> Iterator[str]:
    from c2v_rag.sources import read_sources
    from c2v_rag.sources.formats import TABLES

    if file == "-":
        yield from (line.rstrip("\n") for line in sys.stdin)
    elif Path(file).suffix.lower() in TABLES:
        documents = read_sources([file], text_column=text_column)
        yield from (document.text for document in documents if "row" in document.metadata)  # an empty table has none
    else:
        try:
            with Path(file).open(encoding="utf-8-sig") as lines:
                yield from (line.rstrip("\n") for line in lines)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _write_embeddings(path: Path, texts: list[str], embeddings: np.ndarray) -> None:
    """Write under another name and rename, so that a file with this name is always complete."""
    unfinished = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.suffix == ".npy":
        import numpy as np

        np.save(unfinished, embeddings)
    elif path.suffix == ".parquet":
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            if error.name != "pyarrow":
                raise
            raise ImportError('Writing parquet needs pyarrow: pip install "c2v-rag[files]"') from error
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
        pq.write_table(pa.table({"text": texts, "embedding": vectors}), unfinished)
    else:
        with unfinished.open("w", encoding="utf-8") as file:
            for text, embedding in zip(texts, embeddings, strict=True):
                row = {"text": text, "embedding": embedding.tolist()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    unfinished.replace(path)
