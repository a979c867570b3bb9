"""Embed texts into partitioned parquet with many processes, for vector stores other than Chroma.

A partition contains the embeddings of one slice of an input file. A partition that exists is complete. A run that is
started again writes the missing partitions; if its input has changed, it stops with an error.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import ActorPoolStrategy

from c2v_rag.index import STAMP_KEY, check_stamp
from c2v_rag.scale.cluster import AUTO, EXPECTED, Loaded, Workers, connected, in_words, raise_reported

Precision = Literal["float32", "float16"]

PARTITION_ROWS = 8192
_RUN_FILE = "_run.json"  # readers of parquet folders ignore names that begin with an underscore
_KINDS = (".parquet", ".jsonl", ".txt")
ROWS_READ_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive rows of one input file, which become partition `number`.

    `group`, `start`: a parquet file's row group and the first row in it; for a text file 0 and the byte offset.
    `first`: number of the first row, counted over all files; it is the id if the input has no ids. `content`:
    changes when the rows change: SHA-256 of a text slice, a parquet file's size and time of modification.
    """

    number: int
    file: str
    group: int
    start: int
    rows: int
    first: int
    content: str


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
    """Write `output`/part-NNNNNN.parquet; returns the rows embedded now, and the rows in total.

    Columns: `id` (the input's, or the row's number over all files), `text_sha256`, and `embedding`, a list of fixed
    size of float32 or float16. `files`: .parquet or .jsonl with a column `text_column`, .txt with one text per line, or
    folders of such files; every machine must see them, and `output`, under the same paths. `_run.json` in `output`
    stores the settings and the state of the input files.

    Raises FileNotFoundError for a file that does not exist, ValueError for one of another kind, a missing column, a row
    without a string, an input file that has changed since the run began, or an `output` with partitions of other
    settings, other files or another model.
    """
    slices = plan_slices(files, text_column)
    settings = {
        "model": model,
        "query": query,
        "instruction": instruction,
        "truncate_dim": truncate_dim,
        "text_column": text_column,
        "precision": precision,
    }
    run = {**settings, "slices": [dataclasses.asdict(one) for one in slices]}
    _write_or_check_run(output, run)
    rows = sum(part.rows for part in slices)
    output = output.resolve()
    missing = [part for part in slices if not _partition_path(output, part.number).is_file()]
    if not missing:
        return 0, rows
    reads = [json.dumps([dataclasses.asdict(part) for part in slice_group]) for slice_group in plan_reads(missing)]
    embedded = 0
    with connected(address) as resources, _one_row_per_block():
        chosen = (workers or Workers()).of(resources)
        texts = ray.data.from_items([{"read": read} for read in reads], override_num_blocks=len(reads))
        written = texts.flat_map(
            SliceReader,
            fn_constructor_args=(text_column,),
            num_cpus=0.25,
            compute=ActorPoolStrategy(min_size=1, max_size=max(1, chosen.count or 1)),
        ).map_batches(
            PartitionWriter,
            fn_constructor_args=(output, settings, Loaded(model, dtype, chosen.cpus)),
            batch_size=1,
            **chosen.options,
        )
        for row in written.iter_rows():
            if row["error"]:
                raise_reported(row["error"])
            embedded += int(row["rows"])
    return embedded, rows


@contextmanager
def _one_row_per_block() -> Iterator[None]:
    """Set Ray's block size inside the `with` block so that any worker can take each slice as soon as it is read."""
    context = ray.data.DataContext.get_current()
    original = context.target_max_block_size
    context.target_max_block_size = 1
    try:
        yield
    finally:
        context.target_max_block_size = original


def _partition_path(output: Path, number: int) -> Path:
    return output / f"part-{number:06d}.parquet"


