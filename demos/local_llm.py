"""The decoder that embeds, as the language model that answers: for langchain_rag.py and llamaindex_rag.py."""

import sys

from transformers import AutoModelForCausalLM, PreTrainedModel

from c2v_rag import Causal2Vec
from c2v_rag.generation import causal_lm, shared_bytes


def load_local_llm(model: Causal2Vec, one_model: bool) -> PreTrainedModel:
    """A second copy of the decoder, or with `one_model` the layers that embed and the rest beside them."""
    if not one_model:
        return AutoModelForCausalLM.from_pretrained(model.llm_folder, dtype=model.dtype).to(model.device)
    llm = causal_lm(model)
    print(f"One model: {shared_bytes(model, llm) / 2**20:.0f} MiB are in memory once, not twice.", file=sys.stderr)
    return llm
