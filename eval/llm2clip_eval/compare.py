"""Stage `compare`: models that answered the same lmms-eval tasks are set against a baseline.

Reads runs of `llm2clip-eval lmms` (and, through them, how the models were made). Writes `comparison.json` (all
numbers) and the report: `report.html`, `report.md`, `table.csv`, `table.tex` and `figures/`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import MANIFEST, RunDir, atomic_write, fingerprint, read_manifest
from llm2clip_eval.comparison import NOT_RECORDED, Comparison

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import numpy
if TYPE_CHECKING:
    from llm2clip_eval.task_results import ArmRuns, TaskRun

logger = logging.getLogger(__name__)

COMPARISON = "comparison.json"
EARLIER = ("model", "trained", "pretrained")
"""Settings of `llm2clip-eval lmms` and of llava-bridge's stages that name what the run before has made."""
SEED = "seed"
"""Last part of settings in which models of one recipe may differ."""


@dataclass(kw_only=True)
class CandidateConfig:
    """One of the models that are set against the baseline."""

    results: list[Path]
    """Runs of llm2clip-eval lmms; several models are several training seeds."""
    label: str | None = None
    """What readers see; None: its name."""


@dataclass(kw_only=True)
class CompareConfig(StageConfig):
    """Compare models in lmms-eval tasks with a baseline: paired tests, intervals, report."""

    baseline: list[Path]
    """Runs of llm2clip-eval lmms of what the others are compared with; several models are several training seeds."""
    candidates: dict[str, CandidateConfig]
    """Models by name, in the order of the tables."""
    baseline_name: str = "baseline"
    """Its name beside those of the candidates."""
    baseline_label: str | None = None
    """What readers see; None: its name."""
    title: str = "Which vision tower is better?"
    """Heading of the report."""
    tasks: list[str] = field(default_factory=list)
    """Names or shell patterns of the tasks that are compared; empty: all, which every model must then have."""
    min_tasks: int = 1
    """Fewer tasks than this are an error."""
    metrics: dict[str, list[str]] = field(
        default_factory=lambda: {"mme": ["mme_perception_score", "mme_cognition_score"]}
    )
    """For a task the metrics that are compared instead of its headline one; the first counts in the average."""
    margin: float = 1.0
    """Differences smaller than this count as none; in percent of a metric's range, so 1 is 20 of MME's 2000 points."""
    num_resamples: int = 10_000
    """Bootstrap resamples, and swaps of the permutation test."""
    confidence: float = 0.95
    """Coverage of the intervals; 1 minus it is the level of the tests."""
    seed: int = 0
    """Of the resampling."""
    allow_differences: list[str] = field(default_factory=list)
    """What may differ between runs that are otherwise refused, such as torch; the report says so."""

    def __post_init__(self) -> None:
        problems = []
        if not self.baseline:
            problems.append("baseline: at least one run of llm2clip-eval lmms is needed")
        if not self.candidates:
            problems.append("candidates: at least one is needed")
        problems += [
            f"candidates.{name}.results: at least one run is needed"
            for name, c in self.candidates.items()
            if not c.results
        ]
        if self.baseline_name in self.candidates:
            problems.append(f"baseline_name: {self.baseline_name!r} is a candidate's name too")
        problems += [f"metrics.{task}: at least one is needed" for task, names in self.metrics.items() if not names]
        if not 0 < self.confidence < 1:
            problems.append(f"confidence: {self.confidence} is not between 0 and 1")
        if self.num_resamples < 100:
            problems.append(f"num_resamples: {self.num_resamples} is too few, expected 100 or more")
        if self.margin <= 0:
            problems.append(f"margin: {self.margin} is not positive")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[CompareConfig]:
    """Read the configuration of a command line."""
    return parse_stage(CompareConfig, argv, prog="llm2clip-eval compare")


def inputs(call: StageCall[CompareConfig]) -> dict[str, str]:
    """Fingerprints of all runs that are read."""
    config = call.config
    runs = {"baseline": config.baseline} | {f"candidates.{name}": c.results for name, c in config.candidates.items()}
    return {f"{name}.{number}": fingerprint(path) for name, paths in runs.items() for number, path in enumerate(paths)}


