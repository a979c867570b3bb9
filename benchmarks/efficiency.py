"""Sequence length, time and memory of Causal2Vec beside other ways to embed with the same decoder, at equal text.

    python benchmarks/efficiency.py [--decoder default|1b|7b] [--device D] [--dtype T] [--rounds R] [--output FILE.json]

    EOS                      causal, the last state (E5-Mistral)
    Echo                     the text twice, so that the second copy has read the first (arXiv 2402.15449)
    bidirectional            the same tokens with full attention, mean of the states (LLM2Vec, arXiv 2404.05961)
    in-context               a prefix of 395 tokens with worked examples before every text, computed anew for each, as
                             bge-en-icl's published code does (arXiv 2409.15700; 395: mean of its 56 task prefixes)
    in-context, reused       the same with the prefix's keys and values computed once
    Causal2Vec               encoder, Contextual token, instruction's keys and values computed once: what `encode` does
    Causal2Vec, not reused   the instruction computed anew for each text

The paper's first abstract says: sequences up to 85 % shorter, up to 82 % less time than the best-performing methods.

Two loads: 60 questions, and 60 passages of up to 256 tokens, all behind one instruction of 17 tokens but for the
in-context ones. Every way puts batches of the same number of padded tokens through the decoder, ready tokenised.
`1b` and `7b` are decoders of the shapes of Llama-3.2-1B and Mistral-7B with random weights, beside the default's
encoder: good for speed, not for quality. Seconds are medians over the rounds, every way once a round, behind a
warm-up round. Memory is what a pass adds to a loaded model: on CUDA the allocator's peak, else the process's, each way
in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from common import made, questions
from costs import with_both_states
from throughput import Row, cut_texts, decoder_tokens, measure, print_table, run_each
from torch import Tensor
from transformers import AutoModel, LlamaConfig, MistralConfig
from variants import Bidirectional

from c2v_rag import Causal2Vec, inference
from c2v_rag.sources import python_docs
from c2v_rag.tokenization import TokenBatch, TokenizedTexts

EXAMPLES_TOKENS = 395
NUM_TEXTS = 60
IN_CONTEXT, OURS = "in-context", "Causal2Vec"
SHAPES: dict[str, Callable[[], Any]] = {
    "1b": lambda: LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "7b": lambda: MistralConfig(),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Way:
    """`lengths`: tokens of each text that go through the decoder. `forward` embeds one batch of `batches`."""

    name: str
    lengths: list[int]
    batches: list[TokenBatch]
    forward: Callable[[TokenBatch], Tensor]

    def run(self) -> None:
        run_each(self.forward, self.batches)


def load(decoder: str, device: str | None, dtype: str | None) -> Causal2Vec:
    """The default model with both states, or its encoder and tokenizers with a random decoder of another shape."""
    model = with_both_states(Causal2Vec.from_pretrained("default", device=device, dtype=dtype))
    if decoder == "default":
        return model
    with torch.device(model.device):
        llm = AutoModel.from_config(SHAPES[decoder](), dtype=model.dtype)
    config = dataclasses.replace(model.config, num_llm_layers=None)
    return Causal2Vec(config, model.encoder, llm, model.tokenizer.encoder, model.tokenizer.llm).eval().to(model.device)


def ways(model: Causal2Vec, texts: Sequence[str]) -> list[Way]:
    """All of the above for these texts."""
    parts = model.encoder, model.llm, model.tokenizer.encoder, model.tokenizer.llm
    config = dataclasses.replace(model.config, contextual_token="none", pooling="eos")
    plain = Causal2Vec(config, *parts).eval()
    full_attention = Bidirectional(dataclasses.replace(config, pooling="mean"), *parts).eval()
    instruction = model.config.instruction
    examples = cut_texts(model, decoder_tokens(model), [EXAMPLES_TOKENS])[0]
    with_token, without = model.tokenize(texts, instruction), plain.tokenize(texts, instruction)
    twice = dataclasses.replace(without, text_ids=[ids[:-1] + ids for ids in without.text_ids])
    in_context = plain.tokenize(texts, examples)

    def without_reuse(owner: Causal2Vec, batch: TokenBatch) -> Tensor:
        return owner.embed(batch, reuse_prefix=False)

    def way(name: str, tokenized: TokenizedTexts, forward: Callable[[TokenBatch], Tensor], *, reused: bool) -> Way:
        token = int(name.startswith(OURS))
        prefix = 0 if reused else len(tokenized.prefix_ids)
        lengths = [prefix + token + len(ids) for ids in tokenized.text_ids]
        batches = inference.token_budget_batches(lengths, inference.default_batch_tokens(model.device))
        return Way(name, lengths, [tokenized.collate(rows).to(model.device) for rows in batches], forward)

    return [
        way("EOS", without, partial(without_reuse, plain), reused=False),
        way("Echo", twice, partial(without_reuse, plain), reused=False),
        way("bidirectional", without, partial(without_reuse, full_attention), reused=False),
        way(IN_CONTEXT, in_context, partial(without_reuse, plain), reused=False),
        way(f"{IN_CONTEXT}, reused", in_context, plain.embed, reused=True),
        way(OURS, with_token, model.embed, reused=True),
        way(f"{OURS}, not reused", with_token, partial(without_reuse, model), reused=False),
    ]


def loads(model: Causal2Vec) -> dict[str, list[str]]:
    passages = [document.text for document in python_docs()]
    fitting = [text for text, n in zip(passages, model.count_tokens(passages), strict=True) if 16 < n <= 256]
    return {
        "questions": [row["question"] for row in questions()[:NUM_TEXTS]],
        "passages": fitting[:: len(fitting) // NUM_TEXTS][:NUM_TEXTS],
    }


@torch.inference_mode()
def peak_mib(model: Causal2Vec, way: Way) -> float:
    """What one pass adds to the loaded model; on a CPU (Linux) only the first call in a process tells."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way.run()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that loading had
    before_kib = resident_peak_kib()
    way.run()
    return (resident_peak_kib() - before_kib) / 2**10


