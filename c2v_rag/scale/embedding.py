"""Embed a table to partitioned parquet on many processes, for people whose vector store is another one.

A partition is a slice of one input file; it appears complete or not at all. Stopped and started again, a run makes the
partitions that are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from c2v_rag.index import STAMP_KEY, check_stamp
from c2v_rag.scale.cluster import AUTO, EXPECTED, Loaded, Workers, connected, in_words, raise_reported

Precision = Literal["float32", "float16"]

PARTITION_ROWS = 8192
_RUN_FILE = "_run.json"  # readers of parquet folders leave out what begins so
_KINDS = (".parquet", ".jsonl", ".txt")


@dataclasses.dataclass(frozen=True)
class Slice:
    """Rows of one input file: of a parquet's row group from `start`, or of a text file from that byte on."""

    file: str
    group: int
    start: int
    rows: int
    first: int
    """Number of the first row, counted over all files: what ids are made of where the input has none."""


def embed_on_ray(
    files: Sequence[Path],
    output: Path,
    *,
    model: str = "default",
    query: bool = False,
    instruction: str | None = None,
    truncate_dim: int | None = None,
    text_column: str = "text",
    precision: Precision = "float32",
    address: str = AUTO,
    workers: Workers | None = None,
    dtype: str | None = None,
) -> tuple[int, int]:
    """Write `output`/part-NNNNNN.parquet; returns how many rows were embedded now, and how many there are.

    Columns: `id` (the input's, or the row's number over all files), `text_sha256`, and `embedding`, a list of fixed
    size of float32 or float16. `files`: .parquet or .jsonl with a column `text_column`, .txt with a text a line, or
    folders of such; every machine must see them, and `output`, under the same paths. `_run.json` beside the partitions
    says what they are of.

    Raises FileNotFoundError for a file that is not there, ValueError for one of another kind, a missing column, a text
    that is none, or an `output` that holds partitions of another run or another model.
    """
    slices = list(_slices([found for file in files for found in _files(Path(file).resolve())], text_column))
    settings = {
        "model": model,
        "query": query,
        "instruction": instruction,
        "truncate_dim": truncate_dim,
        "text_column": text_column,
        "precision": precision,
    }
    run = {**settings, "slices": [dataclasses.asdict(one) for one in slices]}
    _claim(output, run)
    waiting = [
        {"slice": dataclasses.asdict(one), "target": str(target)}
        for number, one in enumerate(slices)
        if not (target := output.resolve() / f"part-{number:06d}.parquet").is_file()
    ]
    if not waiting:
        return 0, sum(one.rows for one in slices)
    embedded = 0
    with connected(address) as resources:
        chosen = (workers or Workers()).of(resources)
        items = ray.data.from_items(waiting, override_num_blocks=len(waiting))
        done = items.map_batches(
            _Partition,
            fn_constructor_args=(settings, Loaded(model, dtype, chosen.cpus)),
            batch_size=1,
            **chosen.options,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise_reported(row["error"])
            embedded += int(row["rows"])
    return embedded, sum(one.rows for one in slices)


class _Partition:
    """Embeds one slice and writes it."""

    def __init__(self, settings: dict[str, Any], loaded: Loaded) -> None:
        self._settings = settings
        self._loaded = loaded
        self._checked = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (one,), (target,) = batch["slice"], batch["target"]
        try:
            return {"rows": [self._embed(Slice(**one), Path(str(target)))], "error": [""]}
        except EXPECTED as error:
            return {"rows": [0], "error": [in_words(error)]}

    def _embed(self, part: Slice, path: Path) -> int:
        settings = self._settings
        ids, texts = _read(part, settings["text_column"])
        embedder: Any = self._loaded()
        self._check_model(path.parent, embedder.stamp)
        encode = embedder.encode_query if settings["query"] else embedder.encode_document
        options = {key: settings[key] for key in ("instruction", "truncate_dim") if settings[key] is not None}
        vectors = encode(texts, **options).astype(settings["precision"])
        columns = {
            "id": pa.array(ids, pa.string()),
            "text_sha256": pa.array([hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        }
        aside = path.with_name(f".{path.name}.part")
        pq.write_table(pa.table(columns, metadata={STAMP_KEY: json.dumps(embedder.stamp)}), aside)
        aside.replace(path)
        return len(texts)

    def _check_model(self, folder: Path, stamp: dict[str, str | int]) -> None:
        """A run that goes on must go on with the same weights."""
        if self._checked:
            return
        for earlier in islice(folder.glob("part-*.parquet"), 1):
            theirs = json.loads(pq.read_schema(earlier).metadata[STAMP_KEY.encode()])
            check_stamp(theirs, stamp, str(folder))
        self._checked = True


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(one for one in path.rglob("*") if one.suffix in _KINDS and one.is_file())
    return [path]


def _slices(files: Sequence[Path], text_column: str) -> Iterator[Slice]:
    first = 0
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}.")
        if file.suffix == ".parquet":
            about = pq.ParquetFile(file)
            if text_column not in about.schema_arrow.names:
                raise ValueError(f"{file} has no column {text_column!r}; it has {about.schema_arrow.names}.")
            sizes = [about.metadata.row_group(group).num_rows for group in range(about.num_row_groups)]
            parts = [
                (group, start, min(PARTITION_ROWS, size - start))
                for group, size in enumerate(sizes)
                for start in range(0, size, PARTITION_ROWS)
            ]
        elif file.suffix in _KINDS:
            parts = [(0, offset, lines) for offset, lines in _line_slices(file)]
        else:
            raise ValueError(f"{file}: on Ray, texts come from .parquet, .jsonl or .txt (a text a line).")
        for group, start, rows in parts:
            yield Slice(str(file), group, start, rows, first)
            first += rows


def _line_slices(file: Path) -> Iterator[tuple[int, int]]:
    """(byte offset, number of lines) of each slice."""
    with file.open("rb") as lines:
        while True:
            offset = lines.tell()
            if not (rows := sum(1 for _ in islice(iter(lines.readline, b""), PARTITION_ROWS))):
                return
            yield offset, rows


def _read(part: Slice, text_column: str) -> tuple[list[str], list[str]]:
    """Ids and texts of a slice."""
    if part.file.endswith(".parquet"):
        file = pq.ParquetFile(part.file)
        columns = [name for name in ("id", text_column) if name in file.schema_arrow.names]
        rows = file.read_row_group(part.group, columns=columns).slice(part.start, part.rows).to_pylist()
    else:
        with Path(part.file).open("rb") as lines:
            lines.seek(part.start)
            found = [line.decode("utf-8").rstrip("\r\n") for line in islice(lines, part.rows)]
        rows = (
            [{text_column: line} for line in found]
            if part.file.endswith(".txt")
            else [json.loads(line) for line in found]
        )
    for number, row in enumerate(rows):
        if not isinstance(row.get(text_column), str):
            where = f"{part.file}, row {part.first + number}"
            raise ValueError(f"{where}: {text_column!r} must be a text, got {row.get(text_column)!r}.")
    ids = [str(row.get("id", part.first + number)) for number, row in enumerate(rows)]
    return ids, [row[text_column] for row in rows]


def _claim(output: Path, run: dict[str, Any]) -> None:
    """Note what the partitions are of, or check that those that are there are of the same."""
    path = output / _RUN_FILE
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != run:
            raise ValueError(f"{output} holds embeddings of other texts or settings ({path}). Give another folder.")
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} holds files already. Give a new or an empty folder.")
    output.mkdir(parents=True, exist_ok=True)
    aside = output / f"{_RUN_FILE}.part"
    aside.write_text(json.dumps(run, indent=1), encoding="utf-8")
    aside.replace(path)
