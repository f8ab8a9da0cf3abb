"""The tables of a comparison: formatted once for the page, Markdown and LaTeX, and unrounded for `table.csv`.

Whatever comes from data is escaped for the format it goes into.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip_eval.comparison import CandidateComparison, Comparison, MacroDifference, TaskDifference

NOTHING = "–"
JUDGES = {"llm": "a language model", "server": "a submission server"}
LATEX_SPECIALS = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\symbol{34}"}
    | {"[": "{[}", "]": "{]}", "*": "{*}"}  # \\ that ends the row above would take them for its own
    | {"−": "$-$", "–": "--", "±": r"$\pm$"}
)
FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
CSV_COLUMNS = (
    "group", "candidate", "baseline", "task", "metric", "judge", "scale", "num_items", "num_clusters",
    "num_seeds_baseline", "num_seeds_candidate", "baseline_score", "candidate_score", "difference", "low", "high",
    "confidence", "test", "p", "p_holm", "mde", "wins", "losses", "ties", "margin", "equivalence_p", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One task, or the average, as text."""

    name: str
    note: str
    """The metric; how many tasks an average is over."""
    judge: str
    baseline: str
    candidate: str
    difference: str
    interval: str
    p: str
    p_holm: str
    num_items: str
    mde: str
    counts: str
    """Wins, losses and ties of the candidate, in items."""
    verdict: str
    margin: str
    """Within which the models are equivalent; empty if they are not."""
    test: str
    is_macro: bool = False


@dataclass(frozen=True)
class Table:
    """One candidate against the baseline, in the tasks that rules score or in those that a judge scores."""

    candidate: CandidateComparison
    is_judged: bool
    rows: Sequence[Row]


def tables(comparison: Comparison) -> list[Table]:
    """For every candidate the table of its tasks, and that of the judged ones if there are any."""
    found = []
    for candidate in comparison.candidates:
        for is_judged in (False, True):
            rows = [_row(task) for task in candidate.tasks if (task.judge is not None) == is_judged]
            if rows and not is_judged and candidate.macro:
                rows.append(_macro_row(candidate.macro))
            if rows:
                found.append(Table(candidate, is_judged, rows))
    return found


def _row(task: TaskDifference) -> Row:
    return Row(
        name=task.task,
        note=task.metric,
        judge=JUDGES[task.judge] if task.judge else "",
        baseline=number(task.baseline),
        candidate=number(task.candidate),
        difference=signed(task.difference),
        interval=f"{signed(task.low)} to {signed(task.high)}",
        p=probability(task.p),
        p_holm=probability(task.p_holm),
        num_items=str(task.num_items),
        mde=number(task.mde),
        counts=f"{task.wins} / {task.losses} / {task.ties}",
        verdict=task.verdict,
        margin=f"(±{number(task.margin)})" if task.verdict == "equivalent" else "",
        test=task.test,
    )


def _macro_row(macro: MacroDifference) -> Row:
    return Row(
        name="macro average",
        note=f"{macro.num_tasks} tasks",
        judge="",
        baseline=number(macro.baseline),
        candidate=number(macro.candidate),
        difference=signed(macro.difference),
        interval=f"{signed(macro.low)} to {signed(macro.high)}",
        p=probability(macro.p),
        p_holm=NOTHING,
        num_items=NOTHING,
        mde=NOTHING,
        counts=NOTHING,
        verdict=macro_verdict(macro),
        margin="",
        test="stratified bootstrap",
        is_macro=True,
    )


def macro_verdict(macro: MacroDifference) -> str:
    """`better`, `worse` or `undecided`: whether the interval excludes zero, and on which side."""
    return "better" if macro.low > 0 else "worse" if macro.high < 0 else "undecided"


def number(value: float) -> str:
    """A number with one decimal, a dash for one that is not defined."""
    return f"{value:.1f}".replace("-", "−") if math.isfinite(value) else NOTHING


def signed(value: float) -> str:
    """A difference with one decimal and its sign; what rounds to zero has none."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:+.1f}".replace("-", "−") if round(value, 1) else "0.0"


def probability(p: float) -> str:
    """A p-value with three decimals."""
    if not math.isfinite(p):
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def write_csv(comparison: Comparison) -> str:
    """Every row unrounded, the group (rule, judged, macro) in the first column."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in _csv_rows(comparison):
        writer.writerow([_csv_cell(row.get(column)) for column in CSV_COLUMNS])
    return buffer.getvalue()


def _csv_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for candidate in comparison.candidates:
        shared = {
            "candidate": candidate.label,
            "baseline": comparison.baseline_label,
            "num_seeds_candidate": candidate.num_seeds,
            "num_seeds_baseline": comparison.num_seeds,
            "confidence": comparison.confidence,
        }
        measured = [("judged" if task.judge else "rule", task) for task in candidate.tasks]
        for group, found in [*measured, ("macro", candidate.macro)]:
            if found is not None:
                scores = {"baseline_score": found.baseline, "candidate_score": found.candidate}
                yield {"task": "macro average", **dataclasses.asdict(found), **scores, **shared, "group": group}


def _csv_cell(value: Any) -> Any:
    """Numbers as they are; text so that no spreadsheet takes it for a formula."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return ""
    if not isinstance(value, str):
        return value
    text = " ".join(value.split())
    return "'" + text if text.startswith(FORMULA_STARTS) else text


def write_latex(comparison: Comparison) -> str:
    """One `tabular` per table; needs the package booktabs."""
    interval = latex(f"{100 * comparison.confidence:g} % interval")
    lines = ["% needs \\usepackage{booktabs}"]
    for table in tables(comparison):
        title = f"{table.candidate.label} against {comparison.baseline_label}"
        lines += ["", f"% {latex(title)}{', scored by a judge' if table.is_judged else ''}"]
        lines += ["\\begin{tabular}{lrrrrrrrrr}", "\\toprule"]
        header = ["task", *(latex(label) for label in (comparison.baseline_label, table.candidate.label))]
        header += ["difference", interval, "$p$", "$p$ (Holm)", "$n$", "MDE", "W / L / T"]
        lines += [" & ".join(header) + " \\\\", "\\midrule"]
        for row in table.rows:
            cells = [row.name, row.baseline, row.candidate, row.difference, row.interval, row.p, row.p_holm]
            texts = [latex(cell) for cell in [*cells, row.num_items, row.mde, row.counts]]
            if row.verdict in ("better", "worse"):
                texts[3] = f"\\textbf{{{texts[3]}}}"
            if row.is_macro:
                lines.append("\\midrule")
            lines.append(" & ".join(texts) + " \\\\")
        lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Text that LaTeX prints as it is, on one line."""
    return " ".join(text.split()).translate(LATEX_SPECIALS)


def printable(value: Any) -> Any:
    """The same value, dataclasses and containers included, without characters that no file format can hold.

    Control characters and halves of surrogate pairs, which JSON lets through, become U+FFFD; line breaks and
    tabs stay.
    """
    if isinstance(value, str):
        if value.isprintable():
            return value
        return "".join("\ufffd" if _is_unprintable(character) else character for character in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: printable(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(printable(item) for item in value)
    return value


def _is_unprintable(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"


def shorten(text: str, length: int) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