class SliceReader:
    """Reads slices: a row for each, with ids and texts as JSON, which holds whatever Unicode the input does."""

    def __init__(self, text_column: str) -> None:
        self._text_column = text_column

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        slices = [Slice(**part) for part in json.loads(row["read"])]
        try:
            for part, found in zip(slices, read_slices(slices, self._text_column), strict=True):
                yield {"number": part.number, "ids_and_texts": json.dumps(found), "error": ""}
        except EXPECTED as error:
            yield {"number": -1, "ids_and_texts": "", "error": in_words(error)}


class PartitionWriter:
    """Embeds the texts of one slice and writes its partition."""

    def __init__(self, output: Path, settings: dict[str, Any], loaded: Loaded) -> None:
        self._output = output
        self._settings = settings
        self._loaded = loaded
        self._checked = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (number,), (ids_and_texts,), (reported,) = batch["number"], batch["ids_and_texts"], batch["error"]
        if reported:
            return {"rows": [0], "error": [str(reported)]}
        ids, texts = json.loads(ids_and_texts)
        try:
            self.write(ids, texts, _partition_path(self._output, int(number)))
            return {"rows": [len(texts)], "error": [""]}
        except EXPECTED as error:
            return {"rows": [0], "error": [in_words(error)]}

    def write(self, ids: Sequence[str], texts: Sequence[str], path: Path) -> None:
        """Embed, write under a temporary name, and rename the file, so that a partition that exists is complete."""
        settings = self._settings
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
        unfinished = path.with_name(f".{path.name}.part")
        pq.write_table(pa.table(columns, metadata={STAMP_KEY: json.dumps(embedder.stamp)}), unfinished)
        unfinished.replace(path)

    def _check_model(self, folder: Path, stamp: dict[str, str | int]) -> None:
        """Raise ValueError if the folder has partitions of a model with other weights."""
        if self._checked:
            return
        for earlier in islice(folder.glob("part-*.parquet"), 1):
            stored = json.loads(pq.read_schema(earlier).metadata[STAMP_KEY.encode()])
            check_stamp(stored, stamp, str(folder))
        self._checked = True


def plan_slices(files: Sequence[Path], text_column: str) -> list[Slice]:
    """The slices of these files and of the files in these folders, of at most PARTITION_ROWS rows.

    Raises as `embed_on_ray` does for files that are missing or of another kind.
    """
    slices: list[Slice] = []
    first = 0
    for file in (found for given in files for found in _files(Path(given).resolve())):
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}.")
        if file.suffix == ".parquet":
            parts = _parquet_slices(file, text_column)
        elif file.suffix in _KINDS:
            parts = _line_slices(file)
        else:
            raise ValueError(f"{file}: on Ray, texts come from .parquet, .jsonl or .txt (one text per line).")
        for group, start, rows, content in parts:
            slices.append(Slice(len(slices), str(file), group, start, rows, first, content))
            first += rows
    return slices


