"""Is a difference in recall real? A paired bootstrap over the queries of a pool.

The unit that is resampled is the image, with all its captions: both directions of one image are one observation
(cluster bootstrap; Efron & Tibshirani 1993, ch. 8 and 13). With several training seeds per arm the noise of training
is added (`over_seeds`), so that the interval covers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CHUNK = 500
"""Resamples worked on at a time; bounds memory."""


@dataclass(frozen=True)
class QueryHits:
    """What one trained model found in one pool, at one k."""

    i2t: np.ndarray
    """(num_images,) bool, image to text."""
    t2i: np.ndarray
    """(num_captions,) bool, text to image."""
    caption_image: np.ndarray
    """(num_captions,) index of each caption's image."""

    @classmethod
    def from_ranks(
        cls, i2t_ranks: Sequence[int], t2i_ranks: Sequence[int], caption_image: Sequence[int], k: int = 1
    ) -> QueryHits:
        """Hits at k from 0-based ranks."""
        return cls(np.asarray(i2t_ranks) < k, np.asarray(t2i_ranks) < k, np.asarray(caption_image))


@dataclass(frozen=True)
class Comparison:
    """The difference between two arms in percentage points, target minus baseline."""

    target_recall: float
    """Recall of the target in percent: mean of both directions, mean over its seeds."""
    baseline_recall: float
    low: float
    """Lower end of the interval of the difference."""
    high: float
    confidence: float
    num_images: int
    num_captions: int
    num_seeds: tuple[int, int]
    """Trained models of target and baseline."""
    wins: int
    """Queries (images and captions) that only the target answers, with several seeds in most of them."""
    losses: int
    """Queries only the baseline answers."""

    @property
    def difference(self) -> float:
        return self.target_recall - self.baseline_recall

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `undecided`: whether the interval excludes zero, and on which side."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


