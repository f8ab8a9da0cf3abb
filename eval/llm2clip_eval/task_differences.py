"""One candidate against the baseline in every task and on average: from paired runs to what a comparison says."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llm2clip_eval import paired_statistics as statistics
from llm2clip_eval.comparison import (
    CandidateComparison,
    CategoryDifference,
    MacroDifference,
    TaskDifference,
    Test,
    Verdict,
)
from llm2clip_eval.paired_statistics import Paired
from llm2clip_eval.task_metrics import Item, Measured, items_with
from llm2clip_eval.task_results import ArmRuns, TaskRun, labels_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to compare."""

    num_resamples: int = 10_000
    confidence: float = 0.95
    margin: float = 1.0
    """Of equivalence, in percent of a metric's range."""
    seed: int = 0
    allow_unseen: bool = False
    """Whether intervals allow for what was never seen (`paired_statistics.with_unseen`), as those of a gate must."""


@dataclass(frozen=True)
class Answers:
    """What both arms scored in one metric of one task."""

    run: TaskRun
    metric: str
    items: Sequence[Item]
    """Of the baseline's first model."""
    baseline: Sequence[Measured]
    """One entry per trained model, of the same items in the same order."""
    candidate: Sequence[Measured]
    same_models: bool

    @property
    def points(self) -> float:
        """What the metric is multiplied with to be in percent of its range."""
        return 100 * self.baseline[0].scale / self.baseline[0].best


def compare_arms(
    baseline: ArmRuns, candidate: ArmRuns, settings: Settings, metrics: Mapping[str, Sequence[str]] | None = None
) -> CandidateComparison:
    """Compare two arms whose items are in the same order.

    Args:
        baseline: as `task_results.align` returns it.
        candidate: likewise.
        settings: of the statistics.
        metrics: for a task the metrics that are compared instead of the headline one; the first counts in the average.

    Raises:
        ValueError: if a metric is not known, or does not come to what lmms-eval printed.
    """
    rows, headlines = [], []
    for task, runs in baseline.tasks.items():
        if runs[0].metric is None:
            logger.warning("%s is scored by a server; it is not compared", task)
            continue
        for number, metric in enumerate((metrics or {}).get(task, [runs[0].metric])):
            answers = Answers(
                run=runs[0],
                metric=metric,
                items=items_with(runs[0].items, metric),
                baseline=[run.measured(metric) for run in runs],
                candidate=[run.measured(metric) for run in candidate.tasks[task]],
                same_models=baseline.models == candidate.models,
            )
            rows.append(task_difference(answers, settings))
            if number == 0 and runs[0].judge is None:
                headlines.append(answers)
    return CandidateComparison(
        name=candidate.name,
        label=candidate.label,
        tasks=tuple(corrected(rows, settings.confidence)),
        macro=macro_difference(headlines, settings) if len(headlines) > 1 else None,
        num_seeds=len(candidate.models),
    )


def task_difference(answers: Answers, settings: Settings) -> TaskDifference:
    """One row, its p not yet corrected and without a verdict (`corrected`)."""
    first = answers.baseline[0]
    clusters = statistics.clusters_of(labels_of(answers.items, first))
    paired = Paired.of(answers.baseline, answers.candidate, clusters, same_models=answers.same_models)
    scale, margin = first.scale, settings.margin * first.best / 100
    baseline, candidate = (scale * value for value in paired.metrics())
    resampled = scale * _resampled(paired, settings)
    share = statistics.unseen_share([[paired]], size=len(resampled), seed=settings.seed)
    lost, won = statistics.with_unseen(resampled, first.best, share)
    low, high = _interval(resampled, (lost, won), settings)
    ours, theirs = (np.mean([m.scores for m in arm], axis=0) for arm in (answers.candidate, answers.baseline))
    wins, losses = _wins(ours, theirs)
    p, test = _test(answers, paired, resampled, candidate - baseline, settings)
    several = paired.num_models != (1, 1)
    mde = statistics.minimum_detectable(resampled, settings.confidence, long_tails=several)
    if not paired.is_itself:
        # If a share q of images differed, that n show none has probability (1 - q)^n.
        mde = max(mde, first.best * (1 - (1 - statistics.POWER) ** (1 / paired.num_clusters)))
    return TaskDifference(
        task=answers.run.task,
        metric=answers.metric,
        judge=answers.run.judge,
        scale=scale,
        num_items=len(answers.items),
        num_clusters=paired.num_clusters,
        baseline=baseline,
        candidate=candidate,
        difference=candidate - baseline,
        low=low,
        high=high,
        p=p,
        test=test,
        p_holm=p,
        mde=mde,
        wins=wins,
        losses=losses,
        ties=len(ours) - wins - losses,
        margin=margin,
        equivalence_p=statistics.equivalence_p(lost, won, margin),
        verdict="undecided",
        categories=_categories(answers, clusters, settings),
    )


def corrected(rows: Sequence[TaskDifference], confidence: float) -> list[TaskDifference]:
    """Holm's p and the verdicts; tasks scored by rule and tasks with a judge are two families."""
    p_holm: dict[int, float] = {}
    for is_judged in (False, True):
        family = [number for number, row in enumerate(rows) if (row.judge is not None) == is_judged]
        p_holm |= zip(family, statistics.holm([rows[number].p for number in family]), strict=True)
    return [
        replace(row, p_holm=p_holm[number], verdict=_verdict(replace(row, p_holm=p_holm[number]), 1 - confidence))
        for number, row in enumerate(rows)
    ]


