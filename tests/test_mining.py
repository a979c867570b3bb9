"""Hard negatives: found in a corpus of passages too, by vectors and by words, with a teacher's scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from c2v_rag import Causal2Vec, Document
from c2v_rag.cli import app
from c2v_rag.finetune.mining import corpus_of, mine
from c2v_rag.index import Chunk, LexicalIndex, VectorIndex
from c2v_rag.index.searching import LEXICAL_WEIGHT
from tests.tiny import passages, tiny_model

TEXTS = passages(60)
# The model ignores case, so that the positive has the query's vector, and no other passage ranks above it.
PAIRS = [{"query": text.upper(), "positive": text, "document": f"d{i}"} for i, text in enumerate(TEXTS[:12])]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that ignores upper and lower case: its pooling uses only the uncased encoder's input."""
    path: Path = tmp_path_factory.mktemp("case") / "tiny"
    tiny_model(pooling="context", instruction="").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Causal2Vec:
    return Causal2Vec.from_pretrained(checkpoint, dtype="float32", device="cpu")


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chunk(text: str, embedding: np.ndarray | None = None) -> Chunk:
    return Chunk(text, text, {}, embedding)


def test_a_larger_corpus_is_searched_and_scores_are_kept(model: Causal2Vec, pairs_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "mined.jsonl"
    options: dict[str, Any] = {"num_negatives": 40, "relative_margin": -0.1, "range_max": 60}
    found = mine(pairs_file, output, model, corpus=map(chunk, TEXTS[12:]), **options)
    mined = read(output)
    assert [{name: row[name] for name in PAIRS[0]} for row in mined] == PAIRS
    assert found == 12
    vectors = model.encode_document(TEXTS)
    for row in mined:
        scores = dict(zip(TEXTS, (vectors @ model.encode_query([row["query"]])[0]).tolist(), strict=True))
        others = sorted((score for text, score in scores.items() if text != row["positive"]), reverse=True)
        assert row["positive_score"] == pytest.approx(1, abs=1e-4)
        assert row["negative_scores"] == pytest.approx([scores[text] for text in row["negatives"]], abs=1e-4)
        assert row["negative_scores"] == pytest.approx(others[:40], abs=1e-4)
        assert sum(text in TEXTS[12:] for text in row["negatives"]) >= 29, "there are only 11 other positives"


def test_the_output_keeps_the_instruction_and_its_folder_must_exist(
    model: Causal2Vec, pairs_file: Path, tmp_path: Path
) -> None:
    pairs_file.with_suffix(".json").write_text('{"instruction": "Find the answer", "licence": "CC0"}')
    output = tmp_path / "mined.jsonl"
    output.with_suffix(".json").write_text('{"licence": "CC0"}')
    mine(pairs_file, output, model)
    assert json.loads(output.with_suffix(".json").read_text()) == {"instruction": "Find the answer", "licence": "CC0"}
    pairs_file.with_suffix(".json").unlink()
    mine(pairs_file, tmp_path / "without.jsonl", model)
    assert not (tmp_path / "without.json").exists()
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        mine(pairs_file, tmp_path / "nowhere" / "mined.jsonl", model)


def test_embeddings_of_the_corpus_are_used_and_near_duplicates_of_the_positive_left_out(
    model: Causal2Vec, pairs_file: Path, tmp_path: Path
) -> None:
    same = model.encode_query([str(PAIRS[0]["query"])])[0]
    options: dict[str, Any] = {"num_negatives": 1, "relative_margin": -1.0, "corpus": [chunk("x", same)]}
    mine(pairs_file, tmp_path / "all.jsonl", model, **options)
    assert read(tmp_path / "all.jsonl")[0]["negatives"] == ["x"], "it has the vector that was given"
    mine(pairs_file, tmp_path / "far.jsonl", model, max_similarity=0.9999, **options)
    assert read(tmp_path / "far.jsonl")[0]["negatives"] != ["x"]


def test_bm25_adds_candidates_that_vectors_rank_low(model: Causal2Vec, tmp_path: Path) -> None:
    query, positive = "zebra crossing", "A letter from the harbour, read twice."
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": query, "positive": positive}))
    zebra = chunk("The zebra has a crossing of its own.", -model.encode_query([query])[0])  # the last one by its vector
    options: dict[str, Any] = {"relative_margin": -10.0, "range_max": 20, "corpus": [*map(chunk, TEXTS), zebra]}
    for bm25, number in ((False, 20), (True, 21)):
        mine(tmp_path / "pairs.jsonl", tmp_path / "out.jsonl", model, bm25=bm25, num_negatives=number, **options)
        assert (zebra.text in read(tmp_path / "out.jsonl")[0]["negatives"]) == bm25


def test_the_hybrid_teacher_scores_as_a_hybrid_search_does(model: Causal2Vec, pairs_file: Path, tmp_path: Path) -> None:
    mine(pairs_file, tmp_path / "out.jsonl", model, num_negatives=2, relative_margin=0.0, teacher="hybrid", bm25=True)
    texts = TEXTS[:12]
    vectors, lexical = model.encode_document(texts), LexicalIndex.build([str(i) for i in range(12)], texts)
    rows = read(tmp_path / "out.jsonl")
    for row in rows:
        cosines = vectors @ model.encode_query([row["query"]])[0]
        words = lexical.scores(row["query"]) / lexical.max_score(row["query"])
        scores = (cosines - cosines.mean()) / cosines.std() + LEXICAL_WEIGHT * words**2
        by_text = dict(zip(texts, scores.tolist(), strict=True))
        assert row["positive_score"] == pytest.approx(by_text[row["positive"]], abs=1e-3)
        assert row["negative_scores"] == pytest.approx([by_text[text] for text in row["negatives"]], abs=1e-3)
        assert max(row["negative_scores"]) <= row["positive_score"]


def test_another_model_can_be_the_teacher(model: Causal2Vec, pairs_file: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model.encoder.save_pretrained(tmp_path / "teacher")
    model.tokenizer.encoder.save_pretrained(tmp_path / "teacher")
    teacher = SentenceTransformer(str(tmp_path / "teacher"), device="cpu")
    options: dict[str, Any] = {"num_negatives": 1, "relative_margin": -10.0, "teacher": str(tmp_path / "teacher")}
    mine(pairs_file, tmp_path / "out.jsonl", model, **options)
    for row in read(tmp_path / "out.jsonl"):
        texts = [row["query"], row["positive"], *row["negatives"]]
        query, *documents = teacher.encode(texts, normalize_embeddings=True)
        expected = [float(query @ document) for document in documents]
        assert [row["positive_score"], *row["negative_scores"]] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_the_mine_command_searches_a_folder_and_an_index(
    checkpoint: Path, model: Causal2Vec, pairs_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "docs").mkdir()
    for number, text in enumerate(TEXTS[12:30]):
        (tmp_path / "docs" / f"{number}.txt").write_text(text)
    in_folder = {one.text for one in corpus_of([tmp_path / "docs"], model)}
    assert len(in_folder) >= 18
    assert all(any(piece in text for text in TEXTS[12:30]) for piece in in_folder)
    index = VectorIndex(str(tmp_path / "store"), model)
    index.add(Document(text, f"s{i}") for i, text in enumerate(TEXTS[30:]))
    in_index = {one.text for one in index.chunks()}
    number = 12 + max(len(in_folder), len(in_index))  # more than there are without either of them
    arguments = ["mine", str(pairs_file), "-o", str(tmp_path / "out.jsonl"), "--model", str(checkpoint), "--bm25"]
    arguments += [
        "--corpus",
        str(tmp_path / "docs"),
        "--store",
        str(tmp_path / "store"),
        "--num-negatives",
        str(number),
    ]
    arguments += ["--relative-margin", "0", "--range-max", "200", "--teacher", "hybrid", "--dtype", "float32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    used = {text for row in read(tmp_path / "out.jsonl") for text in row.get("negatives", [])}
    assert used & in_folder
    assert used & in_index
    missing = CliRunner().invoke(app, [*arguments[:-2], "--collection", "nothing"])
    assert isinstance(missing.exception, FileNotFoundError)
