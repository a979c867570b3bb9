"""Index the docstrings of Python's most used modules and search them with five questions."""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection

from rich.console import Console

from c2v_rag import Causal2Vec, Document, VectorIndex
from c2v_rag.cli.hits import hits_table
from c2v_rag.sentences import best_sentences
from c2v_rag.sources import python_docs

MODULES = set(
    "asyncio base64 bisect calendar collections contextlib copy csv datetime difflib functools hashlib heapq itertools "
    "json logging math os pathlib pickle queue random re secrets shutil sqlite3 statistics string subprocess tempfile "
    "textwrap threading time urllib zipfile".split()
)
QUESTIONS = [
    "How do I run several coroutines at the same time and wait for all of them?",
    "What splits a web address into its parts?",
    "How can I keep only the most recent results of an expensive function?",
    "Which function finds the numbers' middle value?",
    "How do I copy a whole folder tree?",
]


def documents_of(modules: Collection[str]) -> list[Document]:
    """The docstrings of these modules of the standard library."""
    return [document for document in python_docs() if document.source.split(".")[0] in modules]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="demo-store", help="folder of the index")
    parser.add_argument("--model", default="default")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="modules of the standard library to index")
    arguments = parser.parse_args()
    out = Console()

    started = time.perf_counter()
    model = Causal2Vec.from_pretrained(arguments.model)
    out.print(f"Loaded {model.name} on {model.device} in {time.perf_counter() - started:.1f} s")

    index = VectorIndex(arguments.store, model)
    report = index.add(documents_of(arguments.modules), show_progress=True)
    out.print(f"{report.added} passages added, {report.unchanged} unchanged, in {report.seconds:.1f} s\n")

    for question in QUESTIONS:
        started = time.perf_counter()
        hits = index.search(question, top_k=3, group_by="source")
        milliseconds = 1000 * (time.perf_counter() - started)
        sentences = best_sentences(question, [hit.text for hit in hits], model)
        out.print(hits_table(f"{question}  ({milliseconds:.0f} ms)", hits, sentences))


if __name__ == "__main__":
    main()
