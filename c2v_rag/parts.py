"""Open, adapt, compare and write the weights of one part of a model.

A part is the encoder or the decoder ("llm"). Its base is the source that its weights were read from. An adapter (LoRA)
may be merged into the weights, but merged weights are never written. An unchanged base is stored as a reference or
written from its own files. A trained base is written without the adapter.
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
from c2v_rag.identity import hash_tensors, sample_weights, walk
from c2v_rag.tokenization import TokenizedTexts

Part = Literal["encoder", "llm"]
PARTS: tuple[Part, ...] = ("encoder", "llm")

_POSITION_TABLES = {"position_embeddings", "embed_positions", "wpe"}
_ADAPTER_PREFIX = "base_model.model."


# Opening


@torch.inference_mode(False)  # inference tensors could not be trained or changed later
def open_module(base: Base, num_layers: int | None = None, **kwargs: Any) -> PreTrainedModel:
    """Open weights with transformers' AutoModel; `num_layers`: use the first layers only.

    `kwargs` are passed to `AutoModel.from_pretrained`. Raises ValueError if a tensor is missing, if the files are
    damaged, or for `trust_remote_code`.
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
    # bitsandbytes packs 4-bit weights on a CPU with bfloat16 units when a layer first computes in eval mode. A packed
    # layer has no gradient, ignores bnb_4bit_compute_dtype, and cannot have fewer columns than a block.
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    opened: PreTrainedModel = model
    return opened


def open_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Open the tokenizer in the folder of a base's weights."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        base.folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _keep_first_layers(config: Any, num_layers: int) -> None:
    total = config.num_hidden_layers
    if num_layers > total:
        raise ValueError(f"num_llm_layers is {num_layers}, but the decoder has {total} layers.")
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:  # one entry per layer, such as layer_types
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers


def token_embeddings(llm: PreTrainedModel) -> nn.Embedding:
    """The decoder's table of token embeddings."""
    return cast(nn.Embedding, llm.get_input_embeddings())


def input_device(llm: PreTrainedModel) -> torch.device:
    """The device for the decoder's inputs. For offloaded token embeddings ("meta"), the device that computes them."""
    table = token_embeddings(llm)
    hook = getattr(table, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) if table.weight.device.type == "meta" else None
    if device is None:
        return table.weight.device
    return torch.device(f"cuda:{device}" if isinstance(device, int) else device)


def position_limit(module: PreTrainedModel) -> int | None:
    """The longest sequence that a model has position embeddings for; None if positions are computed (rotary)."""
    for name, table in module.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            # RoBERTa's and MPNet's positions start after the padding index, OPT's after an offset.
            unused = 0 if table.padding_idx is None else table.padding_idx + 1
            return table.num_embeddings - max(unused, int(getattr(table, "offset", 0)))
    return None


def check_encoder_length(encoder: PreTrainedModel, max_length: int) -> None:
    """Raise ValueError if the encoder has fewer positions than `max_length`."""
    limit = position_limit(encoder)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"encoder_max_length is {max_length}, but the encoder has {limit} positions. Set it to {limit} or less."
        )


def check_llm_length(limit: int | None, config: Causal2VecConfig, tokenized: TokenizedTexts, text_tokens: int) -> None:
    """Raise ValueError if prefix, Contextual token and `text_tokens` tokens need more than `limit` positions."""
    needed = len(tokenized.prefix_ids) + int(config.contextual_token != "none") + text_tokens
    if limit is not None and needed > limit:
        raise ValueError(
            f"The decoder has {limit} positions, but {needed} are needed: {text_tokens} for a text (max_length), the "
            "rest for BOS, the instruction and the Contextual token. Lower max_length or shorten the instruction."
        )


# Adapters


def adapted_layers(module: nn.Module) -> list[BaseTunerLayer]:
    """The layers with a LoRA adapter; their attribute `merged` says whether it is merged."""
    return [layer for layer in walk(module) if isinstance(layer, BaseTunerLayer)]


