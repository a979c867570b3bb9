"""Indexing and embedding on a local Ray give the ids and vectors of one process, even if processes are killed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from c2v_rag import VectorIndex, read_sources
from c2v_rag.index import KnownFiles
from c2v_rag.model import Causal2Vec
from c2v_rag.scale import embedding
from c2v_rag.scale.cluster import Loaded, Workers, raise_reported
from c2v_rag.scale.embedding import embed_on_ray
from c2v_rag.scale.indexing import index_on_ray
from c2v_rag.server.api import create_app
from tests.server.serving import serving
from tests.tiny import WORDS, tiny_model

# All tests run in one pytest worker, which starts one cluster. On a few busy cores Ray takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: str) -> Causal2Vec:
    return Causal2Vec.from_pretrained(tiny_checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def model_url(model: Causal2Vec) -> Iterator[str]:
    """The address of a server with the model: workers that use it need not import torch, which takes seconds."""
    with serving(create_app(model, name="tiny")) as url:
        yield url


@pytest.fixture(scope="module")
def on_ray() -> Iterator[str]:
    """The address of a local Ray cluster for the tests of this process."""
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of text files, and a table in which some rows occur twice."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{' '.join(WORDS)} {number}. " * (1 + number))
    rows = [{"text": f"row {number % 150}", "number": number} for number in range(200)]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def vectors(index: VectorIndex) -> dict[str, np.ndarray]:
    found = {chunk.id: chunk.embedding for chunk in index.chunks(embeddings=True)}
    return {id: np.asarray(vector) for id, vector in found.items()}


def assert_same(found: VectorIndex, expected: VectorIndex) -> None:
    vectors_found, vectors_expected = vectors(found), vectors(expected)
    assert vectors_found.keys() == vectors_expected.keys()
    np.testing.assert_allclose(
        [vectors_found[id] for id in vectors_expected], list(vectors_expected.values()), atol=1e-5
    )


@pytest.mark.usefixtures("on_ray")
def test_an_index_equals_that_of_one_process_and_is_updated(
    tiny_checkpoint: str, model: Causal2Vec, model_url: str, chroma_server: str, corpus: Path, tmp_path: Path
) -> None:
    def run(model: str, dtype: str | None) -> tuple[dict[str, int | float], list[str]]:
        report, left_out = index_on_ray(
            [corpus],
            chroma_server,
            model=model,
            collection="corpus",
            workers=Workers(count=2, cpus=0.5),
            dtype=dtype,
        )
        return vars(report), left_out

    one_process, cluster = VectorIndex(tmp_path / "alone", model, "corpus"), VectorIndex(chroma_server, model, "corpus")
    expected = one_process.add(read_sources([corpus]))
    report, left_out = run(tiny_checkpoint, "float32")
    assert (report["added"], report["unchanged"], report["removed"]) == (expected.added, 0, 0)
    assert expected.added > 220
    assert left_out == []
    assert_same(cluster, one_process)
    metadata = cluster.get(next(iter(vectors(cluster))))
    assert metadata is not None
    assert metadata.metadata["source"].startswith(str(corpus))

    (corpus / "3.txt").write_text("Something else altogether.")
    (corpus / "4.txt").unlink()
    (corpus / "5.txt").write_bytes(b"\xff\xfe\x00 not text")
    (corpus / "bad.jsonl").write_text('{"text": "one"}\n{"no": 1}\n')
    report, left_out = run(model_url, None)
    assert report["added"] == 1
    assert report["replaced"] > 1
    assert report["removed"] > 1
    assert any("bad.jsonl" in line for line in left_out)
    one_process.add(read_sources([corpus], on_error=lambda path, error: None))
    one_process.delete(str(corpus / "4.txt"))
    assert_same(cluster, one_process)

    for name in ("5.txt", "bad.jsonl"):
        (corpus / name).unlink()
    report, left_out = run(model_url, None)  # reads no file
    removed = one_process.delete(str(corpus / "5.txt"))
    unchanged = len(vectors(one_process))
    assert (report["added"], report["unchanged"], report["removed"]) == (0, unchanged, removed)
    assert KnownFiles(cluster, [corpus]).paths == {*corpus.iterdir()}
    assert_same(cluster, one_process)
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="made with another model"):
        run(str(tmp_path / "other"), "float32")  # no file is read


@pytest.mark.usefixtures("on_ray")
def test_wrong_stores_sources_and_models_are_clear_errors(
    tiny_checkpoint: str, model_url: str, chroma_server: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="chroma run"):
        index_on_ray([corpus], str(tmp_path / "store"), model=tiny_checkpoint, collection="corpus")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        index_on_ray([corpus / "nowhere"], chroma_server, model=tiny_checkpoint, collection="corpus")
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        index_on_ray([corpus], chroma_server, model="no-such-model", collection="third")


def test_workers_use_the_resources_of_the_cluster() -> None:
    assert Workers().of({"CPU": 16.0, "GPU": 4.0}) == Workers(count=4, gpus=1.0, cpus=3.0)
    assert Workers(gpus=0.5).of({"CPU": 16.0, "GPU": 1.0}).count == 2
    assert Workers().of({"CPU": 2.0}) == Workers(count=1, gpus=0.0, cpus=1.0)
    assert Workers(count=2).of({"CPU": 2.0}) == Workers(count=2, gpus=0.0, cpus=0.75)


@pytest.mark.usefixtures("on_ray")
def test_embeddings_are_written_to_files_and_a_run_is_continued(
    model_url: str, model: Causal2Vec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PARTITION_ROWS", 16)
    texts = [f"{' '.join(WORDS[: number % 15])} {number}" for number in range(50)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        "".join(json.dumps({"id": f"a{i}", "text": t}) + "\n" for i, t in enumerate(texts[:20]))
    )
    (tmp_path / "in" / "b.txt").write_text("".join(f"{text}\n" for text in texts[20:]))
    output = tmp_path / "out"

    def run(**changes: object) -> tuple[int, int]:
        settings = {"model": model_url, "workers": Workers(count=2, cpus=0.5)} | changes
        return embed_on_ray([tmp_path / "in"], output, **settings)  # type: ignore[arg-type]

    assert run() == (50, 50)
    found = pq.read_table(output)
    assert sorted(path.name for path in output.glob("*.parquet")) == [f"part-{i:06d}.parquet" for i in range(4)]
    assert found["id"].to_pylist() == [f"a{i}" for i in range(20)] + [str(i) for i in range(20, 50)]
    assert found["text_sha256"].to_pylist() == [hashlib.sha256(text.encode()).digest() for text in texts]
    np.testing.assert_allclose(found["embedding"].to_pylist(), model.encode_document(texts), atol=1e-5)

    (output / "part-000002.parquet").unlink()
    kept = (output / "part-000001.parquet").stat().st_mtime_ns
    assert run() == (16, 50)
    assert (output / "part-000001.parquet").stat().st_mtime_ns == kept
    assert run() == (0, 50)
    with pytest.raises(ValueError, match="other texts or settings"):
        run(query=True)
    (output / "part-000003.parquet").unlink()
    run_file = output / "_run.json"
    with serving(create_app(tiny_model(seed=1), name="tiny")) as other:
        run_file.write_text(run_file.read_text().replace(json.dumps(model_url), json.dumps(other)))
        with pytest.raises(ValueError, match="another model"):
            run(model=other)


def test_a_partition_can_have_half_precision_and_an_unreadable_slice_is_an_error(
    tiny_checkpoint: str, tmp_path: Path
) -> None:
    settings = {"query": True, "instruction": None, "truncate_dim": 8, "text_column": "t", "precision": "float16"}
    table = pa.table({"t": [f"text {number}" for number in range(10)], "id": range(100, 110)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=4)
    slices = embedding.plan_slices([tmp_path / "in.parquet"], "t")
    assert [(one.number, one.group, one.rows, one.first) for one in slices] == [
        (0, 0, 4, 0),
        (1, 1, 4, 4),
        (2, 2, 2, 8),
    ]
    worker = embedding.PartitionWriter(tmp_path, settings, Loaded(tiny_checkpoint, "float32", None))
    ((ids, texts),) = embedding.read_slices(slices[1:2], "t")
    worker.write(ids, texts, tmp_path / "part-000001.parquet")
    found = pq.read_table(tmp_path / "part-000001.parquet")
    assert found["id"].to_pylist() == ["104", "105", "106", "107"]
    kind = found.schema.field("embedding").type
    assert (kind.list_size, str(kind.value_type)) == (8, "halffloat")
    model = Causal2Vec.from_pretrained(tiny_checkpoint, dtype="float32")
    expected = model.encode_query([f"text {number}" for number in range(4, 8)], truncate_dim=8)
    np.testing.assert_allclose(found["embedding"].to_pylist(), expected, atol=2e-3)

    (tmp_path / "bad.jsonl").write_text('{"t": "good"}\n{"t": 1}\n')
    (tmp_path / "rows.jsonl").write_text('{"t": "a"}\n\n{"t": "b", "id": null}\n \n', encoding="utf-8-sig")
    (slice_,) = embedding.plan_slices([tmp_path / "rows.jsonl"], "t")
    assert [*embedding.read_slices([slice_], "t")] == [(["0", "1"], ["a", "b"])]
    for content, shown in (
        ('{"t": "a"}\n{"t":', "row 1: not a JSON object: '{\"t\":'"),
        ("[1]", r"not a JSON object: \[1\]"),
    ):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(ValueError, match=rf"rows\.jsonl, .*{shown}"):
            [*embedding.read_slices(embedding.plan_slices([tmp_path / "rows.jsonl"], "t"), "t")]
    bad = embedding.plan_slices([tmp_path / "bad.jsonl"], "t")
    (row,) = embedding.SliceReader("t")({"read": json.dumps([vars(one) for one in bad])})
    reported = worker({key: [value] for key, value in row.items()})
    assert reported["rows"] == [0]
    with pytest.raises(ValueError, match="row 1: 't' must be a text, got 1"):
        raise_reported(reported["error"][0])
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['t', 'id'\]"):
        embedding.plan_slices([tmp_path / "in.parquet"], "text")
    with pytest.raises(ValueError, match="texts come from"):
        embedding.plan_slices([Path(__file__)], "text")


def test_a_large_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PARTITION_ROWS", 8)
    monkeypatch.setattr(embedding, "ROWS_READ_AT_ONCE", 3)
    texts = [f"text {number}" for number in range(110)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet", row_group_size=100)
    opened: list[str] = []
    real = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda path: opened.append(str(path)) or real(path))
    slices = embedding.plan_slices([tmp_path / "in.parquet"], "text")
    assert len(slices) == 15
    opened.clear()
    found = [one for read in embedding.plan_reads(slices) for one in embedding.read_slices(read, "text")]
    assert len(opened) == 2, "each row group is read in one pass"
    assert [text for _, texts in found for text in texts] == texts
    assert [id for ids, _ in found for id in ids] == [str(number) for number in range(110)]
    missing = [slices[1], slices[4], slices[5], slices[13]]
    resumed = [one for read in embedding.plan_reads(missing) for one in embedding.read_slices(read, "text")]
    assert resumed == [found[number] for number in (1, 4, 5, 13)]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_run_with_edited_input_is_not_continued(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"

    def write(text: str) -> None:
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": ["first", text]}), path)
        else:
            rows = ["first", text] if suffix == ".txt" else [json.dumps({"text": one}) for one in ("first", text)]
            path.write_text("\n".join(rows) + "\n")

    write("later")
    before = embedding.plan_slices([path], "text")
    stale = tmp_path / "out"
    stale.mkdir()
    settings = {
        "model": "none", "query": False, "instruction": None, "truncate_dim": None, "text_column": "text",
        "precision": "float32",
    }  # fmt: skip
    (stale / "_run.json").write_text(json.dumps({**settings, "slices": [vars(one) for one in before]}))
    (stale / "part-000000.parquet").touch()
    assert embed_on_ray([path], stale, model="none") == (0, 2)
    write("other")  # of the same length
    if suffix == ".parquet":
        os.utime(path, ns=(1, 1))  # another modification time, even if the file system's clock is coarse
    with pytest.raises(ValueError, match=rf"What differs: {path.resolve()}\. Give another folder"):
        embed_on_ray([path], stale, model="none")
    with pytest.raises(ValueError, match=rf"{path.name} has changed since this run began"):
        list(embedding.read_slices(before, "text"))
    with pytest.raises(ValueError, match="What differs: query"):
        embed_on_ray([path], stale, model="none", query=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


class EncodeBudget:
    """Makes a model's `encode_document` wait after it embedded as many texts as `allow` said. `holds`: a call waits."""

    def __init__(self, model: Causal2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left, self._changed, self.holds = 0, threading.Condition(), False
        encode = model.encode_document

        def encode_within_budget(texts: Iterable[str], **options: Any) -> np.ndarray:
            texts = list(texts)
            with self._changed:
                self.holds = self._left <= 0
                self._changed.wait_for(lambda: self._left > 0)
                self._left -= len(texts)
            return encode(texts, **options)

        monkeypatch.setattr(model, "encode_document", encode_within_budget)

    def allow(self, texts: int) -> None:
        with self._changed:
            self._left, self.holds = texts, False
            self._changed.notify_all()


def test_a_killed_worker_and_a_killed_driver_lose_nothing(
    on_ray: str, chroma_server: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers use a model on a server of this process; it stops answering until the test goes on."""
    model = tiny_model()
    table = tmp_path / "table.jsonl"
    with table.open("w") as file:
        for number in range(4000):
            file.write(json.dumps({"text": f"{WORDS[number % 15]} {WORDS[number % 14]} {number}"}) + "\n")
    alone = VectorIndex(tmp_path / "alone", model)
    expected = alone.add(read_sources([table])).added

    mark = uuid4().hex  # processes that Ray starts inherit the environment; this value identifies them
    environment = os.environ | {"C2V_TEST_RUN": mark}

    def started() -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if _environment(one).get("C2V_TEST_RUN") == mark]

    def writers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
        return [one for one in processes if "_Writer" in _title(one)]

    def clean() -> None:
        for one in started():
            with suppress(psutil.Error):
                one.kill()

    request.addfinalizer(clean)
    index = VectorIndex(chroma_server, model, "killed")
    budget = EncodeBudget(model, monkeypatch)

    def start(url: str, ray_address: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "c2v_rag.cli", "index", str(table), "--model", url, "--json"]
        command += ["--store", chroma_server, "--collection", "killed", "--ray", ray_address, "--workers", "2"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def wait_until_it_holds(chunks: int, process: subprocess.Popen[str]) -> None:
        while not budget.holds or len(index) <= chunks:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)

    with serving(create_app(model, name="tiny")) as url:
        driver = start(url, "local")
        budget.allow(600)
        wait_until_it_holds(0, driver)
        driver.kill()
        driver.communicate()
        while writers(started()):  # they end some time after their driver
            time.sleep(0.1)
        so_far = len(index)
        assert 0 < so_far < expected

        driver = start(url, on_ray)
        budget.allow(1500)
        wait_until_it_holds(so_far, driver)
        writers(psutil.Process().children(recursive=True))[0].kill()
        assert len(index) < expected
        budget.allow(10**9)
        output, errors = driver.communicate()
    assert driver.returncode == 0, errors
    assert json.loads(output)["chunks"] == expected, output
    assert_same(index, alone)
