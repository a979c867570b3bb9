"""The weights of one part of a model: opened, adapted, compared with what was read, and written.

A part is the encoder or the decoder ("llm"). Its base is what its weights were read from; an adapter (LoRA) may be
merged into them. A base is never written with an adapter in it: it is named where it can be had again, read again
from its own files, or, where it was trained, written without the adapter.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from c2v_rag import checkpoint
from c2v_rag.bases import Base, quiet_transformers
from c2v_rag.config import Causal2VecConfig
from c2v_rag.identity import hash_tensors, sample_weights
from c2v_rag.tokenization import TokenizedTexts

Part = Literal["encoder", "llm"]
PARTS: tuple[Part, ...] = ("encoder", "llm")

_POSITION_TABLES = {"position_embeddings", "embed_positions", "wpe"}
_ADAPTER_PREFIX = "base_model.model."


# Opening


@torch.inference_mode(False)  # inference tensors could be neither trained nor changed later
def open_module(base: Base, num_layers: int | None = None, **kwargs: Any) -> PreTrainedModel:
    """Open weights with transformers' AutoModel; `num_layers` keeps the first layers only.

    `kwargs` go to `AutoModel.from_pretrained`. Raises ValueError where a tensor is missing, the files are damaged, or
    `kwargs` ask for code that comes with weights.
    """
    if "trust_remote_code" in kwargs:
        raise ValueError("trust_remote_code is not supported: no code that comes with weights is run.")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(base.folder, **local)
    if num_layers is not None:
        _keep_first_layers(config.get_text_config(), num_layers)
    try:
        with quiet_transformers():
            model, report = AutoModel.from_pretrained(
                base.folder, config=config, use_safetensors=True, output_loading_info=True, **local, **kwargs
            )
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{base.folder} ({base.origin}) is damaged or does not fit its config.json: {error}"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))  # pooler: unused here
    if missing:
        raise ValueError(f"{base.folder} ({base.origin}) lacks the tensors {missing[:4]}. Install or fetch it again.")
    opened: PreTrainedModel = model
    return opened


def open_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The tokenizer beside a base's weights."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        base.folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _keep_first_layers(config: Any, num_layers: int) -> None:
    total = config.num_hidden_layers
    if num_layers > total:
        raise ValueError(f"num_llm_layers is {num_layers}, but the decoder has {total} layers.")
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:  # such as layer_types: one entry a layer
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers


def token_embeddings(llm: PreTrainedModel) -> nn.Embedding:
    """The decoder's table of token embeddings."""
    return cast(nn.Embedding, llm.get_input_embeddings())


def input_device(llm: PreTrainedModel) -> torch.device:
    """Where the decoder takes its inputs; not "meta" where its token embeddings are offloaded."""
    table = token_embeddings(llm)
    hook = getattr(table, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) if table.weight.device.type == "meta" else None
    if device is None:
        return table.weight.device
    return torch.device(f"cuda:{device}" if isinstance(device, int) else device)


def position_limit(module: PreTrainedModel) -> int | None:
    """The longest sequence a model has position embeddings for; None where positions are computed (rotary)."""
    for name, table in module.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            # RoBERTa's and MPNet's positions start behind the padding index, OPT's behind an offset.
            unused = 0 if table.padding_idx is None else table.padding_idx + 1
            return table.num_embeddings - max(unused, int(getattr(table, "offset", 0)))
    return None


def check_encoder_length(encoder: PreTrainedModel, max_length: int) -> None:
    """ValueError where the encoder has fewer positions than `max_length`."""
    limit = position_limit(encoder)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"encoder_max_length is {max_length}, but the encoder has {limit} positions. Set it to {limit} or less."
        )


def check_llm_length(limit: int | None, config: Causal2VecConfig, tokenized: TokenizedTexts, text_tokens: int) -> None:
    """ValueError where prefix, Contextual token and a text of so many tokens need more than `limit` positions."""
    needed = len(tokenized.prefix_ids) + int(config.contextual_token != "none") + text_tokens
    if limit is not None and needed > limit:
        raise ValueError(
            f"The decoder has {limit} positions, but {needed} are needed: {text_tokens} for a text (max_length), the "
            "rest for BOS, the instruction and the Contextual token. Lower max_length or shorten the instruction."
        )


# Adapters


def adapted_layers(module: nn.Module) -> list[BaseTunerLayer]:
    """The layers that carry LoRA; each knows whether it is merged."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def adapter_tensors(module: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's tensors under the names of peft's format."""
    return {f"{_ADAPTER_PREFIX}{name}": tensor for name, tensor in get_peft_model_state_dict(module).items()}


@torch.inference_mode(False)
def load_adapter(module: PreTrainedModel, folder: Path) -> None:
    """Inject a LoRA adapter saved in peft's format and, where the weights are not quantised, merge it."""
    try:
        lora = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder}/adapter_config.json cannot be read ({error}). Save the checkpoint again."
        ) from error
    _inject(module, lora)
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_tensors(module).items()}
    _set_adapter(module, checkpoint.read_tensors(folder / "adapter_model.safetensors", expected))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if not getattr(module, "is_quantized", False):
        for layer in adapted_layers(module):
            layer.merge()


