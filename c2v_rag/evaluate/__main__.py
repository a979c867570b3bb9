"""Score a model and the encoder inside it on folders of parquet files.

Retrieval: corpus.parquet (_id, title, text), queries.parquet (_id, text), qrels.parquet (query-id, corpus-id, score);
nDCG@10. Similarity: pairs.parquet (sentence1, sentence2, score); Spearman of the cosine. Run as
`python -m c2v_rag.evaluate FOLDER... [--model M]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.evaluate.metrics import ndcg_at_k, top_k
from c2v_rag.index import Embedder
from c2v_rag.model import Causal2Vec


def evaluate(folder: Path, embedder: Embedder) -> dict[str, float]:
    """Score x 100 of one folder, by which columns of the embedding were used: all, or one of the two halves."""
    if (folder / "pairs.parquet").is_file():
        pairs = pq.read_table(folder / "pairs.parquet").to_pydict()
        first, second = (embedder.encode_document(pairs[name]) for name in ("sentence1", "sentence2"))
        return {
            name: 100 * float(spearmanr((a * b).sum(axis=1), pairs["score"]).statistic)
            for name, a, b in _halves(first, second)
        }
    corpus, queries, qrels = (
        pq.read_table(folder / f"{n}.parquet").to_pydict() for n in ("corpus", "queries", "qrels")
    )
    gains: dict[str, dict[str, float]] = {}
    for query, document, gain in zip(qrels["query-id"], qrels["corpus-id"], qrels["score"], strict=True):
        if gain > 0:
            gains.setdefault(query, {})[document] = gain
    asked = [(id, text) for id, text in zip(queries["_id"], queries["text"], strict=True) if id in gains]
    titles = corpus.get("title") or [""] * len(corpus["_id"])
    texts = [f"{title} {text}".strip() for title, text in zip(titles, corpus["text"], strict=True)]
    documents = embedder.encode_document(texts)
    vectors = embedder.encode_query([text for _, text in asked])
    scores = {}
    for name, q, d in _halves(vectors, documents):
        ranked = top_k(q, d, corpus["_id"], 10)
        found = [ndcg_at_k(ids, gains[id], 10) for (id, _), ids in zip(asked, ranked, strict=True)]
        scores[name] = 100 * float(np.mean(found))
    return scores


def _halves(a: np.ndarray, b: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    def unit(vectors: np.ndarray) -> np.ndarray:
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    return [
        ("all", a, b),
        ("contextual", unit(a[:, 0::2]), unit(b[:, 0::2])),
        ("eos", unit(a[:, 1::2]), unit(b[:, 1::2])),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype")
    arguments = parser.parse_args()
    model = Causal2Vec.from_pretrained(arguments.model, dtype=arguments.dtype)
    encoder = EncoderEmbedder(model)
    table = Table("set", "context_eos", "contextual half", "eos half", "encoder alone")
    for folder in arguments.folders:
        ours = evaluate(folder, model)
        alone = evaluate(folder, encoder)["all"]
        table.add_row(folder.name, *(f"{ours[name]:.1f}" for name in ("all", "contextual", "eos")), f"{alone:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
