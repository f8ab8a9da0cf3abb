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
    chunk_size: int = 2048,
) -> RetrievalRanks:
    """Rank every image against all captions and every caption against all images, ties as in `relevant_ranks`.

    Similarities are made in tiles, each of which serves both directions: there are never more than `chunk_size` ** 2
    of them, however large the pool.

    Args:
        image_features: (num_images, dim), L2-normalised.
        text_features: (num_captions, dim), L2-normalised.
        caption_image: (num_captions,) index of the image each caption belongs to; images may have different numbers.
        top: how many images to keep per caption in `t2i_top` (fewer where the pool is smaller).
        chunk_size: images and captions in a tile.

    Raises:
        ValueError: for features that are not finite, captions without an image of the pool, or images without caption.
    """
    num_images, num_captions = len(image_features), len(text_features)
    if not (torch.isfinite(image_features).all() and torch.isfinite(text_features).all()):
        raise ValueError("similarities are not finite; the model's features hold NaN or infinity")
    counts = torch.bincount(caption_image, minlength=num_images)
    if len(counts) > num_images or len(caption_image) != num_captions or not counts.all():
        raise ValueError(
            f"{num_captions} captions of {num_images} images: no relevant candidate for {int((counts == 0).sum())} "
            f"images, {int(counts[num_images:].sum())} captions of images that are not there; every image needs a "
            "caption and every caption an image"
        )
    own = torch.cat(  # (num_captions,) similarity of each caption and its image
        [
            (text_features[rows] * image_features[caption_image[rows]]).sum(dim=1)
            for rows in torch.arange(num_captions).split(chunk_size)
        ]
    )
    best = own.new_full((num_images,), -torch.inf).scatter_reduce(0, caption_image, own, "amax")
    i2t = torch.zeros(num_images, dtype=torch.int64)
    t2i = torch.zeros(num_captions, dtype=torch.int64)
    found = []
    for captions in torch.arange(num_captions).split(chunk_size):
        top_scores, top_images = own.new_empty(len(captions), 0), captions.new_empty(len(captions), 0)
        for images in torch.arange(num_images).split(chunk_size):
            tile = text_features[captions] @ image_features[images].T
            top_scores, order = torch.cat([top_scores, tile], 1).topk(min(top, top_scores.shape[1] + len(images)), 1)
            top_images = torch.cat([top_images, images.expand(len(captions), -1)], 1).gather(1, order)
            irrelevant = caption_image[captions][:, None] != images[None]
            t2i[captions] += ((tile >= own[captions][:, None] - TIE_TOLERANCE) & irrelevant).sum(dim=1)
            i2t[images] += ((tile >= best[images] - TIE_TOLERANCE) & irrelevant).sum(dim=0)
        found.append(top_images)
    return RetrievalRanks(i2t.numpy(), t2i.numpy(), torch.cat(found).numpy())


def recall_at_k(ranks: Sequence[int] | np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries whose 0-based rank is below k, in percent, under the keys `R@1`, `R@5`, ..."""
    ranks = np.asarray(ranks)
    return {f"R@{k}": float(100 * np.mean(ranks < k)) for k in ks}
