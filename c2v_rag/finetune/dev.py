"""Development data: questions with their passages, read from a folder or held out of the training pairs.

Q queries, M documents.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np

from c2v_rag.evaluate.folders import read_retrieval, retrieval_files
from c2v_rag.finetune.data import Pair, PairSet
from c2v_rag.finetune.recipe import Dev

logger = logging.getLogger(__name__)

T = TypeVar("T")
HELD_OUT_SHARE = 0.05
_DOCUMENTS_AT_LEAST = 20  # of a set with fewer documents nothing is held out


class _Caps(TypedDict):
    max_queries: int
    max_documents: int


@dataclasses.dataclass(frozen=True)
class DevSet:
    """Queries, the documents to search, and the documents that answer each query.

    `relevant`: per query, the position of each relevant document with its gain. `instruction` goes before the queries;
    None takes the model's own.
    """

    name: str
    instruction: str | None
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    relevant: tuple[Mapping[int, float], ...]


def read_dev_folder(folder: Path, *, max_queries: int, max_documents: int, seed: int = 0) -> DevSet:
    """A retrieval folder of `c2v-rag evaluate` (corpus, queries, qrels), reduced to `max_queries` queries.

    All relevant documents of these queries are kept, and others are drawn until there are `max_documents`. The same
    seed draws the same ones. Raises FileNotFoundError or ValueError for a folder that cannot be used.
    """
    files = retrieval_files(folder)
    if files is None:
        raise FileNotFoundError(
            f"dev: {folder} has no corpus.parquet or corpus.jsonl. Give a retrieval folder as for c2v-rag evaluate."
        )
    data = read_retrieval(files)
    if not data.queries:
        raise ValueError(f"dev: {folder} has no query with a relevant document.")
    rng = np.random.default_rng(seed)
    queries = _draw(data.queries, max_queries, rng)
    texts = {row["id"]: f"{row['title']} {row['text']}".strip() for row in data.documents}
    wanted = {id: None for query in queries for id in data.qrels[query["id"]]}
    if missing := [id for id in wanted if id not in texts]:
        raise ValueError(f"dev: {files[2]} names documents that {files[0]} does not hold: {missing[:4]}.")
    others = [id for id in texts if id not in wanted]
    ids = [*wanted, *_draw(others, max(0, max_documents - len(wanted)), rng)]
    position = {id: row for row, id in enumerate(ids)}
    return DevSet(
        folder.name,
        None,
        tuple(query["text"] for query in queries),
        tuple(texts[id] for id in ids),
        tuple({position[id]: float(g) for id, g in data.qrels[query["id"]].items()} for query in queries),
    )


def dev_set_of_pairs(
    pairs: PairSet, others: Sequence[str] = (), *, max_queries: int, max_documents: int, seed: int = 0
) -> DevSet:
    """A development set whose documents are the pairs' positives, and `others` until there are `max_documents`.

    A query's relevant documents are the positives of all its pairs. At most `max_queries` queries are drawn.
    """
    rng = np.random.default_rng(seed)
    positives: dict[str, dict[str, None]] = {}
    for pair in pairs.pairs:
        positives.setdefault(pair.query, {})[pair.positive] = None
    queries = _draw([*positives], max_queries, rng)
    wanted = dict.fromkeys(text for query in queries for text in positives[query])
    unused = [text for text in dict.fromkeys([pair.positive for pair in pairs.pairs] + [*others]) if text not in wanted]
    documents = [*wanted, *_draw(unused, max(0, max_documents - len(wanted)), rng)]
    position = {text: row for row, text in enumerate(documents)}
    return DevSet(
        pairs.name,
        pairs.instruction,
        tuple(queries),
        tuple(documents),
        tuple({position[text]: 1.0 for text in positives[query]} for query in queries),
    )


def hold_out(pairs: PairSet, share: float, *, max_queries: int, seed: int = 0) -> tuple[PairSet, PairSet]:
    """(training pairs, held-out pairs): a share of the documents with all their pairs, at most `max_queries` queries.

    Documents are split, not pairs: two pairs with the same positive, or with the same `document`, are on the same side.
    A held-out query or passage does not occur in the training pairs at all, neither as a query of another document nor
    as a negative. Nothing is held out of a set with fewer than 20 documents.
    """
    by_document: dict[str, list[Pair]] = {}
    for pair, key in zip(pairs.pairs, _document_keys(pairs.pairs), strict=True):
        by_document.setdefault(key, []).append(pair)
    held: list[Pair] = []
    if share > 0 and len(by_document) >= _DOCUMENTS_AT_LEAST:
        keys = [*by_document]
        queries: set[str] = set()
        for row in np.random.default_rng(seed).permutation(len(keys))[: max(1, round(share * len(keys)))]:
            more = by_document[keys[row]]
            if queries and len(queries | {pair.query for pair in more}) > max_queries:
                continue
            queries |= {pair.query for pair in more}
            held += more
    unseen = {text for pair in held for text in (pair.query, pair.positive)}
    kept = [
        pair.without_negatives(unseen)
        for pair in pairs.pairs
        if pair.query not in unseen and pair.positive not in unseen
    ]
    if not held or not kept:
        return pairs, dataclasses.replace(pairs, pairs=[])
    return dataclasses.replace(pairs, pairs=kept), dataclasses.replace(pairs, pairs=held)


def _document_keys(pairs: Sequence[Pair]) -> list[str]:
    """For each pair the name of its document. Documents that share a positive are one document."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for pair in pairs:
        if pair.document:
            parent[root(f"document {pair.document}")] = root(f"text {pair.positive}")
    return [root(f"text {pair.positive}") for pair in pairs]


