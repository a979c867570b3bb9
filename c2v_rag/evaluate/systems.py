"""The systems that are scored: embedders behind mteb's protocols, and the baselines by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mteb
import numpy as np
from mteb.models.model_meta import ModelMeta
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from c2v_rag.bases import package_base
from c2v_rag.checkpoint import DEFAULT
from c2v_rag.config import CONFIG_FILE
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.fusion import FUSED_DEPTH, reciprocal_rank_fusion
from c2v_rag.model import Causal2Vec

BM25, HYBRID = "bm25", "hybrid"
_MTEB_BM25 = "mteb/baseline-bm25s"
_OURS = "model"
SEARCH_ONLY = (BM25, HYBRID)  # these rank documents and cannot score a pair of sentences


class DenseSystem:
    """An embedder (with encode, encode_query, encode_document) behind mteb's `EncoderProtocol`.

    It caches vectors until `clear_cache` and counts the tokens and seconds that computing them took. `options` are
    passed to every call. With `source`, the vectors are `columns` of that system's vectors (one half of the
    embedding) and nothing is computed again.
    """

    def __init__(
        self,
        name: str,
        weights: str,
        embedder: Any,
        *,
        options: Mapping[str, Any] = MappingProxyType({}),
        count_tokens: Callable[[Sequence[str]], list[int]] | None = None,
        source: DenseSystem | None = None,
        columns: slice = slice(None),
    ) -> None:
        self.name = name
        self.weights = weights
        self.dimension = 0
        self.tokens = 0
        self.seconds = 0.0
        mteb_name = f"local/{name.replace('/', '-')}"
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": mteb_name, "revision": weights[:16]})
        self._embedder = embedder
        self._options = options
        self._count_tokens = count_tokens
        self._source = source
        self._columns = columns
        self._cache: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> np.ndarray:
        """float32 (n, dimension), rows of length 1; `inputs` is mteb's iterable of batches with "text"."""
        texts = [text for batch in inputs for text in batch["text"]]
        vectors = self._vectors(prompt_type.value if prompt_type else "", texts)
        self.dimension = vectors.shape[1]
        return vectors

    def _vectors(self, prompt_type: str, texts: list[str]) -> np.ndarray:
        if self._source is not None:
            selected = self._source._vectors(prompt_type, texts)[:, self._columns]
            return np.asarray(selected / np.linalg.norm(selected, axis=1, keepdims=True))
        key = prompt_type, tuple(texts)
        if key not in self._cache:
            encode = {"": "encode", "query": "encode_query", "document": "encode_document"}[prompt_type]
            started = time.perf_counter()
            vectors = np.asarray(getattr(self._embedder, encode)(texts, **self._options), dtype=np.float32)
            self.seconds += time.perf_counter() - started
            if self._count_tokens is not None:
                self.tokens += sum(self._count_tokens(texts))
            self._cache[key] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return self._cache[key]

    def clear_cache(self) -> None:
        """Free the cached vectors; called after each task."""
        self._cache.clear()

    def similarity(self, left: Any, right: Any) -> Any:
        """(n, m) cosine similarities."""
        return np.asarray(left) @ np.asarray(right).T

    def similarity_pairwise(self, left: Any, right: Any) -> Any:
        """(n,) cosine similarities of rows."""
        return (np.asarray(left) * np.asarray(right)).sum(axis=1)


class HybridSystem:
    """A dense system and BM25, fused by rank, behind mteb's `SearchProtocol`."""

    def __init__(self, dense: DenseSystem) -> None:
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": f"local/{HYBRID}-{dense.name}"})
        self._parts: list[Any] = [SearchEncoderWrapper(dense), mteb.get_model(_MTEB_BM25)]

    def index(self, corpus: Any, **options: Any) -> None:
        for part in self._parts:
            part.index(corpus, **options)

    def search(self, queries: Any, *, top_k: int, **options: Any) -> dict[str, dict[str, float]]:
        """For each query id, scores by document id: `reciprocal_rank_fusion` of both lists."""
        dense, sparse = (part.search(queries, top_k=FUSED_DEPTH, **options) for part in self._parts)
        fused = {}
        for query in dense:
            # BM25's list is filled up with documents that share no word with the query; those are not found.
            shared = {id: score for id, score in sparse[query].items() if score > 0}
            rankings = [sorted(scores, key=lambda id: -scores[id]) for scores in (dense[query], shared)]
            fused[query] = dict(list(reciprocal_rank_fusion(rankings).items())[:top_k])
        return fused


def systems(model: Causal2Vec, baselines: Sequence[str]) -> list[Any]:
    """The model first, then each baseline: "encoder" (the one inside the model), "contextual" and "eos" (one half of
    the embedding alone), "bm25", "hybrid" (the model and BM25 fused), another model of this package ("default" or a
    checkpoint's folder), or a sentence-transformers model: a folder, an installed package, or a hub id.

    A folder and a hub id are named by their last part, or in full where another system has that name. All run in the
    model's dtype, and tokens are the model's own for all of them, so that tokens/s compare.

    Raises ValueError for a half of another pooling, and the errors of opening a model.
    """
    weights = str(model.stamp["weights"])
    quiet = {"on_truncate": "ignore"}  # every system cuts long texts, and the others do not warn either
    ours = DenseSystem(_OURS, weights, model, options=quiet, count_tokens=model.count_tokens)
    found: list[Any] = [ours]
    taken = {_OURS, "encoder", "contextual", "eos", *SEARCH_ONLY}

    def label_of(name: str) -> str:
        last = name.rstrip("/").split("/")[-1]
        label = name if last in taken else last
        taken.add(label)
        return label

    for name in dict.fromkeys(baselines):
        if name == "encoder":
            alone = EncoderEmbedder(model)
            label = f"encoder-{weights}"
            found.append(DenseSystem(name, label, alone, options=quiet, count_tokens=model.count_tokens))
        elif name in ("contextual", "eos"):
            if model.config.pooling != "context_eos":
                raise ValueError(
                    f"The baseline {name!r} is half of a context_eos embedding; this is {model.config.pooling}."
                )
            half = slice(0 if name == "contextual" else 1, None, 2)
            found.append(DenseSystem(name, f"{name}-{weights}", None, source=ours, columns=half))
        elif name == BM25:
            found.append(mteb.get_model(_MTEB_BM25))
        elif name == HYBRID:
            found.append(HybridSystem(ours))
        elif name == DEFAULT or (Path(name) / CONFIG_FILE).is_file():
            another = Causal2Vec.from_pretrained(name, device=model.device, dtype=model.dtype)
            theirs = str(another.stamp["weights"])
            found.append(DenseSystem(label_of(name), theirs, another, options=quiet, count_tokens=model.count_tokens))
        else:
            package = package_base(name)
            source = name if package is None else str(package.folder)
            other = SentenceTransformer(source, device=str(model.device), model_kwargs={"dtype": model.dtype})
            found.append(DenseSystem(label_of(name), name, other, count_tokens=model.count_tokens))
    return found