def adapter_tensors(module: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's tensors, with the names of peft's file format."""
    return {f"{_ADAPTER_PREFIX}{name}": tensor for name, tensor in get_peft_model_state_dict(module).items()}


@torch.inference_mode(False)
def load_adapter(module: PreTrainedModel, folder: Path) -> None:
    """Add a LoRA adapter that was saved in peft's format, and merge it unless the weights are quantised.

    Raises ValueError if the adapter's files cannot be read or do not fit the module.
    """
    try:
        lora = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder}/adapter_config.json cannot be read ({error}). Save the checkpoint again."
        ) from error
    inject_adapter(module, lora)
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_tensors(module).items()}
    _set_adapter(module, checkpoint.read_tensors(folder / "adapter_model.safetensors", expected))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if not getattr(module, "is_quantized", False):
        for layer in adapted_layers(module):
            layer.merge()


def inject_adapter(module: PreTrainedModel, lora: Any) -> None:
    """Add a new LoRA adapter, in float32 whatever the module's dtype."""
    inject_adapter_in_model(lora, module)
    # peft creates these parameters in the base's dtype. bfloat16 would round the adapter that is loaded next.
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _set_adapter(module: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    set_peft_model_state_dict(module, {name.removeprefix(_ADAPTER_PREFIX): t for name, t in tensors.items()})


# Identity


@dataclasses.dataclass
class PartRecord:
    """Source and identity of a part's weights without its adapter.

    `base`: the source; None for weights that exist in memory only. `num_layers`: the part has only this many first
    layers of the base; None for all. `identity` is valid while `sample_weights` returns `sample`.
    """

    base: Base | None = None
    num_layers: int | None = None
    identity: str = ""
    sample: bytes = b""

    def note(self, module: PreTrainedModel, identity: str) -> None:
        """Store `identity` as the identity of the current weights."""
        self.identity, self.sample = identity, sample_weights(module)


def part_identity(module: PreTrainedModel, record: PartRecord) -> str:
    """The base's identity if the weights equal the base's, else the hash of their values."""
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
    """Whether the part's weights without its adapter equal its base: every tensor is compared with the base's files.

    If an adapter is merged, the weights are compared with the base after merging the adapter into it. Differences of a
    few units in the last place are then accepted as rounding.
    """
    base = record.base
    if base is None or not base.folder.is_dir():
        return False
    if getattr(module, "is_quantized", False):
        return True  # such weights cannot be trained
    base_module = open_module(base, record.num_layers, dtype=module.dtype)
    merged = any(layer.merged for layer in adapted_layers(module))
    if merged:
        inject_adapter(base_module, module.peft_config["default"])
        _set_adapter(base_module, {name: tensor.cpu() for name, tensor in adapter_tensors(module).items()})
        for layer in adapted_layers(base_module):
            layer.merge()
    expected = _without_adapter(base_module)
    actual = _without_adapter(module)
    if expected.keys() != actual.keys():
        return False
    return all(
        _is_equal(tensor, expected[name], allow_rounding=merged)
        for name, tensor in actual.items()
        if tensor.device.type != "meta"
    )


def _is_equal(actual: Tensor, expected: Tensor, *, allow_rounding: bool) -> bool:
    actual = actual.detach().cpu()
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if torch.equal(actual, expected):
        return True
    if not allow_rounding or not actual.is_floating_point():
        return False
    tolerance = 4 * torch.finfo(actual.dtype).eps
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def _without_adapter(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }


@torch.no_grad()
def base_tensors(module: PreTrainedModel) -> dict[str, Tensor]:
    """The part's tensors without its adapter. A merged adapter is subtracted from copies of them."""
    tensors = _without_adapter(module)
    for name, layer in module.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not layer.merged:
            continue
        parameters = dict(layer.get_base_layer().named_parameters())
        merged_values = {key: parameter.data.clone() for key, parameter in parameters.items()}
        merged_adapters = list(layer.merged_adapters)
        layer.unmerge()
        for key, parameter in parameters.items():
            tensors[f"{name}.{key}"] = parameter.data
            parameter.data = merged_values[key]
        layer.merged_adapters.extend(merged_adapters)
    return tensors


@torch.inference_mode(False)
@torch.no_grad()
def unmerge_adapter(module: PreTrainedModel, record: PartRecord) -> None:
    """Remove a merged adapter from the weights. The exact values of an unchanged base are read again from its files."""
    layers = [layer for layer in adapted_layers(module) if layer.merged]
    if not layers:
        return
    base_values = (
        _without_adapter(open_module(record.base, record.num_layers, dtype=module.dtype))
        if (record.base is not None and is_base(module, record))
        else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in layers:
            layer.unmerge()
    for name, tensor in _without_adapter(module).items():
        if name in base_values and tensor.device.type != "meta":
            tensor.data.copy_(base_values[name])


# Saving


def save_part(
    part: Part,
    module: PreTrainedModel,
    record: PartRecord,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    further_bases: Sequence[Mapping[str, Any]] = (),
) -> str | None:
    """Write `folder/PART`: base.json for an unchanged base with a reference, else weights and tokenizer.

    `further_bases`: more entries for base.json. Returns the identity of the weights that were written; None if only
    base.json was written.
    """
    part_folder = folder / part
    part_folder.mkdir()
    is_unchanged = is_base(module, record)
    base = record.base
    if is_unchanged and base is not None and base.reference is not None:
        accepted = list(base.reference.get("accepted", [base.reference]))
        accepted += [entry for entry in further_bases if entry not in accepted]
        (part_folder / checkpoint.BASE_FILE).write_text(
            json.dumps({"accepted": accepted}, indent=2) + "\n", encoding="utf-8"
        )
        return None
    if is_unchanged and base is not None:
        # The base's own files are written, because their dtype may differ from the dtype in memory.
        open_module(base, record.num_layers, dtype="auto").save_pretrained(part_folder)
        identity = base.identity
    else:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in base_tensors(module).items()}
        identity = hash_tensors(tensors)
        module.save_pretrained(part_folder, state_dict=tensors)  # this call empties the dict
    tokenizer.save_pretrained(part_folder)
    return identity


def save_adapter(part: Part, module: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the part's adapter, if it has one, to `folder/PART_adapter` in peft's format, in `dtype` if given."""
    if not adapted_layers(module):
        return
    adapter_folder = folder / f"{part}_adapter"
    module.peft_config["default"].save_pretrained(adapter_folder)
    checkpoint.write_tensors(adapter_folder / "adapter_model.safetensors", adapter_tensors(module), dtype)
