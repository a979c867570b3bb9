"""RAG with LlamaIndex on Python's own docstrings: index, hybrid retrieval, an answer with its sources. Offline.

Needs c2v-rag[llama-index,gguf] and: pip install llama-index-llms-huggingface llama-index-retrievers-bm25
llama-index-vector-stores-chroma. --llm "package.module:Class" uses another LLM, an object of this class made without
arguments.
"""

import argparse
from importlib import import_module

import chromadb
from llama_index.core import VectorStoreIndex
from llama_index.core.llms import LLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import Document
from llama_index.embeddings.c2v import Causal2VecEmbedding
from llama_index.llms.huggingface import HuggingFaceLLM
from llama_index.retrievers.bm25 import BM25Retriever
from llama_index.vector_stores.chroma import ChromaVectorStore
from local_llm import load_local_llm
from quickstart import MODULES, documents_of

from c2v_rag import Causal2Vec


def local_llm(model: Causal2Vec, one_model: bool) -> LLM:
    """The decoder of `model` as LlamaIndex's LLM."""
    return HuggingFaceLLM(
        model=load_local_llm(model, one_model),
        tokenizer=model.tokenizer.llm,
        max_new_tokens=40,
        generate_kwargs={"do_sample": False},
        is_chat_model=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="How do I copy a whole folder tree?")
    parser.add_argument("--store", default="demo-store-llamaindex")
    parser.add_argument("--llm", help='such as "llama_index.llms.openai:OpenAI"; SmolLM2-135M-Instruct unless given')
    parser.add_argument("--one-model", action="store_true", help="answer and embed with one copy of the decoder")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="modules of the standard library to index")
    arguments = parser.parse_args()

    model = Causal2Vec.from_pretrained("default")
    docstrings = documents_of(arguments.modules)
    documents = [Document(id_=one.source, text=one.text, metadata={"source": one.source}) for one in docstrings]
    splitter = SentenceSplitter(
        chunk_size=256, chunk_overlap=0, tokenizer=model.tokenizer.llm.encode, id_func=lambda i, one: f"{one.id_} {i}"
    )
    nodes = splitter.get_nodes_from_documents(documents)
    collection = chromadb.PersistentClient(arguments.store).get_or_create_collection(
        "passages", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    index = VectorStoreIndex.from_vector_store(ChromaVectorStore(collection), Causal2VecEmbedding(model=model))
    stored_ids = set(collection.get(include=[])["ids"])
    index.insert_nodes([node for node in nodes if node.node_id not in stored_ids])

    llm = local_llm(model, arguments.one_model)
    if arguments.llm:
        module, _, name = arguments.llm.partition(":")
        llm = getattr(import_module(module), name)()
    hybrid = QueryFusionRetriever(
        [index.as_retriever(similarity_top_k=4), BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=4)],
        llm=llm, similarity_top_k=3, num_queries=1, mode="reciprocal_rerank", use_async=False,
    )  # fmt: skip
    answer = RetrieverQueryEngine.from_args(hybrid, llm=llm).query(arguments.question)
    print(str(answer).strip())
    print("Sources:", *dict.fromkeys(hit.metadata["source"] for hit in answer.source_nodes))


if __name__ == "__main__":
    main()