def _inject(module: PreTrainedModel, lora: Any) -> None:
    inject_adapter_in_model(lora, module)
    # peft makes them in the base's precision; in bfloat16 a saved adapter would no longer be the one that was read.
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _set_adapter(module: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    set_peft_model_state_dict(module, {name.removeprefix(_ADAPTER_PREFIX): t for name, t in tensors.items()})


# Identity


@dataclasses.dataclass
class PartRecord:
    """What is known of a part's own weights, its adapter aside.

    `base`: what they were read from, its first `num_layers` layers; None for weights made in memory. `identity` is
    valid while `sample` is what `sample_weights` gives.
    """

    base: Base | None = None
    num_layers: int | None = None
    identity: str = ""
    sample: bytes = b""

    def note(self, module: PreTrainedModel, identity: str) -> None:
        """Remember the identity of the weights as they are now."""
        self.identity, self.sample = identity, sample_weights(module)


def part_identity(module: PreTrainedModel, record: PartRecord) -> str:
    """The base's identity while the weights are the base's, else the hash of their values."""
    if not record.sample or sample_weights(module) != record.sample:
        base = record.base if is_base(module, record) else None
        record.note(module, base.identity if base else hash_tensors(base_tensors(module)))
    return record.identity


def adapter_identity(module: PreTrainedModel) -> str:
    """The hash of the adapter's tensors and of the settings that change what it computes."""
    lora = module.peft_config["default"]
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias")
    return hash_tensors(adapter_tensors(module), **{name: getattr(lora, name) for name in names})


def is_base(module: PreTrainedModel, record: PartRecord) -> bool:
    """Whether the part's own weights are those of its base: every tensor is compared with the base's files.

    Where an adapter is merged, the base is read and the adapter merged once more; then differences of a few units in
    the last place count as rounding.
    """
    base = record.base
    if base is None or not base.folder.is_dir():
        return False
    if getattr(module, "is_quantized", False):
        return True  # such weights cannot be trained
    read = open_module(base, record.num_layers, dtype=module.dtype)
    merged = any(layer.merged for layer in adapted_layers(module))
    if merged:
        _inject(read, module.peft_config["default"])
        _set_adapter(read, {name: tensor.cpu() for name, tensor in adapter_tensors(module).items()})
        for layer in adapted_layers(read):
            layer.merge()
    expected = _without_adapter(read)
    found = _without_adapter(module)
    if expected.keys() != found.keys():
        return False
    return all(_equal(tensor, expected[name], merged) for name, tensor in found.items() if tensor.device.type != "meta")


def _equal(found: Tensor, expected: Tensor, merged: bool) -> bool:
    found = found.detach().cpu()
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if torch.equal(found, expected):
        return True
    if not merged or not found.is_floating_point():
        return False
    few_units = 4 * torch.finfo(found.dtype).eps
    return torch.allclose(found, expected, rtol=few_units, atol=few_units * float(expected.abs().max()))


def _without_adapter(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }


@torch.no_grad()
def base_tensors(module: PreTrainedModel) -> dict[str, Tensor]:
    """The part's own tensors, with what is merged taken out of copies; the module stays as it is."""
    tensors = _without_adapter(module)
    for name, layer in module.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not layer.merged:
            continue
        own = dict(layer.get_base_layer().named_parameters())
        kept = {key: parameter.data.clone() for key, parameter in own.items()}
        merged = list(layer.merged_adapters)
        layer.unmerge()
        for key, parameter in own.items():
            tensors[f"{name}.{key}"] = parameter.data
            parameter.data = kept[key]
        layer.merged_adapters.extend(merged)
    return tensors


@torch.inference_mode(False)
@torch.no_grad()
def unmerge_adapter(module: PreTrainedModel, record: PartRecord) -> None:
    """Take a merged adapter out of the weights. Where they are the base's, they get its values again, exactly."""
    layers = [layer for layer in adapted_layers(module) if layer.merged]
    if not layers:
        return
    read = (
        _without_adapter(open_module(record.base, record.num_layers, dtype=module.dtype))
        if (record.base is not None and is_base(module, record))
        else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in layers:
            layer.unmerge()
    for name, tensor in _without_adapter(module).items():
        if name in read and tensor.device.type != "meta":
            tensor.data.copy_(read[name])


# Saving


def save_part(
    part: Part,
    module: PreTrainedModel,
    record: PartRecord,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    further_bases: Sequence[Mapping[str, Any]] = (),
) -> str | None:
    """Write `folder/PART`: base.json for a base that can be had again, else weights and tokenizer.

    `further_bases` are entries that base.json gets too. Returns the identity of weights that were written; None for
    base.json.
    """
    place = folder / part
    place.mkdir()
    as_read = is_base(module, record)
    base = record.base
    if as_read and base is not None and base.reference is not None:
        accepted = list(base.reference.get("accepted", [base.reference]))
        accepted += [entry for entry in further_bases if entry not in accepted]
        (place / checkpoint.BASE_FILE).write_text(json.dumps({"accepted": accepted}, indent=2) + "\n", encoding="utf-8")
        return None
    if as_read and base is not None:
        # From the base's files, in their own precision, whatever the weights were loaded in.
        open_module(base, record.num_layers, dtype="auto").save_pretrained(place)
        identity = base.identity
    else:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in base_tensors(module).items()}
        identity = hash_tensors(tensors)
        module.save_pretrained(place, state_dict=tensors)  # which empties the dict
    tokenizer.save_pretrained(place)
    return identity


def save_adapter(part: Part, module: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `folder/PART_adapter` in peft's format, in `dtype` where one is given, where the part has an adapter."""
    if not adapted_layers(module):
        return
    place = folder / f"{part}_adapter"
    module.peft_config["default"].save_pretrained(place)
    checkpoint.write_tensors(place / "adapter_model.safetensors", adapter_tensors(module), dtype)