def run(call: StageCall[CompareConfig]) -> None:
    """Read, compare, write."""
    with RunDir(call, stage="compare", inputs=inputs(call)) as run:
        if run.complete:
            logger.info("compare: %s is complete", run.path)
            return
        from llm2clip_eval import comparison_page

        comparison, runs = collect(call.config)
        atomic_write(run.path / COMPARISON, json.dumps(asdict(comparison), indent=2, ensure_ascii=False) + "\n")
        comparison_page.write(comparison, runs, run.path)
        table = headline_table(comparison)
        logger.info("compare: %s\n%s", run.path / "report.html", table)
        outputs = [COMPARISON, "report.html", "report.md", "table.csv", "table.tex", "figures"]
        run.finish(outputs=outputs, headline=table)


def collect(config: CompareConfig) -> tuple[Comparison, list[TaskRun]]:
    """Everything the report says, and the runs it is about, with their items in one order.

    Raises:
        FileNotFoundError: if a run is missing or not complete.
        ValueError: if runs do not belong together, or a metric cannot be resampled.
    """
    from llm2clip_eval.task_differences import Settings, compare_arms
    from llm2clip_eval.task_results import align, load_arm

    settings = Settings(config.num_resamples, config.confidence, config.margin, config.seed)
    given = {config.baseline_name: CandidateConfig(results=config.baseline, label=config.baseline_label)}
    loaded = [load_arm(name, arm.label or name, arm.results) for name, arm in (given | config.candidates).items()]
    baseline, *candidates = align(loaded, config.tasks, config.allow_differences)
    if len(baseline.tasks) < config.min_tasks:
        raise ValueError(f"{len(baseline.tasks)} tasks to compare, expected at least {config.min_tasks} (min_tasks)")
    found = []
    for candidate in candidates:
        logger.info("compare: %s against %s in %d tasks", candidate.label, baseline.label, len(baseline.tasks))
        found.append(compare_arms(baseline, candidate, settings, config.metrics))
    arms = [baseline, *candidates]
    recipes = [recipe(arm) for arm in arms]
    comparison = Comparison(
        title=config.title,
        baseline=baseline.name,
        baseline_label=baseline.label,
        num_seeds=len(baseline.models),
        candidates=tuple(found),
        confidence=config.confidence,
        num_resamples=config.num_resamples,
        single_seed=any(len(arm.models) == 1 for arm in arms),
        recipe_differences={
            arm.name: differences(recipes[0], own) for arm, own in zip(candidates, recipes[1:], strict=True)
        },
        provenance=tuple(row for arm in arms for row in provenance(arm)),
        allowed_differences=tuple(config.allow_differences),
    )
    return comparison, [run for arm in arms for run in _runs(arm)]


def recipe(arm: ArmRuns) -> dict[str, str]:
    """How the models of an arm were made: setting to value; the values of all training seeds where they differ."""
    found = [recipe_of(run.directory) for run in {run.model_fingerprint: run for run in _runs(arm)}.values()]
    names = {name for of_model in found for name in of_model}
    return {name: "; ".join(sorted({of_model.get(name, "–") for of_model in found})) for name in names}


def recipe_of(answers: Path) -> dict[str, str]:
    """How a LLaVA was made: the settings of its export and of the stages before it, and what they read.

    Args:
        answers: run directory of `llm2clip-eval lmms`; each run names the one before it.

    Returns:
        Setting to value, without seeds. Where the run before is not there or no longer what was read, the recipe ends
        with a setting marked `NOT_RECORDED`, whose value has the fingerprint of what was read.
    """
    found: dict[str, str] = {}
    manifest: Mapping[str, Any] = read_manifest(answers)
    while before := next((name for name in EARLIER if manifest["settings"].get(name)), None):
        path, was = manifest["settings"][before], manifest["inputs"][before]
        maker = _maker(Path(path), was)
        if isinstance(maker, str):
            return found | {f"{manifest['stage']}: {before} {NOT_RECORDED}": f"{path}: {maker} ({was[:12]})"}
        manifest, stage = maker, maker["stage"]
        for name, value in manifest["settings"].items():
            if name not in EARLIER and name.rpartition(".")[2] != SEED:
                found[f"{stage}: {name}"] = str(value)
        for name, digest in manifest["inputs"].items():
            if name not in EARLIER:
                found[f"{stage}: content of {name}"] = digest[:12]
    return found


