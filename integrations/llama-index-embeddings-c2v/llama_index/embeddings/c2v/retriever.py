"""LlamaIndex's `BaseRetriever` over a `c2v_rag.VectorIndex`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.callbacks import CallbackManager
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from c2v_rag import Hit, Reranker, SearchMode, VectorIndex


class C2VRetriever(BaseRetriever):
    """Retrieves from a `VectorIndex`: by embeddings, by words, or by both.

    Examples:
        >>> from c2v_rag import Document, VectorIndex, shared_model
        >>> from llama_index.embeddings.c2v import C2VRetriever
        >>> index = VectorIndex("store", shared_model())
        >>> index.add([Document("Bread needs yeast.", source="bread.txt")]).added
        1
        >>> C2VRetriever(index, mode="hybrid").retrieve("how does dough rise?")[0].metadata["source"]
        'bread.txt'

    `index`: a `VectorIndex`, which may exist already. `similarity_top_k`: number of nodes. The other arguments are
    options of `VectorIndex.search`. With `neighbours`, a node's text is the passage with the text around it, and the
    metadata "passage" is the passage alone.
    """

    def __init__(
        self,
        index: VectorIndex,
        *,
        similarity_top_k: int = 5,
        mode: SearchMode | None = None,
        where: Mapping[str, Any] | None = None,
        min_score: float | None = None,
        group_by: str | None = None,
        mmr: float | None = None,
        neighbours: int = 0,
        rerank: Reranker | None = None,
        rerank_depth: int = 50,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._index = index
        self._top_k = similarity_top_k
        self._options: dict[str, Any] = {
            "mode": mode,
            "where": where,
            "min_score": min_score,
            "group_by": group_by,
            "mmr": mmr,
            "neighbours": neighbours,
            "rerank": rerank,
            "rerank_depth": rerank_depth,
        }
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_node(hit) for hit in self._index.search(query_bundle.query_str, self._top_k, **self._options)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = await self._index.asearch(query_bundle.query_str, self._top_k, **self._options)
        return [_node(hit) for hit in hits]


def _node(hit: Hit) -> NodeWithScore:
    metadata = {**hit.metadata, "passage": hit.text} if hit.context != hit.text else hit.metadata
    # The text contains the passage, which a prompt should not have twice.
    repeated = ["passage"] if hit.context != hit.text else []
    node = TextNode(
        id_=hit.id,
        text=hit.context,
        metadata=metadata,
        excluded_llm_metadata_keys=repeated,
        excluded_embed_metadata_keys=repeated,
    )
    return NodeWithScore(node=node, score=hit.score)
