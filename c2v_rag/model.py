"""Causal2Vec: a small encoder's Contextual token, prepended to a causal LLM (arXiv 2507.23386).

    text -> encoder -> pooled (B, E) -> projector -> Contextual token C (B, 1, D)
    BOS instruction C t1 ... tn EOS -> the unchanged causal llm -> last hidden states
    embedding = the states of C and of EOS, columns interleaved, L2-normalised: (B, 2 D)

B texts, P prefix tokens (BOS and the instruction), S encoder tokens, T tokens of the text ending in EOS,
E encoder width, D llm width.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Unpack, cast

import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from c2v_rag import checkpoint, inference
from c2v_rag.config import Causal2VecConfig, EncoderPooling, Pooling
from c2v_rag.tokenization import TextTokenizer, TokenBatch, TokenizedTexts

_Part = Literal["encoder", "llm"]
_PARTS: tuple[_Part, ...] = ("encoder", "llm")
_PREFIXES_KEPT = 8
ENCODER_SLICES = 2
# A token whose embedding is this many times as long as a word's outweighs what the llm's layers add to it: its last
# hidden state is the encoder's vector, rotated. SmolLM2-135M (12 layers) and all-MiniLM-L6-v2, untrained: Spearman of
# the Contextual token's state on STSBenchmark dev 23.8 at 1 x, 49.0 at 16 x, 83.3 at 64 x, 86.4 at 256 x, 86.6 at
# 1024 x; the encoder itself 86.7, and so has the state once the final norm's gains are made up for.
PASS_THROUGH = 1024
_PROBES = 256


class Projector(nn.Module):
    """Two linear layers from the encoder's width E to the llm's width D: one text, one Contextual token.

    The input is brought to mean square 1 first, so that encoders of any scale start alike. A fresh projector is a
    random rotation: the hidden layer holds x and -x, and gelu(x) - gelu(-x) = x.
    """

    scale: Tensor

    def __init__(self, encoder_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(encoder_dim, 2 * encoder_dim)
        self.output = nn.Linear(2 * encoder_dim, llm_dim)
        self.register_buffer("scale", torch.ones(()))
        with torch.no_grad():
            rotation = nn.init.orthogonal_(torch.empty(llm_dim, encoder_dim))
            self.hidden.weight.copy_(torch.cat([torch.eye(encoder_dim), -torch.eye(encoder_dim)]))
            self.output.weight.copy_(torch.cat([rotation, -rotation], dim=1))
            self.hidden.bias.zero_()
            self.output.bias.zero_()

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, E) -> (B, D)."""
        unit = normalize(pooled.float(), dim=-1) * math.sqrt(pooled.shape[-1])
        output: Tensor = self.output(nn.functional.gelu(self.hidden(unit.to(self.hidden.weight.dtype))))
        return self.scale * output

    @torch.no_grad()
    def start_at_norm(self, norm: float) -> None:
        """Set the fixed scale of the outputs so that those of a fresh projector have about this norm."""
        self.scale.fill_(norm / math.sqrt(self.hidden.in_features))

    @torch.no_grad()
    def make_up_for(self, gains: Tensor) -> None:
        """Divide a fresh projector's columns by `gains` (D,), so that what multiplies by them leaves the rotation."""
        self.output.weight.div_(gains.unsqueeze(1).to(self.output.weight))


def pool_encoder(hidden: Tensor, mask: Tensor, pooling: EncoderPooling) -> Tensor:
    """(B, S, E) states and (B, S) mask -> (B, E), float32."""
    if pooling == "cls":
        return hidden[:, 0].float()
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling, text_start: int) -> Tensor:
    """Last hidden states behind the prefix -> one vector per text, float32, not yet normalised.

    `hidden` is (B, N, D): the Contextual token first where there is one, the text from `text_start` on, ending in
    EOS; `mask` (B, N) is 1 on real tokens, padding on the right. Returns (B, 2 D) for `context_eos`, whose columns
    are interleaved, c0, e0, c1, e1, ...: every prefix of the columns holds both halves alike. Others return (B, D).
    """
    hidden = hidden.float()
    if pooling == "context":
        return hidden[:, 0]
    if pooling == "mean":
        weights = mask.clone().unsqueeze(-1).float()
        weights[:, :text_start] = 0
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    last = mask.sum(dim=1) - 1
    eos = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return eos if pooling == "eos" else torch.stack([hidden[:, 0], eos], dim=-1).flatten(1)


