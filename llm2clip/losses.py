"""Contrastive losses: pure functions of features, the rows of this process against the columns of all.

train-clip's objective is a weighted sum over `LOSSES`. In every function `logit_scale` is the multiplier, already
exponentiated (the models keep its logarithm), and gradients are to be averaged over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from llm2clip.distributed import all_gather_with_grad, rank


class Features(NamedTuple):
    """What a loss may look at."""

    image_features: torch.Tensor
    """(batch, dim), L2-normalised, requires grad."""
    text_features: torch.Tensor
    """(batch, dim), L2-normalised; row i is the caption of image i."""
    logit_scale: torch.Tensor
    """Scalar multiplier."""
    logit_bias: torch.Tensor | None = None
    """Scalar added to the logits; SigLIP only."""


def info_nce(queries: torch.Tensor, keys: torch.Tensor, logit_scale: torch.Tensor | float) -> torch.Tensor:
    """Cross-entropy of each query against the keys of all processes; the key of query i is row i.

    Args:
        queries: (batch, dim), L2-normalised.
        keys: (batch, dim), L2-normalised.
        logit_scale: multiplier of the cosines.

    Returns:
        Scalar, the mean over the queries of this process.
    """
    all_keys = all_gather_with_grad(keys.float())  # (world_size * batch, dim)
    logits = logit_scale * queries.float() @ all_keys.T  # (batch, world_size * batch)
    labels = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return F.cross_entropy(logits, labels)


def clip_loss(image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3): mean of image -> text and text -> image."""
    image_to_text = info_nce(image_features, text_features, logit_scale)
    text_to_image = info_nce(text_features, image_features, logit_scale)
    return (image_to_text + text_to_image) / 2


def sigmoid_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor, logit_bias: torch.Tensor
) -> torch.Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343, algorithm 1): every pair is a yes/no question.

    Returns:
        Scalar, the sum over all pairs of this process' images, divided by their number.
    """
    batch = len(image_features)
    all_text_features = all_gather_with_grad(text_features.float())  # (world_size * batch, dim)
    logits = logit_scale * image_features.float() @ all_text_features.T + logit_bias  # (batch, world_size * batch)
    signs = torch.full_like(logits, -1.0)
    own = torch.arange(batch, device=logits.device)
    signs[own, own + rank() * batch] = 1.0
    return -F.logsigmoid(signs * logits).sum() / batch


def _contrastive(features: Features) -> torch.Tensor:
    return clip_loss(features.image_features, features.text_features, features.logit_scale)


def _sigmoid(features: Features) -> torch.Tensor:
    assert features.logit_bias is not None  # train-clip gives the model one when this loss has a weight
    return sigmoid_loss(features.image_features, features.text_features, features.logit_scale, features.logit_bias)


LOSSES: dict[str, Callable[[Features], torch.Tensor]] = {"contrastive": _contrastive, "sigmoid": _sigmoid}


@torch.no_grad()
def in_batch_accuracy(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Share of right first choices within this process' batch, mean of image -> text and text -> image."""
    cosines = image_features.float() @ text_features.float().T
    labels = torch.arange(len(cosines), device=cosines.device)
    hits = (cosines.argmax(dim=1) == labels).float() + (cosines.argmax(dim=0) == labels).float()
    return hits.mean() / 2


class ClipObjective:
    """train-clip's objective: the weighted sum of `LOSSES`, and what is worth logging.

    Args:
        model: has `logit_scale` (log space), and `logit_bias` for the sigmoid loss.
        weights: loss name -> weight.
    """

    def __init__(self, model: Any, weights: Mapping[str, float]) -> None:
        self.model = model
        self.weights = {name: weight for name, weight in weights.items() if weight}

    def __call__(self, outputs: Any) -> dict[str, torch.Tensor]:
        """Named scalars of a model output with `image_embeds` and `text_embeds`; `loss` is the one to minimise."""
        features = Features(
            image_features=outputs.image_embeds,
            text_features=outputs.text_embeds,
            logit_scale=self.model.logit_scale.float().exp(),
            logit_bias=self.model.logit_bias if "sigmoid" in self.weights else None,
        )
        losses = {name: LOSSES[name](features) for name in self.weights}
        total = torch.stack([weight * losses[name] for name, weight in self.weights.items()]).sum()
        return {
            "loss": total,
            **({f"{name}_loss": loss for name, loss in losses.items()} if len(losses) > 1 else {}),
            "accuracy": in_batch_accuracy(features.image_features, features.text_features),
            "logit_scale": self.model.logit_scale,
        }
