"""How fast a Causal2Vec model embeds, beside what its parts and the machine could do.

    python benchmarks/throughput.py [--model M] [--device D] [--dtype T] [--texts N] [--output FILE.json] [--quick]

Two sets of N texts, cut from the standard library's docstrings: mixed lengths, spread evenly over the logarithm from 8
tokens to the model's longest, and uniform ones of the mixed texts' mean length. Tokens are the decoder's, real ones:
text, EOS and Contextual token, no padding and no prefix, in every row, the encoder's too, so that rows compare.

    LLM alone, encoder alone   forwards of uniform batches
    LLM + encoder, added       the two rows above one after the other: what `embed` could reach without any overhead
    embed                      forwards of uniform, ready-made batches without padding: the reference
    encode                     the path that users take: texts in, numpy out
    sentence-transformers      the same modules in `SentenceTransformer.encode`, batches of 32 texts

The matmul peak is torch.nn.functional.linear's in the model's dtype at the best of a few shapes. The share of it counts,
for a forward over texts of T tokens (the encoder's T for the encoder),

    FLOP = sum over texts of 2 * W * T + 4 * T * T * D * layers        of llm and encoder, W weights in linear layers
           + 2 * W                                                     of the projector, once a text

with real tokens only: padding lowers the share. Attention is counted in full, though the llm's is causal.

Prefix reuse: real questions, tokenised beforehand, behind a short and a long instruction. With reuse the instruction's
keys and values are kept; without, the instruction stands in front of every text.

Every round measures each row once, one after the other; printed are medians over the rounds after a warm-up round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import random
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from c2v_rag import Causal2Vec, inference
from c2v_rag.sources import python_docs
from c2v_rag.tokenization import TokenBatch

QUESTIONS = Path(__file__).with_name("python_docs_questions.jsonl")
NUM_QUESTIONS = 64
LONG_INSTRUCTION_TOKENS = 400
SHORTEST_TEXT = 8
REFERENCE = "embed, uniform batches"
MIXED = "encode, mixed lengths"
PEER = "sentence-transformers, mixed lengths"
ADDED = "LLM + encoder, times added"
WITH_REUSE = ", reuse"
TARGET = 0.85


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: what is run, how many decoder tokens (or queries) that embeds, and the FLOP it takes."""

    name: str
    action: Callable[[], object]
    amount: int
    flop: float = 0.0


# Texts


def decoder_tokens(model: Causal2Vec) -> Iterator[int]:
    """The passages of python-docs in a random, fixed order, as one endless run of the decoder's tokens."""
    passages = [document.text for document in python_docs()]
    random.Random(0).shuffle(passages)
    for text in cycle(passages):
        yield from model.tokenizer.llm(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]


def cut_texts(model: Causal2Vec, tokens: Iterator[int], counts: Sequence[int]) -> list[str]:
    """Texts of so many decoder tokens each."""
    decode = model.tokenizer.llm.decode
    return [decode(list(islice(tokens, count)), clean_up_tokenization_spaces=False) for count in counts]


def mixed_counts(model: Causal2Vec, num_texts: int) -> list[int]:
    """Token counts spread evenly over the logarithm, EOS left out."""
    draw = random.Random(1)
    low, high = math.log(SHORTEST_TEXT), math.log(model.max_tokens)
    return [round(math.exp(draw.uniform(low, high))) - 1 for _ in range(num_texts)]


def uniform_batches(model: Causal2Vec, texts: Sequence[str], width: int, encoder_width: int) -> list[TokenBatch]:
    """Batches on the model's device in which every text takes `width` decoder and `encoder_width` encoder tokens."""
    tokenized = model.tokenize(texts)
    eos = model.tokenizer.eos
    tokenized = dataclasses.replace(
        tokenized,
        text_ids=[[*ids[: width - 2], eos] for ids in tokenized.text_ids],
        encoder_ids=[ids[: encoder_width - 1] + ids[-1:] for ids in tokenized.encoder_ids],
    )
    batches = inference.token_budget_batches(tokenized.lengths, inference.default_batch_tokens(model.device))
    return [tokenized.collate(positions).to(model.device) for positions in batches]


