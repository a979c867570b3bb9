"""What the model sees in a training stage: its sequences and the cached vectors.

B texts, E encoder width, D decoder width, K columns of a teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from torch import Tensor

from c2v_rag.config import Causal2VecConfig, Pooling
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.finetune.bm25 import BatchBM25
from c2v_rag.finetune.recipe import Recipe, Stage
from c2v_rag.finetune.start import StartVectors
from c2v_rag.finetune.vectors import TextVectors, autocast, text_hashes
from c2v_rag.identity import hash_tensors
from c2v_rag.model import Causal2Vec
from c2v_rag.tokenization import TextTokenizer
from sentence_transformers_c2v.module import Causal2VecModule, to_features, to_token_batch

# Names among a recipe's teachers: the encoder inside the model, and `StartVectors`.
ENCODER, START = "encoder", "start"
# The encoder runs on slices of a batch, which have little padding. An accelerator is not busy with a few texts.
_TEXTS_IN_A_SLICE_ON_CPU, _TEXTS_IN_A_SLICE = 4, 64
_MAX_SLICES = 8


@dataclasses.dataclass(frozen=True)
class StageVectors:
    """Cached vectors of a stage's texts.

    `encoder`: of the model's encoder, by what it reads (its prompt and the text). It has no vectors but only the texts
    if the encoder is trained and is no teacher. `teachers`: one entry per teacher other than "start", empty without
    distillation. `start`: the vectors of the model before the stage where it is a teacher, else None. `bm25`: where the
    loss reads its scores.
    """

    encoder: TextVectors
    teachers: Sequence[TextVectors]
    start: StartVectors | None = None
    bm25: BatchBM25 | None = None


class TrainingModule(Causal2VecModule):
    """`Causal2VecModule` for one stage: it tokenises at the stage's lengths and adds cached vectors to the features.

    Features besides those of the base class: "rows" (B,), the index of each text in `texts`; "text_hash" (B,), equal
    for equal texts; "pooled" (B, 1, E), the encoder's vectors, where the encoder is frozen; "teacher" (B, K), the
    teachers' vectors; "bm25_row" (B,), the number of each text in `StageVectors.bm25`.
    """

    def __init__(self, model: Causal2Vec, stage: Stage, vectors: StageVectors) -> None:
        super().__init__(model)
        self._stage = stage
        self._stage_tokenizer = stage_tokenizer(model, stage.max_length)
        self._prompted = vectors.encoder
        self.pooling: Pooling = "context" if stage.sequences == "context" else model.config.pooling
        # The feature by which a text's tokens are counted: without text for the decoder, the encoder's.
        self.text_mask = "encoder_mask" if stage.sequences == "context" else "attention_mask"
        self._teachers = vectors.teachers
        self._start = vectors.start
        self._encoder_is_frozen = encoder_is_frozen(stage)
        self._bm25 = vectors.bm25

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        tokenized = self._stage_tokenizer(inputs, prompt or "")
        if self._stage.sequences == "context":
            # The decoder gets no text. The encoder still reads it, unless its vectors are cached.
            empty = self._stage_tokenizer([""], prompt or "").text_ids
            tokenized = dataclasses.replace(tokenized, text_ids=empty * len(inputs))
        features = to_features(tokenized.collate(range(len(inputs))))
        prompted = [self.model.config.encoder_prompt(prompt or "") + text for text in inputs]
        features["rows"] = self._prompted.rows(prompted)
        features["text_hash"] = text_hashes(inputs)
        if self._encoder_is_frozen:
            features["pooled"] = self._prompted(features["rows"]).unsqueeze(1)
        taught = [t(t.rows(prompted if t is self._prompted else inputs)) for t in self._teachers]
        if self._start is not None:
            taught.append(self._start(prompt or "", inputs))
        if taught:
            features["teacher"] = concatenate_teachers(taught)
        if self._bm25 is not None:
            features["bm25_row"] = self._bm25.rows(inputs)
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        pooled = features["pooled"].squeeze(1) if "pooled" in features else None
        batch = to_token_batch(features)
        if pooled is None:  # the trainer's batches are not sorted by length
            texts = _TEXTS_IN_A_SLICE_ON_CPU if batch.encoder_ids.device.type == "cpu" else _TEXTS_IN_A_SLICE
            batch = batch.with_encoder_order(max(1, min(_MAX_SLICES, len(batch.encoder_ids) // texts)))
        features["sentence_embedding"] = self.model(batch, pooled=pooled, pooling=self.pooling)
        return features

    def batch_texts(self, rows: Tensor) -> list[str]:
        """The texts of these rows (n,), for a report, each behind its prompt for the encoder."""
        return [self._prompted.texts[row] for row in rows.tolist()]


def stage_vectors(
    model: Causal2Vec,
    recipe: Recipe,
    stage: Stage,
    work: Path,
    texts: Sequence[str],
    prompted: Mapping[str, Sequence[str]] | None = None,
) -> StageVectors:
    """The cached vectors of `texts` that the stage needs, each text cut at the stage's `max_length`.

    `prompted`: the same texts by the prompt before them, "" for documents; without it, all texts have no prompt.
    Vectors of the encoder and of other teachers are kept in files under `work`; only missing ones are computed, by each
    process its share.
    """
    shared = _shared()

    def embed_with_teacher(name: str, texts: Sequence[str]) -> np.ndarray:
        teacher = SentenceTransformer(name, device=str(model.device))
        teacher.max_seq_length = min(stage.max_length, teacher.max_seq_length or stage.max_length)
        with autocast(model.device):
            vectors = teacher.encode(list(texts), normalize_embeddings=True, show_progress_bar=True)
        return np.asarray(vectors, dtype=np.float32)

    folder = work / "vectors"
    of_encoder = encoder_vectors(model, stage.max_length, work)
    by_prompt = prompted if prompted is not None else {"": texts}
    read = [model.config.encoder_prompt(prompt) + text for prompt, group in by_prompt.items() for text in group]
    teachers = recipe.teachers if stage.loss.needs_teacher else []
    if encoder_is_frozen(stage) or ENCODER in teachers:
        of_encoder.prepare(read)
    else:
        of_encoder.list_texts(read)
    vectors = {ENCODER: of_encoder}
    start = None
    if START in teachers:
        trained = {name: tensor for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
        start = StartVectors(model, stage_tokenizer(model, stage.max_length), trained, folder, **shared)
        start.prepare(by_prompt)
        teachers = [name for name in teachers if name != START]
    for name in set(teachers) - {ENCODER}:
        name_hash = hashlib.sha256(name.encode()).hexdigest()[:8]
        embed = functools.partial(embed_with_teacher, name)
        vectors[name] = TextVectors(folder / f"teacher-{name_hash}-{stage.max_length}", embed, **shared)
        vectors[name].prepare(texts)
    return StageVectors(of_encoder, [vectors[name] for name in teachers], start)


def encoder_vectors(model: Causal2Vec, max_length: int, work: Path) -> TextVectors:
    """An empty table of the encoder's vectors; its texts have their prompts already and are cut at `max_length`."""
    plain = dataclasses.replace(model.config, encoder_query_prompt="", encoder_document_prompt="")
    encoder = EncoderEmbedder(model, stage_tokenizer(model, max_length, plain))

    def embed(texts: Sequence[str]) -> np.ndarray:
        with autocast(model.device):
            return encoder.encode_document(texts, on_truncate="ignore", show_progress=True)

    digest = hash_tensors(model.encoder.state_dict())[:8]  # an earlier stage may have trained the encoder
    return TextVectors(work / "vectors" / f"encoder-{digest}-{max_length}", embed, **_shared())


def _shared() -> dict[str, int]:
    processes = PartialState()
    return {"process": processes.process_index, "num_processes": processes.num_processes}


def encoder_is_frozen(stage: Stage) -> bool:
    """Whether the stage trains neither the encoder nor its adapter."""
    return not {"encoder", "encoder_adapter"} & set(stage.train)


def concatenate_teachers(vectors: Sequence[Tensor]) -> Tensor:
    """(n, K) vectors whose cosine similarity is the mean of the teachers' similarities; each teacher's are (n, .)."""
    return torch.cat([*vectors], dim=1) / math.sqrt(len(vectors))


def stage_tokenizer(model: Causal2Vec, max_length: int, config: Causal2VecConfig | None = None) -> TextTokenizer:
    """The model's tokenizers with a stage's `max_length`; the encoder's length is never above the model's own.

    `config` replaces the model's.
    """
    config = config or model.config
    encoder_max_length = min(max_length, config.encoder_max_length)
    return model.tokenizer.with_config(
        dataclasses.replace(config, max_length=max_length, encoder_max_length=encoder_max_length)
    )
