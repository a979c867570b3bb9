"""BM25 scores of a batch's queries and documents, for losses that know what lexical search finds already.

B queries, M documents, W different words of a batch's queries, T texts of a stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import Stemmer
import torch
from torch import Tensor

from c2v_rag.index.lexical import tokenize_words

K1, B = 1.5, 0.75  # bm25s' defaults, which the index uses


class BatchBM25:
    """BM25 (Robertson and Zaragoza, 2009) with the words and the formula of `LexicalIndex`.

    `texts`: all texts of a stage. `documents`: by the name of a data set, its documents, which are among `texts`. Idf
    and mean length are those of the set's different documents. Whole texts are read, also those that the model cuts.
    """

    def __init__(self, texts: Iterable[str], documents: Mapping[str, Iterable[str]]) -> None:
        distinct = list(dict.fromkeys(texts))
        self._rows = {text: row for row, text in enumerate(distinct)}
        tokens = tokenize_words(distinct, Stemmer.Stemmer("english"), return_ids=True)
        self._lengths = np.array([len(ids) for ids in tokens.ids], dtype=np.int64)  # (T,)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        # Ids of words can differ between processes, because they come from a set.
        self._words = np.fromiter(itertools.chain.from_iterable(tokens.ids), dtype=np.int64, count=self._starts[-1])
        num_words = 1 + int(self._words.max(initial=0))
        self._statistics: dict[str, tuple[np.ndarray, float]] = {}  # of a set: idf of each word, mean length
        for name, group in documents.items():
            rows = np.array([self._rows[text] for text in dict.fromkeys(group)], dtype=np.int64)
            places, words = self._words_of(rows)
            pairs = np.unique(places * num_words + words)  # each word counts once for a document
            holding = np.bincount(pairs % num_words, minlength=num_words)
            idf = np.log1p((len(rows) - holding + 0.5) / (holding + 0.5)).astype(np.float32)
            self._statistics[name] = (idf, float(self._lengths[rows].mean()))

    def rows(self, texts: Sequence[str]) -> Tensor:
        """(n,): a number of each text, the same in every process. KeyError for a text that is none of the stage's."""
        return torch.tensor([self._rows[text] for text in texts])

    def scores(self, queries: Tensor, documents: Tensor, data_set: str) -> Tensor:
        """(B, M) float32: BM25 of each document for each query; 0 where they share no word.

        `queries` (B,) and `documents` (M,): numbers from `rows`. Result on their device.
        """
        device = queries.device
        idf, mean_length = self._statistics[data_set]
        query_rows, document_rows = queries.cpu().numpy(), documents.cpu().numpy()
        query_of, query_words = self._words_of(query_rows)
        words, columns = np.unique(query_words, return_inverse=True)
        document_of, document_words = self._words_of(document_rows)
        places = np.searchsorted(words, document_words)
        is_query_word = np.isin(document_words, words)

        def counts(rows: np.ndarray, columns: np.ndarray, num_rows: int) -> Tensor:
            flat = torch.from_numpy(rows * len(words) + columns).to(device)
            return torch.bincount(flat, minlength=num_rows * len(words)).view(num_rows, len(words)).float()

        in_queries = counts(query_of, columns, len(query_rows))  # (B, W)
        in_documents = counts(document_of[is_query_word], places[is_query_word], len(document_rows))  # (M, W)
        lengths = torch.from_numpy(self._lengths[document_rows]).to(device).float().unsqueeze(1) / (mean_length or 1.0)
        saturated = in_documents / (in_documents + K1 * (1 - B + B * lengths))
        return (in_queries * torch.from_numpy(idf[words]).to(device)) @ saturated.T

    def _words_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every word of these texts (n,): the position of its text in `rows`, and its id."""
        parts = [self._words[self._starts[row] : self._starts[row + 1]] for row in rows]
        places = np.repeat(np.arange(len(rows)), self._lengths[rows])
        return places, np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