def padding_shares(model: Causal2Vec, texts: Sequence[str]) -> dict[str, float]:
    """Share of padding in the tokens that `encode` puts through the decoder and through the encoder."""
    real, padded = {"decoder": 0, "encoder": 0}, {"decoder": 0, "encoder": 0}
    for window in inference._windows(texts):
        tokenized = model.tokenize(window)
        lengths = {"decoder": tokenized.lengths, "encoder": [len(ids) for ids in tokenized.encoder_ids]}
        budget = inference.default_batch_tokens(model.device)
        for batch in inference.token_budget_batches(tokenized.lengths, budget):
            for part, of_part in lengths.items():
                real[part] += sum(of_part[i] for i in batch)
                padded[part] += len(batch) * max(of_part[i] for i in batch)
    return {part: 1 - real[part] / padded[part] for part in real}


# FLOP


def linear_weights(module: nn.Module) -> int:
    """Weights in linear layers, without adapters (they are merged) and BERT's pooler (its output is not used)."""
    return sum(
        layer.weight.numel()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name and not name.startswith("pooler.")
    )


def transformer_flop(module: nn.Module, lengths: Sequence[int]) -> float:
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    attention = 4 * config.hidden_size * config.num_hidden_layers
    return 2 * linear_weights(module) * sum(lengths) + attention * sum(length**2 for length in lengths)


def embedding_flop(model: Causal2Vec, lengths: Sequence[int], encoder_lengths: Sequence[int]) -> float:
    projector = 2 * linear_weights(model.projector) * len(lengths)
    return transformer_flop(model.llm, lengths) + transformer_flop(model.encoder, encoder_lengths) + projector


# Rows


