"""Image features on disk, keyed by content: the weights, the transform and every image that made them.

A key holds no path and no time, so that other weights or images at the same path are never served from the cache, and
the same ones anywhere are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from llm2clip.images import ImageTransform
from llm2clip.run_dir import atomic_path
from llm2clip_eval.dual_encoder import DualEncoder, Images, encode_dataset

logger = logging.getLogger(__name__)

TENSOR = "image_features"
VERSION = 1
"""To be raised when the computation of features changes."""


def cached_features(
    cache: Path | None,
    compute: Callable[[], torch.Tensor],
    *,
    model: nn.Module,
    output: str,
    transform: ImageTransform,
    images: Images,
) -> torch.Tensor:
    """Read features from the cache, or compute and keep them.

    Args:
        cache: folder, made if it is not there; None computes.
        compute: gives the features.
        model: whose weights and configuration make the features.
        output: which of its outputs the features are, such as "projected".
        transform: what is done to the images.
        images: all of them, in order.

    Returns:
        (images, dim) float32, on the CPU.
    """
    if cache is None:
        return compute()
    path = cache / f"{feature_key(model, output, transform, images)}.safetensors"
    if path.is_file():
        features = load_file(path)[TENSOR]
        logger.info("image features: %d of %d dimensions read from %s", *features.shape, path)
        return features
    features = compute()
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file({TENSOR: features.contiguous()}, temporary)
    return features


def projected_features(
    encoder: DualEncoder, images: Images, *, batch_size: int, num_workers: int, cache: Path | None
) -> torch.Tensor:
    """Features that captions are compared with, from the cache where they are there.

    Args:
        encoder: whose images they are.
        images: all of them, in order.
        batch_size: images encoded at a time.
        num_workers: processes that decode images; 0 decodes in this one.
        cache: as in `cached_features`.

    Returns:
        (images, dim) float32, L2-normalised, on the CPU.
    """
    transform = encoder.image_transform
    return cached_features(
        cache,
        lambda: encode_dataset(
            images, transform, encoder.encode_image, batch_size=batch_size, num_workers=num_workers
        ),
        model=encoder.model,
        output="projected",
        transform=transform,
        images=images,
    )


def feature_key(model: nn.Module, output: str, transform: ImageTransform, images: Images) -> str:
    """sha256 over all that features depend on: weights, configuration, transform, images, versions and dtype."""
    digest = hashlib.sha256()
    facts = (VERSION, output, transform, torch.__version__, transformers.__version__, model.config.to_json_string())  # type: ignore[union-attr]
    digest.update(repr(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for index in range(len(images)):
        digest.update(hashlib.sha256(images.image_bytes(index)).digest())
    return digest.hexdigest()
