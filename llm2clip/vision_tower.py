"""A vision tower as a plain Hugging Face directory: read from any CLIP-like model, written for every transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llm2clip.run_dir import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

PREFIXED = {"clip_vision_model": "vision_model.", "siglip_vision_model": "vision_model."}
"""Model types whose tensors transformers 4.x expects below `vision_model.`; 5.x dropped that level but reads both. A
tower without the prefix loads in 4.x as a random one, with only a warning."""


def load_vision_model(clip: str, *, pooled: bool = False) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load the vision model and the image processor of a CLIP directory, or of a vision model's own.

    Args:
        clip: directory or hub id.
        pooled: whether ViT's pooler must be there; classifiers have none, and LLaVA reads none.

    Raises:
        ValueError: if there is no such model, no image processor beside it, or weights of its vision half are missing.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    import llm2clip.modeling_clip  # noqa: F401  # registers LLM2CLIPModel with AutoModel
    from llm2clip.clip_init import check_weights

    try:
        config = AutoConfig.from_pretrained(clip)
        processor = AutoImageProcessor.from_pretrained(clip)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{clip} holds no model with its image processor ({error}); expected config.json, model.safetensors and "
            "preprocessor_config.json, as train-clip writes them"
        ) from error
    model, info = AutoModel.from_pretrained(clip, output_loading_info=True)
    whole = "vision_config" in config.to_dict()
    part = "vision_model." if whole else ""
    check_weights(clip, model, info, part, unread=() if pooled else (f"{part}pooler.",))
    return (model.vision_model if whole else model).eval(), processor


def write_tower(vision_model: PreTrainedModel, processor: BaseImageProcessor, tower: Path) -> None:
    """Write config, weights and image processor so that transformers 4.57 and 5.x read all of it."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    config = vision_model.config
    # A fresh model: how save_pretrained names tensors depends on how the model at hand was once loaded.
    stock = AutoModel.from_config(config).to(vision_model.dtype)
    stock.load_state_dict(vision_model.state_dict())
    stock.save_pretrained(tower, max_shard_size="1TB")
    weights = tower / "model.safetensors"
    if prefix := PREFIXED.get(config.model_type):
        tensors = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
    settings = processor.to_dict()
    # Backend suffixes are of 5.x (Pil) or of 4.5x (Fast); the plain name exists in both.
    settings["image_processor_type"] = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    atomic_write(tower / "preprocessor_config.json", json.dumps(settings, indent=2, default=str) + "\n")
