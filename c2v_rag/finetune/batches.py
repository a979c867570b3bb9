"""Batches of pairs with similar queries: their answers are harder negatives for each other than those of random pairs.

N pairs, B pairs of a batch, U different queries, K columns of a query's vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor

from c2v_rag.finetune.vectors import TextVectors


def in_neighbour_batches(
    datasets: Mapping[str, Dataset],
    vectors: TextVectors,
    prompts: Mapping[str, str],
    *,
    batch_size: int,
    share: float,
    pool: float,
    seed: int,
    device: torch.device,
) -> dict[str, Dataset]:
    """The datasets with their rows in the order of `neighbour_order`, for `PreparedBatches`.

    `vectors` computes what is missing of the queries, each behind the prompt of its dataset in `prompts`. The search
    runs on `device`. With several processes all get the order of process 0.
    """
    texts = {name: [prompts[name] + query for query in dataset["query"]] for name, dataset in datasets.items()}
    vectors.prepare(text for queries in texts.values() for text in queries)
    ordered = {}
    for name, dataset in datasets.items():
        rows, query_of = np.unique(vectors.rows(texts[name]).numpy(), return_inverse=True)
        queries = vectors(torch.from_numpy(rows)).to(device)
        order = neighbour_order(query_of, queries, batch_size=batch_size, share=share, pool=pool, seed=seed)
        (order,) = broadcast_object_list([order])
        ordered[name] = dataset.select(order)
    return ordered


@torch.no_grad()
def neighbour_order(
    query_of: np.ndarray, queries: Tensor, *, batch_size: int, share: float, pool: float, seed: int
) -> np.ndarray:
    """(N,): each pair once; every B of them are a batch.

    `query_of` (N,): the row of each pair's query in `queries` (U, K), which have length 1. A batch begins with a random
    unused pair. From the `pool` x B queries nearest to it that have unused pairs, more are drawn until `share` x B
    pairs are in the batch. Random unused pairs fill it. No query is twice in a batch while others are left.
    """
    rng = np.random.default_rng(seed)
    waiting = rng.permutation(len(query_of))  # the unused pairs
    pairs_of: list[list[int]] = [[] for _ in range(len(queries))]  # of each query, the last comes first in `waiting`
    for pair in waiting[::-1].tolist():
        pairs_of[query_of[pair]].append(pair)
    num_left = len(queries)  # queries with unused pairs
    is_used_up = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    is_used = np.zeros(len(query_of), dtype=bool)
    order: list[int] = []
    while len(waiting):
        batch: dict[int, None] = {}  # queries in their order
        pairs: list[int] = []

        def take(query: int, batch: dict[int, None] = batch, pairs: list[int] = pairs) -> None:
            pair = pairs_of[query].pop()
            is_used[pair] = True
            batch[query] = None
            pairs.append(pair)

        anchor = int(query_of[waiting[0]])
        take(anchor)
        similarities = (queries @ queries[anchor]).masked_fill_(is_used_up, -torch.inf)
        nearest = similarities.topk(min(round(pool * batch_size), num_left)).indices.cpu().numpy()
        nearest = nearest[nearest != anchor]
        number = min(max(0, round(share * batch_size) - 1), len(nearest))
        for query in rng.choice(nearest, size=number, replace=False).tolist():
            take(query)
        for repeat in (False, True):
            for pair in waiting:
                if len(pairs) == batch_size:
                    break
                query = int(query_of[pair])
                if not is_used[pair] and (repeat or query not in batch):
                    take(query)
        used_up = [query for query in batch if not pairs_of[query]]
        num_left -= len(used_up)
        is_used_up[torch.tensor(used_up, dtype=torch.long, device=queries.device)] = True
        waiting = waiting[~is_used[waiting]]
        order += pairs
    return np.array(order, dtype=np.int64)


class PreparedBatches(DefaultBatchSampler):
    """Batches of consecutive rows of a dataset; each epoch has another order of the batches."""

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        num_rows = len(self.sampler)  # type: ignore[arg-type]
        for batch in torch.randperm(len(self), generator=generator).tolist():
            start = batch * self.batch_size
            yield list(range(start, min(start + self.batch_size, num_rows)))
