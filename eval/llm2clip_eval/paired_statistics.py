"""Is a difference in a task's metric real? Paired tests and intervals that compute the metric itself anew.

Answers about one image are no independent observations, so what is resampled, and what is swapped between the models,
is the cluster: images that are connected by being asked about together, with all their questions (Efron & Tibshirani
1993, ch. 8, 13 and 16). With several trained models per arm the noise of training is added (`statistics.over_seeds`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llm2clip_eval.statistics import CHUNK, draw_counts, over_seeds
from llm2clip_eval.task_metrics import Formula, Measured

POWER = 0.8
"""At which the minimum detectable difference is given."""
MAX_DRAWS = 20_000_000
"""Counts held at a time; bounds memory where there are very many clusters."""


@dataclass(frozen=True)
class Paired:
    """The answers of two arms to the same items, as sums that add up over clusters."""

    baseline: np.ndarray
    """(num_clusters, num_models, k)"""
    candidate: np.ndarray
    """(num_clusters, num_models, k)"""
    formula: Formula
    same_models: bool = False
    """Both arms are the very same trained models, so that noise of training is shared."""

    @classmethod
    def of(
        cls,
        baseline: Sequence[Measured],
        candidate: Sequence[Measured],
        clusters: np.ndarray,
        *,
        num_clusters: int | None = None,
        same_models: bool = False,
    ) -> Paired:
        """Add up over clusters.

        Args:
            baseline: one entry per trained model.
            candidate: one entry per trained model, of the same items in the same order.
            clusters: (num_items,) number of each item's cluster.
            num_clusters: if there are more than come up in `clusters`.
            same_models: see the field.
        """
        num = clusters.max() + 1 if num_clusters is None else num_clusters
        ours, theirs = (
            np.stack([_add_up(model.statistics, clusters, num) for model in models], axis=1)
            for models in (baseline, candidate)
        )
        return cls(ours, theirs, baseline[0].formula, same_models)

    @property
    def num_clusters(self) -> int:
        return len(self.baseline)

    @property
    def num_models(self) -> tuple[int, int]:
        """Trained models of baseline and candidate."""
        return self.baseline.shape[1], self.candidate.shape[1]

    def metrics(self) -> tuple[float, float]:
        """The metric of baseline and candidate, mean over their models."""
        baseline, candidate = (float(self.formula(arm.sum(axis=0)).mean()) for arm in (self.baseline, self.candidate))
        return baseline, candidate

    @property
    def is_itself(self) -> bool:
        """Whether both are the very same models with the very same results: they differ nowhere, seen or not."""
        return self.same_models and np.array_equal(self.baseline, self.candidate)


def clusters_of(labels: Sequence[Iterable[Hashable]]) -> np.ndarray:
    """Connect items that share a label, directly or through others.

    Args:
        labels: of each item: its images and its group. An item without any is its own cluster.

    Returns:
        (num_items,) numbers of clusters, from 0.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[Hashable, int] = {}
    pairs = [(item, numbers.setdefault(label, len(numbers))) for item, own in enumerate(labels) for label in own]
    items, columns = np.array(pairs, int).reshape(-1, 2).T
    size = len(labels) + len(numbers)
    graph = coo_array((np.ones(len(pairs), np.int8), (items, len(labels) + columns)), shape=(size, size))
    component = connected_components(graph, directed=False)[1][: len(labels)]
    return np.unique(component, return_inverse=True)[1]