def prepare_dev(
    sets: Sequence[PairSet], dev: Dev, read_pairs: Mapping[str, PairSet], *, seed: int
) -> tuple[list[PairSet], list[DevSet]]:
    """(the training sets without what is held out, the development sets) of a recipe's `dev` section.

    `read_pairs`: the sets that `dev.pairs` names. Caps on queries and documents hold for all held-out sets together,
    and for each folder and each set of pairs. Raises ValueError for a set that is trained on too and for two sets of
    one name; logs a warning when training pairs contain answers of the given development data.
    """
    if trained := {one.name for one in sets} & {*dev.pairs}:
        raise ValueError(f"dev.pairs names sets that are trained on: {sorted(trained)}. Use dev.hold_out for these.")
    caps: _Caps = {"max_queries": dev.max_queries, "max_documents": dev.max_documents}
    found = [read_dev_folder(folder, seed=seed, **caps) for folder in dev.folders]
    found += [dev_set_of_pairs(read_pairs[name], seed=seed, **caps) for name in dev.pairs]
    positives = {pair.positive for one in sets for pair in one.pairs}
    for dev_set in found:
        answers = {dev_set.documents[row] for relevant in dev_set.relevant for row in relevant}
        if seen := len(answers & positives):
            logger.warning("dev: %d of %d answers of %s are trained on.", seen, len(answers), dev_set.name)
    share = dev.hold_out
    if share is None:
        share = 0.0 if found else HELD_OUT_SHARE
    kept = list(sets)
    total = sum(len(one.pairs) for one in sets)
    for i, one in enumerate(sets):
        part = len(one.pairs) / total
        queries = max(1, round(dev.max_queries * part))
        kept[i], held = hold_out(one, share, max_queries=queries, seed=seed + i)
        if held.pairs:
            others = [pair.positive for pair in kept[i].pairs]
            documents = max(2, round(dev.max_documents * part))
            found.append(dev_set_of_pairs(held, others, max_queries=queries, max_documents=documents, seed=seed + i))
    names = [one.name for one in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"dev: the development data has more than one set of the name {', '.join(repeated)}.")
    return kept, found


def _draw(items: Sequence[T], number: int, rng: np.random.Generator) -> list[T]:
    """At most `number` of the items, in their order."""
    if len(items) <= number:
        return list(items)
    return [items[i] for i in sorted(rng.choice(len(items), size=number, replace=False))]
