"""Command `gate`: may a model take another one's place? Exit codes for continuous integration.

Reads runs of `llm2clip-eval lmms` of both. A task passes when it is shown that the candidate loses less than the
allowed drop, fails when it is shown that it loses more, and is inconclusive otherwise. So does the average of tasks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

from llm2clip.run_dir import atomic_write

if TYPE_CHECKING:
    from llm2clip_eval.comparison import CandidateComparison

Outcome = Literal["pass", "fail", "inconclusive"]
EXIT_CODES: dict[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 3}
"""2 is bad input, as everywhere."""
MIN_CLUSTERS = 30
"""With fewer images a bootstrap cannot know what it has not seen: ten answers that agree show no more than that."""
DESCRIPTION = """May a model take another one's place? Exit code 0: every task is shown to lose less than --max-drop;
1: one is shown to lose more; 3: neither is shown, more questions are needed; 2: bad input. Levels are those of each
task: with many tasks whose true loss is just --max-drop, some fail by chance."""


@dataclass(frozen=True)
class Check:
    """One task, or the average."""

    name: str
    outcome: Outcome
    message: str


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line.

    Raises:
        ValueError: for values that make no sense.
        SystemExit: 0 after `--help`, 2 for options that do not exist.
    """
    parser = argparse.ArgumentParser(prog="llm2clip-eval gate", description=DESCRIPTION, allow_abbrev=False)
    runs = {"nargs": "+", "type": Path, "required": True, "metavar": "RUN"}
    parser.add_argument("--baseline", help="runs of llm2clip-eval lmms, one per training seed", **runs)
    parser.add_argument("--candidate", help="runs of the model that is to take its place", **runs)
    parser.add_argument(
        "--max-drop",
        type=float,
        required=True,
        metavar="X",
        help="loss that is tolerable, in percentage points; where the metric is none, in percent of its range",
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of each one-sided bound (default: 0.95)")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME", help="names or patterns; default: all that need no judge"
    )
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the outcome as JUnit XML too")
    parser.add_argument("--num-resamples", type=int, default=10_000, help="of the bootstrap (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument(
        "--allow-differences", nargs="+", default=[], metavar="KEY", help="what may differ, such as torch"
    )
    options = parser.parse_args(argv)
    if not 0.5 < options.confidence < 1:
        raise ValueError(f"--confidence: {options.confidence} is not between 0.5 and 1")
    if not options.max_drop > 0:
        raise ValueError(f"--max-drop: {options.max_drop} is not positive; no finite test shows a drop to be none")
    if options.num_resamples < 100:
        raise ValueError(f"--num-resamples: {options.num_resamples} is too few, expected 100 or more")
    return options


def checks(options: argparse.Namespace) -> list[Check]:
    """Compare, and judge every task and their average.

    Raises:
        FileNotFoundError: if a run is missing or not complete.
        ValueError: if runs do not belong together.
    """
    from llm2clip_eval.task_differences import Settings, compare_arms
    from llm2clip_eval.task_results import ArmRuns, align, load_arm

    arms = [load_arm("baseline", "baseline", options.baseline), load_arm("candidate", "candidate", options.candidate)]
    if not options.tasks:
        by_rule = [name for arm in arms for name, runs in arm.tasks.items() if runs[0].judge is None]
        arms = [
            ArmRuns(arm.name, arm.label, {name: runs for name, runs in arm.tasks.items() if name in by_rule})
            for arm in arms
        ]
    baseline, candidate = align(arms, options.tasks, options.allow_differences)
    if not baseline.tasks:
        raise ValueError("there is no task that needs no judge; name tasks with --tasks")
    # Both ends of a two-sided interval of this coverage are one-sided bounds of the confidence that is asked for.
    settings = Settings(
        options.num_resamples, 2 * options.confidence - 1, options.max_drop, options.seed, allow_unseen=True
    )
    return judge(compare_arms(baseline, candidate, settings), options)


def judge(found: CandidateComparison, options: argparse.Namespace) -> list[Check]:
    """Outcome of every task and of the average."""
    drop, confidence = options.max_drop, f"{100 * options.confidence:g} %"

    def check(name: str, told: str, difference: float, low: float, high: float, num_clusters: int) -> Check:
        # Bounds allow for images that were not seen; only those of a model against itself are both 0.
        few = num_clusters < MIN_CLUSTERS and not low == high == 0
        outcome = "inconclusive" if few else decide(low, high, drop)
        shown = {
            "pass": f"shown to lose less than {drop:g}",
            "fail": f"shown to lose more than {drop:g}",
            "inconclusive": f"neither shown to lose less than {drop:g} nor more",
        }[outcome]
        message = f"{told}: {difference:+.2f} points ({confidence} bounds {low:+.2f} and {high:+.2f}), {shown}"
        if few:
            message += f"; {num_clusters} images are too few, at least {MIN_CLUSTERS} are needed"
        return Check(name, outcome, message)

    results = []
    for task in found.tasks:
        percent = drop / task.margin  # points of the metric -> percent of its range
        told = f"{task.metric} {task.candidate:.2f} against {task.baseline:.2f}"
        difference, low, high = (percent * value for value in (task.difference, task.low, task.high))
        results.append(check(task.task, told, difference, low, high, task.num_clusters))
    if macro := found.macro:
        told = f"mean of {macro.num_tasks} tasks {macro.candidate:.2f} against {macro.baseline:.2f}"
        smallest = min(task.num_clusters for task in found.tasks)
        results.append(check("macro average", told, macro.difference, macro.low, macro.high, smallest))
    return results


def decide(low: float, high: float, max_drop: float) -> Outcome:
    """Judge by one-sided bounds of the difference, candidate minus baseline."""
    return "pass" if low > -max_drop else "fail" if high < -max_drop else "inconclusive"


def overall(results: Sequence[Check]) -> Outcome:
    """Fail if one fails, else inconclusive if one is, else pass."""
    outcomes = {check.outcome for check in results}
    return "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"


def junit(results: Sequence[Check]) -> bytes:
    """JUnit XML, one test case per check; inconclusive ones are skipped ones."""
    counts = {kind: str(sum(check.outcome == kind for check in results)) for kind in EXIT_CODES}
    suite = ElementTree.Element(
        "testsuite",
        name="llm2clip-eval gate",
        tests=str(len(results)),
        failures=counts["fail"],
        skipped=counts["inconclusive"],
        errors="0",
    )
    for check in results:
        case = ElementTree.SubElement(suite, "testcase", classname="gate", name=check.name)
        if check.outcome == "pass":
            ElementTree.SubElement(case, "system-out").text = check.message
        else:
            tag = "failure" if check.outcome == "fail" else "skipped"
            ElementTree.SubElement(case, tag, message=check.message)
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval gate`.

    Raises:
        SystemExit: 1 fail, 3 inconclusive.
    """
    options = parse(argv)
    results = checks(options)
    width = max(len(check.name) for check in results)
    for check in results:
        sys.stdout.write(f"{check.outcome:12} {check.name:{width}}  {check.message}\n")
    outcome = overall(results)
    sys.stdout.write(f"{outcome}\n")
    if options.junit:
        atomic_write(options.junit, junit(results))
    if code := EXIT_CODES[outcome]:
        raise SystemExit(code)
