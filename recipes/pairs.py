"""Pairs of the open training sets: reading, batches of neighbours, mined negatives, BM25 and losses, on one device.

For recipes and benchmarks that train on one GPU. B queries, M documents of which the first B are the positives.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from packed import Packed, Ragged
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize

from c2v_rag.evaluate.folders import RetrievalFolder, read_retrieval, read_rows, retrieval_files
from c2v_rag.evaluate.intervals import difference_of_means, paired_bootstrap
from c2v_rag.evaluate.metrics import ndcg_at_k, spearman
from c2v_rag.finetune.loss import standardize
from c2v_rag.inference import default_dtype
from c2v_rag.sources import PYTHON_DOCS, python_docs

# Openly licensed sets; none is made from SQuAD, whose articles XQuAD-en asks about. A set's share of the batches is its
# weight times the square root of its rows.
SETS = {
    "arxiv_title_abstract": 1.0,
    "arxiv_title_abstract_2": 1.0,
    "boolq": 1.0,
    "debian_package_descriptions": 1.0,
    "eurlex_title_text": 0.5,
    "fetaqa": 1.0,
    "foldoc_terms": 1.0,
    "interview_qa": 1.0,
    "man_pages": 1.0,
    "medquad": 1.0,
    "nl2bash": 1.0,
    "nli_mnli": 1.0,
    "nli_snli": 0.7,
    "nq_qed_dev": 1.0,
    "piqa_goal_solution": 1.0,
    "python_package_docs": 1.0,
    "python_package_docs_name": 0.3,
    "question_paraphrases_open": 1.0,
    "reading_comprehension_open": 1.0,
    "science_fact_qa": 1.0,
    "science_fact_support": 1.0,
    "selqa": 1.0,
    "simplification_open": 1.0,
    "stackexchange_qa": 1.0,
    "stackexchange_title_body": 1.0,
    "stackoverflow_title_code": 1.0,
    "strategyqa": 1.0,
    "tech_docs_sections": 1.0,
    "textbook_biology": 1.0,
    "textbook_questions": 1.0,
    "textbook_questions_2": 1.0,
    "textbook_sections": 1.0,
    "textbook_sections_2": 1.0,
    "tldr_pages": 1.0,
    "wiki_title_passage": 1.0,
    "wiki_vital_title_summary": 1.0,
    "wikisplit_paraphrase": 1.0,
}
MAX_ROWS, MAX_CHARACTERS = 50_000, 1_600  # of a set, of a text
QUESTIONS = Path(__file__).parents[1] / "benchmarks" / "python_docs_questions.jsonl"
BATCH, POOL, NEIGHBOURS = 512, 2.0, 0.6  # pairs; a batch's neighbours come from the POOL x BATCH nearest queries
TEMPERATURE = 0.05
K1, B = 1.5, 0.75
SIMILAR_DOCUMENTS, SIMILAR_QUERIES = 0.88, 0.92  # cosines from which a document may answer the query too
MINED, FIRST_RANK, LAST_RANK, BELOW_POSITIVE = 8, 5, 50, 0.95


class Texts:
    """All different texts of a run; `pairs`: by the name of a set, the rows of its queries and positives."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self.pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def all(self) -> list[str]:
        """The text of each row."""
        return list(self._rows)

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self._rows.setdefault(text, len(self._rows)) for text in texts], dtype=np.int64)

    def read(self, folder: Path, seed: int, max_rows: int = MAX_ROWS) -> None:
        """Read NAME.parquet of each of `SETS`, columns query and positive; at most `max_rows` random rows of each."""
        rng = np.random.default_rng(seed)
        for name in SETS:
            table = pq.read_table(folder / f"{name}.parquet", columns=["query", "positive"]).to_pydict()
            chosen = rng.permutation(len(table["query"]))[:max_rows]
            sides = [[table[side][i][:MAX_CHARACTERS] for i in chosen] for side in ("query", "positive")]
            self.pairs[name] = (self.rows(sides[0]), self.rows(sides[1]))


