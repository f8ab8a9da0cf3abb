"""Retrieval metrics: pure functions of features.

The rule for several captions per image is the field's (CLIP_benchmark, LLM2CLIP `zeroshot_retrieval.evaluate`): image
to text counts as found when *any* caption of the image is among the first k; text to image is counted per caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

TIE_TOLERANCE = 1e-6
"""Cosines closer than this are ties: about eight float32 roundings, so no rank hangs on the order of summation."""


@dataclass(frozen=True)
class RetrievalRanks:
    """Where the right answers came, for every query of a pool."""

    i2t_ranks: np.ndarray
    """(num_images,) 0-based rank of each image's best own caption among all captions."""
    t2i_ranks: np.ndarray
    """(num_captions,) 0-based rank of each caption's image among all images."""
    t2i_top: np.ndarray
    """(num_captions, top) indices of the images each caption finds, best first."""


def relevant_ranks(similarity: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Rank the best relevant candidate of every query, ties counted against it.

    Args:
        similarity: (num_queries, num_candidates), higher is closer.
        relevant: (num_queries, num_candidates) bool; at least one True per row.

    Returns:
        (num_queries,) int64: how many irrelevant candidates score at least as high, within `TIE_TOLERANCE`, as the
        best relevant one. A model that gives everything the same score is therefore last, not first.

    Raises:
        ValueError: for scores that are not finite or a query without a relevant candidate.
    """
    if not torch.isfinite(similarity).all():
        raise ValueError("similarities are not finite; the model's features hold NaN or infinity")
    if not relevant.any(dim=1).all():
        raise ValueError("a query has no relevant candidate: every image needs a caption and every caption an image")
    best = similarity.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best - TIE_TOLERANCE) & ~relevant).sum(dim=1)


def retrieval_ranks(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    caption_image: torch.Tensor,
    *,
    top: int = 5,
    chunk_size: int = 1024,
) -> RetrievalRanks:
    """Rank every image against all captions and every caption against all images.

    Args:
        image_features: (num_images, dim), L2-normalised.
        text_features: (num_captions, dim), L2-normalised.
        caption_image: (num_captions,) index of the image each caption belongs to; images may have different numbers.
        top: how many images to keep per caption in `t2i_top` (fewer where the pool is smaller).
        chunk_size: queries scored at a time, which bounds memory at `chunk_size * max(num_images, num_captions)`.
    """
    images = torch.arange(len(image_features))
    i2t = [
        relevant_ranks(image_features[rows] @ text_features.T, caption_image[None, :] == rows[:, None])
        for rows in images.split(chunk_size)
    ]
    t2i, found = [], []
    for rows in torch.arange(len(text_features)).split(chunk_size):
        similarity = text_features[rows] @ image_features.T  # (chunk, num_images)
        t2i.append(relevant_ranks(similarity, caption_image[rows][:, None] == images[None, :]))
        found.append(similarity.topk(min(top, len(images)), dim=1).indices)
    return RetrievalRanks(torch.cat(i2t).numpy(), torch.cat(t2i).numpy(), torch.cat(found).numpy())


def recall_at_k(ranks: Sequence[int] | np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries whose 0-based rank is below k, in percent, under the keys `R@1`, `R@5`, ..."""
    ranks = np.asarray(ranks)
    return {f"R@{k}": float(100 * np.mean(ranks < k)) for k in ks}
