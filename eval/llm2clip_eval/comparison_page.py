"""The report of a comparison: `report.html` in one file, `report.md`, `table.csv`, `table.tex` and `figures/`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm2clip.run_dir import atomic_write
from llm2clip_eval import comparison_figures, flips, report_html
from llm2clip_eval import comparison_tables as tables
from llm2clip_eval.comparison import NOT_RECORDED, CandidateComparison, Comparison, TaskDifference
from llm2clip_eval.comparison_tables import number, printable, probability, signed
from llm2clip_eval.task_results import TaskRun

FLIPS_PER_TASK = 6
TOWER = re.compile(r"(^|[^a-z_])(vision_)?tower($|[^a-z_])")
"""Settings and inputs that name a vision tower, such as `finetune: content of tower`, not `tune.tower_lr`."""
MAX_NAMED = 6
"""Tasks that a sentence lists by name."""


@dataclass(frozen=True)
class Statement:
    """What is shown, or not, in plain words."""

    text: str
    verdict: str


def write(
    comparison: Comparison,
    runs: Sequence[TaskRun],
    directory: Path,
    *,
    flips_per_task: int = FLIPS_PER_TASK,
    seed: int = 0,
) -> None:
    """Write the report's files.

    Args:
        comparison: everything that was measured.
        runs: answers of every model, task and seed; of these come the flipped items and the identity of the tasks.
        directory: where they go.
        flips_per_task: flipped items shown of each task and candidate at most; 0 for none.
        seed: of the choice of flipped items.

    Raises:
        FileNotFoundError, ValueError: as in `flips.choose`.
    """
    chosen = [
        flips.choose(comparison, candidate, runs, num_per_task=flips_per_task, seed=seed)
        for candidate in comparison.candidates
    ]
    atomic_write(directory / "table.csv", tables.write_csv(printable(comparison)))
    identities = printable(task_identities(comparison, runs))
    unscored = printable(sorted({run.task for run in runs if run.metric is None}))
    comparison = distinct_names(printable(comparison))
    report = {
        "comparison": comparison,
        "candidates": [
            (candidate, list(zip(candidate.tasks, found, strict=True)))
            for candidate, found in zip(comparison.candidates, chosen, strict=True)
        ],
        "confidence": f"{100 * comparison.confidence:g} %",
        "warnings": recipe_warnings(comparison),
        "statements": {candidate.name: state(comparison, candidate) for candidate in comparison.candidates},
        "single_seed": single_seed_note(comparison),
        "unscored": ", ".join(unscored),
        "tables": tables.tables(comparison),
        "figures": comparison_figures.draw_all(comparison, directory / "figures"),
        "radar_tasks": comparison_figures.radar_axes(comparison),
        "is_tower": is_tower,
        "identities": identities,
        "number": number,
        "change": signed,
        "seed": seed,
    }
    atomic_write(directory / "report.html", report_html.render("comparison.html.jinja", report))
    atomic_write(directory / "report.md", report_html.render("comparison.md.jinja", report))
    atomic_write(directory / "table.tex", tables.write_latex(comparison))


def distinct_names(comparison: Comparison) -> Comparison:
    """The same, but where a task is listed with several metrics, each is named after its metric."""
    candidates = []
    for candidate in comparison.candidates:
        times = Counter(task.task for task in candidate.tasks)
        named = [
            task if times[task.task] == 1 else replace(task, task=_with_metric(task.task, task.metric))
            for task in candidate.tasks
        ]
        candidates.append(replace(candidate, tasks=tuple(named)))
    return replace(comparison, candidates=tuple(candidates))


def _with_metric(task: str, metric: str) -> str:
    return metric if metric.startswith(task) else f"{task} {metric}"


def single_seed_note(comparison: Comparison) -> str:
    """Says which models were trained only once, and what that means; empty if none was."""
    once = [candidate.label for candidate in comparison.candidates if candidate.num_seeds == 1]
    if comparison.num_seeds == 1:
        once.insert(0, comparison.baseline_label)
    if not once:
        return ""
    return (
        f"Single seed: {' and '.join(once)} trained once. The intervals and p-values cover the choice of test items, "
        "not the noise of training: another training run of the same recipe may differ by more than that."
    )


def state(comparison: Comparison, candidate: CandidateComparison) -> list[Statement]:
    """Say what a candidate's tasks show, and what they do not."""
    ours, theirs = candidate.label, comparison.baseline_label
    ruled = [task for task in candidate.tasks if task.judge is None]
    judged = [task for task in candidate.tasks if task.judge is not None]
    told = _verdicts(ours, theirs, ruled)
    if (macro := candidate.macro) is not None:
        verdict = tables.macro_verdict(macro)
        shown = {"better": f"{ours} is better", "worse": f"{ours} is worse", "undecided": "no difference is shown"}
        interval = f"{100 * comparison.confidence:g} % interval {signed(macro.low)} to {signed(macro.high)}"
        text = (
            f"On average over {macro.num_tasks} tasks {shown[verdict]}: {number(macro.candidate)} against "
            f"{number(macro.baseline)}, a difference of {signed(macro.difference)} points "
            f"({interval}, p = {_p(macro.p)})."
        )
        told.append(Statement(text, verdict))
    for found in _verdicts(ours, theirs, judged):
        text = f"Judged by a language model or a server, and in no average: {found.text}"
        told.append(Statement(text, found.verdict))
    return told