def _maker(path: Path, digest: str) -> Mapping[str, Any] | str:
    """Manifest of the run that made what is at `path`, or why it cannot be told.

    Args:
        path: a run directory, or the model in it.
        digest: fingerprint of what was read from there.
    """
    run = next((place for place in (path, path.parent) if (place / MANIFEST).is_file()), None)
    if not path.exists():
        return "not found"
    if run is None:
        return "of no complete run"
    return read_manifest(run) if fingerprint(path) == digest else "changed since"


def differences(baseline: Mapping[str, str], candidate: Mapping[str, str]) -> tuple[tuple[str, str, str], ...]:
    """(setting, baseline's value, candidate's value) of all that differs, and of what only one has."""
    return tuple(
        (name, baseline.get(name, "–"), candidate.get(name, "–"))
        for name in sorted(baseline.keys() | candidate.keys())
        if baseline.get(name) != candidate.get(name)
    )


def provenance(arm: ArmRuns) -> list[dict[str, Any]]:
    """One row per run directory of an arm."""
    from llm2clip_eval.report_data import run_facts

    rows = []
    for directory in dict.fromkeys(run.directory for run in _runs(arm)):
        facts = run_facts(arm.label, directory)
        of_run = [run for run in _runs(arm) if run.directory == directory]
        rows.append(
            {
                "label": arm.label,
                "name": arm.name,
                "seed": of_run[0].seed,
                "model_fingerprint": of_run[0].model_fingerprint,
                "directory": facts["directory"],
                "minutes": sum(run.seconds for run in of_run) / 60,
                "tasks": len(of_run),
                "commit": facts["commit"],
                "machine": facts["machine"],
                "versions": facts["versions"] | {"lmms_eval": of_run[0].identity["lmms_eval"]},
            }
        )
    return rows


def headline_table(comparison: Comparison) -> str:
    """Every task of every candidate, as fixed-width text."""
    percent = f"{100 * comparison.confidence:g} %"
    lines = [
        f"{'task':28} {'baseline':>9} {'model':>9} {'diff.':>8}  {f'{percent} interval':20} {'p Holm':>7}  verdict"
    ]
    for candidate in comparison.candidates:
        lines.append(f"{candidate.label} against {comparison.baseline_label}")
        for task in candidate.tasks:
            is_alone = [other.task for other in candidate.tasks].count(task.task) == 1
            name = (task.task if is_alone else task.metric) + (" (judge)" if task.judge else "")
            interval = f"{task.low:+.1f} to {task.high:+.1f}"
            lines.append(
                f"  {name:26} {task.baseline:9.1f} {task.candidate:9.1f} {task.difference:+8.1f}  {interval:20} "
                f"{_p(task.p_holm):>7}  {task.verdict}"
            )
        if macro := candidate.macro:
            interval = f"{macro.low:+.1f} to {macro.high:+.1f}"
            lines.append(
                f"  {f'mean of {macro.num_tasks} tasks':26} {macro.baseline:9.1f} {macro.candidate:9.1f} "
                f"{macro.difference:+8.1f}  {interval:20} {_p(macro.p):>7}  (p not corrected)"
            )
    if comparison.single_seed:
        lines.append("A model with a single training seed: the intervals do not cover the noise of training.")
    return "\n".join(lines)


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}"


def _runs(arm: ArmRuns) -> list[TaskRun]:
    return [run for runs in arm.tasks.values() for run in runs]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval compare`."""
    run(parse(argv))