def macro_difference(tasks: Sequence[Answers], settings: Settings) -> MacroDifference:
    """Mean over tasks, each in percent of its range, with the interval of a bootstrap stratified by task.

    Tasks that ask about the same images (POPE's three, the demo's kinds of questions) are drawn together, and so are
    a model's results in all tasks: a lucky draw of images or of a training seed is lucky in each of them.
    """
    values = np.array([_paired_alone(task).metrics() for task in tasks]) * np.array([[task.points] for task in tasks])
    metrics: list[tuple[np.ndarray, np.ndarray]] = []
    strata = _strata(tasks)
    for number, stratum in enumerate(strata):
        rng = np.random.default_rng([settings.seed, 3, number])
        found = statistics.resampled_metrics(
            [paired for _, paired in stratum], num_resamples=settings.num_resamples, rng=rng
        )
        metrics += [(a * task.points, b * task.points) for (task, _), (a, b) in zip(stratum, found, strict=True)]
    arms = [np.mean([both[arm] for both in metrics], axis=0) for arm in (0, 1)]
    resampled = statistics.seed_differences(*arms, seed=settings.seed, same_models=tasks[0].same_models)
    share = statistics.unseen_share(
        [[paired for _, paired in stratum] for stratum in strata], size=len(resampled), seed=settings.seed
    )
    low, high = _interval(resampled, statistics.with_unseen(resampled, 100, share), settings)
    baseline, candidate = values.mean(axis=0).tolist()
    return MacroDifference(
        num_tasks=len(tasks),
        baseline=baseline,
        candidate=candidate,
        difference=candidate - baseline,
        low=low,
        high=high,
        p=statistics.bootstrap_p(resampled, candidate - baseline),
    )


def _resampled(paired: Paired, settings: Settings) -> np.ndarray:
    return statistics.resampled_differences(paired, num_resamples=settings.num_resamples, seed=settings.seed)


def _interval(
    differences: np.ndarray, with_unseen: tuple[np.ndarray, np.ndarray], settings: Settings
) -> tuple[float, float]:
    for_low, for_high = with_unseen if settings.allow_unseen else (differences, differences)
    low, _ = statistics.interval(for_low, settings.confidence)
    _, high = statistics.interval(for_high, settings.confidence)
    return low, high


def _paired_alone(task: Answers) -> Paired:
    return Paired.of(task.baseline, task.candidate, np.arange(len(task.items)))


def _wins(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int]:
    difference = np.round(ours - theirs, 9)  # means over seeds of equal scores may differ in the last digit
    return int((difference > 0).sum()), int((difference < 0).sum())


def _test(
    answers: Answers, paired: Paired, resampled: np.ndarray, difference: float, settings: Settings
) -> tuple[float, Test]:
    """p and the test it is of.

    McNemar's is exact, but takes every answer for an observation of its own; where images have several questions the
    permutation test stands for it, and with several seeds, whose noise neither knows, the bootstrap with that noise.
    """
    if paired.num_models != (1, 1):
        return statistics.bootstrap_p(resampled, difference), "cluster bootstrap"
    ours, theirs = answers.candidate[0], answers.baseline[0]
    groups, rows = np.unique(theirs.groups, return_index=True)
    scores = np.stack([ours.scores[rows], theirs.scores[rows]])
    if theirs.is_mean and len(groups) == paired.num_clusters and np.isin(scores, (0, 1)).all():
        return statistics.mcnemar_p(*_wins(*scores)), "exact McNemar"
    p = statistics.sign_flip_p(paired, num_resamples=settings.num_resamples, seed=settings.seed)
    return p, "sign-flip permutation"


def _verdict(row: TaskDifference, alpha: float) -> Verdict:
    if row.p_holm < alpha and (row.low > 0 or row.high < 0):
        return "better" if row.low > 0 else "worse"
    return "equivalent" if row.equivalence_p < alpha else "undecided"


def _categories(answers: Answers, clusters: np.ndarray, settings: Settings) -> tuple[CategoryDifference, ...]:
    """One entry per category if items have any; a category's score is the metric of its items alone."""
    category = np.array([item["category"] or "" for item in answers.items])
    scale = answers.baseline[0].scale
    found = []
    for name in sorted(set(category.tolist()) - {""}):
        rows = category == name
        own = np.unique(clusters[rows], return_inverse=True)[1]
        arms = [
            [replace(m, statistics=m.statistics[rows]) for m in arm] for arm in (answers.baseline, answers.candidate)
        ]
        paired = Paired.of(arms[0], arms[1], own, same_models=answers.same_models)
        baseline, candidate = (scale * value for value in paired.metrics())
        low, high = statistics.interval(scale * _resampled(paired, settings), settings.confidence)
        found.append(CategoryDifference(name, int(rows.sum()), baseline, candidate, candidate - baseline, low, high))
    return tuple(found)


def _strata(tasks: Sequence[Answers]) -> list[list[tuple[Answers, Paired]]]:
    """Tasks that share images, over the same clusters."""
    labels = [
        [(kind, name if kind == "image" else (number, name)) for kind, name in of_item]
        for number, task in enumerate(tasks)
        for of_item in labels_of(task.items, task.baseline[0])
    ]
    ends = np.cumsum([len(task.items) for task in tasks])[:-1]
    clusters = np.split(statistics.clusters_of(labels), ends)
    stratum = statistics.clusters_of([of_task.tolist() for of_task in clusters])
    found = []
    for number in range(stratum.max() + 1):
        members = np.flatnonzero(stratum == number).tolist()
        names = np.unique(np.concatenate([clusters[member] for member in members]))
        found.append(
            [
                (
                    tasks[member],
                    Paired.of(
                        tasks[member].baseline,
                        tasks[member].candidate,
                        np.searchsorted(names, clusters[member]),
                        num_clusters=len(names),
                        same_models=tasks[member].same_models,
                    ),
                )
                for member in members
            ]
        )
    return found
