"""Command `answers-report`: compare LLaVA models that were asked the same questions.

Reads directories of `llm2clip-eval answers`. Writes `report.html` (one self-contained file), `report.md`,
`results.json` (all numbers) and `figures/accuracy.svg`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_write, fingerprint
from llm2clip_eval.report import ComparisonConfig

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import numpy
if TYPE_CHECKING:
    from llm2clip_eval.answer_statistics import Estimate
    from llm2clip_eval.answers_report_data import GroupFacts

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class AskedArm:
    """One of the models that are compared."""

    results: list[Path]
    """Directories of llm2clip-eval answers, one per training seed."""
    label: str | None = None
    """What readers see; None: the arm's name."""


@dataclass(kw_only=True)
class AnswersReportConfig(StageConfig):
    """Compare LLaVA models by their answers, against chance, blind and each other; report.md and report.html."""

    arms: dict[str, AskedArm]
    """Models by name, in the order of the tables."""
    comparisons: dict[str, ComparisonConfig] = field(default_factory=dict)
    """What is set against what; the key says in what they are alike, such as: the same recipe, another tower."""
    headline: list[str] = field(default_factory=lambda: ["seen/count", "seen/yesno"])
    """The results that were chosen before the run to stand for all: pool/type, or pool/type/language."""
    title: str = "Answers to questions about images"
    """Heading of the report."""
    pools: dict[str, str] = field(default_factory=dict)
    """What each pool asks, in a sentence; also their order. Pools that are not named come last."""
    examples_per_type: int = 1
    """Right and wrong answers shown with their picture, of each, for every pool and type of question; 0 for none."""
    num_resamples: int = 10_000
    """Bootstrap resamples."""
    confidence: float = 0.95
    """Coverage of the intervals."""
    seed: int = 0
    """Of the resampling and of the choice of examples."""

    def __post_init__(self) -> None:
        problems = [] if self.arms else ["arms: at least one is needed"]
        for name, arm in self.arms.items():
            if not arm.results:
                problems.append(f"arms.{name}.results: at least one directory of llm2clip-eval answers is needed")
        for title, comparison in self.comparisons.items():
            for name in (comparison.target, *comparison.baselines):
                if name not in self.arms:
                    problems.append(f"comparisons.{title}: no arm {name!r}; there are {', '.join(self.arms)}")
        if not 0 < self.confidence < 1:
            problems.append(f"confidence: {self.confidence} is not between 0 and 1")
        if self.num_resamples < 1:
            problems.append(f"num_resamples: {self.num_resamples} is not positive")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[AnswersReportConfig]:
    """Read the configuration of a command line."""
    return parse_stage(AnswersReportConfig, argv, prog="llm2clip-eval answers-report")


def inputs(call: StageCall[AnswersReportConfig]) -> dict[str, str]:
    """Fingerprints of all runs that are read."""
    return {
        f"arms.{name}.results.{number}": fingerprint(path)
        for name, arm in call.config.arms.items()
        for number, path in enumerate(arm.results)
    }


def run(call: StageCall[AnswersReportConfig]) -> None:
    """Collect, compare, write."""
    with RunDir(call, stage="answers-report", inputs=inputs(call)) as run:
        if run.complete:
            logger.info("answers-report: %s is complete", run.path)
            return
        from llm2clip_eval import figures, report_html

        report = collect(call.config)
        report["figures"] = figures.draw_answers(report, run.path / "figures")
        atomic_write(run.path / "report.md", report_html.render("answers.md.jinja", report))
        atomic_write(run.path / "report.html", report_html.render("answers.html.jinja", report))
        atomic_write(run.path / "results.json", json.dumps(results(report), indent=2, ensure_ascii=False) + "\n")
        headline = headline_text(report)
        logger.info("answers-report: %s\n%s", run.path / "report.html", headline)
        run.finish(outputs=["report.md", "report.html", "results.json", "figures"], headline=headline)