def plan_reads(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Groups of slices that are read in one pass: those of a parquet row group, or a single slice of another file."""
    return [
        list(slice_group)
        for _, slice_group in groupby(
            slices, key=lambda part: (part.file, part.group, 0 if part.file.endswith(".parquet") else part.start)
        )
    ]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(found for found in path.rglob("*") if found.suffix in _KINDS and found.is_file())
    return [path]


def _parquet_slices(file: Path, text_column: str) -> Iterator[tuple[int, int, int, str]]:
    """(row group, first row in it, number of rows, content) of each slice."""
    content = _file_state(file)
    parquet = pq.ParquetFile(file)
    if text_column not in parquet.schema_arrow.names:
        raise ValueError(f"{file} has no column {text_column!r}; it has {parquet.schema_arrow.names}.")
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        for start in range(0, size, PARTITION_ROWS):
            yield group, start, min(PARTITION_ROWS, size - start), content


def _line_slices(file: Path) -> Iterator[tuple[int, int, int, str]]:
    """(0, byte offset, number of lines, content) of each slice."""
    with file.open("rb") as lines:
        while True:
            offset, rows, digest = lines.tell(), 0, hashlib.sha256()
            for line in islice(_rows_of(lines), PARTITION_ROWS):
                rows += 1
                digest.update(line)
            if not rows:
                return
            yield 0, offset, rows, digest.hexdigest()


def _rows_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a text file, without the empty ones if it is JSONL."""
    lines = iter(file.readline, b"")
    return lines if file.name.endswith(".txt") else filter(bytes.strip, lines)


def _file_state(file: Path) -> str:
    state = file.stat()
    return f"{state.st_size} bytes, modified {state.st_mtime_ns}"


def read_slices(slices: Sequence[Slice], text_column: str) -> Iterator[tuple[list[str], list[str]]]:
    """(ids, texts) of each slice in a group from `plan_reads`; a parquet row group is read once.

    Raises ValueError for a row without a string and for a file that has changed since the slices were planned.
    """
    if slices[0].file.endswith(".parquet"):
        file = slices[0].file
        if _file_state(Path(file)) != slices[0].content:
            raise _changed_file_error(file)
        parquet = pq.ParquetFile(file)
        columns = [name for name in ("id", text_column) if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(ROWS_READ_AT_ONCE, row_groups=[slices[0].group], columns=columns)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        position = 0
        for part in slices:
            found = list(islice(rows, part.start - position, part.start - position + part.rows))
            position = part.start + part.rows
            yield _ids_and_texts(found, part, text_column)
        return
    for part in slices:
        with Path(part.file).open("rb") as lines:
            lines.seek(part.start)
            raw = list(islice(_rows_of(lines), part.rows))
        if hashlib.sha256(b"".join(raw)).hexdigest() != part.content:
            raise _changed_file_error(part.file)
        if part.start == 0 and raw:
            raw[0] = raw[0].removeprefix(codecs.BOM_UTF8)
        texts = [line.decode("utf-8").rstrip("\r\n") for line in raw]
        is_plain = part.file.endswith(".txt")
        found = [{text_column: text} if is_plain else _parsed(text) for text in texts]
        yield _ids_and_texts(found, part, text_column)


def _parsed(line: str) -> Any:
    """The value of a line of JSON; the line itself if it is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def _ids_and_texts(rows: Sequence[Any], part: Slice, text_column: str) -> tuple[list[str], list[str]]:
    ids = []
    for number, row in enumerate(rows, start=part.first):
        if not isinstance(row, dict):
            raise ValueError(f"{part.file}, row {number}: not a JSON object: {row!r:.80}")
        if not isinstance(row.get(text_column), str):
            raise ValueError(
                f"{part.file}, row {number}: {text_column!r} must be a text, got {row.get(text_column)!r}."
            )
        id = row.get("id")
        ids.append(str(number if id is None else id))
    return ids, [row[text_column] for row in rows]


def _changed_file_error(file: str) -> ValueError:
    return ValueError(f"{file} has changed since this run began. Embed it into another folder.")


def _write_or_check_run(output: Path, run: dict[str, Any]) -> None:
    """Write the settings and slices of this run to `output`. Raises ValueError if a different run used it."""
    path = output / _RUN_FILE
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier != run:
            differing = sorted(key for key in run if key != "slices" and earlier.get(key) != run[key])
            if earlier.get("slices") != run["slices"]:
                now, then = _contents(run), _contents(earlier)
                differing += sorted(file for file in now.keys() | then.keys() if now.get(file) != then.get(file))
            raise ValueError(
                f"{output} holds embeddings of other texts or settings, or of an earlier version ({path}). What "
                f"differs: {', '.join(differing)}. Give another folder."
            )
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} holds files already. Give a new or an empty folder.")
    output.mkdir(parents=True, exist_ok=True)
    unfinished = output / f"{_RUN_FILE}.part"
    unfinished.write_text(json.dumps(run, indent=1), encoding="utf-8")
    unfinished.replace(path)


def _contents(run: dict[str, Any]) -> dict[str, list[Any]]:
    """The slices of each file."""
    contents: dict[str, list[Any]] = {}
    for part in run["slices"]:
        contents.setdefault(part["file"], []).append(part)
    return contents
