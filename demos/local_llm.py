"""Loads the decoder of an embedding model as the language model for langchain_rag.py and llamaindex_rag.py."""

import sys

from transformers import AutoModelForCausalLM, PreTrainedModel

from c2v_rag import Causal2Vec
from c2v_rag.generation import causal_lm


def load_local_llm(model: Causal2Vec, one_model: bool) -> PreTrainedModel:
    """The decoder as a causal LM: a second copy or, with `one_model`, one that shares the embedding model's weights."""
    if not one_model:
        return AutoModelForCausalLM.from_pretrained(model.base_folder("llm"), dtype=model.dtype).to(model.device)
    llm = causal_lm(model)
    shared = sum(p.numel() * p.element_size() for name, p in model.llm.named_parameters() if ".lora_" not in name)
    print(f"One model: {shared / 2**20:.0f} MiB are in memory once, not twice.", file=sys.stderr)
    return llm