def collect(config: AnswersReportConfig) -> dict[str, Any]:
    """Everything the report says.

    Raises:
        FileNotFoundError: if a run or a question file is missing or not complete.
        ValueError: if answers do not belong together or a headline result is not among them.
    """
    from llm2clip_eval import answers_report_data as data
    from llm2clip_eval.report_data import run_facts
    from llm2clip_eval.statistics import seed_note

    arms = {name: data.load_arm(name, arm.label or name, arm.results) for name, arm in config.arms.items()}
    data.check_same_questions(list(arms.values()))
    first = next(iter(arms.values()))
    rows = data.groups(first, list(config.pools))
    keys = {group.key: group for group in rows}
    if missing := [key for key in config.headline if key not in keys]:
        raise ValueError(f"headline: no results for {', '.join(missing)}; there are {', '.join(keys)}")
    comparisons = [
        {"title": title, "target": arms[comparison.target], "baseline": arms[name]}
        for title, comparison in config.comparisons.items()
        for name in comparison.baselines
    ]
    pairs = [(comparison["target"].name, comparison["baseline"].name) for comparison in comparisons]
    bootstrap = {"num_resamples": config.num_resamples, "confidence": config.confidence, "seed": config.seed}
    facts = {
        group: data.measure(list(arms.values()), group, chosen, pairs, **bootstrap) for group, chosen in rows.items()
    }
    pools = list(dict.fromkeys(group.pool for group in rows))
    lead = comparisons[0]["target"] if comparisons else first
    return {
        "config": config,
        "arms": arms,
        "groups": facts,
        "headline": [facts[keys[key]] for key in config.headline],
        "pools": {pool: [found for group, found in facts.items() if group.pool == pool] for pool in pools},
        "comparisons": comparisons,
        "seed_note": seed_note({arm.label: arm.num_seeds for arm in arms.values()}),
        "several_seeds": any(arm.num_seeds > 1 for arm in arms.values()),
        "lead": lead,
        "examples": {
            pool: data.examples([lead, *(arm for arm in arms.values() if arm is not lead)], pool, number, config.seed)
            for pool in pools
            if (number := config.examples_per_type)
        },
        "runs": [
            run_facts(f"{arm.label}, seed {seed}" if seed else arm.label, path)
            for arm in arms.values()
            for seed, path in enumerate(arm.directories)
        ],
    }


def results(report: dict[str, Any]) -> dict[str, Any]:
    """Every number, for programs; shares are from 0 to 1."""
    return {
        "title": report["config"].title,
        "confidence": report["config"].confidence,
        "num_seeds": {name: arm.num_seeds for name, arm in report["arms"].items()},
        "headline": [facts.group.key for facts in report["headline"]],
        "groups": [_group_results(facts) for facts in report["groups"].values()],
        "comparisons": [
            {
                "title": comparison["title"],
                "target": comparison["target"].name,
                "baseline": comparison["baseline"].name,
                **facts.group._asdict(),
                "target_accuracy": difference.target,
                "baseline_accuracy": difference.baseline,
                "difference": difference.difference._asdict(),
                "verdict": difference.verdict,
                "statement": difference.text,
            }
            for comparison in report["comparisons"]
            for facts in report["groups"].values()
            for difference in [facts.differences[comparison["target"].name, comparison["baseline"].name]]
        ],
    }


def _group_results(facts: GroupFacts) -> dict[str, Any]:
    return {
        **facts.group._asdict(),
        "num_questions": facts.num_questions,
        "num_images": facts.num_images,
        "chance": facts.chance,
        "majority": facts.majority,
        "majority_answer": facts.majority_answer,
        "arms": {
            name: {
                "accuracy": score.accuracy._asdict(),
                "blind": score.blind._asdict() if score.blind else None,
                "over_blind": score.over_blind._asdict() if score.over_blind else None,
                "verdict": score.verdict,
            }
            for name, score in facts.scores.items()
        },
    }


def headline_text(report: dict[str, Any]) -> str:
    """The headline results as a few lines of text."""
    lines = []
    for facts in report["headline"]:
        lines.append(
            f"{facts.group.key}: {facts.num_questions} questions, chance {100 * facts.chance:.1f} %, "
            f"always {facts.majority_answer!r} {100 * facts.majority:.1f} %"
        )
        for score in facts.scores.values():
            blind = f", blind {100 * score.blind.value:.1f} %" if score.blind else ""
            lines.append(f"  {score.label}: {interval(score.accuracy)} right{blind}; {score.verdict}")
        lines += [f"  {difference.text}" for difference in facts.differences.values()]
    if report["seed_note"]:
        lines.append(report["seed_note"])
    return "\n".join(lines)


def interval(share: Estimate) -> str:
    """A share in percent with its interval."""
    value, low, high = share.percent
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval answers-report`."""
    run(parse(argv))
