"""RAG with LangChain on Python's own docstrings: hybrid retrieval, and an answer with numbered sources. Offline.

Needs c2v-rag[langchain,gguf] and: pip install langchain-classic langchain-huggingface.
--chat-model "openai:gpt-4.1-mini" uses another chat model; it needs that model's package and API key.
"""

import argparse

from langchain_classic.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from local_llm import load_local_llm
from quickstart import MODULES, documents_of
from transformers import pipeline

from c2v_rag import Causal2Vec, VectorIndex
from langchain_c2v import C2VRetriever


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
    index = VectorIndex(arguments.store, model)
    index.add(documents_of(arguments.modules), show_progress=True)
    hits = C2VRetriever(index=index, k=3, group_by="source").invoke(arguments.question)

    chat = init_chat_model(arguments.chat_model) if arguments.chat_model else local_chat(model, arguments.one_model)
    prompt = ChatPromptTemplate.from_template(
        "Answer the question in one sentence, and end it with the number of the passage that says so, in brackets."
        "\n\n{passages}\n\n{question}"
    )
    passages = "\n\n".join(f"[{number}] {hit.page_content}" for number, hit in enumerate(hits, start=1))
    print((prompt | chat).invoke({"passages": passages, "question": arguments.question}).text.strip())
    print("Sources:", *(f"[{number}] {hit.metadata['source']}" for number, hit in enumerate(hits, start=1)))


if __name__ == "__main__":
    main()
