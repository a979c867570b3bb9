"""How fast a Causal2Vec model embeds, beside its encoder alone, and beside what its parts and the machine could do.

    python benchmarks/throughput.py [--model M] [--device D] [--dtype T] [--texts N] [--rounds R] [--output FILE.json]
        [--quick] [--only costs|path]

First `costs.py`: the model, its encoder in sentence-transformers and its encoder in our own path, in passages/s,
queries/s, memory and disk. Then the path of a model with both states, whose decoder reads the text:

Two sets of N texts are cut from the standard library's docstrings: mixed lengths, log-uniform from 8 tokens to the
longest that the model reads, and uniform ones of the mixed texts' mean length. Tokens are the decoder's in every row,
the encoder's too, so that rows compare: text, EOS and Contextual token, no padding and no prefix.

    LLM, encoder             each alone, forwards of uniform batches
    LLM + encoder, added     the times of these two added up: `embed` without any overhead
    embed                    forwards of ready-made uniform batches without padding: the reference
    encode                   the path that users take, texts in, numpy out, on uniform and on mixed lengths
    sentence-transformers    the same modules in `SentenceTransformer.encode`, batches of 32 texts

The matmul peak is that of torch.nn.functional.linear in the model's dtype, at the best of a few shapes. For the share
of it, with T real tokens a text, D the width and W the weights in linear layers of the llm or of the encoder,

    FLOP = sum over texts of (2 * W * T + 4 * T * T * D * layers), for llm and encoder, + 2 * W of the projector

Padding thus lowers the share; attention is counted in full, though the llm's is causal.

Prefix reuse: real questions, tokenised beforehand, behind a short and a long instruction. With reuse the instruction's
keys and values are kept from call to call; without, its tokens stand in front of every text.

Every round runs each row once, one row after the other; printed are medians over the rounds behind a warm-up round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import costs
import torch
from common import made, questions
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from c2v_rag import Causal2Vec, inference
from c2v_rag.sources import python_docs
from c2v_rag.tokenization import TokenBatch

REFERENCE, MIXED, PEER = "embed, uniform", "encode, mixed", "sentence-transformers, mixed"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: what runs, the tokens (or queries) that it embeds, and the FLOP that these need."""

    name: str
    run: Callable[[], object]
    amount: int
    flop: float = 0.0


def run_each(forward: Callable[[Any], object], inputs: Sequence[Any]) -> None:
    for each in inputs:
        forward(each)


def decoder_tokens(model: Causal2Vec) -> Iterator[int]:
    """The passages of python-docs, shuffled in a fixed way, as one endless run of the decoder's tokens."""
    passages = [document.text for document in python_docs()]
    random.Random(0).shuffle(passages)
    for text in cycle(passages):
        yield from model.tokenizer.llm(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]


def cut_texts(model: Causal2Vec, tokens: Iterator[int], counts: Sequence[int]) -> list[str]:
    """Texts of so many tokens each; tokenised again, some differ by a few."""
    decode: Callable[..., Any] = model.tokenizer.llm.decode
    return [decode(list(islice(tokens, count)), clean_up_tokenization_spaces=False) for count in counts]


