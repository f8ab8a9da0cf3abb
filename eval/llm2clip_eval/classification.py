"""Accuracy of class scores: pure functions, with what every image got kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def label_ranks(scores: torch.Tensor, labels: np.ndarray, texts: np.ndarray | None = None) -> np.ndarray:
    """How many other classes score at least as high as the right one: a tie counts against it.

    Args:
        scores: (images, classes).
        labels: (images,).
        texts: (classes,) numbers that are equal for classes which no model can tell apart, as their texts are the
            same. Of such classes the first one is found, as by argmax: those after the right one do not count.
            Default: no two are.

    Returns:
        (images,) int64; 0 is right.

    Raises:
        ValueError: for scores that are not finite.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("scores of classes are not finite; the model's features hold NaN or infinity")
    right = torch.from_numpy(labels)[:, None]
    classes = torch.arange(scores.shape[1])
    same = classes if texts is None else torch.from_numpy(texts)
    behind = (same == same[right]) & (classes >= right)  # (images, classes): the right class, and its twins after it
    return ((scores >= scores.gather(1, right)) & ~behind).sum(dim=1).numpy()


def accuracies(ranks: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The figures of CLIP_benchmark, in percent.

    Args:
        ranks: (images,) 0-based rank of the right class.
        labels: (images,).

    Returns:
        `acc1`, `acc5` and `mean_per_class_recall`: the mean over the classes that occur of the share of their images
        that are right.
    """
    hits = ranks == 0
    counts = np.bincount(labels)
    right = np.bincount(labels, weights=hits, minlength=len(counts))
    present = counts > 0
    return {
        "acc1": float(100 * hits.mean()),
        "acc5": float(100 * (ranks < 5).mean()),
        "mean_per_class_recall": float(100 * (right[present] / counts[present]).mean()),
    }


def image_records(
    ids: Sequence[str], labels: np.ndarray, scores: torch.Tensor, ranks: np.ndarray
) -> list[dict[str, Any]]:
    """One record for each image: its id, label, prediction, the rank of its label, and whether it is right."""
    predictions = scores.argmax(dim=1).tolist()
    columns = zip(ids, labels.tolist(), predictions, ranks.tolist(), strict=True)
    return [
        {"id": name, "label": label, "prediction": prediction, "rank": rank, "correct": rank == 0}
        for name, label, prediction, rank in columns
    ]
