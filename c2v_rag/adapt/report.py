"""The report of a run: as data, as JSON, as text, and as one page of HTML that needs no other file."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from c2v_rag.adapt.corpus import Corpus
from c2v_rag.adapt.filter import Filtered
from c2v_rag.adapt.passages import SPLITS
from c2v_rag.adapt.questions import Question
from c2v_rag.adapt.scoring import METRICS, Comparison, compare, metric_values
from c2v_rag.adapt.work import write_text
from c2v_rag.sentences import one_line

Ending = Literal[
    "gain", "gain by vectors only", "gain, but forgets", "no gain", "nothing to learn", "questions written"
]
FORGOTTEN = 0.01  # a general set may fall by this much
_MIN_DOCUMENTS = 6  # a bootstrap over fewer documents says nothing: it is over questions then
_EXAMPLES = 3  # shown of the questions that were dropped for one reason
SHOWN = 20  # questions whose ranks before and after are shown


@dataclasses.dataclass(frozen=True)
class ChangedQuestion:
    """A held-out question with the rank of its passage, by vectors, before and after."""

    question: str
    document: str
    passage: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptReport:
    """What a run did and what it gained.

    `ending`: see `judge`; "nothing to learn" if too few questions were kept, and nothing was trained; "questions
    written" if no more was asked for. `advice`: what to do now. `model`: the folder of the adapted model, None without
    training. `held_out`: by mode of search and metric. `general`: nDCG@10 by set. `dropped`: numbers of questions by
    reason; `examples`: some of them. `losses`: of each training step. `seconds`: by step. `collection`: the new
    collection, None unless one was made.
    """

    ending: Ending
    advice: str
    output: str
    model: str | None
    base_model: str
    writer: str
    documents: dict[str, int]
    passages: dict[str, int]
    written: int
    kept: dict[str, int]
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    unread: list[str]
    held_out: dict[str, dict[str, Comparison]] = dataclasses.field(default_factory=dict)
    general: dict[str, Comparison] = dataclasses.field(default_factory=dict)
    changed: list[ChangedQuestion] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    collection: str | None = None

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        """The report as lines of text."""
        return "\n".join(_text(self)) + "\n"

    def to_html(self) -> str:
        """The report as one page, with plots. Texts of documents and questions are escaped."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("c2v_rag.adapt", "."), autoescape=True, undefined=jinja2.StrictUndefined
        )
        plots = [plot for plot in (_plot_metrics(self), _plot_losses(self.losses)) if plot]
        page: str = environment.get_template("report.html").render(report=self, plots=plots, points=points)
        return page

    def save(self, folder: Path) -> None:
        """Write report.json, report.txt and report.html."""
        for name, text in (("html", self.to_html()), ("txt", self.to_text()), ("json", self.to_json())):
            write_text(folder / f"report.{name}", text)


def judge(held_out: Mapping[str, Mapping[str, Comparison]], general: Mapping[str, Comparison]) -> tuple[Ending, str]:
    """The ending of a run with training, and the advice, by the intervals of nDCG@10 on held-out questions.

    "gain": that of hybrid search is above 0. "gain by vectors only": that of vectors is above 0, and hybrid search did
    not become worse. "gain, but forgets": a gain, and a general set fell by more than 1 point. "no gain" otherwise.
    """
    hybrid, vectors = (held_out[mode]["nDCG@10"] for mode in ("hybrid", "vectors"))
    found = (
        f"nDCG@10 on held-out questions changed by {_interval(hybrid)} in hybrid search, "
        f"and by {_interval(vectors)} by vectors."
    )
    if hybrid.low <= 0 and (vectors.low <= 0 or hybrid.high < 0):
        is_worse = hybrid.high < 0 or vectors.high < 0
        return (
            "no gain",
            f"{'The adapted model is worse' if is_worse else 'No gain is proved'}: {found} Keep the old model.",
        )
    forgotten = [name for name, one in general.items() if one.difference < -FORGOTTEN]
    if forgotten:
        return "gain, but forgets", (
            f"The adapted model finds more in these documents: {found} It finds less in {', '.join(forgotten)}. Use it "
            "for these documents only."
        )
    if hybrid.low <= 0:
        return "gain by vectors only", f"{found} Use the adapted model only if you search by vectors alone."
    return "gain", (
        f"The adapted model finds more in these documents: {found} Use it, and embed the documents again with it."
    )


def points(value: float) -> str:
    """A fraction as points out of 100."""
    return f"{100 * value:.1f}"


def _interval(one: Comparison) -> str:
    return f"{100 * one.difference:+.1f} points (95 % interval {100 * one.low:+.1f} to {100 * one.high:+.1f})"


