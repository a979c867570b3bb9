"""The attention masks of encoder and decoder, without a wait for the device: what transformers would read from it.

B texts, S encoder tokens.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_KEY_VALUE_LAYERS = {"full_attention", "sliding_attention"}  # among `layer_types` of a decoder's config


def is_causal(llm: PreTrainedModel) -> bool:
    """Whether no token of the decoder attends to later ones, so that padding on the right changes no other state."""
    config = llm.config.get_text_config()
    return getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)


def has_only_keys_and_values(llm: PreTrainedModel) -> bool:
    """Whether the decoder's class and config say that its layers store only keys and values per token."""
    if getattr(llm, "_is_stateful", False):  # transformers' mark of recurrent models
        return False
    layer_types = getattr(llm.config.get_text_config(), "layer_types", None) or ()
    return _KEY_VALUE_LAYERS.issuperset(layer_types)


def key_value_layers(states: object) -> list[Any] | None:
    """The layers of a decoder's cache; None if it is no `DynamicCache` of keys and values only."""
    if type(states) is not DynamicCache:
        return None
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in states.layers):
        return None
    return list(states.layers)


def cache_that_stores_nothing(llm: PreTrainedModel) -> DynamicCache | None:
    """An empty cache whose layers return the keys and values of each forward and keep none of them.

    Without any cache, transformers looks for several texts in one row, and waits for the device to do so. None, which
    is correct for every decoder, for those whose cache has other states.
    """
    if not has_only_keys_and_values(llm):
        return None
    states = DynamicCache(config=llm.config.get_text_config(decoder=True))
    layers = key_value_layers(states)
    if not layers:
        return None
    for layer in layers:
        vars(layer)["update"] = MethodType(_return_unstored, layer)
    return states


def _return_unstored(layer: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return keys, values


def encoder_attention_mask(encoder: PreTrainedModel, mask: Tensor) -> Tensor:
    """The attention mask to pass to an encoder, from the mask (B, S) of its tokens: (B, 1, 1, S) bool if it takes one.

    transformers reads a mask (B, S) on the host to see whether it has padding, and passes one of four dimensions on
    unread. Only PyTorch's attention takes it, and only in encoders whose layers all attend to all tokens.
    """
    config = encoder.config
    has_windows = any(getattr(config, name, None) for name in ("layer_types", "sliding_window", "local_attention"))
    takes_any_mask = hasattr(sys.modules[type(encoder).__module__], "create_bidirectional_mask")
    if has_windows or not takes_any_mask or getattr(config, "_attn_implementation", None) != "sdpa":
        return mask
    return mask[:, None, None, :].bool()
