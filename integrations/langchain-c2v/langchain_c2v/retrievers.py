"""LangChain's `BaseRetriever` over a `c2v_rag.VectorIndex`."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from c2v_rag import Hit, Reranker, SearchMode, VectorIndex

_OPTIONS = ("mode", "where", "min_score", "group_by", "mmr", "neighbours", "rerank", "rerank_depth")


class C2VRetriever(BaseRetriever):
    """Retrieves from a `VectorIndex`: by embeddings, by words, or by both.

    Examples:
        >>> from c2v_rag import Document, VectorIndex, shared_model
        >>> from langchain_c2v import C2VRetriever
        >>> index = VectorIndex("store", shared_model())
        >>> index.add([Document("Bread needs yeast.", source="bread.txt")]).added
        1
        >>> C2VRetriever(index=index, mode="hybrid").invoke("how does dough rise?")[0].metadata["source"]
        'bread.txt'

    `index`: a `VectorIndex`, which may exist already. `k`: number of documents. The other fields are options of
    `VectorIndex.search`. Each of them can also be given to `invoke`. The metadata of a document holds the chunk's
    metadata, its "source" and its "score". With `neighbours`, a document's text is the passage with the text around it,
    and the metadata "passage" is the passage alone.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    index: VectorIndex
    k: int = 5
    mode: SearchMode | None = None
    where: dict[str, Any] | None = None
    min_score: float | None = None
    group_by: str | None = None
    mmr: float | None = None
    neighbours: int = 0
    rerank: Reranker | None = None
    rerank_depth: int = 50

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **changes: Any
    ) -> list[Document]:
        k, options = self._arguments(changes)
        return [_document(hit) for hit in self.index.search(query, k, **options)]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **changes: Any
    ) -> list[Document]:
        k, options = self._arguments(changes)
        return [_document(hit) for hit in await self.index.asearch(query, k, **options)]

    def _arguments(self, changes: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        own = {name: getattr(self, name) for name in _OPTIONS}
        options = {**own, **changes}
        options.pop("verbose", None)  # LangChain's own
        return options.pop("k", self.k), options


def _document(hit: Hit) -> Document:
    metadata = {**hit.metadata, "score": hit.score}
    if hit.context != hit.text:
        metadata["passage"] = hit.text
    return Document(id=hit.id, page_content=hit.context, metadata=metadata)