def encode_rows(model: Causal2Vec, num_texts: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows in tokens, and what the texts are like."""
    tokens = decoder_tokens(model)
    mixed = cut_texts(model, tokens, mixed_counts(model, num_texts))
    mixed_tokens = model.tokenize(mixed)
    mixed_encoder = [len(ids) for ids in mixed_tokens.encoder_ids]
    width, encoder_width = round(fmean(mixed_tokens.lengths)), round(fmean(mixed_encoder))

    uniform = cut_texts(model, tokens, [width - 2] * num_texts)
    uniform_tokens = model.tokenize(uniform)
    uniform_encoder = [len(ids) for ids in uniform_tokens.encoder_ids]
    # Texts of twice the width are cut after tokenisation: whatever the ratio of the tokenizers, both sides are full.
    batches = uniform_batches(model, cut_texts(model, tokens, [2 * width] * num_texts), width, encoder_width)
    most = max(len(batch.text_ids) for batch in batches)
    embeds = torch.randn((most, width, model.llm.config.get_text_config().hidden_size)).to(model.device, model.dtype)

    def run_llm() -> None:
        for batch in batches:
            model.llm(inputs_embeds=embeds[: len(batch.text_ids)], use_cache=False)

    def run_encoder() -> None:
        for batch in batches:
            model.pooled_encoder_states(batch)

    total = num_texts * width
    widths, encoder_widths = [width] * num_texts, [encoder_width] * num_texts
    mixed_total, mixed_flop = sum(mixed_tokens.lengths), embedding_flop(model, mixed_tokens.lengths, mixed_encoder)
    rows = [
        Row("LLM alone, uniform batches", run_llm, total, transformer_flop(model.llm, widths)),
        Row("encoder alone, uniform batches", run_encoder, total, transformer_flop(model.encoder, encoder_widths)),
        Row(REFERENCE, partial(embed_all, model, batches), total, embedding_flop(model, widths, encoder_widths)),
        Row(
            "encode, uniform lengths",
            lambda: model.encode(uniform, on_truncate="ignore"),
            sum(uniform_tokens.lengths),
            embedding_flop(model, uniform_tokens.lengths, uniform_encoder),
        ),
        Row(MIXED, lambda: model.encode(mixed, on_truncate="ignore"), mixed_total, mixed_flop),
    ]
    if (peer := in_sentence_transformers(model)) is not None:
        rows.append(Row(PEER, lambda: peer(mixed), mixed_total, mixed_flop))
    about = {
        "texts": num_texts,
        "uniform_tokens": {"decoder": width, "encoder": encoder_width},
        "mixed_tokens": {"shortest": min(mixed_tokens.lengths), "longest": max(mixed_tokens.lengths)},
        "batch_tokens": inference.default_batch_tokens(model.device),
        "padding": {"uniform": padding_shares(model, uniform), "mixed": padding_shares(model, mixed)},
    }
    return rows, about


def in_sentence_transformers(model: Causal2Vec) -> Callable[[list[str]], object] | None:
    """`SentenceTransformer.encode` around the model; None where the package is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import InputModule
    except ModuleNotFoundError as error:
        if error.name != "sentence_transformers":
            raise
        return None

    class Embedder(InputModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
            return {"batch": model.tokenize(inputs).collate(range(len(inputs)))}

        def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            return {"sentence_embedding": model.embed(features["batch"].to(model.device))}

        def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
            raise NotImplementedError("This module is for measuring only.")

    peer = SentenceTransformer(modules=[Embedder()], device=str(model.device))
    return lambda texts: peer.encode(texts, batch_size=32, show_progress_bar=False)


def query_rows(model: Causal2Vec, num_questions: int) -> list[tuple[Row, Row]]:
    """Pairs with and without reuse of the prefix: a short and a long instruction, one at a time and as one batch."""
    with QUESTIONS.open(encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in islice(file, num_questions)]
    count = len(questions)
    long = model.config.instruction + "\n" + cut_texts(model, decoder_tokens(model), [LONG_INSTRUCTION_TOKENS])[0]
    pairs = []
    for instruction in (model.config.instruction, long):
        tokenized = model.tokenize(questions, instruction)
        each = [tokenized.collate([i]).to(model.device) for i in range(count)]
        together = [tokenized.collate(range(count)).to(model.device)]
        for how, batches in (("one at a time", each), (f"{count} in a batch", together)):
            name = f"prefix of {len(tokenized.prefix_ids)} tokens, {how}"
            pairs.append(
                (
                    Row(name + WITH_REUSE, partial(embed_all, model, batches), count),
                    Row(name + ", whole", partial(embed_whole, model, batches), count),
                )
            )
    return pairs


def embed_all(model: Causal2Vec, batches: Sequence[TokenBatch]) -> None:
    for batch in batches:
        model.embed(batch)


def embed_whole(model: Causal2Vec, batches: Sequence[TokenBatch]) -> None:
    """`embed` with the prefix's tokens in front of every text instead of its kept keys and values."""
    for batch in batches:
        model._embed(batch, None, pooled=None, pooling=model.config.pooling)


def matmul_rows(model: Causal2Vec, *, quick: bool) -> list[Row]:
    """Multiplications of the model's own shapes and of large squares."""
    tokens = inference.default_batch_tokens(model.device)
    width = model.llm.config.get_text_config().hidden_size
    shapes = [(tokens, width, width), (tokens, width, 4 * width), (tokens, 4 * width, width)]
    shapes += [(side, side, side) for side in ((1024,) if quick else (2048, 4096))]
    rows = []
    for tall, inner, outer in shapes:
        flop = 2 * tall * inner * outer
        repeats = max(1, int((2e13 if model.device.type == "cuda" else 2e11) / flop))
        left = torch.randn((tall, inner)).to(model.device, model.dtype)
        right = torch.randn((outer, inner)).to(model.device, model.dtype)

        rows.append(
            Row(f"matmul {tall} x {inner} x {outer}", partial(multiply, left, right, repeats), 0, flop * repeats)
        )
    return rows


def multiply(left: torch.Tensor, right: torch.Tensor, repeats: int) -> None:
    for _ in range(repeats):
        nn.functional.linear(left, right)


# Measuring and printing


@torch.inference_mode()
def measure(rows: Sequence[Row], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every row in every round, the warm-up round left out."""
    synchronize = torch.get_device_module(device).synchronize
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}" if number else "warm-up", file=sys.stderr)
        for row in rows:
            synchronize()
            start = perf_counter()
            row.action()
            synchronize()
            if number:
                seconds[row.name].append(perf_counter() - start)
    return seconds


def machine(model: Causal2Vec) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    on_cuda = model.device.type == "cuda"
    return {
        "platform": platform.platform(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if on_cuda else str(model.device),
    }


def encode_figures(rows: Sequence[Row], medians: dict[str, float], peak: float) -> list[dict[str, Any]]:
    """What is printed of the rows in tokens; `rows` opens with the LLM's and the encoder's."""
    measured = [(row.name, row.amount, row.flop, medians[row.name]) for row in rows]
    (_, tokens, llm_flop, llm_seconds), (_, _, encoder_flop, encoder_seconds) = measured[:2]
    measured.insert(2, (ADDED, tokens, llm_flop + encoder_flop, llm_seconds + encoder_seconds))
    reference = next(tokens / seconds for name, tokens, _, seconds in measured if name == REFERENCE)
    return [
        {
            "name": name,
            "tokens_per_s": tokens / seconds,
            "share_of_reference": tokens / seconds / reference,
            "share_of_matmul_peak": flop / seconds / peak,
        }
        for name, tokens, flop, seconds in measured
    ]


def query_figures(pairs: Sequence[tuple[Row, Row]], medians: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "name": reuse.name.removesuffix(WITH_REUSE),
            "queries_per_s_with_reuse": reuse.amount / medians[reuse.name],
            "queries_per_s_without": whole.amount / medians[whole.name],
            "gain": medians[whole.name] / medians[reuse.name],
        }
        for reuse, whole in pairs
    ]


def report(figures: dict[str, Any]) -> None:
    """Print two tables and the line that says whether the target is met."""
    console = Console(highlight=False)
    where, texts, uniform = figures["machine"], figures["texts"], figures["uniform_tokens"]
    console.print(
        f"{figures['model']['name']}, {where['dtype']} on {where['device']}: {where['cpu']}, {where['cores']} cores"
    )
    console.print(
        f"{texts} texts; mixed: {figures['mixed_tokens']['shortest']} to {figures['mixed_tokens']['longest']} tokens, "
        f"uniform: {uniform['decoder']} (encoder: {uniform['encoder']}); medians of {figures['rounds']} rounds"
    )
    console.print(f"measured matmul peak: {figures['matmul_peak_flop_per_s'] / 1e9:.0f} GFLOP/s")

    table = Table("", box=box.SIMPLE)
    for column in ("tokens/s", "of the reference", "of the matmul peak"):
        table.add_column(column, justify="right")
    for row in figures["encode"]:
        shares = [f"{row['share_of_reference']:.0%}", f"{row['share_of_matmul_peak']:.0%}"]
        table.add_row(row["name"], f"{row['tokens_per_s']:,.0f}", *shares)
    console.print(table)
    if not any(row["name"] == PEER for row in figures["encode"]):
        console.print('Left out: sentence-transformers is not installed (pip install "sentence-transformers>=6.2,<7").')
    for lengths, shares in figures["padding"].items():
        parts = ", ".join(f"{part} {share:.1%}" for part, share in shares.items())
        console.print(f"share of padding in encode, {lengths} lengths: {parts}")

    table = Table("", box=box.SIMPLE)
    for column in ("queries/s with reuse", "without", "gain"):
        table.add_column(column, justify="right")
    for row in figures["queries"]:
        speeds = [f"{row['queries_per_s_with_reuse']:,.1f}", f"{row['queries_per_s_without']:,.1f}"]
        table.add_row(row["name"], *speeds, f"{row['gain']:.2f} x")
    console.print(table)
    mixed = next(row["share_of_reference"] for row in figures["encode"] if row["name"] == MIXED)
    console.print(f"mixed-length encode path: {mixed:.0%} of the uniform reference (target {TARGET:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens and queries per second of a Causal2Vec model.")
    parser.add_argument("--model", default="default", help="checkpoint: a folder, a hub id, or 'default'")
    parser.add_argument("--device", help="cpu, cuda, mps; chosen unless given")
    parser.add_argument("--dtype", help="bfloat16, float32, ...; chosen for the device unless given")
    parser.add_argument("--texts", type=int, help="texts in each set; 1024 unless given, 64 with --quick")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--quick", action="store_true", help="a trial of the script: few texts, one round")
    arguments = parser.parse_args()
    num_texts = arguments.texts or (64 if arguments.quick else 1024)
    rounds = 1 if arguments.quick else 5

    model = Causal2Vec.from_pretrained(arguments.model, device=arguments.device, dtype=arguments.dtype)
    encode, about = encode_rows(model, num_texts)
    queries = query_rows(model, 8 if arguments.quick else NUM_QUESTIONS)
    matmuls = matmul_rows(model, quick=arguments.quick)
    seconds = measure([*matmuls, *encode, *chain.from_iterable(queries)], rounds, model.device)

    medians = {name: median(times) for name, times in seconds.items()}
    peak = max(row.flop / medians[row.name] for row in matmuls)
    figures = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(model),
        "model": {"name": model.name, **model.sources},
        **about,
        "rounds": rounds,
        "matmul_peak_flop_per_s": peak,
        "encode": encode_figures(encode, medians, peak),
        "queries": query_figures(queries, medians),
        "seconds": seconds,
    }
    report(figures)
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
