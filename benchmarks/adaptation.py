"""What `c2v-rag adapt` gains on questions that people wrote, for several writers and times.

    python benchmarks/adaptation.py --minutes 20 60 --writers headings default --output FILE.json
    python benchmarks/adaptation.py --folder eval/Cranfield --general eval/XQuAD-en --output FILE.json

Without --folder: Python's own documentation, with the 60 questions beside this file, one passage a source counted. With
it: the corpus of each folder (as `c2v-rag evaluate` reads it) and its own questions. No writer and no training sees
these questions. "headings" is the control: questions made without a model. Scores: recall@10, nDCG@10 and MRR over the
whole corpus, by vectors and by hybrid search, before and after, with the 95 % interval of a paired bootstrap over
questions. `--passages` reduces the corpus that is searched to the answers and a random rest, for a short run.

`--soft-labels 0` trains with hard negatives alone, without the hybrid search's scores.

The rows of another run of the same model stay in FILE.json; a row of the same corpus, writer, time and weight of soft
labels is replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from common import made, questions
from rich.console import Console
from rich.table import Table

from c2v_rag import Causal2Vec, Document, __version__, read_sources
from c2v_rag.adapt import adapt
from c2v_rag.adapt.corpus import Ranker
from c2v_rag.adapt.scoring import MODES, Comparison, compare
from c2v_rag.adapt.training import SOFT_LABELS
from c2v_rag.evaluate.folders import read_retrieval, retrieval_files
from c2v_rag.evaluate.metrics import hit_at_k, mrr_at_k, ndcg_at_k, recall_at_k

PYTHON_DOCS = "python-docs"
# Of a run's report: texts of the corpus, paths on this machine, and the loss of every step. The run's folder has them.
LEFT_OUT = ("changed", "examples", "losses", "model", "output", "unread")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A corpus with real questions. `one_is_enough`: any of a question's documents answers it alone."""

    name: str
    documents: list[Document]
    queries: list[str]
    relevant: list[dict[str, float]]
    one_is_enough: bool


def python_docs_benchmark() -> Benchmark:
    rows = questions()
    relevant = [dict.fromkeys(row["answers"], 1.0) for row in rows]
    return Benchmark(
        PYTHON_DOCS, list(read_sources([PYTHON_DOCS])), [row["question"] for row in rows], relevant, one_is_enough=True
    )


def folder_benchmark(folder: Path) -> Benchmark:
    files = retrieval_files(folder)
    if files is None:
        raise FileNotFoundError(f"{folder} has no corpus.parquet or corpus.jsonl.")
    data = read_retrieval(files)
    documents = [Document(row["text"], row["id"], title=row["title"]) for row in data.documents]
    relevant = [{id: float(gain) for id, gain in data.qrels[query["id"]].items()} for query in data.queries]
    return Benchmark(folder.name, documents, [query["text"] for query in data.queries], relevant, one_is_enough=False)


def reduced(benchmark: Benchmark, number: int) -> Benchmark:
    """The benchmark with at most `number` documents: all that answer a question, and a random rest."""
    wanted = {id for one in benchmark.relevant for id in one}
    others = [row for row, document in enumerate(benchmark.documents) if document.source not in wanted]
    rest = max(0, number - (len(benchmark.documents) - len(others)))
    drawn = {int(row) for row in np.random.default_rng(0).permutation(others)[:rest]}
    documents = [
        document for row, document in enumerate(benchmark.documents) if row in drawn or document.source in wanted
    ]
    return dataclasses.replace(benchmark, documents=documents)


def scores(benchmark: Benchmark, model: Causal2Vec) -> dict[str, list[float]]:
    """For each way of search and metric one score a question."""
    texts = [
        f"{document.title}\n\n{document.text}"
        if document.title and not document.text.startswith(document.title)
        else document.text
        for document in benchmark.documents
    ]
    ids = [document.source for document in benchmark.documents]
    ranker = Ranker(texts, model.encode_document(texts, show_progress=True))
    vectors = model.encode_query(benchmark.queries)
    recall = hit_at_k if benchmark.one_is_enough else recall_at_k
    found: dict[str, list[float]] = {}
    for mode in MODES:
        for query, vector, relevant in zip(benchmark.queries, vectors, benchmark.relevant, strict=True):
            ranked = np.argsort(-(ranker.dense(vector) if mode == "vectors" else ranker.hybrid(query, vector)))
            row = list(dict.fromkeys(ids[position] for position in ranked[:200]))[:100]
            found.setdefault(f"{mode}, recall@10", []).append(float(recall(row, relevant, 10)))
            found.setdefault(f"{mode}, nDCG@10", []).append(ndcg_at_k(row, relevant, 10))
            found.setdefault(f"{mode}, MRR", []).append(mrr_at_k(row, relevant, 100))
    return found


