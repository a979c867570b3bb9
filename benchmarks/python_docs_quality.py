"""How often the right passage is found: 60 questions on the standard library's docstrings.

Compares a model, the encoder inside it, and BM25, on python-docs and the questions beside this file, which were
written before any system was run on them. A question is answered when any of its accepted names is found. Prints a
table; `--output` saves it as JSON with what is needed to repeat it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
import torch
import transformers
from rich.console import Console
from rich.table import Table

from c2v_rag import Causal2Vec, __version__
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.evaluate.metrics import hit_at_k, mrr_at_k, top_k
from c2v_rag.protocols import Embedder
from c2v_rag.sources import python_docs

QUESTIONS = Path(__file__).with_name("python_docs_questions.jsonl")
CONSIDERED = 100  # ranks that count for the mean reciprocal rank


def rank_with_bm25(questions: list[str], texts: list[str], names: list[str]) -> list[list[str]]:
    stemmer = Stemmer.Stemmer("english")
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(questions, stopwords="en", stemmer=stemmer, show_progress=False)
    found, _ = retriever.retrieve(tokens, k=CONSIDERED, show_progress=False)
    return [[names[i] for i in row] for row in found]


def rank_with(embedder: Embedder, questions: list[str], texts: list[str], names: list[str]) -> list[list[str]]:
    return top_k(embedder.encode_query(questions), embedder.encode_document(texts), names, CONSIDERED)


def interval(differences: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences."""
    means = rng.choice(differences, size=(10_000, len(differences))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    questions, answers = [row["question"] for row in rows], [set(row["answers"]) for row in rows]
    passages = python_docs()
    texts, names = [passage.text for passage in passages], [passage.source for passage in passages]
    model = Causal2Vec.from_pretrained(arguments.model, dtype=arguments.dtype)
    systems: dict[str, Callable[[], list[list[str]]]] = {
        model.name: lambda: rank_with(model, questions, texts, names),
        "encoder alone": lambda: rank_with(EncoderEmbedder(model), questions, texts, names),
        "bm25": lambda: rank_with_bm25(questions, texts, names),
    }

    scores: dict[str, dict[str, np.ndarray]] = {}
    figures: dict[str, dict[str, object]] = {}
    for system, rank in systems.items():
        started = time.perf_counter()
        pairs = list(zip(rank(), answers, strict=True))
        scores[system] = {
            "recall@10": np.array([hit_at_k(ranked, right, 10) for ranked, right in pairs]),
            "mrr": np.array([mrr_at_k(ranked, right, CONSIDERED) for ranked, right in pairs]),
        }
        means: dict[str, object] = {metric: round(float(values.mean()), 4) for metric, values in scores[system].items()}
        figures[system] = means | {"seconds": round(time.perf_counter() - started, 1)}
    rng = np.random.default_rng(0)
    for system in list(systems)[1:]:
        for metric, values in scores[system].items():
            low, high = interval(scores[model.name][metric] - values, rng)
            figures[system][f"{model.name} minus this, {metric}, 95 %"] = [round(low, 3), round(high, 3)]

    table = Table("system", "recall@10", "MRR", f"{model.name} minus this, recall@10, 95 %", "seconds")
    for system, row in figures.items():
        difference = row.get(f"{model.name} minus this, recall@10, 95 %", "")
        table.add_row(
            system, *(f"{row[metric]:.3f}" for metric in ("recall@10", "mrr")), str(difference), str(row["seconds"])
        )
    Console().print(table)
    Console().print(f"{len(questions)} questions, {len(passages)} passages, {model.dtype} on {model.device}")
    if arguments.output:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "questions": len(questions),
            "passages": len(passages),
            "model": model.stamp,
            "dtype": str(model.dtype),
            "device": str(model.device),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}",
            "versions": {"c2v-rag": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "results": figures,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
