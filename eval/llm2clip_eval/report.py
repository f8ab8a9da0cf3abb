"""Command `report`: compare arms that were evaluated on the same pools.

Reads directories of `llm2clip-eval retrieval` (and, for curves and provenance, the training runs). Writes
`report.html` (one self-contained file), `report.md`, `summary.json` (all numbers) and `figures/`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_write, fingerprint

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ArmConfig:
    """One of the models that are compared."""

    results: list[Path]
    """Directories of llm2clip-eval retrieval, one per training seed."""
    clip: list[Path] = field(default_factory=list)
    """The train-clip runs that were evaluated, in the same order: for loss curves, cost and provenance."""
    label: str | None = None
    """What readers see; None: the arm's name."""
    note: str = ""
    """One sentence on what it is."""


@dataclass(kw_only=True)
class ComparisonConfig:
    """One arm set against others, on every pool."""

    target: str
    """Arm whose gain is asked for."""
    baselines: list[str]
    """Arms it is set against."""


@dataclass(kw_only=True)
class ReportConfig(StageConfig):
    """Compare arms: tables, paired bootstrap intervals, pictures; report.md and report.html."""

    arms: dict[str, ArmConfig]
    """Models by name, in the order of the tables."""
    comparisons: dict[str, ComparisonConfig]
    """What is set against what; the key says in what they are alike, such as: equal data, equal steps."""
    headline: list[str]
    """The results that were chosen before the run to stand for all: pool/kind, such as concepts/long."""
    headline_rule: str = ""
    """How and when they were chosen, in a sentence."""
    headline_at: list[int] = field(default_factory=list)
    """Further k at which the headline results are compared, beside R@1."""
    title: str = "Image-text retrieval"
    """Heading of the report."""
    pools: dict[str, str] = field(default_factory=dict)
    """What each pool asks, in a sentence; also their order. Pools that are not named come last."""
    cross_lingual_pools: list[str] = field(default_factory=list)
    """Names or shell patterns (lang_*) of pools in languages other than that of training; they get their own table."""
    remarks: list[str] = field(default_factory=list)
    """Sentences that stand below the headline."""
    teacher: Path | None = None
    """Directory of finetune-llm, for the LLM's caption retrieval accuracy before and after tuning."""
    stages: dict[str, Path] = field(default_factory=dict)
    """Further runs, by title, whose cost and provenance are listed."""
    num_neighbour_queries: int = 3
    """Captions per headline result whose five nearest images are shown for every arm; 0 for none."""
    num_resamples: int = 10_000
    """Bootstrap resamples."""
    confidence: float = 0.95
    """Coverage of the intervals."""
    seed: int = 0
    """Of the resampling."""

    def __post_init__(self) -> None:
        problems = []
        for name, arm in self.arms.items():
            if not arm.results:
                problems.append(f"arms.{name}.results: at least one directory of llm2clip-eval retrieval is needed")
            if arm.clip and len(arm.clip) != len(arm.results):
                problems.append(f"arms.{name}: {len(arm.clip)} clip runs for {len(arm.results)} results")
        for title, comparison in self.comparisons.items():
            for name in (comparison.target, *comparison.baselines):
                if name not in self.arms:
                    problems.append(f"comparisons.{title}: no arm {name!r}; there are {', '.join(self.arms)}")
        problems += [f"headline: {key!r} is not of the form pool/kind" for key in self.headline if key.count("/") != 1]
        if not self.arms:
            problems.append("arms: at least one is needed")
        if not 0 < self.confidence < 1:
            problems.append(f"confidence: {self.confidence} is not between 0 and 1")
        if self.num_resamples < 1:
            problems.append(f"num_resamples: {self.num_resamples} is not positive")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[ReportConfig]:
    """Read the configuration of a command line."""
    return parse_stage(ReportConfig, argv, prog="llm2clip-eval report")


def inputs(call: StageCall[ReportConfig]) -> dict[str, str]:
    """Fingerprints of all runs that are read."""
    config = call.config
    found = {f"stages.{title}": fingerprint(path) for title, path in config.stages.items()}
    for name, arm in config.arms.items():
        for kind, paths in (("results", arm.results), ("clip", arm.clip)):
            found |= {f"arms.{name}.{kind}.{number}": fingerprint(path) for number, path in enumerate(paths)}
    if config.teacher is not None:
        found["teacher"] = fingerprint(config.teacher)
    return found


def run(call: StageCall[ReportConfig]) -> None:
    """Collect, compare, write."""
    with RunDir(call, stage="report", inputs=inputs(call)) as run:
        if run.complete:
            logger.info("report: %s is complete", run.path)
            return
        from llm2clip_eval import figures, report_html

        report = collect(call.config)
        report["figures"] = figures.draw_all(report, run.path / "figures")
        atomic_write(run.path / "report.md", report_html.render("report.md.jinja", report))
        atomic_write(run.path / "report.html", report_html.render("report.html.jinja", report))
        atomic_write(run.path / "summary.json", json.dumps(summary(report), indent=2, ensure_ascii=False) + "\n")
        table = headline_table(report)
        logger.info("report: %s\n%s", run.path / "report.html", table)
        run.finish(outputs=["report.md", "report.html", "summary.json", "figures"], headline=table)


