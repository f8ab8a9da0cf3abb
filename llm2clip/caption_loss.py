"""The caption-to-caption contrastive loss: a pure function of embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llm2clip.distributed import all_gather_with_grad, rank


@dataclass(kw_only=True)
class PairFeatures:
    """One process' embeddings and what tells false negatives; numbers stand for texts and images, 0 for none."""

    queries: torch.Tensor
    """(batch, dim)."""
    positives: torch.Tensor
    """(batch, dim)."""
    negatives: torch.Tensor | None
    """(batch, dim), or None if no example has one."""
    query_keys: torch.Tensor
    """(batch,) int64, equal for equal texts."""
    positive_keys: torch.Tensor
    """(batch,)."""
    negative_keys: torch.Tensor
    """(batch,); 0 where an example has no negative: that row is ignored."""
    groups: torch.Tensor
    """(batch,) int64, equal for captions of one image."""
    negative_groups: torch.Tensor
    """(batch,) the image that the negative belongs to."""


def caption_loss(
    features: PairFeatures, *, scale: float, symmetric: bool, mask_false_negatives: bool
) -> dict[str, torch.Tensor]:
    """Cross-entropy of each query over the positives and negatives of all processes.

    Args:
        features: embeddings of this process; they need no normalisation.
        scale: multiplier of the cosines.
        symmetric: also rank the queries of all processes for each positive, and take the mean of both.
        mask_false_negatives: leave out candidates with the text of the query or its positive, or of the same image.

    Returns:
        `loss`, the mean over this process' queries, and `accuracy`, the share whose positive ranks first.
    """
    queries = F.normalize(features.queries.float(), dim=-1)
    positives = F.normalize(features.positives.float(), dim=-1)
    own = torch.stack([features.query_keys, features.positive_keys])  # (2, batch)
    positive_keys, groups = all_gather_with_grad(features.positive_keys), all_gather_with_grad(features.groups)
    candidates, keys, candidate_groups = all_gather_with_grad(positives), positive_keys, groups
    if features.negatives is not None:
        negatives = F.normalize(features.negatives.float(), dim=-1)
        candidates = torch.cat([candidates, all_gather_with_grad(negatives)])  # (2 * world_size * batch, dim)
        keys = torch.cat([keys, all_gather_with_grad(features.negative_keys)])
        candidate_groups = torch.cat([candidate_groups, all_gather_with_grad(features.negative_groups)])
    labels = torch.arange(len(queries), device=queries.device) + rank() * len(queries)

    def excluded(candidate_keys: torch.Tensor, candidate_groups: torch.Tensor) -> torch.Tensor:
        missing = (candidate_keys == 0).expand(len(queries), -1)
        if not mask_false_negatives:
            return missing
        same_text = (own[:, :, None] == candidate_keys).any(dim=0)
        same_group = features.groups[:, None] == candidate_groups
        false_negative = same_text | same_group  # (batch, candidates)
        return missing | false_negative.scatter(1, labels[:, None], False)

    logits = (scale * queries @ candidates.T).masked_fill(excluded(keys, candidate_groups), -torch.inf)
    loss = F.cross_entropy(logits, labels)
    if symmetric:
        backward = scale * positives @ all_gather_with_grad(queries).T  # (batch, world_size * batch)
        query_keys = all_gather_with_grad(features.query_keys)
        loss = (loss + F.cross_entropy(backward.masked_fill(excluded(query_keys, groups), -torch.inf), labels)) / 2
    return {"loss": loss, "accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}
