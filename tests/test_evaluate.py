"""Scores equal mteb's and their definitions, in every format; baselines are scored too, with intervals."""

from __future__ import annotations

import json
from pathlib import Path

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import Stemmer
from scipy.stats import spearmanr
from typer.testing import CliRunner

from c2v_rag import Causal2Vec
from c2v_rag.cli import app
from c2v_rag.encoder import EncoderEmbedder
from c2v_rag.evaluate.metrics import mrr_at_k, ndcg_at_k, recall_at_k, top_k
from c2v_rag.evaluate.run import evaluate, rows_of
from c2v_rag.evaluate.tasks import mteb_task, read_task
from c2v_rag.fusion import reciprocal_rank_fusion
from tests.tiny import passages, tiny_model

DOCUMENTS = passages(40)
CORPUS = [{"_id": f"d{i}", "title": "t" * (i % 2), "text": text} for i, text in enumerate(DOCUMENTS)]
QUERIES = [{"_id": f"q{i}", "text": text[8:60]} for i, text in enumerate(DOCUMENTS[:12])]
QRELS = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 2} for i in range(10)]
QRELS += [{"query-id": "q0", "corpus-id": "d20", "score": 1}, {"query-id": "q1", "corpus-id": "d21", "score": 0}]
PAIRS = [{"sentence1": DOCUMENTS[i], "sentence2": DOCUMENTS[i + 10], "score": (7 * i % 11) / 2} for i in range(20)]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    for name, suffix, qrels in (("Docs", ".parquet", "qrels.parquet"), ("Beir", ".jsonl", "qrels/test.tsv")):
        write(root / name / f"corpus{suffix}", CORPUS)
        write(root / name / f"queries{suffix}", QUERIES)
        write(root / name / qrels, QRELS)
    write(root / "Pairs" / "pairs.parquet", PAIRS)
    return root


@pytest.fixture(scope="module")
def model() -> Causal2Vec:
    return tiny_model(max_length=200)


def test_the_hybrid_is_the_fusion_of_both_rankings(folders: Path, model: Causal2Vec) -> None:
    task = read_task(folders / "Docs")
    result = evaluate(model, [task, read_task(folders / "Pairs")], ["bm25", "hybrid"])
    scores = {name: found["ndcg_at_10"] for name, found in result["tasks"]["Docs"]["scores"].items()}
    assert "hybrid" not in result["tasks"]["Pairs"]["scores"]

    texts = [f"{row['title']} {row['text']}".strip() for row in CORPUS]
    dense = model.encode_document(texts) @ model.encode_query([str(row["text"]) for row in QUERIES]).T
    bm25 = bm25s.BM25()
    stem = Stemmer.Stemmer("english")
    bm25.index(bm25s.tokenize(texts, stopwords="en", stemmer=stem, show_progress=False), show_progress=False)
    ndcg = []
    for number, row in enumerate(QUERIES[:10]):
        words = bm25s.tokenize(str(row["text"]), stopwords="en", stemmer=stem, show_progress=False)
        (found,), (weights,) = bm25.retrieve(words, k=len(texts), show_progress=False)
        sparse = [f"d{i}" for i, weight in zip(found, weights, strict=True) if weight > 0]
        fused = reciprocal_rank_fusion([[f"d{i}" for i in np.argsort(-dense[:, number])], sparse])
        gains = {str(one["corpus-id"]): int(str(one["score"])) for one in QRELS if one["query-id"] == row["_id"]}
        ndcg.append(ndcg_at_k(list(fused), gains, 10))
    assert scores["hybrid"] == pytest.approx(np.mean(ndcg), abs=0.02)