def lengths_of(model: Causal2Vec, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Real tokens of each text in the decoder and in the encoder."""
    tokenized = model.tokenize(texts)
    return [1 + len(ids) for ids in tokenized.text_ids], [len(ids) for ids in tokenized.encoder_ids]


def uniform_batches(model: Causal2Vec, texts: Sequence[str], width: int, encoder_width: int) -> list[TokenBatch]:
    """Batches in which every text takes `width` decoder and `encoder_width` encoder tokens; texts must be longer."""
    tokenized = model.tokenize(texts)
    tokenized = dataclasses.replace(
        tokenized,
        text_ids=[[*ids[: width - 2], model.tokenizer.eos] for ids in tokenized.text_ids],
        encoder_ids=[ids[: encoder_width - 1] + ids[-1:] for ids in tokenized.encoder_ids],
    )
    batches = inference.token_budget_batches(tokenized.lengths, inference.default_batch_tokens(model.device))
    return [tokenized.collate(positions).to(model.device) for positions in batches]


def padding_shares(model: Causal2Vec, texts: Sequence[str]) -> dict[str, float]:
    """Share of padding in what `encode` puts through the decoder and, in slices of a batch, through the encoder."""
    budget = inference.default_batch_tokens(model.device)
    real, padded = {"decoder": 0, "encoder": 0}, {"decoder": 0, "encoder": 0}
    for window in inference.text_windows(texts, inference.window_texts(budget)):
        tokenized = model.tokenize(window)
        for positions in inference.token_budget_batches(tokenized.lengths, budget):
            batch = tokenized.collate(positions)
            real["decoder"] += int(batch.text_mask.sum())
            padded["decoder"] += batch.text_mask.numel()
            real["encoder"] += int(batch.encoder_mask.sum())
            padded["encoder"] += sum((end - first) * width for first, end, width, _ in batch.encoder_slices or ())
    return {part: 1 - real[part] / padded[part] for part in real}


def linear_weights(module: nn.Module) -> int:
    """Without LoRA's, which are merged, and BERT's pooler, whose output is not used."""
    return sum(
        layer.weight.numel()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name and not name.startswith("pooler.")
    )


def part_flop(part: Any, lengths: Sequence[int]) -> int:
    """FLOP of the llm or the encoder, as at the top of this file."""
    config = part.config.get_text_config()
    per_square: int = 4 * config.hidden_size * config.num_hidden_layers
    return 2 * linear_weights(part) * sum(lengths) + per_square * sum(length * length for length in lengths)


def flop(model: Causal2Vec, lengths: Sequence[int], encoder_lengths: Sequence[int]) -> int:
    projector = 2 * linear_weights(model.projector) * len(lengths)
    return part_flop(model.llm, lengths) + part_flop(model.encoder, encoder_lengths) + projector


def encode_rows(model: Causal2Vec, num_texts: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows in tokens, the LLM's and the encoder's first, and what their texts are like."""
    tokens, draw = decoder_tokens(model), random.Random(1)
    shortest, longest = math.log(8), math.log(model.max_tokens - 1)
    mixed = cut_texts(model, tokens, [round(math.exp(draw.uniform(shortest, longest))) for _ in range(num_texts)])
    mixed_lengths = lengths_of(model, mixed)
    width, encoder_width = (round(fmean(lengths)) for lengths in mixed_lengths)
    uniform = cut_texts(model, tokens, [width - 2] * num_texts)
    # Twice as long as needed, and cut as tokens: however the two tokenizers differ, both sides are full.
    batches = uniform_batches(model, cut_texts(model, tokens, [2 * width] * num_texts), width, encoder_width)

    shape = (max(len(batch.text_ids) for batch in batches), width, model.llm.config.get_text_config().hidden_size)
    embeds = torch.randn(shape).to(model.device, model.dtype)

    def llm(batch: TokenBatch) -> object:
        return model.llm(inputs_embeds=embeds[: len(batch.text_ids)], use_cache=False)

    total, widths, encoder_widths = width * num_texts, [width] * num_texts, [encoder_width] * num_texts
    llm_flop, encoder_flop = part_flop(model.llm, widths), part_flop(model.encoder, encoder_widths)
    rows = [
        Row("LLM alone", partial(run_each, llm, batches), total, llm_flop),
        Row("encoder alone", partial(run_each, model.pooled_encoder_states, batches), total, encoder_flop),
        Row(REFERENCE, partial(run_each, model.embed, batches), total, flop(model, widths, encoder_widths)),
    ]
    encode = partial(model.encode, on_truncate="ignore")
    paths: list[tuple[str, Callable[..., object] | None, list[str]]] = [
        ("encode, uniform", encode, uniform),
        (MIXED, encode, mixed),
        (PEER, in_sentence_transformers(model), mixed),
    ]
    for name, path, texts in paths:
        if path is None:
            continue
        lengths, encoder_lengths = lengths_of(model, texts)
        rows.append(Row(name, partial(path, texts), sum(lengths), flop(model, lengths, encoder_lengths)))
    about = {
        "texts": num_texts,
        "uniform_tokens": {"decoder": width, "encoder": encoder_width},
        "mixed_tokens": {"shortest": min(mixed_lengths[0]), "longest": max(mixed_lengths[0])},
        "batch_tokens": inference.default_batch_tokens(model.device),
        "padding": {"uniform": padding_shares(model, uniform), "mixed": padding_shares(model, mixed)},
    }
    return rows, about


def in_sentence_transformers(model: Causal2Vec) -> Callable[..., object] | None:
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

        def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
            return {"batch": model.tokenize(inputs).collate(range(len(inputs)))}

        def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            return {"sentence_embedding": model.embed(features["batch"].to(model.device))}

        def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError("This module only measures.")

    peer = SentenceTransformer(modules=[Embedder()], device=str(model.device))
    return partial(peer.encode, batch_size=32, show_progress_bar=False)


def query_rows(model: Causal2Vec, num_questions: int) -> list[tuple[Row, Row]]:
    """With and without reuse of the prefix: a short and a long instruction, one at a time and as one batch."""
    texts = [row["question"] for row in questions()[:num_questions]]
    short = model.config.instruction
    long = f"{short}\n{cut_texts(model, decoder_tokens(model), [400])[0]}"

    without_reuse = partial(model.embed, reuse_prefix=False)
    pairs = []
    for instruction in (short, long):
        tokenized = model.tokenize(texts, instruction)
        singles = [tokenized.collate([i]).to(model.device) for i in range(len(texts))]
        together = [tokenized.collate(range(len(texts))).to(model.device)]
        for how, batches in (("one at a time", singles), (f"{len(texts)} at once", together)):
            name = f"prefix of {len(tokenized.prefix_ids)} tokens, {how}"
            with_reuse = Row(name, partial(run_each, model.embed, batches), len(texts))
            pairs.append((with_reuse, Row(f"{name}, no reuse", partial(run_each, without_reuse, batches), len(texts))))
    return pairs


def matmul_rows(model: Causal2Vec, squares: Sequence[int]) -> list[Row]:
    """Multiplications of the llm's own shapes and of squares."""
    tokens, width = inference.default_batch_tokens(model.device), model.llm.config.get_text_config().hidden_size
    shapes = [(tokens, width, width), (tokens, width, 4 * width), (tokens, 4 * width, width)]
    rows = []
    for height, inner, outer in [*shapes, *((side, side, side) for side in squares)]:
        work = 2 * height * inner * outer
        repeats = math.ceil((2e13 if model.device.type == "cuda" else 2e11) / work)
        left, right = (torch.randn((n, inner)).to(model.device, model.dtype) for n in (height, outer))
        run = partial(run_each, partial(nn.functional.linear, left), [right] * repeats)
        rows.append(Row(f"matmul {height} x {inner} x {outer}", run, 0, work * repeats))
    return rows


@torch.inference_mode()
def measure(rows: Sequence[Row], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every row in every round but the first, which warms up."""
    synchronize = torch.get_device_module(device).synchronize
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for counts, row in costs.in_rounds(rows, rounds, device):
        start = perf_counter()
        row.run()
        synchronize()
        if counts:
            seconds[row.name].append(perf_counter() - start)
    return seconds


def encode_figures(rows: Sequence[Row], medians: dict[str, float], peak: float) -> dict[str, dict[str, float]]:
    measured = [(row.name, row.amount, row.flop, medians[row.name]) for row in rows]
    (_, tokens, llm_flop, llm_seconds), (_, _, encoder_flop, encoder_seconds) = measured[:2]
    measured.insert(2, ("LLM + encoder, added", tokens, llm_flop + encoder_flop, llm_seconds + encoder_seconds))
    reference = tokens / medians[REFERENCE]
    return {
        name: {
            "tokens_per_s": tokens / seconds,
            "of_reference": tokens / seconds / reference,
            "of_matmul_peak": flop / seconds / peak,
        }
        for name, tokens, flop, seconds in measured
    }


def query_figures(pairs: Sequence[tuple[Row, Row]], medians: dict[str, float]) -> dict[str, dict[str, float]]:
    return {
        reuse.name: {
            "per_s_with_reuse": reuse.amount / medians[reuse.name],
            "per_s_without": whole.amount / medians[whole.name],
            "gain": medians[whole.name] / medians[reuse.name],
        }
        for reuse, whole in pairs
    }


def path_figures(model: Causal2Vec, num_texts: int, rounds: int, *, quick: bool) -> dict[str, Any]:
    """The figures of the path: what `encode` reaches of its parts and of the machine."""
    encode, about = encode_rows(model, num_texts)
    queries = query_rows(model, 4 if quick else 64)
    matmuls = matmul_rows(model, [1024] if quick else [2048, 4096])
    seconds = measure([*matmuls, *encode, *chain.from_iterable(queries)], rounds, model.device)
    medians = {name: median(times) for name, times in seconds.items()}
    peak = max(row.flop / medians[row.name] for row in matmuls)
    return {
        **about,
        "matmul_peak_flop_per_s": peak,
        "encode": encode_figures(encode, medians, peak),
        "queries": query_figures(queries, medians),
        "seconds": seconds,
    }


def report_costs(figures: dict[str, Any]) -> None:
    where, found = figures["machine"], figures["costs"]
    print(f"{figures['model']['name']}: {where['dtype']} on {where['device']}; {where['cpu']}, {where['cores']} cores")
    print(f"{found['passages']} passages, {found['queries']} queries one at a time; rounds: {found['rounds']}")
    rows = {name: costs_row(row) for name, row in found["rows"].items()}
    print_table(dict.fromkeys(next(iter(rows.values())), "{}"), rows)


def costs_row(row: dict[str, Any]) -> dict[str, str]:
    rates = {
        heading: "{median:,.1f} [{low:,.1f}, {high:,.1f}]".format(**row[key])
        for heading, key in (("passages/s", "passages_per_s"), ("queries/s", "queries_per_s"))
    }
    times = {"p50": f"{row['query_p50_ms']:.1f} ms", "p99": f"{row['query_p99_ms']:.1f} ms"}
    memory = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else "-"
    return rates | times | {"peak MiB": memory, "disk MiB": f"{row['disk_mib']:,.0f}"}


def report(figures: dict[str, Any]) -> None:
    where, widths, lengths = figures["machine"], figures["uniform_tokens"], figures["mixed_tokens"]
    print(f"{figures['model']['name']}: {where['dtype']} on {where['device']}; {where['cpu']}, {where['cores']} cores")
    print(f"{figures['texts']} texts, mixed: {lengths['shortest']} to {lengths['longest']} tokens;", end=" ")
    print(f"uniform: {widths['decoder']} (encoder: {widths['encoder']}); rounds: {figures['rounds']}")
    print(f"matmul peak: {figures['matmul_peak_flop_per_s'] / 1e9:,.0f} GFLOP/s")
    columns = {"tokens/s": "{:,.0f}", "of the reference": "{:.0%}", "of the matmul peak": "{:.0%}"}
    print_table(columns, figures["encode"])
    if PEER not in figures["encode"]:
        print('Left out: sentence-transformers is not installed (pip install "sentence-transformers>=6.2,<7").')
    for name, shares in figures["padding"].items():
        print(f"padding in encode, {name}: decoder {shares['decoder']:.1%}, encoder {shares['encoder']:.1%}")
    print_table({"queries/s with reuse": "{:,.1f}", "without": "{:,.1f}", "gain": "{:.2f} x"}, figures["queries"])
    reached = figures["encode"][MIXED]["of_reference"]
    print(f"mixed-length encode path: {100 * reached:.0f} % of the uniform reference (target 85 %)")


def print_table(columns: dict[str, str], rows: Mapping[str, Mapping[str, float | str]]) -> None:
    """`columns`: heading -> how its numbers are written."""
    table = Table("", box=box.SIMPLE)
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, values in rows.items():
        cells = zip(columns.values(), values.values(), strict=True)
        table.add_row(name, *(form.format(value) for form, value in cells))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens and queries per second of a Causal2Vec model.")
    parser.add_argument("--model", default="default", help="checkpoint: a folder, a hub id, or 'default'")
    parser.add_argument("--device", help="cpu, cuda, mps; chosen unless given")
    parser.add_argument("--dtype", help="bfloat16, float32, ...; chosen for the device unless given")
    parser.add_argument("--texts", type=int, help="texts in each set; 1024 unless given, 16 with --quick")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, behind one that warms up")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--quick", action="store_true", help="a trial of the script: few texts, one round")
    parser.add_argument("--only", choices=["costs", "path"], help="one of the two parts; both unless given")
    parser.add_argument("--passages", type=int, default=300, help="passages of the first part")
    arguments = parser.parse_args()
    quick = arguments.quick
    rounds = 1 if quick else arguments.rounds

    model = Causal2Vec.from_pretrained(arguments.model, device=arguments.device, dtype=arguments.dtype)
    figures: dict[str, Any] = {
        **made(model.device, model.dtype),
        "model": model.stamp,
        "rounds": rounds,
    }
    if arguments.only != "path":
        queries = [row["question"] for row in questions()[: 4 if quick else 64]]
        num_passages = 8 if quick else arguments.passages
        figures["costs"] = costs.compare(
            model, queries, num_passages=num_passages, rounds=rounds, with_memory=not quick
        )
        report_costs(figures)
    if arguments.only != "costs":
        figures |= path_figures(
            costs.with_both_states(model), arguments.texts or (16 if quick else 1024), rounds, quick=quick
        )
        report(figures)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
