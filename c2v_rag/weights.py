"""Open, identify and save all weights of a model.

The identity of a model is one hash over its settings, the values of projector and adapters, and the identities of its
encoder and decoder. It is the same in memory and in a checkpoint, on every device and in every dtype.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from c2v_rag import checkpoint, inference, parts
from c2v_rag.bases import Base
from c2v_rag.config import Causal2VecConfig
from c2v_rag.hashes import write_sums
from c2v_rag.identity import hash_tensors, sample_weights
from c2v_rag.parts import PARTS, Part, PartRecord
from c2v_rag.tokenization import TextTokenizer


@dataclasses.dataclass
class WeightsRecord:
    """Source and identity of a model's weights: of each part, and of the whole model.

    `identity` is valid while `sample_weights` returns `sample`. `read_identity` and `identity_0_1` belong to the
    checkpoint that the model was read from: its identity in this version, and in version 0.1.
    """

    parts: dict[Part, PartRecord] = dataclasses.field(default_factory=lambda: {part: PartRecord() for part in PARTS})
    sample: bytes = b""
    identity: str = ""
    read_identity: str = ""
    identity_0_1: str = ""

    @property
    def origins(self) -> dict[str, str]:
        """For each part: a description of where its weights came from."""
        return {part: record.base.origin if record.base else "in memory" for part, record in self.parts.items()}

    def note_bases(self, model: HasWeights) -> None:
        """Store the identities of the parts of a model that was just read."""
        for part, record in self.parts.items():
            assert record.base is not None
            record.note(getattr(model, part), record.base.identity)

    def note_checkpoint(self, model: HasWeights, sums: Mapping[str, str]) -> None:
        """Store the identity of a model that was just read from a checkpoint; `sums` are the hashes of its files."""
        self.note_bases(model)
        bases = {part: record.base for part, record in self.parts.items()}
        self.read_identity = identity(model)
        adapters = {file: sha for file, sha in sums.items() if file.endswith(".safetensors") and "_adapter/" in file}
        self.identity_0_1 = _hash(
            config=model.config.to_dict(),
            projector=sums.get("projector.safetensors"),
            adapters=adapters,
            **{part: sorted(base.hashes.values()) for part, base in bases.items() if base},
        )


class HasWeights(Protocol):
    """The attributes of a `Causal2Vec` that this module uses."""

    name: str
    config: Causal2VecConfig
    tokenizer: TextTokenizer
    encoder: PreTrainedModel
    llm: PreTrainedModel
    projector: Any
    weights_record: WeightsRecord

    @property
    def embedding_dim(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class OpenedParts:
    """An encoder and a decoder in memory, with their tokenizers; `input_device` is the device for inputs."""

    encoder: PreTrainedModel
    llm: PreTrainedModel
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    record: WeightsRecord
    input_device: torch.device


def open_parts(
    bases: Mapping[Part, Base],
    num_llm_layers: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    llm_kwargs: Mapping[str, Any],
    encoder_dtype: torch.dtype | None = None,
) -> OpenedParts:
    """Open both parts; arguments as in `Causal2Vec.from_pretrained`."""
    device = inference.resolve_device(device)
    dtype = inference.resolve_dtype(dtype, device)
    encoder = parts.open_module(bases["encoder"], dtype=encoder_dtype or dtype)
    llm = parts.open_module(bases["llm"], num_llm_layers, **{"dtype": dtype, **llm_kwargs})
    if not llm_kwargs.keys() & {"device_map", "quantization_config"}:
        llm.to(device)  # type: ignore[arg-type]
    input_device = parts.input_device(llm)
    encoder.to(input_device)  # type: ignore[arg-type]
    record = WeightsRecord({"encoder": PartRecord(bases["encoder"]), "llm": PartRecord(bases["llm"], num_llm_layers)})
    tokenizers = parts.open_tokenizer(bases["encoder"]), parts.open_tokenizer(bases["llm"])
    return OpenedParts(encoder, llm, tokenizers, record, input_device)


def read_trained(model: HasWeights, folder: Path) -> None:
    """Read the projector and the adapters of a checkpoint into the model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.projector.state_dict().items()}
    model.projector.load_state_dict(checkpoint.read_tensors(folder / "projector.safetensors", shapes))
    for part in PARTS:
        if (folder / f"{part}_adapter").is_dir():
            parts.load_adapter(getattr(model, part), folder / f"{part}_adapter")