def _verdicts(ours: str, theirs: str, tasks: Sequence[TaskDifference]) -> list[Statement]:
    """One sentence for every verdict that occurs."""
    if tasks and not any(task.wins or task.losses or task.difference for task in tasks):
        return [Statement(f"{ours} and {theirs} score exactly the same in all {len(tasks)} tasks.", "equivalent")]
    says = {
        "better": f"{ours} is better than {theirs}",
        "worse": f"{ours} is worse than {theirs}",
        "equivalent": f"{ours} and {theirs} are equivalent within the margin",
        "undecided": f"No difference between {ours} and {theirs} is shown, nor that there is none,",
    }
    found = []
    for verdict, saying in says.items():
        if of_verdict := [task for task in tasks if task.verdict == verdict]:
            count = f"{len(of_verdict)} of {len(tasks)} tasks" if len(tasks) > 1 else "1 task"
            found.append(Statement(f"{saying} in {count}: {_named(of_verdict)}.", verdict))
    return found


def _named(tasks: Sequence[TaskDifference]) -> str:
    names = []
    for task in tasks[:MAX_NAMED]:
        detectable = f"; detectable from {number(task.mde)}" if task.verdict == "undecided" else ""
        names.append(f"{task.task} ({signed(task.difference)}{detectable})")
    return ", ".join(names) + (f" and {len(tasks) - MAX_NAMED} more" if len(tasks) > MAX_NAMED else "")


def _p(value: float) -> str:
    return probability(value).replace("<", "below ")


def is_tower(setting: str) -> bool:
    """Whether a setting may differ between models of which only the tower is to be compared."""
    return TOWER.search(setting.lower()) is not None


def recipe_warnings(comparison: Comparison) -> list[str]:
    """What makes it unclear that the tower alone made the difference."""
    warnings = []
    for candidate in comparison.candidates:
        changed = comparison.recipe_differences.get(candidate.name, ())
        if any(setting.endswith(NOT_RECORDED) for setting, _, _ in changed):
            warnings.append(
                f"How {candidate.label} or {comparison.baseline_label} was made is not recorded in full, so it is not "
                "known whether they differ only in the vision tower. See “What differs”."
            )
        elif further := [setting for setting, _, _ in changed if not is_tower(setting)]:
            named = ", ".join(further[:MAX_NAMED]) + (" …" if len(further) > MAX_NAMED else "")
            warnings.append(
                f"{candidate.label} and {comparison.baseline_label} differ in more than the vision tower ({named}): a "
                "difference in scores may come from that. See “What differs”."
            )
    if comparison.allowed_differences:
        warnings.append(
            f"The runs were compared although they may differ in {', '.join(comparison.allowed_differences)}, "
            "as the configuration demands."
        )
    return warnings


def task_identities(comparison: Comparison, runs: Sequence[TaskRun]) -> dict[str, list[tuple[str, Mapping[str, str]]]]:
    """For every task what made its scores: whose runs, and their identity; one entry if all agree, as they should."""
    labels = {candidate.name: candidate.label for candidate in comparison.candidates}
    labels[comparison.baseline] = comparison.baseline_label
    found: dict[str, dict[str, list[TaskRun]]] = {}
    for run in runs:
        key = json.dumps(run.identity, sort_keys=True)
        found.setdefault(run.task, {}).setdefault(key, []).append(run)
    return {
        task: [
            (
                ", ".join(f"{labels[run.arm]} (seed {run.seed})" for run in same),
                {
                    name: value if isinstance(value, str) else json.dumps(value)
                    for name, value in json.loads(key).items()
                },
            )
            for key, same in by_identity.items()
        ]
        for task, by_identity in found.items()
    }
