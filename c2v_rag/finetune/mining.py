"""Mining of hard negatives: passages that a model ranks high for a query although they do not answer it."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from c2v_rag.finetune.data import read_pair_set
from c2v_rag.model import Causal2Vec
from sentence_transformers_c2v import Causal2VecModule


def mine(
    data: Path,
    output: Path,
    model: Causal2Vec,
    *,
    num_negatives: int = 4,
    range_min: int = 0,
    range_max: int = 50,
    relative_margin: float = 0.05,
    instruction: str | None = None,
) -> int:
    """Write the pairs of `data` with `negatives` to `output` (JSONL); returns how many pairs got them.

    `data` is one file as `read_pair_set` reads it; its positives are the corpus. Candidates are the passages at ranks
    `range_min` to `range_max`; one whose score is above (1 - `relative_margin`) x the positive's own is taken for an
    unmarked answer and left out. A pair with fewer than `num_negatives` left is written without any.

    Ranking and filtering: `sentence_transformers.util.mine_hard_negatives`.
    """
    if output.suffix != ".jsonl":
        raise ValueError(f"{output}: the output must end in .jsonl.")
    pairs = read_pair_set(data.parent, data.stem, instruction=instruction)
    prompt = model.config.prompt(pairs.instruction or model.config.instruction)
    columns = {"query": [pair.query for pair in pairs.pairs], "positive": [pair.positive for pair in pairs.pairs]}
    mined = mine_hard_negatives(
        Dataset.from_dict(columns),
        SentenceTransformer(modules=[Causal2VecModule(model)], device=str(model.device)),
        anchor_column_name="query",
        positive_column_name="positive",
        query_prompt=prompt,
        range_min=range_min,
        range_max=min(range_max, len(set(columns["positive"])) - 1),
        relative_margin=relative_margin,
        num_negatives=num_negatives,
        output_format="n-tuple",
        batch_size=64,
        verbose=False,
    )
    names = [name for name in mined.column_names if name.startswith("negative")]
    found = {
        (query, positive): list(negatives)
        for query, positive, *negatives in zip(*(mined[name] for name in ("query", "positive", *names)), strict=True)
    }
    aside = output.with_name(f".{output.name}.part")
    with aside.open("w", encoding="utf-8") as file:
        for pair in pairs.pairs:
            row: dict[str, object] = {"query": pair.query, "positive": pair.positive}
            if negatives := found.get((pair.query, pair.positive)):
                row["negatives"] = negatives
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    aside.replace(output)
    return len(found)
