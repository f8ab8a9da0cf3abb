"""The little that the losses need to know about other processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_gather_tensor_autograd


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate `tensor` of all processes in rank order; gradients flow back to the process a row came from.

    The backward pass sums what all processes send back. With losses that are means over a process' own rows, and
    gradients averaged over processes (DDP, DeepSpeed), that is exactly the gradient of the global batch. A gather
    without gradient leaves the loss value as it is and gets the gradient wrong, so there is no such option.

    Args:
        tensor: (batch, ...), the same shape in every process.

    Returns:
        (world_size * batch, ...), the tensor itself if there is one process.
    """
    if world_size() == 1:
        return tensor
    return all_gather_tensor_autograd(tensor.contiguous(), 0, dist.group.WORLD)  # type: ignore[arg-type]