def _text(report: AdaptReport) -> list[str]:
    lines = [
        f"Result: {report.ending}. {report.advice}",
        "",
        f"{sum(report.passages.values())} passages of {sum(report.documents.values())} documents: "
        + ", ".join(f"{count} {split}" for split, count in report.passages.items()),
        f"{report.written} questions by {report.writer}; kept: "
        + (", ".join(f"{count} {split}" for split, count in report.kept.items()) or "not checked yet"),
    ]
    for reason, count in report.dropped.items():
        lines.append(f"  dropped, {reason}: {count}")
        lines += [f"    - {one_line(example)}" for example in report.examples[reason]]
    if report.unread:
        lines.append(f"{len(report.unread)} files could not be read, such as {report.unread[0]}")
    for mode, metrics in report.held_out.items():
        lines += ["", f"Held-out questions, search by {mode} (x 100)"]
        lines += [f"  {metric:<10} {_row(one)}" for metric, one in metrics.items()]
    if report.general:
        lines += ["", "General sets, nDCG@10 by vectors (x 100)"]
        lines += [f"  {name}: {_row(one)}" for name, one in report.general.items()]
    if report.changed:
        lines += ["", "Rank of the right passage before and after (held-out questions that changed most)"]
        lines += [
            f"  {one.before:>5} -> {one.after:<5} {one_line(one.question)}  [{one_line(one.document)}]"
            for one in report.changed
        ]
    lines += ["", f"Base model: {report.base_model}", f"Adapted model: {report.model or 'none'}"]
    if report.collection:
        lines.append(f"New collection: {report.collection}; the old one is unchanged. Search it with --collection.")
    took = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in report.seconds.items())
    return [*lines, f"Time: {took}" if took else "Time: none"]


def _row(one: Comparison) -> str:
    return f"{points(one.before)} -> {points(one.after)}  {_interval(one)}"


def describe(corpus: Corpus, filtered: Filtered | None) -> dict[str, Any]:
    """The fields of a report that say what was read, written and dropped."""
    split_of = {passage.document: passage.split for passage in corpus.passages}
    dropped = filtered.counts() if filtered else {}
    return {
        "documents": _by_split(split_of.values()),
        "passages": _by_split(passage.split for passage in corpus.passages),
        "written": len(corpus.questions),
        "kept": _by_split(str(corpus.questions[number].split) for number in filtered.kept) if filtered else {},
        "dropped": dropped,
        "examples": {
            reason: [question.question for question, other in filtered.dropped if other == reason][:_EXAMPLES]
            for reason in dropped
            if filtered
        },
    }


def _by_split(splits: Iterable[str]) -> dict[str, int]:
    counts = Counter(splits)
    return {split: counts[split] for split in SPLITS}


def compare_scores(questions: Sequence[Question], before: Any, after: Any) -> dict[str, Any]:
    """The fields "held_out", "general" and "changed" of a report, from the ranks and scores of both models."""
    groups = [question.document for question in questions]
    if len({*groups}) < _MIN_DOCUMENTS:
        groups = [str(number) for number in range(len(questions))]
    held_out = {
        mode: {
            metric: compare(metric_values(metric, old), metric_values(metric, after["ranks"][mode]), groups)
            for metric in METRICS
        }
        for mode, old in before["ranks"].items()
    }
    general = {
        name: compare(old, after["general"][name], [str(row) for row in range(len(old))])
        for name, old in before["general"].items()
    }
    changed = [
        ChangedQuestion(question.question, question.document, question.passage, old, new)
        for question, old, new in zip(questions, before["ranks"]["vectors"], after["ranks"]["vectors"], strict=True)
    ]
    return {"held_out": held_out, "general": general, "changed": changed_most(changed)}


def changed_most(rows: Sequence[ChangedQuestion]) -> list[ChangedQuestion]:
    """At most twenty questions, those with the largest change of 1 / rank first."""
    return sorted(rows, key=lambda row: -abs(1 / row.after - 1 / row.before))[:SHOWN]


def _plot_metrics(report: AdaptReport) -> str:
    """Bars of all metrics before and after, with the interval of the difference, as SVG; "" without scores."""
    if not report.held_out:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(report.held_out), sharey=True, squeeze=False)[0]
    for axis, (mode, metrics) in zip(axes, report.held_out.items(), strict=True):
        for row, metric in enumerate(METRICS):
            one = metrics[metric]
            errors = [[100 * max(0.0, one.difference - one.low)], [100 * max(0.0, one.high - one.difference)]]
            axis.bar(row - 0.2, 100 * one.before, 0.4, color="tab:gray", label="before" if row == 0 else None)
            axis.bar(
                row + 0.2, 100 * one.after, 0.4, yerr=errors, capsize=3, color="tab:blue",
                label="after" if row == 0 else None,
            )  # fmt: skip
        axis.set(title=f"search by {mode}", xticks=range(len(METRICS)), xticklabels=METRICS)
    axes[0].legend()
    axes[0].set_ylabel("held-out questions, x 100")
    return _svg(figure)


def _plot_losses(losses: Sequence[float]) -> str:
    if not losses:
        return ""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(1, len(losses) + 1), losses, color="tab:blue", linewidth=1)
    axis.set(xlabel="training step", ylabel="loss")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure)


def _svg(figure: Any) -> str:
    """The figure as an SVG element without the XML header."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
