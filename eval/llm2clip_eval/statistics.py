"""Is a difference in recall real? A paired bootstrap over the queries of a pool.

The unit that is resampled is the image, with all its captions: both directions of one image are one observation
(cluster bootstrap; Efron & Tibshirani 1993, ch. 8 and 13). With several training seeds per arm the seeds are resampled
as well, independently in each arm (two-level bootstrap), so that the interval covers training noise.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    seeds = np.random.default_rng([seed, 1])
    differences = []
    for images in np.split(_image_draws(num_resamples, num_images, seed), range(CHUNK, num_resamples, CHUNK)):
        images = images.astype(float)  # (chunk, num_images)
        hits = images @ columns.T  # (chunk, 2 * num_models): found images and found captions of each model
        captions = images @ num_captions
        recall = 50 * (hits[:, 0::2] / num_images + hits[:, 1::2] / captions[:, None])  # (chunk, num_models)
        ours, theirs = recall[:, : len(target)], recall[:, len(target) :]
        differences.append(seed_mean(ours, seeds) - seed_mean(theirs, seeds))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(differences), [tail, 100 - tail])
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


def seed_mean(recall: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean over seeds drawn with replacement: (count, num_seeds) -> (count,)."""
    num_seeds = recall.shape[1]
    if num_seeds == 1:
        return recall[:, 0]
    return (recall * draw_counts(rng, len(recall), num_seeds)).mean(axis=1)


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