def load_tokenizer(
    name_or_path: str | os.PathLike[str] = checkpoint.DEFAULT, *, revision: str | None = None
) -> TextTokenizer:
    """Load only the tokenizers of a checkpoint, to count tokens without its weights.

    Raises the errors of `Causal2Vec.from_pretrained`.
    """
    folder = checkpoint.locate(name_or_path, revision)
    tokenizers = (parts.open_tokenizer(checkpoint.checkpoint_part(folder, part)) for part in PARTS)
    return TextTokenizer(Causal2VecConfig.load(folder), *tokenizers)


def identity(model: HasWeights) -> str:
    """Hash of every weight and setting that changes a vector. Folder, device and dtype do not change it."""
    record = model.weights_record
    sample = b"".join(sample_weights(part) for part in (model.encoder, model.llm, model.projector))
    if sample != record.sample:
        modules: dict[str, PreTrainedModel] = {"encoder": model.encoder, "llm": model.llm}
        record.identity = _hash(
            config=model.config.to_dict(),
            projector=hash_tensors(model.projector.state_dict()),
            encoder=parts.part_identity(model.encoder, record.parts["encoder"]),
            llm=parts.part_identity(model.llm, record.parts["llm"]),
            adapters={
                name: parts.adapter_identity(module) for name, module in modules.items() if parts.adapted_layers(module)
            },
        )
        record.sample = sample
    return record.identity


def stamp(model: HasWeights) -> dict[str, str | int]:
    """The facts that an index stores about the model that made it; see `Causal2Vec.stamp`."""
    record = model.weights_record
    values: dict[str, str | int] = {
        "name": model.name,
        "weights": identity(model),
        **record.origins,
        "embedding_dim": model.embedding_dim,
        "pooling": model.config.pooling,
        "instruction": model.config.instruction,
    }
    if record.read_identity == values["weights"]:
        values["weights_0_1"] = record.identity_0_1
    return values


def _hash(**values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def save(
    model: HasWeights,
    folder: str | os.PathLike[str],
    *,
    trained_dtype: torch.dtype | None = None,
    further_bases: Mapping[Part, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write a checkpoint; see `Causal2Vec.save_pretrained`.

    `trained_dtype`: dtype of the stored projector and adapters (float16 halves their size). `further_bases`: more
    entries for a part's base.json, which are other sources of the same weights.
    """
    target = Path(folder)
    checkpoint.check_target(target)
    tokenizers = {"encoder": model.tokenizer.encoder, "llm": model.tokenizer.llm}
    identities: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
        staging = Path(temporary) / target.name
        staging.mkdir()
        model.config.save(staging)
        checkpoint.write_tensors(staging / "projector.safetensors", model.projector.state_dict(), trained_dtype)
        for part in PARTS:
            module: PreTrainedModel = getattr(model, part)
            parts.save_adapter(part, module, staging, trained_dtype)
            further = (further_bases or {}).get(part, ())
            saved = parts.save_part(part, module, model.weights_record.parts[part], tokenizers[part], staging, further)
            if saved is not None:
                identities[part] = saved
        checkpoint.write_identities(staging, identities)
        checkpoint.write_sentence_transformers(staging, {"query": model.config.prompt(model.config.instruction)})
        facts = {
            "encoder": model.weights_record.origins["encoder"],
            "decoder": model.weights_record.origins["llm"],
            "embedding": f"{model.embedding_dim} columns, pooling `{model.config.pooling}`",
            "instruction": model.config.instruction,
        }
        checkpoint.write_card(staging, facts)
        write_sums(staging)
        checkpoint.replace_folder(staging, target)
    for part, record in model.weights_record.parts.items():
        if record.base is not None and record.base.folder.resolve() == (target / part).resolve():
            record.base = checkpoint.checkpoint_part(target, part)  # its files are those that were written now