def resident_peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def peak_in_its_own_process(load_name: str, way_name: str) -> float:
    command = [sys.executable, *sys.argv, "--peak-of", load_name, way_name]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="What embedding costs, beside other methods.")
    parser.add_argument("--decoder", choices=["default", *SHAPES], default="default")
    parser.add_argument("--device", help="cpu or cuda; chosen unless given")
    parser.add_argument("--dtype", help="bfloat16, float32, ...; chosen for the device unless given")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, behind one that warms up")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--peak-of", nargs=2, metavar=("LOAD", "WAY"), help="print one way's memory, in MiB")
    arguments = parser.parse_args()

    model = load(arguments.decoder, arguments.device, arguments.dtype)
    every = {name: ways(model, texts) for name, texts in loads(model).items()}
    if arguments.peak_of:
        name, wanted = arguments.peak_of
        print(peak_mib(model, next(way for way in every[name] if way.name == wanted)))
        return

    figures: dict[str, Any] = {
        **made(model.device, model.dtype),
        "decoder": arguments.decoder,
        **({"model": Causal2Vec.from_pretrained("default").stamp} if arguments.decoder == "default" else {}),
        "rounds": arguments.rounds,
        "loads": {},
    }
    for name, compared in every.items():
        seconds = measure([Row(way.name, way.run, 0) for way in compared], arguments.rounds, model.device)
        ours = next(way for way in compared if way.name == OURS)
        our_time = median(seconds[OURS])
        rows = {}
        for way in compared:
            on_cuda = model.device.type == "cuda"
            peak = peak_mib(model, way) if on_cuda else peak_in_its_own_process(name, way.name)
            time = median(seconds[way.name])
            rows[way.name] = {
                "tokens_a_text": fmean(way.lengths),
                "tokens_per_s": sum(way.lengths) / time,
                "texts_per_s": len(way.lengths) / time,
                "peak_mib": peak,
                "ours_is_shorter_by": 1 - fmean(ours.lengths) / fmean(way.lengths),
                "ours_takes_less_time_by": 1 - our_time / time,
            }
        figures["loads"][name] = {"rows": rows, "seconds": seconds}
        print(f"{name}; {figures['machine']['dtype']} on {figures['machine']['device']}, decoder {arguments.decoder}")
        forms = {"tokens a text": "{:,.1f}", "tokens/s": "{:,.0f}", "texts/s": "{:,.1f}", "peak MiB": "{:,.0f}"}
        forms |= {f"{OURS}: shorter by": "{:+.0%}", "less time by": "{:+.0%}"}
        print_table(forms, {way: dict(zip(forms, row.values(), strict=True)) for way, row in rows.items()})
        shorter, faster = (rows[IN_CONTEXT][key] for key in ("ours_is_shorter_by", "ours_takes_less_time_by"))
        print(
            f"Paper: up to 85 % shorter, 82 % less time. Here, against {IN_CONTEXT}: {shorter:.0%} and {faster:.0%}.\n"
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
