"""Generate text with a model's decoder. Embedding and generation share one copy of its weights in memory."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from c2v_rag.bases import quiet_transformers
from c2v_rag.model import Causal2Vec
from c2v_rag.parts import adapted_layers


def causal_lm(model: Causal2Vec) -> PreTrainedModel:
    """The complete decoder with its language-model head, as a transformers model that shares weights with `model`.

    All layers are read from the files of `model`'s decoder. The layers of `model` then use the same tensors in memory.
    A merged LoRA adapter is removed from these tensors and computed separately: embeddings use it, generation does
    not. Embeddings do not change, except for rounding, and take a little longer. Different threads may embed and
    generate at the same time.

    Raises ValueError if the weights cannot be shared: the decoder exists in memory only, was changed after it was
    read, is quantised, or was saved without its last layers or its head.
    """
    folder = model.base_folder("llm")
    if getattr(model.llm, "is_quantized", False):
        raise ValueError("A quantised decoder cannot be shared: its LoRA and its weights are not in one precision.")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    layers = AutoConfig.from_pretrained(folder, **local).get_text_config().num_hidden_layers
    if model.config.num_llm_layers == layers:
        raise ValueError(
            f"{folder} holds the decoder's first {layers} layers only. Build the model from the whole decoder "
            "(Causal2Vec.from_parts), or load a checkpoint that names it as its base."
        )
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True, **local
        )
    decoder, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{folder} has no head to generate with: it lacks {sorted(report['missing_keys'])[:4]}.")
    decoder = decoder.to(model.device).eval()
    for layer in adapted_layers(model.llm):
        if layer.merged:
            layer.unmerge()
    for name, parameter in model.llm.named_parameters():
        if ".lora_" not in name:
            parameter.data = decoder.base_model.get_parameter(name.replace(".base_layer.", ".")).data
    generator: PreTrainedModel = decoder
    return generator
