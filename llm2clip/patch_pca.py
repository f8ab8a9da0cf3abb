"""Start a ViT from scratch with the principal components of its patches instead of random filters.

A plain ViT spends its first hundreds of steps on finding out which directions of a 3 * 32 * 32 dimensional patch vary
at all. Whitened principal components give that away at the price of one small eigenproblem, which matters where the
whole training is a few hundred steps (first-layer whitening as in Jordan, arXiv 2404.00498, section 3.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

NUM_POWER_ITERATIONS = 3
REGULARIZATION = 0.05  # of the largest deviation: components far below it are noise and stay small
FLAT = 0.05  # standard deviation (of normalised pixels) below which a patch is background and says nothing


@torch.no_grad()
def init_patch_embedding(model: nn.Module, pixel_values: torch.Tensor) -> None:
    """Set a CLIP vision model's patch embedding to whitened principal components of its training images.

    The convolution has no bias, so the patches' mean is taken off through the position embedding.

    Args:
        model: holds one CLIP vision model.
        pixel_values: (batch, 3, size, size), normalised as for training; some hundreds of images that hold more
            patches with content than the model has dimensions.

    Raises:
        ValueError: if there are too few patches with content, or the vision model is not CLIP's.
    """
    found = [module for module in model.modules() if isinstance(module, CLIPVisionEmbeddings)]
    if len(found) != 1:
        raise ValueError("model.patch_init pca is for CLIP vision models; use random for others")
    convolution, positions = found[0].patch_embedding, found[0].position_embedding
    size, width = convolution.kernel_size[0], convolution.out_channels
    patches = F.unfold(pixel_values.float(), size, stride=size)  # (batch, 3 * size * size, num_patches)
    patches = patches.transpose(1, 2).flatten(0, 1)  # (batch * num_patches, 3 * size * size)
    contrast = patches.unflatten(1, (3, -1)).std(dim=2).mean(dim=1)
    patches = patches[contrast > FLAT]
    if len(patches) < 2 * width:
        raise ValueError(
            f"patch_init pca: {len(patches)} patches with content for {width} dimensions, expected at least "
            f"{2 * width}; use more images, a smaller hidden_size, or patch_init random"
        )
    mean = patches.mean(dim=0)
    with torch.random.fork_rng(devices=[]):  # the projection is random, but the model's own start must not move
        torch.manual_seed(0)
        _, singular, components = torch.pca_lowrank(
            patches - mean, q=min(width, patches.shape[1]), center=False, niter=NUM_POWER_ITERATIONS
        )
    deviation = singular / len(patches) ** 0.5  # (width,)
    filters = components.T / (deviation + REGULARIZATION * deviation[0])[:, None]
    convolution.weight[: len(filters)] = filters.view(-1, *convolution.weight.shape[1:]).to(convolution.weight)
    num_patches = (pixel_values.shape[-1] // size) ** 2
    positions.weight[-num_patches:] -= convolution.weight.flatten(1) @ mean.to(convolution.weight)