def paired_bootstrap(
    target: Sequence[QueryHits],
    baseline: Sequence[QueryHits],
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two arms on the same pool by percentile intervals of the resampled difference.

    Args:
        target: hits of the target arm, one entry per training seed.
        baseline: hits of the other arm on the same images and captions, one entry per training seed.
        num_resamples: bootstrap resamples.
        confidence: coverage of the interval.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: if the entries are not of one pool.
    """
    caption_image, num_images = target[0].caption_image, len(target[0].i2t)
    for hits in (*target, *baseline):
        if len(hits.i2t) != num_images or not np.array_equal(hits.caption_image, caption_image):
            raise ValueError("paired comparison of different pools: images or captions differ between the arms")
    num_captions = np.bincount(caption_image, minlength=num_images).astype(float)  # (num_images,)

    columns = np.concatenate([_per_image(target), _per_image(baseline)])  # (2 * num_models, num_images)
    recalls = []
    for images in np.split(_image_draws(num_resamples, num_images, seed), range(CHUNK, num_resamples, CHUNK)):
        images = images.astype(float)  # (chunk, num_images)
        hits = images @ columns.T  # (chunk, 2 * num_models): found images and found captions of each model
        captions = images @ num_captions
        recalls.append(50 * (hits[:, 0::2] / num_images + hits[:, 1::2] / captions[:, None]))  # (chunk, num_models)
    ours, theirs = np.split(np.concatenate(recalls), [len(target)], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(over_seeds(ours, theirs, seed=seed), [tail, 100 - tail])
    wins, losses = _discordant(target, baseline)
    return Comparison(
        target_recall=_recall(target),
        baseline_recall=_recall(baseline),
        low=float(low),
        high=float(high),
        confidence=confidence,
        num_images=num_images,
        num_captions=len(caption_image),
        num_seeds=(len(target), len(baseline)),
        wins=wins,
        losses=losses,
    )


def statement(comparison: Comparison, target: str, baseline: str, metric: str = "R@1") -> str:
    """Say what a comparison shows, in one sentence."""
    scores = f"{metric} {comparison.target_recall:.1f} against {comparison.baseline_recall:.1f}"
    interval = f"{100 * comparison.confidence:g} % interval {signed(comparison.low)} to {signed(comparison.high)}"
    if comparison.verdict != "undecided":
        size = f"{abs(comparison.difference):.1f} points"
        return f"{target} is {comparison.verdict} than {baseline} by {size} ({scores}; {interval}, excludes zero)."
    if comparison.low == comparison.high == 0:
        return f"{target} and {baseline} find exactly the same ({scores})."
    difference = f"{signed(comparison.difference)} points"
    return f"No difference shown between {target} and {baseline}: {difference} ({scores}; {interval}, includes zero)."


def signed(points: float) -> str:
    """A difference with one decimal, its sign always there: +1.5 or −1.5."""
    return f"{points:+.1f}".replace("-", "−")


def _per_image(models: Sequence[QueryHits]) -> np.ndarray:
    """(2 * num_models, num_images): for each model, whether an image found a caption, how many captions found it."""
    rows = []
    for hits in models:
        rows += [hits.i2t.astype(float), np.bincount(hits.caption_image, weights=hits.t2i, minlength=len(hits.i2t))]
    return np.stack(rows)


def over_seeds(target: np.ndarray, baseline: np.ndarray | None = None, *, seed: int) -> np.ndarray:
    """Mean over trained models in each resample of the images, or a difference of two, with the noise of training.

    Two or three seeds drawn with replacement vary too little, and how much they vary is itself hardly known. So the
    deviation that comes of training is drawn from Student's distribution, as in Welch's test (1947, Biometrika 34): of
    variance s² / n, added over arms, with Satterthwaite's degrees of freedom. Quantiles then hold at every level. What
    seeds and images do together counts twice, on the safe side. An arm trained once shows no noise, and adds none.

    Args:
        target: (num_resamples, num_seeds) metric of each trained model in each resample.
        baseline: likewise, of other trained models; it is subtracted.
        seed: of the draws.

    Returns:
        (num_resamples,)
    """
    arms = [target] if baseline is None else [target, -baseline]
    means = np.sum([arm.mean(axis=1) for arm in arms], axis=0)
    several = [arm for arm in arms if arm.shape[1] > 1]
    freedom = np.array([arm.shape[1] - 1 for arm in several])
    variances = np.array([arm.mean(axis=0).var(ddof=1) / arm.shape[1] for arm in several])  # of each arm's mean
    variance = variances.sum()
    if variance == 0:
        return means
    noise = np.random.default_rng([seed, 1]).standard_t(variance**2 / (variances**2 / freedom).sum(), len(means))
    return means + np.sqrt(variance) * noise


@lru_cache(maxsize=1)
def _image_draws(num_resamples: int, num_images: int, seed: int) -> np.ndarray:
    """The resamples of a pool's images; kept, as every comparison on a pool and mostly the next pool uses the same."""
    rng = np.random.default_rng([seed, 0])
    counts = [min(CHUNK, num_resamples - start) for start in range(0, num_resamples, CHUNK)]
    return np.concatenate([draw_counts(rng, count, num_images).astype(np.uint16) for count in counts])


def draw_counts(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """(count, size) how often each of `size` things comes up in `size` draws with replacement."""
    drawn = rng.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)


def _recall(models: Sequence[QueryHits]) -> float:
    return float(np.mean([50 * (hits.i2t.mean() + hits.t2i.mean()) for hits in models]))


def _discordant(target: Sequence[QueryHits], baseline: Sequence[QueryHits]) -> tuple[int, int]:
    """Queries only one side answers; a side with several seeds answers a query when most of them do."""
    ours, theirs = (
        np.mean([np.concatenate([hits.i2t, hits.t2i]) for hits in models], axis=0) > 0.5
        for models in (target, baseline)
    )
    return int((ours & ~theirs).sum()), int((theirs & ~ours).sum())


def seed_note(num_seeds: Mapping[str, int]) -> str:
    """Says which models, by label, were trained only once, and what that means; empty if none was."""
    once = [label for label, number in num_seeds.items() if number == 1]
    if not once:
        return ""
    if len(once) == len(num_seeds):
        return "One training seed per arm: the intervals cover the choice of test images, not training noise."
    return f"Trained once: {' and '.join(once)}. The intervals do not cover the noise of that training."
