"""Draw passages from documents evenly, and split the documents into training, dev and held-out ones."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from typing import Any, Literal, get_args

from c2v_rag.index import Chunk, ChunkSettings, Present, new_chunks
from c2v_rag.index.chunking import chunk_header
from c2v_rag.sources import Document

Split = Literal["training", "dev", "held-out"]
SPLITS: tuple[Split, ...] = get_args(Split)
MIN_WORDS = 5  # a shorter passage has nothing to ask about
MIN_PASSAGES = 20
_SHARES: dict[Split, float] = {"held-out": 0.2, "dev": 0.1}
_DOCUMENTS_READ_AHEAD = 512


@dataclasses.dataclass(frozen=True)
class Passage:
    """A chunk of a document.

    `header`: what it is embedded behind, title and headings; "" without. `document`: the document's source, with the
    row for a table. `split`: the split of its document.
    """

    id: str
    body: str
    document: str
    metadata: Mapping[str, Any]
    header: str = ""
    split: Split = "training"

    @property
    def text(self) -> str:
        """The text as the model reads it."""
        return f"{self.header}\n\n{self.body}" if self.header else self.body


def chunks_of(documents: Iterable[Document], model: object) -> Iterator[Chunk]:
    """The chunks that a new index of these documents would have; `model` counts the tokens."""
    present, counts = Present(), Counter[str]()
    stream = iter(documents)
    while part := list(islice(stream, _DOCUMENTS_READ_AHEAD)):
        yield from chain.from_iterable(new_chunks(part, model, ChunkSettings(), None, present, counts))


def draw_passages(
    chunks: Iterable[Chunk],
    number: int,
    seed: int,
    settings: ChunkSettings,
    usable: Callable[[Passage], bool] = lambda _: True,
) -> list[Passage]:
    """At most `number` passages: one of each document, then a second one of each, and so on.

    Which passages and documents come first is random, and the same for equal seeds. Repeated texts, passages with fewer
    than five words, and those that are not `usable` are left out. Only `number` passages are in memory. The result is
    in the order of the chunks. `settings`: those of the chunks, which say whether they are embedded behind headers.
    """
    passages = (_passage(chunk, settings) for chunk in chunks)
    fitting = (passage for passage in passages if len(passage.body.split()) >= MIN_WORDS and usable(passage))
    drawn = heapq.nsmallest(number, _with_priority(fitting, seed), key=lambda item: item[:3])
    first: dict[str, tuple[int, Passage]] = {}  # by text
    for _, _, position, passage in drawn:
        first.setdefault(passage.body, (position, passage))
    return [passage for _, passage in sorted(first.values(), key=lambda item: item[0])]


def _passage(chunk: Chunk, settings: ChunkSettings) -> Passage:
    header = chunk_header(chunk.text, chunk.metadata) if settings.header else ""
    return Passage(chunk.id, chunk.text, document_of(chunk.metadata), chunk.metadata, header)


def _with_priority(passages: Iterable[Passage], seed: int) -> Iterator[tuple[int, str, int, Passage]]:
    """(number of earlier passages of the document, random key, position, passage); the lowest are drawn."""
    earlier: Counter[str] = Counter()
    for document, of_document in groupby(enumerate(passages), key=lambda item: item[1].document):
        for position, passage in sorted(of_document, key=lambda item: _random_key(seed, item[1].id)):
            yield earlier[document], _random_key(seed, document), position, passage
            earlier[document] += 1


def document_of(metadata: Mapping[str, Any]) -> str:
    """The name of the document that a chunk belongs to: its source, and for a table the row."""
    row = metadata.get("row")
    return str(metadata["source"]) if row is None else f"{metadata['source']}#{row}"


def split_documents(passages: Sequence[Passage], seed: int) -> list[Passage]:
    """The passages with the split of their document.

    About a fifth of the passages are held out, and a tenth are for development. A document is in one split with all of
    its passages. Raises ValueError for fewer than three documents, and for fewer than `MIN_PASSAGES` passages.
    """
    sizes = Counter(passage.document for passage in passages)
    if len(passages) < MIN_PASSAGES:
        raise ValueError(
            f"There are {len(passages)} passages of at least {MIN_WORDS} words that a question can be written for, "
            f"which is too few to learn from: at least {MIN_PASSAGES} are needed. Give more documents."
        )
    if len(sizes) < 3:
        raise ValueError(
            f"All {len(passages)} passages are of {len(sizes)} document(s): {', '.join(sorted(sizes))}. Whole "
            "documents are held out to measure the gain, so at least three are needed. Split the file, for example by "
            "chapter."
        )
    split_of = _choose(sizes, len(passages), seed)
    return [dataclasses.replace(passage, split=split_of[passage.document]) for passage in passages]


def _choose(sizes: Mapping[str, int], total: int, seed: int) -> dict[str, Split]:
    """The split of each document, chosen at random within the shares; at least one document is in each split."""
    waiting = sorted(sizes, key=lambda document: _random_key(seed, f"split {document}"))
    chosen: dict[str, Split] = {}
    for number, (split, share) in enumerate(_SHARES.items(), start=1):
        free = max(1, round(share * total))
        for document in list(waiting):
            if sizes[document] <= free and len(waiting) > len(SPLITS) - number:
                chosen[document] = split
                free -= sizes[document]
                waiting.remove(document)
        if split not in chosen.values():  # every document is larger than the share
            smallest = min(waiting, key=lambda document: sizes[document])
            chosen[smallest] = split
            waiting.remove(smallest)
    return chosen | dict.fromkeys(waiting, "training")


def _random_key(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).hexdigest()
