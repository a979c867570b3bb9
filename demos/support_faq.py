"""Fine-tune the default model on the questions of a support FAQ, and show what it finds before and after.

Needs c2v-rag[gguf,train]. The FAQ is a .jsonl file with an answer and its questions on each line. The last question of
each line is not trained on: it measures the gain.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from c2v_rag import Causal2Vec
from c2v_rag.finetune.recipe import BaseModels, Recipe
from c2v_rag.finetune.run import train

FAQ = Path(__file__).parent / "data" / "bike_faq.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faq", type=Path, default=FAQ)
    parser.add_argument("--model", default="default")
    parser.add_argument("--output", type=Path, default=Path("faq-model"), help="folder of the new model")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    if arguments.output.exists():
        parser.error(f"{arguments.output} exists: delete it with {arguments.output}.training, or name another --output")
    with arguments.faq.open(encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    answers = [entry["answer"] for entry in entries]
    held_out = [entry["questions"][-1] for entry in entries]
    pairs = [(question, entry["answer"]) for entry in entries for question in entry["questions"][:-1]]

    recipe = Recipe.load(Path("adapt"))  # changes little at a time; docs/finetuning.md describes the settings
    stage = recipe.stages[0].model_copy(update={"steps": arguments.steps, "num_negatives": 0})
    base = BaseModels(checkpoint=arguments.model)
    # dev: none, because a FAQ is too small to hold out whole answers. --steps is then the only limit.
    recipe = recipe.model_copy(update={"base": base, "stages": [stage], "dev": "none"})

    before = places(Causal2Vec.from_pretrained(arguments.model), held_out, answers)
    with tempfile.TemporaryDirectory() as data:
        rows = (json.dumps({"query": question, "positive": answer}) for question, answer in pairs)
        Path(data, "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
        model = train(recipe, Path(data), arguments.output)
    after = places(model, held_out, answers)

    print(f"Of {len(held_out)} new questions, the right answer is first for")
    print(f"  {np.sum(before == 1)} before and {np.sum(after == 1)} after training on {len(pairs)} pairs.")
    print(f"{np.sum(after < before)} answers rank higher than before, {np.sum(after > before)} lower.")
    for row in np.argsort(after - before)[[0, 1, -1]]:
        print(f"{held_out[row]}\n  place {before[row]} -> {after[row]}: {answers[row]}")
    print(f"The model is in {arguments.output}: c2v-rag index FOLDER --model {arguments.output} --store STORE")


def places(model: Causal2Vec, questions: list[str], answers: list[str]) -> np.ndarray:
    """(number of questions,) the place of each question's own answer among all answers; 1 is the first."""
    scores = model.encode_query(questions) @ model.encode_document(answers).T
    return 1 + (scores > scores.diagonal()[:, None]).sum(axis=1)


if __name__ == "__main__":
    main()
