"""What the model sees in a training stage: its sequences, the cached vectors, and the targets of the loss.

B texts, E encoder width, D decoder width, K columns of a teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from c2v_rag.config import Pooling
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.finetune.recipe import Recipe, Stage
from c2v_rag.finetune.start import StartVectors
from c2v_rag.finetune.vectors import LexicalEmbedder, TextVectors, autocast
from c2v_rag.model import Causal2Vec
from c2v_rag.tokenization import TextTokenizer
from sentence_transformers_c2v.module import Causal2VecModule, to_features, to_token_batch

# Names among a recipe's teachers: the encoder inside the model, `LexicalEmbedder`, and `StartVectors`.
ENCODER, LEXICAL, START = "encoder", "lexical", "start"
_EOS_SAMPLE = 256  # texts whose EOS states are averaged


@dataclasses.dataclass(frozen=True)
class StageVectors:
    """Cached vectors of a stage's texts; a text has the same row in all of them.

    `encoder`: the vectors of the model's encoder. `teachers`: one entry per teacher, empty without distillation.
    `lexical`: the vectors of `LexicalEmbedder` where the loss has `words`, else None. `start`: the vectors of the model
    before the stage where it is a teacher, else None.
    """

    encoder: TextVectors
    teachers: Sequence[TextVectors]
    lexical: TextVectors | None
    start: StartVectors | None = None


class TrainingModule(Causal2VecModule):
    """`Causal2VecModule` for one stage: it tokenises at the stage's lengths and adds cached vectors to the features.

    Features besides those of the base class: "rows" (B,), the index of each text in `texts`; "pooled" (B, 1, E), the
    encoder's vectors, where the encoder is frozen; "teacher" (B, K), the teachers' vectors; "target" (B, D), the
    target of the EOS half, where the loss has `words`.

    Raises ValueError when the loss has `words` and the stage's pooling has no EOS half.
    """

    def __init__(self, model: Causal2Vec, stage: Stage, vectors: StageVectors) -> None:
        super().__init__(model)
        self._stage = stage
        self._stage_tokenizer = stage_tokenizer(model, stage.max_length)
        self.texts = vectors.encoder
        self.pooling: Pooling = "context" if stage.sequences == "context" else model.config.pooling
        self._teachers = vectors.teachers
        self._start = vectors.start
        self._encoder_is_frozen = not {"encoder", "encoder_adapter"} & set(stage.train)
        self._lexical = vectors.lexical
        self._mean_eos = torch.empty(0)
        if self._lexical is not None:
            if self.pooling not in ("context_eos", "eos"):
                raise ValueError(f"'words' is a loss of EOS's half, and pooling {self.pooling!r} has none.")
            self._mean_eos = self._compute_mean_eos()

    @torch.no_grad()
    def _compute_mean_eos(self) -> Tensor:
        """(D,) of length 1: the mean direction of the EOS states over a sample of texts, before the stage."""
        texts = self.texts.texts
        sample = texts[:: max(1, len(texts) // _EOS_SAMPLE)][:_EOS_SAMPLE]
        batch = self._stage_tokenizer(sample).collate(range(len(sample))).to(self.model.device)
        pooled = self.texts(self.texts.rows(sample)).to(self.model.device)
        with autocast(self.model.device):
            embeddings = self.model(batch, pooled=pooled)
        eos = embeddings[:, 1::2] if self.pooling == "context_eos" else embeddings
        return normalize(normalize(eos.float().cpu(), dim=1).mean(dim=0), dim=0)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        tokenized = self._stage_tokenizer(inputs, prompt or "")
        if self._stage.sequences == "context":
            # The decoder gets no text. The encoder still reads it, unless its vectors are cached.
            empty = self._stage_tokenizer([""], prompt or "").text_ids
            tokenized = dataclasses.replace(tokenized, text_ids=empty * len(inputs))
        features = to_features(tokenized.collate(range(len(inputs))))
        features["rows"] = self.texts.rows(inputs)
        if self._encoder_is_frozen:
            features["pooled"] = self.texts(features["rows"]).unsqueeze(1)
        taught = [teacher(features["rows"]) for teacher in self._teachers]
        if self._start is not None:
            taught.append(self._start(prompt or "", inputs))
        if taught:
            features["teacher"] = concatenate_teachers(taught)
        if self._lexical is not None:
            share = self._stage.loss.words_share
            lexical = self._lexical(features["rows"])
            features["target"] = math.sqrt(1 - share) * self._mean_eos + math.sqrt(share) * lexical
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        pooled = features["pooled"].squeeze(1) if "pooled" in features else None
        features["sentence_embedding"] = self.model(to_token_batch(features), pooled=pooled, pooling=self.pooling)
        return features


def stage_vectors(
    model: Causal2Vec,
    recipe: Recipe,
    stage: Stage,
    work: Path,
    texts: Sequence[str],
    prompted: Mapping[str, Sequence[str]] | None = None,
) -> StageVectors:
    """The cached vectors of `texts` that the stage needs, each text cut at the stage's `max_length`.

    `prompted`: the texts of each prompt, which the teacher "start" needs; without it, all texts have no prompt.
    Vectors of the encoder and of other teachers are kept in files under `work`; only missing ones are computed.
    """
    encoder = EncoderEmbedder(model, stage_tokenizer(model, stage.max_length))

    def embed_with_encoder(texts: Sequence[str]) -> np.ndarray:
        with autocast(model.device):
            return encoder.encode_document(texts, on_truncate="ignore", show_progress=True)

    def embed_with_teacher(name: str, texts: Sequence[str]) -> np.ndarray:
        teacher = SentenceTransformer(name, device=str(model.device))
        teacher.max_seq_length = min(stage.max_length, teacher.max_seq_length or stage.max_length)
        with autocast(model.device):
            vectors = teacher.encode(list(texts), normalize_embeddings=True, show_progress_bar=True)
        return np.asarray(vectors, dtype=np.float32)

    digest = hashlib.sha256()  # an earlier stage may have trained the encoder
    for tensor in model.encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    folder = work / "vectors"
    vectors = {
        ENCODER: TextVectors(folder / f"encoder-{digest.hexdigest()[:8]}-{stage.max_length}", embed_with_encoder)
    }
    teachers = recipe.teachers if stage.loss.needs_teacher else []
    start = None
    if START in teachers:
        trained = {name: tensor for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
        start = StartVectors(model, stage_tokenizer(model, stage.max_length), trained, folder)
        start.prepare(prompted if prompted is not None else {"": texts})
        teachers = [name for name in teachers if name != START]
    for name in {*teachers, *([LEXICAL] if stage.loss.words else [])} - {ENCODER}:
        if name == LEXICAL:
            table = cast(Tensor, model.llm.get_input_embeddings().weight)
            vectors[name] = TextVectors(None, LexicalEmbedder(table, model.tokenizer.llm, texts, stage.max_length))
        else:
            name_hash = hashlib.sha256(name.encode()).hexdigest()[:8]
            embed = functools.partial(embed_with_teacher, name)
            vectors[name] = TextVectors(folder / f"teacher-{name_hash}-{stage.max_length}", embed)
    for table_of_vectors in vectors.values():
        table_of_vectors.prepare(texts)
    lexical = vectors[LEXICAL] if stage.loss.words else None
    return StageVectors(vectors[ENCODER], [vectors[name] for name in teachers], lexical, start)


def concatenate_teachers(vectors: Sequence[Tensor]) -> Tensor:
    """(n, K) vectors whose cosine similarity is the mean of the teachers' similarities; each teacher's are (n, ...)."""
    return torch.cat(list(vectors), dim=1) / math.sqrt(len(vectors))


def stage_tokenizer(model: Causal2Vec, max_length: int) -> TextTokenizer:
    """The model's tokenizers with a stage's `max_length`; the encoder's length is never above the model's own."""
    config = dataclasses.replace(
        model.config, max_length=max_length, encoder_max_length=min(max_length, model.config.encoder_max_length)
    )
    return model.tokenizer.with_config(config)