class PieceBM25:
    """BM25 over the encoder's word pieces. Idf and mean length are those of a set's different positives.

    Whole words and stems give nearly the same ranking, and pieces are on the device already.
    """

    def __init__(self, ids: Ragged, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], vocabulary: int) -> None:
        self._ids, self._vocabulary = ids, vocabulary
        self._statistics: dict[str, tuple[Tensor, float]] = {}
        for name, (_, positives) in pairs.items():
            self.add(name, positives)

    def add(self, name: str, documents: np.ndarray) -> None:
        """Statistics of a set with these documents."""
        rows = np.unique(documents)
        sequence, words = self._words(rows)
        holding = torch.bincount(torch.unique(sequence * self._vocabulary + words) % self._vocabulary)
        holding = torch.nn.functional.pad(holding, (0, self._vocabulary - len(holding)))
        idf = torch.log1p((len(rows) - holding + 0.5) / (holding + 0.5))
        self._statistics[name] = (idf, float(self._ids.lengths[rows].mean()))

    def _words(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        packed = Packed.of(self._ids.lengths[rows], self._ids.flat.device)
        starts = self._ids.starts[torch.from_numpy(rows).to(self._ids.flat.device)]
        return packed.sequence, self._ids.flat[starts[packed.sequence] + packed.place].long()

    def scores(self, queries: np.ndarray, documents: np.ndarray, name: str) -> Tensor:
        """(B, M) float32: BM25 of each document for each query."""
        idf, mean_length = self._statistics[name]
        query_of, query_words = self._words(queries)
        words, columns = torch.unique(query_words, return_inverse=True)
        number = torch.full((self._vocabulary,), len(words), device=idf.device)
        number[words] = torch.arange(len(words), device=idf.device)
        document_of, document_words = self._words(documents)

        def counts(rows: Tensor, columns: Tensor, num_rows: int) -> Tensor:
            width = len(words) + 1
            flat = torch.bincount(rows * width + columns, minlength=num_rows * width)
            return flat.view(num_rows, width)[:, :-1].float()

        lengths = torch.from_numpy(self._ids.lengths[documents]).to(idf.device).float().unsqueeze(1) / mean_length
        in_documents = counts(document_of, number[document_words], len(documents))
        saturated = in_documents / (in_documents + K1 * (1 - B + B * lengths))
        return (counts(query_of, columns, len(queries)) * idf[words]) @ saturated.T


class Batches:
    """Batches of pairs of one set, most of them near to one of its queries by `vectors` (all texts, length 1)."""

    def __init__(self, texts: Texts, vectors: Tensor, seed: int, size: int | None = None) -> None:
        self._pairs, self._vectors, self._size = texts.pairs, vectors, size or BATCH
        self._rng = np.random.default_rng(seed)
        shares = np.array([SETS[name] * math.sqrt(len(queries)) for name, (queries, _) in self._pairs.items()])
        self._shares = shares / shares.sum()
        self._negatives: dict[str, np.ndarray] = {}

    def mine(self, vectors: Tensor, documents_at_once: int = 4096) -> None:
        """Hard negatives of each pair: documents of its set of ranks 5 to 50 by `vectors`, none nearly as near as the
        positive. `draw` then returns one of them for each pair after the positives."""
        for name, (queries, positives) in self._pairs.items():
            pool = np.unique(positives)
            if len(pool) <= LAST_RANK:
                continue
            documents = vectors[torch.from_numpy(pool).to(vectors.device)]
            found = []
            for start in range(0, len(queries), documents_at_once):
                part = slice(start, start + documents_at_once)
                left, right = (
                    vectors[torch.from_numpy(side[part]).to(vectors.device)] for side in (queries, positives)
                )
                own = (left.float() * right.float()).sum(dim=1, keepdim=True)
                best = (left @ documents.T).float().topk(LAST_RANK, dim=1)
                near, places = best.values[:, FIRST_RANK:], best.indices[:, FIRST_RANK:]
                # The hardest that are clearly worse than the positive; where there are too few, the last ones.
                ranks = torch.arange(near.shape[1], device=near.device).expand(near.shape)
                order = torch.where(near < BELOW_POSITIVE * own, ranks, 2 * LAST_RANK - ranks)
                chosen = order.argsort(dim=1)[:, :MINED]
                found.append(places.gather(1, chosen).cpu().numpy())
            self._negatives[name] = pool[np.concatenate(found)]

    def draw(self) -> tuple[str, np.ndarray, np.ndarray]:
        """The set, rows of queries (B,), rows of documents (M,): the positives, then mined negatives if there are."""
        rng = self._rng
        name = list(self._pairs)[rng.choice(len(self._pairs), p=self._shares)]
        queries, positives = self._pairs[name]
        size = min(self._size, len(queries))
        chosen = rng.permutation(len(queries))[: 2 * size]
        if len(queries) > size:
            anchor = self._vectors[int(queries[rng.integers(len(queries))])]
            sims = self._vectors[torch.from_numpy(queries).to(self._vectors.device)] @ anchor
            near = sims.topk(min(len(queries), int(POOL * size))).indices.cpu().numpy()
            near = rng.permutation(near)[: int(NEIGHBOURS * size)]
            chosen = np.concatenate([near, chosen[~np.isin(chosen, near)]])
        chosen = chosen[:size]
        documents = positives[chosen]
        if name in self._negatives:
            mined = self._negatives[name][chosen, rng.integers(MINED, size=size)]
            documents = np.concatenate([documents, mined])
        return name, queries[chosen], documents


def false_negatives(vectors: Tensor, queries: np.ndarray, documents: np.ndarray) -> Tensor:
    """(B, M): candidates that probably answer the query, by `vectors` of all texts; never its positive."""
    q, d = (vectors[torch.from_numpy(rows).to(vectors.device)].float() for rows in (queries, documents))
    size = len(q)
    found = d[:size] @ d.T > SIMILAR_DOCUMENTS
    found[:, :size] |= q @ q.T > SIMILAR_QUERIES
    return found.fill_diagonal_(False)


def info_nce(scores: Tensor, left_out: Tensor) -> Tensor:
    """Of scores (B, M), from queries to documents, and a quarter of it from positives to queries."""
    scores = scores.masked_fill(left_out, -1e4)
    labels = torch.arange(len(scores), device=scores.device)
    backwards = cross_entropy(scores[:, : len(scores)].T, labels)
    return (cross_entropy(scores, labels) + 0.25 * backwards) / 1.25


def divergence(scores: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of the distributions over each row."""
    return kl_div(log_softmax(scores, dim=1), log_softmax(wanted, dim=1), log_target=True, reduction="batchmean")


def fused(cosines: Tensor, bm25: Tensor) -> Tensor:
    """0.7 z + 0.3 z of scores (B, M)."""
    return 0.7 * standardize(cosines) + 0.3 * standardize(bm25)


@torch.no_grad()
def teacher_vectors(folder: str, texts: Sequence[str], device: torch.device) -> Tensor:
    """(n, K) float16 of length 1: the vectors of a sentence-transformers model with mean pooling."""
    teacher = SentenceTransformer(folder, device=str(device))
    if not getattr(teacher[1], "pooling_mode_mean_tokens", True) or len(teacher) > 3:
        raise ValueError(f"{folder} has another pooling than the mean over tokens.")
    network: Any = teacher[0].auto_model
    network = network.to(torch.float16 if device.type == "cuda" else default_dtype(device))
    ids = Ragged.tokenize(teacher.tokenizer, texts, device, most=int(teacher.max_seq_length or 256))
    pad_id = teacher.tokenizer.pad_token_id or 0
    order = np.argsort(ids.lengths, kind="stable")
    found = torch.empty(len(texts), network.config.hidden_size, dtype=torch.float16, device=device)
    tokens_at_once = 131_072 if device.type == "cuda" else 8_192
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * ids.lengths[order[end]] <= tokens_at_once:
            end = min(len(order), end + 64)
        rows = torch.from_numpy(order[start:end]).to(device)
        places = torch.arange(int(ids.lengths[order[end - 1]]), device=device)
        lengths = torch.from_numpy(ids.lengths[order[start:end]]).to(device)
        mask = places < lengths[:, None]
        tokens = ids.flat[(ids.starts[rows][:, None] + places).clamp(max=len(ids.flat) - 1)].long()
        states = network(input_ids=tokens.where(mask, pad_id), attention_mask=mask.long()).last_hidden_state.float()
        pooled = (states * mask.unsqueeze(-1)).sum(dim=1) / lengths[:, None]
        found[rows] = normalize(pooled, dim=1).half()
        start = end
    return found


def kept_vectors(file: Path | None, teacher: str, texts: Sequence[str], device: torch.device) -> Tensor:
    """`teacher_vectors`, read from `file` if it exists, else written to it."""
    if file is not None and file.is_file():
        return torch.load(file, map_location=device)
    found = teacher_vectors(teacher, texts, device)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found.cpu(), file)
    return found


class DevSets:
    """Scores of retrieval folders (nDCG@10) and of sentence pairs (Spearman), x 100, from vectors of their texts.

    The folder "python-docs" is none: this Python's docstrings and the project's questions about them.

    A retrieval folder is scored by cosines alone and by 0.7 z + 0.3 z with BM25 (`PieceBM25`), "NAME + BM25".
    """

    def __init__(self, folders: Sequence[Path], texts: Texts) -> None:
        self.retrieval: dict[str, tuple[Any, np.ndarray, np.ndarray]] = {}
        self.pairs: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for folder in folders:
            if (found := _read_folder(folder)) is not None:
                documents = [f"{row['title']} {row['text']}".strip() for row in found.documents]
                rows = texts.rows([row["text"] for row in found.queries])
                self.retrieval[folder.name] = (found, rows, texts.rows(documents))
            else:
                pairs = list(read_rows(folder / "pairs.parquet", ("sentence1", "sentence2", "score")))
                left, right = (texts.rows([row[side] for row in pairs]) for side in ("sentence1", "sentence2"))
                self.pairs[folder.name] = (left, right, np.array([float(row["score"]) for row in pairs]))

    def add_pairs(self, name: str, queries: np.ndarray, positives: np.ndarray) -> None:
        """A retrieval set of pairs: to each query its positives, among all positives."""
        documents = np.unique(positives)
        gains: dict[str, dict[str, int]] = {}
        for query, positive in zip(queries.tolist(), positives.tolist(), strict=True):
            gains.setdefault(str(query), {})[str(positive)] = 1
        found = RetrievalFolder(
            (Path(), Path(), Path()),
            [{"id": str(row)} for row in documents.tolist()],
            [{"id": id} for id in gains],
            gains,
        )
        self.retrieval[name] = (found, np.array([int(id) for id in gains]), documents)

    def items(
        self, embed: Callable[[np.ndarray, bool], Tensor], bm25: PieceBM25 | None = None
    ) -> dict[str, np.ndarray]:
        """One number an item: nDCG@10 of each query, the cosine of each pair. `embed`: of rows, and whether they are
        queries; vectors of length 1."""
        items = {}
        for name, (found, queries, documents) in self.retrieval.items():
            cosines = embed(queries, True).float() @ embed(documents, False).float().T
            rankings = {name: cosines}
            if bm25 is not None:
                bm25.add(name, documents)
                rankings[f"{name} + BM25"] = fused(cosines, bm25.scores(queries, documents, name))
            ids = [row["id"] for row in found.documents]
            for kind, scores in rankings.items():
                best = scores.topk(min(10, len(ids)), dim=1).indices.cpu().numpy()
                items[kind] = np.array(
                    [
                        ndcg_at_k([ids[i] for i in row], found.qrels[query["id"]], 10)
                        for row, query in zip(best, found.queries, strict=True)
                    ]
                )
        for name, (left, right, _) in self.pairs.items():
            items[name] = (embed(left, False).float() * embed(right, False).float()).sum(dim=1).cpu().numpy()
        return items

    def scores(self, items: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {
            name: 100 * (spearman(found, self.pairs[name][2]) if name in self.pairs else float(found.mean()))
            for name, found in items.items()
        }

    def difference(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
        """Between two systems' items of a set, with its 95 % interval over queries or pairs, in points."""
        if name in self.pairs:
            gold = self.pairs[name][2]
            found = paired_bootstrap(
                len(gold), lambda rows: spearman(ours[rows], gold[rows]) - spearman(theirs[rows], gold[rows])
            )
        else:
            found = difference_of_means([ours], [theirs])
        return {key: 100 * value for key, value in dataclasses.asdict(found).items()}


def remembered(embed: Callable[[np.ndarray, bool], Tensor]) -> Callable[[np.ndarray, bool], Tensor]:
    """`embed`, computed once for the same rows."""
    vectors: dict[tuple[bytes, bool], Tensor] = {}

    def found(rows: np.ndarray, queries: bool) -> Tensor:
        key = rows.tobytes(), queries
        if key not in vectors:
            vectors[key] = embed(rows, queries)
        return vectors[key]

    return found


def _read_folder(folder: Path) -> RetrievalFolder | None:
    """A retrieval folder, or this Python's docstrings with the questions about them; None for sentence pairs."""
    if str(folder) != PYTHON_DOCS:
        files = retrieval_files(folder)
        return None if files is None else read_retrieval(files)
    documents = [{"id": one.source, "title": "", "text": one.text[:MAX_CHARACTERS]} for one in python_docs()]
    known = {row["id"] for row in documents}
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    gains = {str(i): {name: 1 for name in line["answers"] if name in known} for i, line in enumerate(lines)}
    queries = [{"id": id, "text": lines[int(id)]["question"]} for id, found in gains.items() if found]
    return RetrievalFolder((QUESTIONS, QUESTIONS, QUESTIONS), documents, queries, gains)


def train(
    groups: Sequence[tuple[Sequence[Tensor], float]],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    warmup: int = 20,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """AdamW with a cosine over `steps`; returns about forty losses. `groups`: parameters and their learning rate.

    `report(step, loss)` is called at each of these losses.
    """
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters), "lr": rate, "rate": rate} for parameters, rate in groups],
        weight_decay=0.0,
        betas=(0.9, 0.98),
        fused=groups[0][0][0].is_cuda,
    )
    every, losses, total = max(1, steps // 40), [], 0.0
    for step in range(steps):
        factor = min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        total = total + value.detach()
        if (step + 1) % every == 0 or step + 1 == steps:
            losses.append(float(total) / ((step % every) + 1))
            total = 0.0
            if report is not None:
                report(step + 1, losses[-1])
    return losses
