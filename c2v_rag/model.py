"""Causal2Vec: a small encoder's Contextual token, prepended to a causal LLM (arXiv 2507.23386).

    text -> encoder -> pooled (B, E) -> projector -> Contextual token C (B, 1, D)
    BOS instruction C t1 ... tn EOS -> the unchanged causal llm -> last hidden states
    embedding = the states of C and of EOS, columns interleaved, L2-normalised: (B, 2 D)

B texts, P prefix tokens (BOS and the instruction), S encoder tokens, T tokens of the text ending in EOS,
E encoder width, D llm width.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from c2v_rag import checkpoint, inference, parts, weights
from c2v_rag.attention import cache_that_stores_nothing, is_causal
from c2v_rag.bases import Base, locate_base
from c2v_rag.config import Causal2VecConfig, Pooling
from c2v_rag.hashes import verify_sums
from c2v_rag.pooling import pool, pool_by_length
from c2v_rag.prefix import PrefixCache, is_checkpointing, is_short, prefix_states, weights_state
from c2v_rag.projector import INITIAL_TOKEN_SCALE, Projector, initialise
from c2v_rag.replicas import Replicas
from c2v_rag.tokenization import TextTokenizer, TokenBatch, TokenizedTexts


class Causal2Vec(nn.Module):
    """An embedding model: a bidirectional encoder, a projector and a causal decoder.

    Examples:
        >>> from c2v_rag import Causal2Vec
        >>> model = Causal2Vec.from_pretrained("default")
        >>> documents = model.encode_document(["A heap keeps its smallest item first.", "Bread needs yeast."])
        >>> queries = model.encode_query(["priority queue"])
        >>> documents.shape
        (2, 384)
        >>> int((queries @ documents.T).argmax())
        0

    `encoder` and `llm` are models that `transformers.AutoModel` opens. `llm` must be causal and already have
    `config.num_llm_layers` layers (`from_parts` keeps the first ones).

    Raises ValueError if the parts do not fit each other, or have too few positions for the config's lengths.
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
        parts.check_encoder_length(encoder, config.encoder_max_length)
        self._llm_positions = parts.position_limit(llm)
        tokenized = self.tokenizer([""], config.prompt(config.instruction))
        parts.check_llm_length(self._llm_positions, config, tokenized, tokenized.num_prompt_tokens + config.max_length)
        self.name = ""  # the name it was loaded by; "" for a model that exists in memory only
        self.load_arguments: dict[str, Any] = {}  # the other fields of EmbedderSpec
        self.encoding_state = inference.EncodingState()
        self.prefix_cache = PrefixCache()
        self.replicas = Replicas()
        self.weights_record = weights.WeightsRecord()

    # Properties

    @property
    def _llm_dim(self) -> int:
        return int(self.llm.config.get_text_config().hidden_size)

    @property
    def _full_dim(self) -> int:
        return self._llm_dim * (2 if self.config.pooling == "context_eos" else 1)

    @property
    def embedding_dim(self) -> int:
        """Columns of an embedding: `config.truncate_dim` if set, else 2 D for pooling `context_eos`, else D."""
        return self.config.truncate_dim or self._full_dim

    @property
    def device(self) -> torch.device:
        return self.projector.hidden.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's dtype. The projector and adapters are float32."""
        return parts.token_embeddings(self.llm).weight.dtype

    @property
    def sources(self) -> dict[str, str]:
        """For "encoder" and "llm": a description of where the weights came from."""
        return self.weights_record.origins

    @property
    def stamp(self) -> dict[str, str | int]:
        """The facts that an index stores about the model that made it, as JSON values.

        `weights` is the model's identity: a hash of every weight and setting that changes a vector. Folder, device and
        dtype do not change it. `name` is "" for a model that exists in memory only. `weights_0_1`, if present, is the
        identity that version 0.1 computed for the same weights.
        """
        return weights.stamp(self)

    def base_folder(self, part: parts.Part) -> Path:
        """The folder that the encoder's or the decoder's weights were read from.

        Raises ValueError for weights that exist in memory only or have changed since.
        """
        record = self.weights_record.parts[part]
        if record.base is None or not parts.is_base(getattr(self, part), record):
            raise ValueError(f"The weights of the {part} exist in memory only. Save the model and load it again.")
        return record.base.folder

    def unmerge_adapter(self, part: parts.Part) -> None:
        """Remove a merged adapter from a part's weights, and restore the exact values of an unchanged base.

        The adapter is then computed separately and can be trained. Embeddings do not change, except for rounding.
        """
        parts.unmerge_adapter(getattr(self, part), self.weights_record.parts[part])

    # The method

    def forward(self, batch: TokenBatch, *, pooled: Tensor | None = None, pooling: Pooling | None = None) -> Tensor:
        """Embeddings (B, embedding_dim) of a token batch, differentiable, rows of length 1.

        For training. `pooled` (B, E): cached states of a frozen encoder, which is then not run. `pooling` overrides the
        config's. With "context" the decoder does not read the text, because under a causal mask the text cannot change
        the Contextual token's state. The prefix is computed once per batch, with its gradient.
        """
        prefix = None if is_short(batch) else self.compute_prefix(batch.prefix_ids)
        return self.embed_with_prefix(prefix, batch, pooled=pooled, pooling=pooling or self.config.pooling)

    @torch.no_grad()
    def embed(self, batch: TokenBatch, *, reuse_prefix: bool = True) -> Tensor:
        """The same embeddings as `forward`, without gradients, for inference.

        The prefix's keys and values are cached between batches, unless `reuse_prefix=False` or the prefix is short.
        """
        prefix = None
        if reuse_prefix and not is_short(batch):
            weights = self.encoding_state.once_per_encode(lambda: weights_state(self.llm))
            prefix = self.prefix_cache.get(self.llm, batch.prefix_ids, key=batch.prefix_key, weights=weights)
        return self.embed_with_prefix(prefix, batch, pooled=None, pooling=self.config.pooling)

    def pooled_encoder_states(self, batch: TokenBatch) -> Tensor:
        """(B, E): the encoder's pooled states of the texts, float32, not normalised.

        Computed in slices of texts with similar lengths in the encoder, so that there is little padding.
        """
        return pool_by_length(self.encoder, batch, self.config.encoder_pooling)

    def compute_prefix(self, prefix_ids: Tensor) -> DynamicCache | None:
        """Keys and values of the prefix (P,), with gradient; None if the decoder has none (see prefix.py)."""
        return prefix_states(self.llm, prefix_ids)

    def embed_with_prefix(
        self, prefix: DynamicCache | None, batch: TokenBatch, *, pooled: Tensor | None, pooling: Pooling
    ) -> Tensor:
        """Embeddings (B, embedding_dim) of a batch, with the states of its prefix, which do not change.

        If `prefix` is None, the prefix is computed with every text. `pooled` as for `forward`.

        A causal decoder gets no attention mask: padding is on the right, where no token of a text attends to it, and
        positions are the same. With a mask, PyTorch could not use its flash kernels.
        """
        has_token = self.config.contextual_token != "none"
        text_ids, mask = batch.text_ids, batch.text_mask
        if pooling == "context":
            text_ids, mask = text_ids[:, :0], mask[:, :0]

        embed_tokens = parts.token_embeddings(self.llm)
        inputs = [embed_tokens(text_ids)]
        if has_token:
            if pooled is None:
                pooled = self.pooled_encoder_states(batch)
            inputs.insert(0, self.projector(pooled).unsqueeze(1).to(inputs[0].dtype))
            mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        num_prefix = len(batch.prefix_ids)
        states = prefix
        if prefix is None:
            inputs.insert(0, embed_tokens(batch.prefix_ids).expand(len(text_ids), -1, -1))
            states = None if self.llm.training and is_checkpointing(self.llm) else cache_that_stores_nothing(self.llm)
        hidden = self.llm(
            inputs_embeds=torch.cat(inputs, dim=1),
            attention_mask=None if is_causal(self.llm) else torch.cat([mask.new_ones(len(mask), num_prefix), mask], 1),
            past_key_values=states,
            use_cache=states is not None,
        ).last_hidden_state
        if prefix is None:
            hidden = hidden[:, num_prefix:]
        vectors = pool(hidden, mask, pooling, text_start=int(has_token) + batch.num_prompt_tokens)
        return normalize(vectors[:, : self.config.truncate_dim], dim=1)

    # Texts to arrays

    def tokenize(self, texts: Sequence[str], instruction: str = "") -> TokenizedTexts:
        """Token ids of the texts, truncated to the config's lengths. Raises ValueError for a too long instruction."""
        tokenized = self.tokenizer(texts, self.config.prompt(instruction))
        longest = max(map(len, tokenized.text_ids), default=0)
        parts.check_llm_length(self._llm_positions, self.config, tokenized, longest)
        return tokenized

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Length of each text in tokens. Texts longer than `max_tokens` are truncated."""
        return self.tokenizer.count_tokens(texts)

    def token_ends(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """For each text, for decoder and encoder, the offset at which each token ends."""
        return self.tokenizer.token_ends(texts)

    @property
    def max_tokens(self) -> int:
        """The longest text, in `count_tokens`, that is not truncated for the encoder or the decoder."""
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
        devices: Sequence[torch.device | str] | None = None,
    ) -> np.ndarray:
        """Embeddings of `texts`, in their order: float32 (n, embedding_dim), rows of length 1. No instruction.

        For similarity and clustering. For retrieval use `encode_query` and `encode_document`.

        `texts`: a list or any iterable of strings, read window by window. `instruction`: is put before every text;
        None and "" mean no instruction. `batch_tokens`: padded tokens per batch; unless given, chosen for the device.
        `truncate_dim`: use the first columns only (Matryoshka), normalised again. The Contextual token's and EOS's
        columns alternate, so that the first columns contain both. `on_truncate`: texts longer than the config's
        lengths are truncated before EOS; "warn" logs their number once, "error" raises, "ignore" does neither.
        `devices`: embed on all of these, such as ["cuda:0", "cuda:1"], with a copy of the model on each.

        Raises TypeError for a bare string or an item that is not a string, ValueError for a text whose embedding is
        not finite; both name the index. Thread-safe: threads take turns.
        """
        model, *replicas = [self] if devices is None else self.replicas.get(self, devices)
        return inference.encode(
            model, texts, replicas=replicas, instruction=instruction or "", batch_tokens=batch_tokens,
            truncate_dim=truncate_dim, on_truncate=on_truncate, show_progress=show_progress,
        )  # fmt: skip

    def encode_query(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[inference.EncodeOptions]
    ) -> np.ndarray:
        """Embeddings of queries: `encode` with an instruction, the config's unless one is given ("" for none)."""
        instruction = self.config.instruction if instruction is None else instruction
        return self.encode(texts, instruction=instruction, **options)

    def encode_document(
        self, texts: Iterable[str], *, instruction: str | None = None, **options: Unpack[inference.EncodeOptions]
    ) -> np.ndarray:
        """Embeddings of documents: `encode`, without an instruction unless one is given."""
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
        encoder_dtype: torch.dtype | None = None,
        seed: int = 0,
        initial_token_scale: float = INITIAL_TOKEN_SCALE,
        **llm_kwargs: Any,
    ) -> Causal2Vec:
        """A new, untrained model from an encoder and a decoder: folders, hub ids or installed packages.

        The projector is a random rotation (`seed`). Before training, the Contextual half ranks texts as the encoder
        does. `initial_token_scale`: see `projector.initialise`. The rest, and errors, as in `from_pretrained`.
        """
        bases: dict[parts.Part, Base] = {
            "encoder": locate_base(encoder, encoder_revision),
            "llm": locate_base(llm, llm_revision),
        }
        options = {"device": device, "dtype": dtype, "encoder_dtype": encoder_dtype, "llm_kwargs": llm_kwargs}
        model = cls._assemble(config or Causal2VecConfig(), bases, seed, **options)
        model.weights_record.note_bases(model)
        initialise(model.projector, model.llm, initial_token_scale)
        return model

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = checkpoint.DEFAULT,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        encoder_dtype: torch.dtype | None = None,
        **llm_kwargs: Any,
    ) -> Causal2Vec:
        """Read a checkpoint: "default", a folder written by `save_pretrained`, or a Hugging Face Hub id.

        `device`: unless given, the first available of CUDA, MPS and CPU. `dtype`: a torch.dtype, its name, or "auto"
        for the files' dtype; unless given, bfloat16 if the hardware supports it, else float32. `encoder_dtype`: the
        encoder's, if it differs (float32 to train it). `llm_kwargs` are passed to the decoder's
        `AutoModel.from_pretrained`: `device_map`, `attn_implementation`, `quantization_config`, ...

        Raises FileNotFoundError, with the commands that install them, if the weights are not on this machine;
        ValueError if a file is missing or altered, or has unknown settings or tensors of another shape.
        """
        folder = checkpoint.locate(name_or_path, revision)
        config = Causal2VecConfig.load(folder)
        sums = verify_sums(folder)
        bases = {part: checkpoint.checkpoint_part(folder, part) for part in parts.PARTS}
        options = {"device": device, "dtype": dtype, "encoder_dtype": encoder_dtype, "llm_kwargs": llm_kwargs}
        model = cls._assemble(config, bases, seed=0, **options)
        weights.read_trained(model, folder)
        model.name = os.fspath(name_or_path)
        model.load_arguments = {
            "revision": revision,
            "device": None if device is None else str(device),
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "llm_kwargs": llm_kwargs,
        }
        model.weights_record.note_checkpoint(model, sums)
        return model.eval()  # the adapters were added in training mode

    @classmethod
    @torch.inference_mode(False)
    def _assemble(
        cls,
        config: Causal2VecConfig,
        bases: Mapping[parts.Part, Base],
        seed: int,
        **options: Any,
    ) -> Causal2Vec:
        """Open the parts (options of `weights.open_parts`) and add a projector; returns the model in eval mode."""
        opened = weights.open_parts(bases, config.num_llm_layers, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config, opened.encoder, opened.llm, *opened.tokenizers)
        model.projector.to(opened.input_device)
        model.weights_record = opened.record
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a checkpoint with its SHA256SUMS. A model loaded from it gives the same vectors.

        An unchanged encoder or decoder from the Hub or an installed package is stored as a reference (name and hash);
        any other is written in full. Every tensor is compared with the files it was read from, so that no change is
        lost. The checkpoint is moved to `folder` when it is complete, and replaces an earlier one.

        Raises ValueError if `folder` contains files and is no checkpoint.
        """
        with self.encoding_state.compute_lock:
            weights.save(self, folder)

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
