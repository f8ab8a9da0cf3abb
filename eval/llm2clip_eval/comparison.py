"""What `llm2clip-eval compare` finds out, as plain data: the page lays it out, `comparison.json` stores it.

Scores, differences and their intervals are in the metric's own unit times `scale`: percent for shares, points for MME.
A difference is the candidate's score minus the baseline's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Judge = Literal["llm", "server"]
"""Who scores a task's answers if lmms-eval cannot do so by itself."""
Test = Literal["exact McNemar", "sign-flip permutation", "cluster bootstrap"]
Verdict = Literal["better", "worse", "equivalent", "undecided"]
NOT_RECORDED = "(not recorded)"
"""Ends the name of a setting that stands for a run of which nothing more is known: it is gone, or another one now."""


@dataclass(frozen=True)
class CategoryDifference:
    """One category of a task's items, such as a language or a skill."""

    name: str
    num_items: int
    baseline: float
    candidate: float
    difference: float
    low: float
    """Lower end of the interval of the difference."""
    high: float


@dataclass(frozen=True)
class TaskDifference:
    """One candidate against the baseline in one task."""

    task: str
    metric: str
    """The headline metric, as lmms-eval calls it."""
    judge: Judge | None
    """None: scored by rule. Tasks with a judge are listed apart and are in no average."""
    scale: float
    """What the metric was multiplied with: 100 for shares, 1 for points."""
    num_items: int
    num_clusters: int
    """Independent observations: connected images, with all questions about them."""
    baseline: float
    """Mean over seeds."""
    candidate: float
    difference: float
    low: float
    high: float
    p: float
    """Two-sided, not corrected."""
    test: Test
    p_holm: float
    """Corrected for the number of tasks by Holm's method, within this candidate and kind of judge."""
    mde: float
    """Minimum detectable difference: found with 80 % power at this size of test; unit of the metric."""
    wins: int
    """Items that the candidate scores higher on, with several seeds on average."""
    losses: int
    ties: int
    margin: float
    """Differences smaller than this count as none; unit of the metric."""
    equivalence_p: float
    """TOST: how likely so small a difference were if the true one were as large as the margin."""
    verdict: Verdict
    categories: tuple[CategoryDifference, ...]


@dataclass(frozen=True)
class MacroDifference:
    """Mean over tasks without a judge, each in percent of its own range."""

    num_tasks: int
    baseline: float
    candidate: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class CandidateComparison:
    """One candidate against the baseline in every task."""

    name: str
    label: str
    tasks: tuple[TaskDifference, ...]
    macro: MacroDifference | None
    """None if there are fewer than two tasks without a judge."""
    num_seeds: int


@dataclass(frozen=True)
class Comparison:
    """Everything that a report shows."""

    title: str
    baseline: str
    """Name of the model that the others are compared with."""
    baseline_label: str
    num_seeds: int
    """Trained models of the baseline."""
    candidates: tuple[CandidateComparison, ...]
    confidence: float
    """Coverage of the intervals."""
    num_resamples: int
    single_seed: bool
    """Whether some model was trained only once: intervals then do not cover the noise of training."""
    recipe_differences: Mapping[str, tuple[tuple[str, str, str], ...]]
    """For each candidate what its models were made with that the baseline's were not: setting, baseline, candidate.
    Values of several training seeds are in one, seeds themselves left out."""
    provenance: tuple[Mapping[str, Any], ...]
    """One row per run: `label`, `name`, `seed`, `model_fingerprint`, `directory`, `minutes`, `commit`, `machine` and
    `versions` (a mapping from package to version)."""
    allowed_differences: tuple[str, ...] = ()
    """Settings in which the runs may differ because the user said so, though such runs are otherwise refused."""