def test_scores_equal_their_definitions_in_either_format(folders: Path, model: Causal2Vec) -> None:
    result = evaluate(model, [read_task(folders / name) for name in ("Docs", "Beir", "Pairs")])
    scores = result["tasks"]["Docs"]["scores"]["model"]
    assert result["tasks"]["Beir"]["scores"]["model"] == pytest.approx(scores)
    assert result["tasks"]["Beir"]["data"] != result["tasks"]["Docs"]["data"]
    assert result["tasks"]["Docs"]["items"] == 10, "q10 and q11 have no relevant document"

    texts = [f"{row['title']} {row['text']}".strip() for row in CORPUS]
    queries = model.encode_query([str(row["text"]) for row in QUERIES[:10]])
    ranked = top_k(queries, model.encode_document(texts), [str(row["_id"]) for row in CORPUS], 40)
    gains = [{f"d{i}": 2.0} | ({"d20": 1.0} if i == 0 else {}) for i in range(10)]
    by_hand = {
        "ndcg_at_10": np.mean([ndcg_at_k(ids, gain, 10) for ids, gain in zip(ranked, gains, strict=True)]),
        "recall_at_10": np.mean([recall_at_k(ids, gain, 10) for ids, gain in zip(ranked, gains, strict=True)]),
        "mrr_at_10": np.mean([mrr_at_k(ids, gain, 10) for ids, gain in zip(ranked, gains, strict=True)]),
        "recall_at_100": 1.0,
    }
    for name, value in by_hand.items():
        assert scores[name] == pytest.approx(value, abs=1e-4), name

    cosines = (
        model.encode([str(row["sentence1"]) for row in PAIRS]) * model.encode([str(row["sentence2"]) for row in PAIRS])
    ).sum(axis=1)
    expected = spearmanr(cosines, [row["score"] for row in PAIRS]).statistic
    assert result["tasks"]["Pairs"]["scores"]["model"]["cosine_spearman"] == pytest.approx(expected, abs=1e-5)