class Causal2Vec(nn.Module):
    """An embedding model made of a bidirectional encoder, a projector and a causal decoder.

    Example:
        >>> from c2v_rag import Causal2Vec
        >>> model = Causal2Vec.from_pretrained("default")
        >>> documents = model.encode_document(["A heap keeps its smallest item first.", "Bread needs yeast."])
        >>> queries = model.encode_query(["priority queue"])
        >>> documents.shape
        (2, 1152)
        >>> int((queries @ documents.T).argmax())
        0

    `encoder` and `llm` are models that `transformers.AutoModel` opens; `llm` must be causal and hold
    `config.num_llm_layers` layers already (`from_parts` cuts it). Raises ValueError where the parts do not fit.
    """

    def __init__(
        self,
        config: Causal2VecConfig,
        encoder: PreTrainedModel,
        llm: PreTrainedModel,
        encoder_tokenizer: PreTrainedTokenizerBase,
        llm_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        layers = llm.config.get_text_config().num_hidden_layers
        if config.num_llm_layers not in (None, layers):
            raise ValueError(
                f"num_llm_layers is {config.num_llm_layers}, but the decoder given has {layers} layers. "
                "Load it through Causal2Vec.from_parts, which keeps the first layers only."
            )
        self.config = config
        self.tokenizer = TextTokenizer(config, encoder_tokenizer, llm_tokenizer)
        self.encoder = encoder
        self.llm = llm
        self.projector = Projector(encoder.config.hidden_size, self._llm_dim)
        if config.truncate_dim is not None and config.truncate_dim > self._full_dim:
            raise ValueError(f"truncate_dim is {config.truncate_dim}, but an embedding has {self._full_dim} columns.")
        self.name = ""  # what from_pretrained reads it by; a model that exists in memory only has none
        self._bases: dict[_Part, checkpoint.Base] = {}
        self._base_versions: dict[str, dict[str, int]] = {}
        self._weights_hash: str | None = None  # of the files read, or of the tensors; valid for these versions of them
        self._versions_hashed: list[int] = []
        self._prefixes: OrderedDict[tuple[int, ...], tuple[tuple[object, ...], DynamicCache | None]] = OrderedDict()

    # What it is

    @property
    def _llm_dim(self) -> int:
        return int(self.llm.config.get_text_config().hidden_size)

    @property
    def _full_dim(self) -> int:
        return self._llm_dim * (2 if self.config.pooling == "context_eos" else 1)

    @property
    def embedding_dim(self) -> int:
        """2 D for pooling `context_eos`, D for the others; `config.truncate_dim` where that is set."""
        return self.config.truncate_dim or self._full_dim

    @property
    def device(self) -> torch.device:
        return self.projector.hidden.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return _token_table(self.llm).weight.dtype

    @property
    def sources(self) -> dict[str, str]:
        """Where the encoder's and the decoder's weights came from, in words."""
        return {part: self._bases[part].origin if part in self._bases else "in memory" for part in _PARTS}

    @property
    def stamp(self) -> dict[str, str | int]:
        """What an index must remember of the model that made it; JSON values only.

        `weights` hashes every weight and setting that changes a vector, not the dtype they were loaded in. `name` is
        "" for a model that cannot be loaded by name, because it exists in memory only.
        """
        return {
            "name": self.name,
            "weights": self._weights(),
            "encoder": self.sources["encoder"],
            "llm": self.sources["llm"],
            "embedding_dim": self.embedding_dim,
            "pooling": self.config.pooling,
            "instruction": self.config.instruction,
        }

    @property
    def llm_folder(self) -> Path:
        """The folder the decoder's weights were read from. ValueError where they came from nowhere or were changed."""
        base = self._bases.get("llm")
        if base is None or not self._is_as_read("llm"):
            raise ValueError("This decoder exists in memory only. Save the model and load it again.")
        return base.folder

    @contextmanager
    def same_weights(self) -> Iterator[None]:
        """What is done inside changes where the llm's weights lie, not what they are: the stamp stays."""
        stamp = self._weights()
        yield
        self._weights_hash, self._versions_hashed = stamp, self._versions()
        self._base_versions["llm"] = {
            name.replace(".base_layer.", "."): parameter._version
            for name, parameter in self.llm.named_parameters()
            if ".lora_" not in name
        }

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.parameters()]

    def _weights(self) -> str:
        versions = self._versions()
        if self._weights_hash is not None and versions == self._versions_hashed:
            return self._weights_hash
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._weights_hash, self._versions_hashed = digest.hexdigest()[:16], versions
        return self._weights_hash

    # The method

    def forward(self, batch: TokenBatch, *, pooled: Tensor | None = None, pooling: Pooling | None = None) -> Tensor:
        """Embeddings (B, embedding_dim) of a token batch, differentiable, rows of length 1.

        For training: `pooled` (B, E) stands in for the encoder, whose frozen vectors may be cached; `pooling`
        overrides the config's, and "context" leaves the text out of the decoder altogether, because the Contextual
        token's state depends on nothing behind it. The prefix is computed once a batch here too, with its gradient.
        """
        prefix = self._prefix_states(batch.prefix_ids)
        return self._embed(batch, prefix, pooled=pooled, pooling=pooling or self.config.pooling)

    def embed(self, batch: TokenBatch) -> Tensor:
        """The same embeddings for inference: the prefix's keys and values are kept from batch to batch."""
        prefix = copy.deepcopy(self._kept_prefix_states(batch.prefix_ids))
        pooled = None if self.config.contextual_token == "none" else self.pooled_by_length(batch)
        return self._embed(batch, prefix, pooled=pooled, pooling=self.config.pooling)

    def pooled_encoder_states(self, batch: TokenBatch) -> Tensor:
        """(B, E): what the encoder alone makes of the texts, float32, not normalised."""
        hidden = self.encoder(input_ids=batch.encoder_ids, attention_mask=batch.encoder_mask).last_hidden_state
        return pool_encoder(hidden, batch.encoder_mask, self.config.encoder_pooling)

    def pooled_by_length(self, batch: TokenBatch) -> Tensor:
        """`pooled_encoder_states`, computed in a few slices of texts of like length.

        Batches are made by the decoder's lengths; counted in the encoder's tokens, a third of them was padding.
        """
        order = torch.argsort(batch.encoder_mask.sum(dim=1))
        pooled = []
        for rows in order.tensor_split(min(ENCODER_SLICES, len(order))):
            mask = batch.encoder_mask[rows]
            width = max(1, int(mask.sum(dim=1).max()))
            part = dataclasses.replace(batch, encoder_ids=batch.encoder_ids[rows, :width], encoder_mask=mask[:, :width])
            pooled.append(self.pooled_encoder_states(part))
        return torch.cat(pooled)[torch.argsort(order)]

    def _embed(self, batch: TokenBatch, prefix: DynamicCache | None, pooled: Tensor | None, pooling: Pooling) -> Tensor:
        """`prefix` is written to; without one, the prefix's tokens are put before every text."""
        has_token = self.config.contextual_token != "none"
        text_ids, mask = batch.text_ids, batch.text_mask
        if pooling == "context":
            text_ids, mask = text_ids[:, :0], mask[:, :0]

        embed_tokens = _token_table(self.llm)
        parts = [embed_tokens(text_ids)]
        if has_token:
            if pooled is None:
                pooled = self.pooled_encoder_states(batch)
            parts.insert(0, self.projector(pooled).unsqueeze(1).to(parts[0].dtype))
            mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        num_prefix = len(batch.prefix_ids)
        if prefix is None:
            parts.insert(0, embed_tokens(batch.prefix_ids).expand(len(text_ids), -1, -1))
        else:
            prefix.batch_repeat_interleave(len(text_ids))
        hidden = self.llm(
            inputs_embeds=torch.cat(parts, dim=1),
            attention_mask=torch.cat([mask.new_ones(len(mask), num_prefix), mask], dim=1),
            past_key_values=prefix,
            use_cache=prefix is not None,
        ).last_hidden_state
        if prefix is None:
            hidden = hidden[:, num_prefix:]
        vectors = pool(hidden, mask, pooling, text_start=int(has_token) + batch.num_lead)
        return normalize(vectors[:, : self.config.truncate_dim], dim=1)

    def _prefix_states(self, prefix_ids: Tensor) -> DynamicCache | None:
        """Keys and values of what stands before the Contextual token; None where the llm keeps no plain cache.

        Nothing in the prefix sees the text under a causal mask, so that one computation serves every text.
        """
        embeds = _token_table(self.llm)(prefix_ids).unsqueeze(0)
        states = self.llm(inputs_embeds=embeds, use_cache=True).past_key_values
        return states if type(states) is DynamicCache else None

    def _kept_prefix_states(self, prefix_ids: Tensor) -> DynamicCache | None:
        """`_prefix_states`, computed anew only when the llm's weights have changed since."""
        key = tuple(prefix_ids.tolist())
        weights = self._llm_fingerprint()
        if key not in self._prefixes or self._prefixes[key][0] != weights:
            self._prefixes[key] = (weights, self._prefix_states(prefix_ids))
        self._prefixes.move_to_end(key)
        if len(self._prefixes) > _PREFIXES_KEPT:
            self._prefixes.popitem(last=False)
        return self._prefixes[key][1]

    def _llm_fingerprint(self) -> tuple[object, ...]:
        """Changes whenever the llm's weights do: written in place, moved, merged, or an adapter switched."""
        tensors = tuple((parameter.data_ptr(), parameter._version) for parameter in self.llm.parameters())
        adapters = tuple(
            (tuple(layer.merged_adapters), tuple(layer.active_adapters), layer.disable_adapters)
            for layer in adapted_layers(self.llm)
        )
        return tensors, adapters

    # Texts to arrays

    def tokenize(self, texts: Sequence[str], instruction: str = "") -> TokenizedTexts:
        return self.tokenizer(texts, self.config.lead(instruction))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Length of each text in this model's tokens; what is longer than `max_tokens` would be cut."""
        return inference.tokenizing(self, lambda: self.tokenizer.count_tokens(texts))

    @property
    def max_tokens(self) -> int:
        """The longest text, in `count_tokens`, that neither the encoder nor the decoder cuts."""
        return self.tokenizer.max_tokens

    def encode(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        truncate_dim: int | None = None,
        on_truncate: inference.OnTruncate = "warn",
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeddings of `texts`, in their order: float32 (n, embedding_dim), rows of length 1. No instruction.

        The neutral form, for similarity and clustering; for retrieval use `encode_query` and `encode_document`.

        `texts`: a list or any iterable of strings, read a window at a time. `instruction`: put before every text;
        None and "" mean none here. `batch_tokens`: padded tokens a batch, chosen for the device unless given.
        `truncate_dim`: a shorter embedding (Matryoshka), cut from the front and brought to length 1 again. The
        columns of the two halves are interleaved, so a cut keeps both the Contextual token's and EOS's state;
        concatenated end to end, a cut would throw one of them away. `on_truncate`: a text longer than the config's
        lengths is cut, EOS kept; "warn" logs their number once, "error" raises, "ignore" does neither.

        Raises TypeError for a bare string or an item that is not a string, and ValueError for a text whose
        embedding is not finite, each naming the index. Safe to call from several threads: they take turns.
        """
        return inference.encode(
            self,
            texts,
            instruction=instruction or "",
            batch_tokens=batch_tokens,
            truncate_dim=truncate_dim,
            on_truncate=on_truncate,
            show_progress=show_progress,
        )

    def encode_query(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[inference.EncodeOptions]
    ) -> np.ndarray:
        """Embeddings of what is asked: `encode` with an instruction, the config's unless one is given ("" for none)."""
        return self.encode(
            texts, instruction=self.config.instruction if instruction is None else instruction, **options
        )

    def encode_document(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[inference.EncodeOptions]
    ) -> np.ndarray:
        """Embeddings of what is searched: `encode`, without an instruction unless one is given."""
        return self.encode(texts, instruction=instruction, **options)

    # Building, reading and writing

    @classmethod
    def from_parts(
        cls,
        encoder: str | os.PathLike[str],
        llm: str | os.PathLike[str],
        *,
        config: Causal2VecConfig | None = None,
        encoder_revision: str | None = None,
        llm_revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        **llm_kwargs: Any,
    ) -> Causal2Vec:
        """A new, untrained model from an encoder and a decoder: folders, hub ids or installed packages.

        The projector is a random rotation (`seed`): before any training the Contextual half ranks as the encoder
        does, and the other states know next to nothing. `llm_kwargs` as in `from_pretrained`. Raises
        FileNotFoundError, ValueError as there.
        """
        bases: dict[_Part, checkpoint.Base] = {
            "encoder": checkpoint.locate_base(encoder, encoder_revision),
            "llm": checkpoint.locate_base(llm, llm_revision),
        }
        model = cls._assemble(config or Causal2VecConfig(), bases, device, dtype, llm_kwargs, seed).eval()
        norm = PASS_THROUGH * _token_norm(model.llm)
        model.projector.start_at_norm(norm)
        model.projector.make_up_for(_final_gains(model.llm, norm))
        return model

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = checkpoint.DEFAULT,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        **llm_kwargs: Any,
    ) -> Causal2Vec:
        """Read a checkpoint: "default", a folder written by `save_pretrained`, or a Hugging Face Hub id.

        `device`: CUDA, MPS or CPU, the first there is unless given. `dtype`: bfloat16 where the hardware computes
        in it, else float32, unless given (a torch.dtype or its name). `llm_kwargs` go to the decoder's
        `AutoModel.from_pretrained`: `device_map`, `attn_implementation`, `quantization_config`, ...

        Raises FileNotFoundError when the weights cannot be had, with what would bring them; ValueError when a file
        is missing, altered, of another shape, or has settings this version does not know.
        """
        folder = checkpoint.locate(name_or_path, revision)
        config = Causal2VecConfig.load(folder)
        sums = checkpoint.verify_sums(folder)
        bases = {part: checkpoint.checkpoint_part(folder, part) for part in _PARTS}
        model = cls._assemble(config, bases, device, dtype, llm_kwargs, seed=0)
        _load_strictly(model.projector, folder / "projector.safetensors")
        for part in _PARTS:
            if (folder / f"{part}_adapter").is_dir():
                _load_adapter(getattr(model, part), folder / f"{part}_adapter")
        model.name = os.fspath(name_or_path)
        ours = {file: digest for file, digest in sums.items() if file.endswith(".safetensors") and "_adapter/" in file}
        model._weights_hash = hashlib.sha256(
            json.dumps(
                {
                    "config": config.to_dict(),
                    "projector": sums.get("projector.safetensors"),
                    "adapters": ours,
                    **{part: sorted(bases[part].hashes.values()) for part in _PARTS},
                },
                sort_keys=True,
            ).encode()
        ).hexdigest()[:16]
        model._versions_hashed = model._versions()
        return model.eval()

    @classmethod
    def _assemble(
        cls,
        config: Causal2VecConfig,
        bases: Mapping[_Part, checkpoint.Base],
        device: torch.device | str | None,
        dtype: torch.dtype | str | None,
        llm_kwargs: dict[str, Any],
        seed: int,
    ) -> Causal2Vec:
        where = torch.device(device) if device is not None else inference.default_device()
        what = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        what = what or inference.default_dtype(where)
        encoder = _open(bases["encoder"], None, {"dtype": what})
        llm = _open(bases["llm"], config.num_llm_layers, {"dtype": what, **llm_kwargs})
        if not llm_kwargs.keys() & {"device_map", "quantization_config"}:
            llm.to(where)  # type: ignore[arg-type]
        tokenizers = [_open_tokenizer(bases[part]) for part in _PARTS]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config, encoder, llm, *tokenizers)
        device_of_tokens = _token_table(llm).weight.device
        model.projector.to(device_of_tokens)
        model.encoder.to(device_of_tokens)  # type: ignore[arg-type]
        model._bases = dict(bases)
        model._base_versions = {
            part: {name: parameter._version for name, parameter in getattr(model, part).named_parameters()}
            for part in _PARTS
        }
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        trained_dtype: torch.dtype | None = None,
        also_accepted: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        """Write a checkpoint that `from_pretrained` reads back to the same vectors, and SHA256SUMS over it.

        An encoder or decoder that came from the Hub or an installed package and was not changed is referenced by
        name and hash, not copied; any other is written in full. The folder appears complete or not at all; an
        existing one is replaced.

        `trained_dtype` stores projector and adapters in another precision (float16 halves them). `also_accepted`
        adds entries to the `base.json` of "encoder" or "llm": further places that hold the same model.

        Raises ValueError when `folder` holds something that is no checkpoint.
        """
        target = Path(folder)
        if target.is_dir() and any(target.iterdir()) and not (target / "c2v_config.json").is_file():
            raise ValueError(f"{target} holds files and is no Causal2Vec checkpoint; give a new or an empty folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
            made = Path(temporary) / target.name
            made.mkdir()
            self.config.save(made)
            checkpoint.write_tensors(made / "projector.safetensors", self.projector.state_dict(), trained_dtype)
            for part in _PARTS:
                self._save_adapter(part, made, trained_dtype)
                self._save_base(part, made, list((also_accepted or {}).get(part, [])))
            checkpoint.write_sentence_transformers(made, {"query": self.config.lead(self.config.instruction)})
            (made / "README.md").write_text(_card(self), encoding="utf-8")
            checkpoint.write_sums(made)
            checkpoint.replace_folder(made, target)

    def _save_adapter(self, part: _Part, folder: Path, dtype: torch.dtype | None) -> None:
        module: PreTrainedModel = getattr(self, part)
        if not adapted_layers(module):
            return
        place = folder / f"{part}_adapter"
        module.peft_config["default"].save_pretrained(place)
        adapter = {f"base_model.model.{name}": tensor for name, tensor in get_peft_model_state_dict(module).items()}
        checkpoint.write_tensors(place / "adapter_model.safetensors", adapter, dtype)

    def _save_base(self, part: _Part, folder: Path, also_accepted: list[Mapping[str, Any]]) -> None:
        module: PreTrainedModel = getattr(self, part)
        place = folder / part
        place.mkdir()
        base = self._bases.get(part)
        if base is not None and base.reference is not None and self._is_as_read(part):
            accepted = list(base.reference.get("accepted", [base.reference]))
            accepted += [entry for entry in also_accepted if entry not in accepted]
            text = json.dumps({"accepted": accepted}, indent=2) + "\n"
            (place / checkpoint.BASE_FILE).write_text(text, encoding="utf-8")
            return
        merged = [layer for layer in adapted_layers(module) if layer.merged]
        for layer in merged:
            layer.unmerge()
        tensors = {
            name.replace(".base_layer.", "."): tensor.detach().cpu().contiguous()
            for name, tensor in module.state_dict().items()
            if ".lora_" not in name
        }
        module.save_pretrained(place, state_dict=tensors)
        for layer in merged:
            layer.merge()
        (self.tokenizer.encoder if part == "encoder" else self.tokenizer.llm).save_pretrained(place)

    def _is_as_read(self, part: _Part) -> bool:
        """Whether the part's own weights (its adapter aside) are those of its base."""
        return all(
            parameter._version == self._base_versions[part][name.replace(".base_layer.", ".")]
            for name, parameter in getattr(self, part).named_parameters()
            if ".lora_" not in name
        )

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, commit_message: str = "Upload Causal2Vec model"
    ) -> str:
        """Upload the checkpoint to the Hugging Face Hub (created if missing); returns the commit's URL."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "checkpoint"
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefixes": OrderedDict()}


def _token_table(llm: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, llm.get_input_embeddings())


def _token_norm(llm: PreTrainedModel) -> float:
    """Mean norm of the llm's token embeddings, over a sample spread over the vocabulary."""
    table = _token_table(llm)
    ids = torch.linspace(0, table.num_embeddings - 1, steps=min(4096, table.num_embeddings)).long()
    with torch.no_grad():
        return float(table(ids.to(table.weight.device)).float().norm(dim=-1).mean())


