"""Keys and values of the shared prefix (BOS and the instruction), computed once and read by every batch.

Under a causal mask the prefix does not attend to the text, so its keys and values are the same for every text.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from c2v_rag.attention import has_only_keys_and_values, key_value_layers
from c2v_rag.identity import sample_weights
from c2v_rag.parts import adapted_layers, token_embeddings
from c2v_rag.tokenization import TokenBatch

_MAX_CACHED_PREFIXES = 8
# A prefix of at most this share of a text's tokens is computed with every text: it adds few tokens, and without a cache
# the decoder needs no attention mask at all.
_SHORT_SHARE = 1 / 16


def prefix_states(llm: PreTrainedModel, prefix_ids: Tensor) -> DynamicCache | None:
    """Keys and values of the prefix (P,), for `past_key_values`. Batches of any size read them and do not change them.

    None for a decoder whose cache has other states than keys and values per token (Mamba, LFM2, Qwen3-Next, Falcon-H1).
    The prefix must then be computed with every text. None too while the decoder trains with gradient checkpointing,
    because its layers then accept no cache.
    """
    if llm.training and is_checkpointing(llm):
        return None
    if not has_only_keys_and_values(llm):
        return None
    embeds = token_embeddings(llm)(prefix_ids).unsqueeze(0)
    states: DynamicCache | None = getattr(llm(inputs_embeds=embeds, use_cache=True), "past_key_values", None)
    layers = key_value_layers(states)
    if layers is None:
        return None
    for layer in layers:
        vars(layer)["update"] = MethodType(_read_only_update, layer)
    return states


def is_short(batch: TokenBatch) -> bool:
    """Whether the batch's prefix is so short that it is computed with every text: BOS alone, or few tokens."""
    return len(batch.prefix_ids) <= max(1, batch.text_ids.shape[1] * _SHORT_SHARE)


def is_checkpointing(module: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on: in training, layers then compute their activations twice."""
    return any(getattr(layer, "gradient_checkpointing", False) for layer in module.modules())


def _read_only_update(layer: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Call the layer's `update` for a batch (B, heads, T, width), then restore the layer; returns keys and values."""
    original = dict(vars(layer))
    layer.keys = layer.keys.expand(len(keys), -1, -1, -1)
    layer.values = layer.values.expand(len(keys), -1, -1, -1)
    try:
        joined: tuple[Tensor, Tensor] = type(layer).update(layer, keys, values, *args, **kwargs)
    finally:
        vars(layer).update(original)
    return joined


class PrefixCache:
    """A cache of the states of the last 8 prefixes. An entry is computed again if the decoder's weights have changed.

    A pickle or copy of it is empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: OrderedDict[tuple[int, ...], tuple[object, DynamicCache | None]] = OrderedDict()

    def __reduce__(self) -> tuple[type[PrefixCache], tuple[()]]:
        return PrefixCache, ()

    def __len__(self) -> int:
        return len(self._states)

    def get(
        self,
        llm: PreTrainedModel,
        prefix_ids: Tensor,
        *,
        key: tuple[int, ...] | None = None,
        weights: object = None,
    ) -> DynamicCache | None:
        """`prefix_states`, from the cache if possible.

        `key`: the ids of the prefix as integers; `weights`: `weights_state(llm)`. Both are computed if they are
        missing, which waits for the device.
        """
        key = tuple(prefix_ids.tolist()) if key is None else key
        weights = weights_state(llm) if weights is None else weights
        with self._lock:
            if key not in self._states or self._states[key][0] != weights:
                self._states[key] = weights, prefix_states(llm, prefix_ids)
            self._states.move_to_end(key)
            if len(self._states) > _MAX_CACHED_PREFIXES:
                self._states.popitem(last=False)
            return self._states[key][1]


def weights_state(llm: PreTrainedModel) -> object:
    """A value that changes with the decoder's weights, device, dtype, and the state of its adapters."""
    adapters = tuple(
        (tuple(layer.merged_adapters), tuple(layer.active_adapters), layer.disable_adapters)
        for layer in adapted_layers(llm)
    )
    return token_embeddings(llm).weight.device, token_embeddings(llm).weight.dtype, sample_weights(llm), adapters