def test_baselines_are_reported_with_an_interval(folders: Path, model: Causal2Vec, tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tasks = [read_task(folders / name) for name in ("Docs", "Pairs")]
    result = evaluate(model, tasks, ["encoder", "contextual", "eos", "bm25", str(tmp_path / "other")])
    docs, pairs = result["tasks"]["Docs"], result["tasks"]["Pairs"]
    assert [*docs["scores"]] == ["model", "encoder", "contextual", "eos", "bm25", "other"]
    assert [*pairs["scores"]] == ["model", "encoder", "contextual", "eos", "other"]
    assert docs["scores"]["bm25"]["ndcg_at_10"] > 0.5, "the queries are pieces of the passages"
    assert {name: one["dimension"] for name, one in result["systems"].items()} == {
        "model": 64, "encoder": 24, "contextual": 32, "eos": 32, "other": 64,
    }  # fmt: skip
    assert result["systems"]["model"]["tokens_per_second"] > 0

    sentences = [[str(row[key]) for row in PAIRS] for key in ("sentence1", "sentence2")]
    alone = [EncoderEmbedder(model).encode_document(texts) for texts in sentences]
    expected = spearmanr((alone[0] * alone[1]).sum(axis=1), [row["score"] for row in PAIRS]).statistic
    assert pairs["scores"]["encoder"]["cosine_spearman"] == pytest.approx(expected, abs=1e-4)
    both = [model.encode(texts)[:, 1::2] for texts in sentences]
    cosines = [(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*both, strict=True)]
    expected = spearmanr(cosines, [row["score"] for row in PAIRS]).statistic
    assert pairs["scores"]["eos"]["cosine_spearman"] == pytest.approx(expected, abs=1e-4)

    for task in (docs, pairs):
        for name, lead in task["lead"].items():
            difference = task["scores"]["model"][task["metric"]] - task["scores"][name][task["metric"]]
            assert lead["difference"] == pytest.approx(difference, abs=1e-4)
            assert lead["low"] <= lead["difference"] <= lead["high"]
    assert docs["lead"]["bm25"]["low"] < docs["lead"]["bm25"]["high"]
    header, *rows = rows_of(result)
    assert header[:3] == ["task", "metric", "model"]
    assert len(rows) == 6
    other = Causal2Vec.from_pretrained(tmp_path / "other", dtype=model.dtype)
    cosines = (other.encode(sentences[0]) * other.encode(sentences[1])).sum(axis=1)
    expected = spearmanr(cosines, [row["score"] for row in PAIRS]).statistic
    assert pairs["scores"]["other"]["cosine_spearman"] == pytest.approx(expected, abs=1e-4)
    assert next(row for row in rows if row[0] == "Pairs")[header.index("bm25")] == "-"


def test_the_encoder_alone_scores_the_same_through_sentence_transformers(folders: Path, tmp_path: Path) -> None:
    model = tiny_model(encoder_max_length=256)
    model.encoder.save_pretrained(tmp_path / "st")
    model.tokenizer.encoder.save_pretrained(tmp_path / "st")
    encoder = EncoderEmbedder(model)
    # sentence-transformers opens the encoder's folder; it adds mean pooling to a plain BERT folder.
    result = evaluate(model, [read_task(folders / "Docs")], ["encoder", str(tmp_path / "st")])
    scores = result["tasks"]["Docs"]["scores"]
    assert scores["st"]["ndcg_at_10"] == pytest.approx(scores["encoder"]["ndcg_at_10"], abs=0.02)
    assert encoder.embedding_dim == result["systems"]["st"]["dimension"]


def test_the_command_prints_a_table_and_writes_model_command_and_versions(folders: Path, tmp_path: Path) -> None:
    tiny_model(max_length=200).save_pretrained(tmp_path / "model")
    output = tmp_path / "result.json"
    arguments = [
        str(folders / "Docs"),
        str(folders / "Pairs"),
        "--model",
        str(tmp_path / "model"),
        "--dtype",
        "float32",
    ]
    done = CliRunner().invoke(app, ["evaluate", *arguments, "--baseline", "bm25", "--output", str(output)])
    assert done.exit_code == 0, done.output
    for word in ("Docs", "Pairs", "ndcg_at_10", "cosine_spearman", "lead over bm25", "tokens/s"):
        assert word in done.output
    written = json.loads(output.read_text())
    assert written["model"]["weights"] == Causal2Vec.from_pretrained(tmp_path / "model").stamp["weights"]
    assert written["command"].split()[0] == "c2v-rag"
    assert written["versions"].keys() == {"c2v-rag", "mteb", "torch", "transformers"}


def test_systems_of_one_name_stay_apart_and_sets_of_one_name_are_refused(
    folders: Path, model: Causal2Vec, tmp_path: Path
) -> None:
    paths = [str(tmp_path / run / "model") for run in "ab"]
    for seed, path in enumerate(paths):
        tiny_model(seed=seed).save_pretrained(path)
    result = evaluate(model, [read_task(folders / "Pairs")], [*paths, paths[0]])
    assert [*result["tasks"]["Pairs"]["scores"]] == ["model", *paths] == [*result["systems"]]
    assert len({one["weights"] for one in result["systems"].values()}) == 3
    with pytest.raises(ValueError, match="Two sets have the same name: Pairs"):
        evaluate(model, [read_task(folders / "Pairs")] * 2)


def test_a_lead_leaves_out_what_mteb_leaves_out(folders: Path, model: Causal2Vec, tmp_path: Path) -> None:
    """Hits that have the query's own id, in tasks such as ArguAna."""
    write(tmp_path / "Same" / "corpus.parquet", CORPUS)
    write(tmp_path / "Same" / "queries.parquet", [{"_id": f"d{i}", "text": DOCUMENTS[i]} for i in range(10)])
    qrels = [{"query-id": f"d{i}", "corpus-id": f"d{i + 10}", "score": 1} for i in range(10)]
    write(tmp_path / "Same" / "qrels.parquet", qrels)
    task = read_task(tmp_path / "Same")
    task.mteb.ignore_identical_ids = True
    found = evaluate(model, [task], ["bm25"])["tasks"]["Same"]
    difference = found["scores"]["model"]["ndcg_at_10"] - found["scores"]["bm25"]["ndcg_at_10"]
    assert found["lead"]["bm25"]["difference"] == pytest.approx(difference, abs=1e-4)


def test_unreadable_evaluation_data_is_named_in_the_error(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no evaluation set"):
        read_task(tmp_path)
    write(tmp_path / "a" / "corpus.jsonl", CORPUS)
    with pytest.raises(FileNotFoundError, match=r"test\.tsv is missing"):
        read_task(tmp_path / "a")
    write(tmp_path / "a" / "qrels" / "test.tsv", [{"query-id": "q99", "corpus-id": "d1", "score": 1}])
    write(tmp_path / "a" / "queries.jsonl", QUERIES)
    with pytest.raises(ValueError, match=r"judges queries that .* does not hold: \['q99'\]"):
        read_task(tmp_path / "a")
    write(tmp_path / "b" / "pairs.jsonl", [{"sentence1": "a", "score": 1}])
    with pytest.raises(ValueError, match=r"row 1 lacks \['sentence2'\]"):
        read_task(tmp_path / "b")
    (tmp_path / "b" / "pairs.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: not valid JSON"):
        read_task(tmp_path / "b")
    (tmp_path / "b" / "pairs.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl holds no rows"):
        read_task(tmp_path / "b")
    write(tmp_path / "a" / "qrels" / "test.tsv", [{"query-id": "q1", "corpus-id": "d1", "score": 0.5}])
    with pytest.raises(ValueError, match=r"test\.tsv: .*whole numbers, got 0\.5"):
        read_task(tmp_path / "a")
    with pytest.raises(ValueError, match="STS17 has several languages"):
        mteb_task("STS17")
    with pytest.raises(ValueError, match="neither a folder here nor a task of mteb's"):
        mteb_task("NoSuchTask")