@torch.no_grad()
def _final_gains(llm: PreTrainedModel, norm: float) -> Tensor:
    """(D,): what the llm's final norm multiplies each column by, up to a factor common to all.

    Seen on tokens of this norm, too long for the layers to change much, so that no family's norm need be known. The
    directions are random; they stand behind a word, because the first token takes the attention sink.
    """
    table = _token_table(llm).weight
    width = table.shape[1]
    directions = torch.randn(_PROBES, width, generator=torch.Generator().manual_seed(0)).to(table)
    probes = torch.stack([table[:1].expand(_PROBES, -1), directions * (norm / math.sqrt(width))], dim=1)
    states = llm(inputs_embeds=probes, use_cache=False).last_hidden_state[:, 1].float()
    gains: Tensor = (states * directions).sum(dim=0) / directions.float().square().sum(dim=0)
    gains = gains / gains.abs().mean()
    signs = torch.where(gains < 0, -1.0, 1.0)
    return signs * gains.abs().clamp(min=0.05)  # a column that is shut off stays so


def adapted_layers(module: nn.Module) -> list[BaseTunerLayer]:
    """The layers that carry LoRA; each knows whether it is merged."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def load_tokenizer(
    name_or_path: str | os.PathLike[str] = checkpoint.DEFAULT, *, revision: str | None = None
) -> TextTokenizer:
    """A checkpoint's tokenizers alone, to count tokens where nothing is embedded.

    Raises what `from_pretrained` raises.
    """
    folder = checkpoint.locate(name_or_path, revision)
    bases = (checkpoint.checkpoint_part(folder, part) for part in _PARTS)
    return TextTokenizer(Causal2VecConfig.load(folder), *(_open_tokenizer(base) for base in bases))


def _open_tokenizer(base: checkpoint.Base) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        base.folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _open(base: checkpoint.Base, num_layers: int | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Open weights with transformers; every tensor must be there. `num_layers` keeps the first layers only."""
    if "trust_remote_code" in kwargs:
        raise ValueError("trust_remote_code is not supported: no code that comes with weights is run.")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(base.folder, **local)
    if num_layers is not None:
        _keep_first_layers(config, num_layers)
    try:
        with checkpoint.quiet_transformers():
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