def collect(config: ReportConfig) -> dict[str, Any]:
    """Everything the report says.

    Raises:
        FileNotFoundError: if a run is missing or not complete.
        ValueError: if results do not belong together or a headline result is not among them.
    """
    from llm2clip_eval import neighbours
    from llm2clip_eval import report_data as data
    from llm2clip_eval.statistics import seed_note

    arms = {name: data.load_arm(name, arm.label or name, arm.results) for name, arm in config.arms.items()}
    data.check_same_queries(list(arms.values()))
    first = next(iter(arms.values()))
    order = {name: number for number, name in enumerate(config.pools)}
    keys = sorted(first.records, key=lambda key: (order.get(key[0], len(order)), key))
    headline = [(pool, kind) for pool, _, kind in (name.partition("/") for name in config.headline)]
    if missing := [key for key in headline if key not in keys]:
        there = ", ".join("/".join(key) for key in keys)
        raise ValueError(f"headline: no results for {', '.join('/'.join(key) for key in missing)}; there are {there}")
    bootstrap = {"num_resamples": config.num_resamples, "confidence": config.confidence, "seed": config.seed}
    comparisons = []
    for title, comparison in config.comparisons.items():
        for name in comparison.baselines:
            target, baseline = arms[comparison.target], arms[name]
            runs = config.arms[comparison.target].clip, config.arms[name].clip
            comparisons.append(
                {
                    "title": title,
                    "target": target,
                    "baseline": baseline,
                    "differences": {key: data.compare(target, baseline, key, **bootstrap) for key in keys},
                    "at_k": {
                        (key, k): data.compare(target, baseline, key, k=k, **bootstrap)
                        for key in headline
                        for k in config.headline_at
                    },
                    "settings": data.settings_that_differ(runs[0][0], runs[1][0]) if all(runs) else None,
                }
            )
    clip_runs = [
        (arms[name].label, seed, path) for name, arm in config.arms.items() for seed, path in enumerate(arm.clip)
    ]
    return {
        "config": config,
        "arms": arms,
        "split": first.records[keys[0]][0]["split"],
        "headline": headline,
        "keys": keys,
        "ks": data.recall_names(first.records[keys[0]][0]),
        "pools": {key: data.pool_facts(list(arms.values()), key, config.pools.get(key[0], "")) for key in keys},
        "cross_lingual": [key for key in keys if any(fnmatch(key[0], p) for p in config.cross_lingual_pools)],
        "comparisons": comparisons,
        "several_seeds": any(arm.num_seeds > 1 for arm in arms.values()),
        "seed_note": seed_note({arm.label: arm.num_seeds for arm in arms.values()}),
        "curves": [(label, seed, *data.loss_curve(path)) for label, seed, path in clip_runs],
        "runs": [data.run_facts(title, path) for title, path in config.stages.items()]
        + [data.run_facts(f"{label}, seed {seed}" if seed else label, path) for label, seed, path in clip_runs],
        "teacher": data.teacher_accuracy(config.teacher) if config.teacher else [],
        "neighbours": [
            neighbours.nearest(list(arms.values()), key, config.num_neighbour_queries)
            for key in headline
            if config.num_neighbour_queries
        ],
    }


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers and every comparison, for programs."""
    return {
        "title": report["config"].title,
        "split": report["split"],
        "headline": ["/".join(key) for key in report["headline"]],
        "num_seeds": {name: arm.num_seeds for name, arm in report["arms"].items()},
        "recall_at_1": {
            "/".join(key): {name: arm.recall(key, "mean") for name, arm in report["arms"].items()}
            for key in report["keys"]
        },
        "comparisons": [
            {
                "title": comparison["title"],
                "target": comparison["target"].name,
                "baseline": comparison["baseline"].name,
                "result": "/".join(key),
                "is_headline": key in report["headline"],
                "difference": difference.comparison.difference,
                "verdict": difference.comparison.verdict,
                **asdict(difference.comparison),
                "statement": difference.text,
            }
            for comparison in report["comparisons"]
            for key, difference in comparison["differences"].items()
        ],
        "headline_at": [
            {
                "result": "/".join(key),
                "k": k,
                "target": comparison["target"].name,
                "baseline": comparison["baseline"].name,
                **asdict(difference.comparison),
                "statement": difference.text,
            }
            for comparison in report["comparisons"]
            for (key, k), difference in comparison["at_k"].items()
        ],
    }


def headline_table(report: dict[str, Any]) -> str:
    """The headline results as a few lines of text."""
    lines = []
    for key in report["headline"]:
        scores = ", ".join(f"{arm.label} {arm.recall(key, 'mean'):.1f}" for arm in report["arms"].values())
        lines.append(f"{'/'.join(key)}: R@1 {scores}")
        for comparison in report["comparisons"]:
            further = [difference for (of, _), difference in comparison["at_k"].items() if of == key]
            lines += [f"  {difference.text}" for difference in (comparison["differences"][key], *further)]
    if report["seed_note"]:
        lines.append(report["seed_note"])
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval report`."""
    run(parse(argv))
