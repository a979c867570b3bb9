"""RAG with LangChain on Python's own docstrings: index, hybrid retrieval, an answer with its sources. Offline.

Needs c2v-rag[langchain,gguf] and: pip install bm25s langchain-chroma langchain-classic langchain-huggingface.
--chat-model "openai:gpt-4.1-mini" uses another chat model; it needs that model's package and API key.
"""

import argparse
from typing import Any

import bm25s
from langchain_chroma import Chroma
from langchain_classic.chat_models import init_chat_model
from langchain_classic.retrievers import EnsembleRetriever
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from local_llm import load_local_llm
from quickstart import MODULES, documents_of
from transformers import pipeline

from c2v_rag import Causal2Vec, VectorIndex
from langchain_c2v import Causal2VecEmbeddings


class BM25Retriever(BaseRetriever):
    """The best `k` of `passages` by BM25."""

    passages: list[Document]
    bm25: Any
    k: int = 4

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        tokens = bm25s.tokenize(query, stopwords="en", show_progress=False)
        return self.bm25.retrieve(tokens, self.passages, k=self.k, show_progress=False).documents[0].tolist()


def local_chat(model: Causal2Vec, one_model: bool) -> BaseChatModel:
    """The decoder of `model` as LangChain's chat model."""
    llm = load_local_llm(model, one_model)
    options = {"max_new_tokens": 40, "do_sample": False, "return_full_text": False}
    pipe = pipeline("text-generation", model=llm, tokenizer=model.tokenizer.llm, **options)
    return ChatHuggingFace(llm=HuggingFacePipeline(pipeline=pipe))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="How do I copy a whole folder tree?")
    parser.add_argument("--store", default="demo-store")
    parser.add_argument("--chat-model", help='"provider:model" of init_chat_model; SmolLM2-135M-Instruct unless given')
    parser.add_argument("--one-model", action="store_true", help="answer and embed with one copy of the decoder")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="modules of the standard library to index")
    arguments = parser.parse_args()

    model = Causal2Vec.from_pretrained("default")
    VectorIndex(arguments.store, model).add(documents_of(arguments.modules), show_progress=True)

    store = Chroma("documents", Causal2VecEmbeddings(model=model), persist_directory=arguments.store)
    stored = store.get()
    texts_and_metadata = zip(stored["documents"], stored["metadatas"], strict=True)
    passages = [Document(text, metadata=metadata) for text, metadata in texts_and_metadata]
    sparse = BM25Retriever(passages=passages, bm25=bm25s.BM25())
    sparse.bm25.index(bm25s.tokenize(stored["documents"], stopwords="en", show_progress=False), show_progress=False)
    dense = store.as_retriever(search_kwargs={"k": 4})
    hits = EnsembleRetriever(retrievers=[dense, sparse], weights=[0.5, 0.5]).invoke(arguments.question)[:3]

    chat = init_chat_model(arguments.chat_model) if arguments.chat_model else local_chat(model, arguments.one_model)
    prompt = ChatPromptTemplate.from_template("{passages}\n\nAnswer in one sentence, from the text above: {question}")
    context = "\n\n".join(hit.page_content for hit in hits)
    print((prompt | chat).invoke({"passages": context, "question": arguments.question}).text.strip())
    print("Sources:", *dict.fromkeys(hit.metadata["source"] for hit in hits))


if __name__ == "__main__":
    main()