def resampled_metrics(
    tasks: Sequence[Paired], *, num_resamples: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw clusters with replacement, the same for all tasks and models, and compute the metrics of each draw.

    Args:
        tasks: all of the same clusters; one that a task does not ask about has sums of 0 there.
        num_resamples: how often to draw.
        rng: where from.

    Returns:
        For every task (num_resamples, num_models) of the baseline and of the candidate.
    """
    num_clusters = tasks[0].num_clusters
    chunk = max(1, min(CHUNK, MAX_DRAWS // num_clusters))
    arms = [arm for task in tasks for arm in (task.baseline, task.candidate)]
    columns = np.concatenate([arm.reshape(num_clusters, -1) for arm in arms], axis=1)
    found = []
    for start in range(0, num_resamples, chunk):
        counts = draw_counts(rng, min(chunk, num_resamples - start), num_clusters).astype(float)
        found.append(counts @ columns)
    sums = np.split(np.concatenate(found), np.cumsum([arm[0].size for arm in arms])[:-1], axis=1)
    metrics = [
        tasks[number // 2].formula(part.reshape(num_resamples, *arm.shape[1:]))
        for number, (part, arm) in enumerate(zip(sums, arms, strict=True))
    ]
    both = zip(tasks, metrics[0::2], metrics[1::2], strict=True)
    # Equal columns of a matrix product may differ in the last digit; what is equal shall differ by exactly 0.
    return [
        (baseline, baseline if np.array_equal(task.baseline, task.candidate) else candidate)
        for task, baseline, candidate in both
    ]


def seed_differences(
    baseline: np.ndarray, candidate: np.ndarray, *, seed: int, same_models: bool = False
) -> np.ndarray:
    """Add the noise of training: (num_resamples, num_models) of both arms -> (num_resamples,) differences.

    Draws in which the metric has no value are left out.
    """
    has_value = np.isfinite(baseline).all(axis=1) & np.isfinite(candidate).all(axis=1)
    baseline, candidate = baseline[has_value], candidate[has_value]
    if same_models:
        return over_seeds(candidate - baseline, seed=seed)
    return over_seeds(candidate, baseline, seed=seed)


def resampled_differences(task: Paired, *, num_resamples: int, seed: int) -> np.ndarray:
    """(num_resamples,) differences, candidate minus baseline, of one task; the same `seed` gives the same ones."""
    rng = np.random.default_rng([seed, 0])
    baseline, candidate = resampled_metrics([task], num_resamples=num_resamples, rng=rng)[0]
    return seed_differences(baseline, candidate, seed=seed, same_models=task.same_models)


def with_unseen(differences: np.ndarray, best: float, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Allow for what no resample can show, as it was never seen: one more cluster that is all lost, or all won.

    Where few of n clusters differ, quantiles of a bootstrap lie too near to zero. A further loss whose share is drawn
    from Beta(1, n), as it would be for one cluster more in a Bayesian bootstrap, brings the lower end for a difference
    of shares close to the exact one (Fay & Lumbard 2021, Statistics in Medicine 40): to that of Clopper and Pearson
    where nothing is won, and to 1 - (1 - confidence)^(1 / n), which n clusters may hide, where nothing differs.

    Args:
        differences: (num_resamples,)
        best: highest possible metric; the lowest is 0.
        share: (num_resamples,) of the further cluster; see `unseen_share`.

    Returns:
        (num_resamples,) differences with a loss, for lower ends, and with a win, for upper ones.
    """
    return (1 - share) * differences - share * best, (1 - share) * differences + share * best


def unseen_share(strata: Sequence[Sequence[Paired]], *, size: int, seed: int) -> np.ndarray:
    """(size,) how much of a task, or of a mean over tasks, a further cluster is; 0 for a model against itself.

    Args:
        strata: tasks; those of one stratum are about the same clusters, so what is unseen in one is so in all.
        size: how many to draw.
        seed: of the draws.
    """
    tasks = [task for stratum in strata for task in stratum]
    if all(task.is_itself for task in tasks):
        return np.zeros(size)
    rng = np.random.default_rng([seed, 4])
    shares = [len(stratum) * rng.beta(1, stratum[0].num_clusters, size) for stratum in strata]
    return np.sum(shares, axis=0) / len(tasks)


def interval(differences: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentile interval of resampled differences."""
    low, high = np.percentile(differences, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def bootstrap_p(differences: np.ndarray, value: float) -> float:
    """Two-sided p: how often resampled differences lie as far from the found one as that lies from zero."""
    return _share_as_large(np.abs(differences - value), abs(value))


def sign_flip_p(task: Paired, *, num_resamples: int, seed: int) -> float:
    """Two-sided p of a permutation test: were it all one whose answers to a cluster are whose?

    Every cluster's answers are swapped between the arms or not, at random, and the metric computed anew. For a mean
    this flips the signs of the clusters' differences. One model per arm.
    """
    ours, theirs = task.candidate[:, 0], task.baseline[:, 0]
    difference = ours - theirs
    difference = difference[(difference != 0).any(axis=1)]  # (num that differ, k): the others change nothing
    total = ours.sum(axis=0) + theirs.sum(axis=0)
    if not len(difference):
        return 1.0
    rng = np.random.default_rng([seed, 2])
    found = []
    chunk = max(1, min(CHUNK, MAX_DRAWS // len(difference)))
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start), len(difference)
        moved = (2.0 * rng.integers(2, size=size, dtype=np.int8) - 1) @ difference
        found.append(task.formula((total + moved) / 2) - task.formula((total - moved) / 2))
    baseline, candidate = task.metrics()
    return _share_as_large(np.abs(np.concatenate(found)), abs(candidate - baseline))


def mcnemar_p(wins: int, losses: int) -> float:
    """Two-sided exact p that a discordant answer is a win as often as a loss; 1 if there is none."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p corrected for their number, in the order given (Holm 1979, Scand. J. Statist. 6)."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(order))
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.maximum.accumulate(np.minimum(1, factors * np.asarray(p_values, float)[order]))
    return corrected.tolist()


def minimum_detectable(differences: np.ndarray, confidence: float, *, long_tails: bool = False) -> float:
    """True difference that an interval of this coverage keeps apart from zero in 80 % of such tests.

    By normal approximation, from the standard deviation of resampled differences.

    Args:
        differences: (num_resamples,)
        confidence: coverage of the interval.
        long_tails: they hold noise of training, Student's, whose standard deviation may be infinite; the same two
            distances are then taken from quantiles.
    """
    from scipy.stats import norm

    if long_tails:
        return float(sum(np.ptp(interval(differences, level)) for level in (confidence, 2 * POWER - 1)) / 2)
    return float((norm.ppf((1 + confidence) / 2) + norm.ppf(POWER)) * differences.std(ddof=1))


def equivalence_p(lost: np.ndarray, won: np.ndarray, margin: float) -> float:
    """Two one-sided tests (TOST): the larger share of resampled differences beyond one end of ±margin.

    Args:
        lost: (num_resamples,) differences with what may be lost unseen (`with_unseen`).
        won: likewise, with what may be won.
        margin: smallest difference that counts.
    """
    above, below = (won >= margin).sum(), (lost <= -margin).sum()
    return float((1 + max(above, below)) / (1 + len(won)))


def _share_as_large(sizes: np.ndarray, found: float) -> float:
    # Sums of floats in another order: equal ones may differ in the last digits.
    return float((1 + (sizes >= found * (1 - 1e-9) - 1e-12).sum()) / (1 + len(sizes)))


def _add_up(statistics: np.ndarray, clusters: np.ndarray, num_clusters: int) -> np.ndarray:
    columns = [np.bincount(clusters, weights=column, minlength=num_clusters) for column in statistics.T]
    return np.stack(columns, axis=1)