def _keep_first_layers(config: Any, num_layers: int) -> None:
    total = config.num_hidden_layers
    if num_layers > total:
        raise ValueError(f"num_llm_layers is {num_layers}, but the decoder has {total} layers.")
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:  # such as layer_types: one entry a layer
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers


def _load_strictly(module: nn.Module, path: Path) -> None:
    state = module.state_dict()
    tensors = checkpoint.read_tensors(path, {name: tuple(tensor.shape) for name, tensor in state.items()})
    module.load_state_dict(tensors)


def _load_adapter(module: PreTrainedModel, folder: Path) -> None:
    """Inject a LoRA adapter saved in peft's format and, where the weights are not quantised, merge it."""
    try:
        lora = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder}/adapter_config.json cannot be read ({error}). Save the checkpoint again."
        ) from error
    inject_adapter_in_model(lora, module)
    expected = {
        f"base_model.model.{name}": tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(module).items()
    }
    tensors = checkpoint.read_tensors(folder / "adapter_model.safetensors", expected)
    set_peft_model_state_dict(module, {name.removeprefix("base_model.model."): t for name, t in tensors.items()})
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if not getattr(module, "is_quantized", False):
        for layer in adapted_layers(module):
            layer.merge()


def _card(model: Causal2Vec) -> str:
    rows = {
        "encoder": model.sources["encoder"],
        "decoder": model.sources["llm"],
        "embedding": f"{model.embedding_dim} columns, pooling `{model.config.pooling}`",
        "instruction": model.config.instruction,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: c2v-rag
pipeline_tag: feature-extraction
---
# A Causal2Vec embedding model

| | |
|---|---|
{table}

```python
from c2v_rag import Causal2Vec

model = Causal2Vec.from_pretrained("PATH OR HUB ID OF THIS FOLDER")
embeddings = model.encode_document(["a text"])
```

Method: Causal2Vec, arXiv 2507.23386. Made with c2v-rag.
"""


_shared: dict[tuple[object, ...], Causal2Vec] = {}
_shared_lock = threading.Lock()


def shared_model(
    name_or_path: str | os.PathLike[str] = checkpoint.DEFAULT,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **llm_kwargs: Any,
) -> Causal2Vec:
    """`Causal2Vec.from_pretrained`, or the model it returned to an earlier call with the same arguments.

    Frameworks build embedding objects over and over; they all get the one model in this process.
    """
    key = (os.fspath(name_or_path), revision, str(device), str(dtype), repr(sorted(llm_kwargs.items())))
    with _shared_lock:
        if key not in _shared:
            _shared[key] = Causal2Vec.from_pretrained(
                name_or_path, revision=revision, device=device, dtype=dtype, **llm_kwargs
            )
        return _shared[key]