def run(benchmark: Benchmark, folder: Path, arguments: argparse.Namespace, writer: str, minutes: float) -> Any:
    """Adapt the model to the benchmark's documents; the report of the run, and the adapted model if there is one."""
    sources: list[str | Path] = [PYTHON_DOCS]
    if benchmark.name != PYTHON_DOCS:
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / f"{benchmark.name}.jsonl"
        rows = [{"text": f"{one.title}\n\n{one.text}".strip()} for one in benchmark.documents]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sources = [table]
    soft_labels = arguments.soft_labels
    output = folder / f"{benchmark.name}-{writer}-{minutes:g}-{soft_labels:g}"
    return adapt(
        sources, output=output, model=arguments.model, minutes=minutes, questions=arguments.questions, writer=writer,
        general=arguments.general, soft_labels=soft_labels, resume=output.exists(), show_progress=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--folder", type=Path, action="append", default=[])
    parser.add_argument("--general", type=Path, action="append", default=[], help="retrieval sets for forgetting")
    parser.add_argument("--writers", nargs="+", default=["headings", "default"])
    parser.add_argument("--minutes", type=float, nargs="+", default=[20, 60])
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--soft-labels", type=float, default=SOFT_LABELS)
    parser.add_argument("--passages", type=int, help="most documents to search, for a short run")
    parser.add_argument("--work", type=Path, help="folder that keeps the runs; one that was killed goes on")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    benchmarks = [folder_benchmark(folder) for folder in arguments.folder] or [python_docs_benchmark()]
    results = earlier(arguments.output, arguments.model)
    with nullcontext(arguments.work) if arguments.work else tempfile.TemporaryDirectory() as work:
        for full in benchmarks:
            benchmark = reduced(full, arguments.passages) if arguments.passages else full
            before = scores(benchmark, Causal2Vec.from_pretrained(arguments.model))
            for writer in arguments.writers:
                for minutes in arguments.minutes:
                    started = time.perf_counter()
                    report = run(full, Path(work), arguments, writer, minutes)
                    seconds = time.perf_counter() - started
                    after = scores(benchmark, Causal2Vec.from_pretrained(report.model)) if report.model else before
                    row = {
                        **made(),
                        "benchmark": benchmark.name,
                        "documents": len(benchmark.documents),
                        "questions": len(benchmark.queries),
                        "writer": writer,
                        "minutes": minutes,
                        "soft_labels": arguments.soft_labels,
                        "seconds": round(seconds),
                        "scores": {name: dataclasses.asdict(one) for name, one in compared(before, after).items()},
                        "report": {
                            name: value for name, value in dataclasses.asdict(report).items() if name not in LEFT_OUT
                        },
                    }
                    results = [one for one in results if key(one) != key(row)] + [row]
                    show(results)
                    if arguments.output:
                        save(arguments.output, arguments.model, results)


def key(row: dict[str, Any]) -> tuple[str, str, float, float]:
    return row["benchmark"], row["writer"], row["minutes"], row["soft_labels"]


def earlier(path: Path | None, model: str) -> list[dict[str, Any]]:
    """The rows in the file, if they are of the same model."""
    if path is None or not path.is_file():
        return []
    value = json.loads(path.read_text(encoding="utf-8"))
    same = value["model"] == Causal2Vec.from_pretrained(model).stamp
    return list(value["results"]) if same else []


def compared(before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, Comparison]:
    return {
        metric: compare(values, after[metric], [str(row) for row in range(len(values))])
        for metric, values in before.items()
    }


def show(results: Sequence[dict[str, Any]]) -> None:
    table = Table("corpus", "writer", "minutes", "ending", "metric", "before", "after", "95 % interval")
    for row in results:
        for metric, one in row["scores"].items():
            table.add_row(
                row["benchmark"], row["writer"], f"{row['minutes']:g}", row["report"]["ending"], metric,
                f"{one['before']:.3f}", f"{one['after']:.3f}", f"{one['low']:+.3f} to {one['high']:+.3f}",
            )  # fmt: skip
    Console(width=120).print(table)


def save(path: Path, model: str, results: Sequence[dict[str, Any]]) -> None:
    value = {
        "model": Causal2Vec.from_pretrained(model).stamp,
        "version": __version__,
        "results": list(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
