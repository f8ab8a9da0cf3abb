"""How sure is an accuracy, and is a difference between two of them real? A cluster bootstrap over images.

Questions about one image are no independent observations, so images are resampled, each with all its questions (Efron
& Tibshirani 1993, ch. 8 and 13). All arms, and each arm seeing and blind, share the resamples: every difference is
paired. With several trained models per arm the noise of training is added (`statistics.over_seeds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm2clip_eval.statistics import CHUNK, draw_counts, over_seeds, signed


class Estimate(NamedTuple):
    """A share, or a difference of shares, with its interval."""

    value: float
    low: float
    high: float

    @property
    def percent(self) -> Estimate:
        """In percent, or in percentage points."""
        return Estimate(*(100 * part for part in self))

    def against(self, bar: float) -> str:
        """`above` or `below` if the whole interval is, else `undecided`."""
        return "above" if self.low > bar else "below" if self.high < bar else "undecided"


class ClusterBootstrap:
    """Percentile intervals of mean scores over one set of questions.

    Args:
        scores: by name, (num_models, num_questions) what each model of an arm scored: 1 right, 0 wrong.
        clusters: (num_questions,) the image of each question; any hashable, comparable labels.
        num_resamples: bootstrap resamples.
        confidence: coverage of the intervals.
        seed: of the resampling; the same seed gives the same intervals.
    """

    def __init__(
        self,
        scores: Mapping[str, np.ndarray],
        clusters: Sequence[str] | np.ndarray,
        *,
        num_resamples: int = 10_000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.scores = scores
        self.tails = [50 * (1 - confidence), 50 * (1 + confidence)]
        self.seed = seed
        self._resampled = _resampled_means(scores, clusters, num_resamples, seed)

    def mean(self, name: str) -> Estimate:
        """Mean score, over questions and models."""
        return self._estimate(float(self.scores[name].mean()), over_seeds(self._resampled[name], seed=self.seed))

    def difference(self, target: str, baseline: str, *, same_models: bool = False) -> Estimate:
        """Mean score of one minus that of another.

        Args:
            target: name of the one.
            baseline: name of the other.
            same_models: both are of the same trained models, in the same order, so that noise of training is shared.
        """
        value = float(self.scores[target].mean()) - float(self.scores[baseline].mean())
        ours, theirs = self._resampled[target], self._resampled[baseline]
        arms = (ours - theirs,) if same_models else (ours, theirs)
        return self._estimate(value, over_seeds(*arms, seed=self.seed))

    def _estimate(self, value: float, resampled: np.ndarray) -> Estimate:
        low, high = np.percentile(resampled, self.tails)
        return Estimate(value, float(low), float(high))


def _resampled_means(
    scores: Mapping[str, np.ndarray], clusters: Sequence[str] | np.ndarray, num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """By name, (num_resamples, num_models): means over questions of images drawn with replacement."""
    labels, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    columns = np.concatenate([*scores.values()]).astype(float)  # (num_columns, num_questions)
    if columns.shape[1] != len(cluster):
        raise ValueError(f"scores of {columns.shape[1]} questions, clusters of {len(cluster)}")
    sums = np.stack([np.bincount(cluster, weights=column, minlength=len(labels)) for column in columns], axis=1)
    sizes = np.bincount(cluster).astype(float)  # (num_clusters,)
    rng = np.random.default_rng([seed, 0])
    means = []
    for start in range(0, num_resamples, CHUNK):
        draws = draw_counts(rng, min(CHUNK, num_resamples - start), len(labels)).astype(float)
        means.append(draws @ sums / (draws @ sizes)[:, None])  # (chunk, num_columns)
    ends = np.cumsum([len(models) for models in scores.values()])[:-1]
    return dict(zip(scores, np.split(np.concatenate(means), ends, axis=1), strict=True))


def verdict(accuracy: Estimate, bar: float, over_blind: Estimate | None) -> str:
    """What an accuracy shows, in words.

    Args:
        accuracy: of the model that sees the images.
        bar: what needs no model: chance, or the best constant answer if that is better.
        over_blind: accuracy minus that of the same model blind, paired; None if it was not asked.
    """
    words = {"above": "above", "below": "below", "undecided": "not shown to be above"}
    text = f"{words[accuracy.against(bar)]} chance"
    if over_blind is None:
        return f"{text}; no blind baseline"
    blind = words[over_blind.against(0)]
    joint = "but" if (accuracy.against(bar) == "above") != (blind == "above") else "and"
    return f"{text} {joint} {blind} the blind baseline"


def statement(target: str, baseline: str, scores: tuple[float, float], difference: Estimate, confidence: float) -> str:
    """Say what a comparison of two arms shows, in one sentence.

    Args:
        target: label of the one.
        baseline: label of the other.
        scores: their accuracies.
        difference: the one's minus the other's.
        confidence: coverage of its interval.
    """
    value, low, high = difference.percent
    against = f"{100 * scores[0]:.1f} % against {100 * scores[1]:.1f} %"
    interval = f"{100 * confidence:g} % interval {signed(low)} to {signed(high)}"
    found = difference.against(0)
    if found != "undecided":
        better = {"above": "better", "below": "worse"}[found]
        return (
            f"{target} is {better} than {baseline} by {abs(value):.1f} points ({against}; {interval}, excludes zero)."
        )
    if low == high == 0:
        return f"{target} and {baseline} are right equally often on every image ({against})."
    return (
        f"No difference shown between {target} and {baseline}: {signed(value)} points "
        f"({against}; {interval}, includes zero)."
    )
