"""RAG with LlamaIndex on Python's own docstrings: hybrid retrieval, and an answer with numbered sources. Offline.

Needs c2v-rag[llama-index,gguf] and: pip install llama-index-llms-huggingface.
--llm "package.module:Class" uses another LLM, an object of this class made without arguments.
"""

import argparse
from importlib import import_module

from llama_index.core.llms import LLM
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.embeddings.c2v import C2VRetriever
from llama_index.llms.huggingface import HuggingFaceLLM
from local_llm import load_local_llm
from quickstart import MODULES, documents_of

from c2v_rag import Causal2Vec, VectorIndex


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
    parser.add_argument("--store", default="demo-store")
    parser.add_argument("--llm", help='such as "llama_index.llms.openai:OpenAI"; SmolLM2-135M-Instruct unless given')
    parser.add_argument("--one-model", action="store_true", help="answer and embed with one copy of the decoder")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="modules of the standard library to index")
    arguments = parser.parse_args()

    model = Causal2Vec.from_pretrained("default")
    index = VectorIndex(arguments.store, model)
    index.add(documents_of(arguments.modules), show_progress=True)

    llm = local_llm(model, arguments.one_model)
    if arguments.llm:
        module, _, name = arguments.llm.partition(":")
        llm = getattr(import_module(module), name)()
    retriever = C2VRetriever(index, similarity_top_k=3, group_by="source")
    answer = CitationQueryEngine(retriever, llm=llm).query(arguments.question)  # it numbers the passages for the LLM
    print(str(answer).strip())
    print("Sources:", *(f"[{n}] {hit.metadata['source']}" for n, hit in enumerate(answer.source_nodes, start=1)))


if __name__ == "__main__":
    main()
