"""Where a CLIP model starts from: a vision tower, a CLIP or LLM2CLIP directory, or nothing; and what its parts are."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm2clip.images import ImageTransform
from llm2clip.modeling_clip import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip.run_dir import IDENTITY, read_manifest

logger = logging.getLogger(__name__)

PARTS = {
    "vision_model": "vision",
    "visual_projection": "projection",
    "text_adapter": "text",
    "text_model": "text",
    "text_projection": "text",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_scale",
}
"""First component of a parameter's name -> part that has a learning rate and can be frozen."""

SIGLIP_BIAS = -10.0  # SigLIP, arXiv 2303.15343, section 3.2


def part_of(name: str) -> str:
    """Part of the model that a parameter belongs to, see `PARTS`."""
    return PARTS[name.partition(".")[0]]


def freeze(model: nn.Module, parts: Collection[str]) -> None:
    """Stop the training of whole parts."""
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def vision_layer(name: str, num_layers: int) -> int:
    """Depth of a vision model's parameter, for layer decay.

    0 for the embeddings and the norm in front of the blocks, i + 1 for block i, num_layers + 1 for what comes after
    the blocks. The original has the same mapping, but by oversight leaves `class_embedding` and `ln_pre` of OpenAI's
    ViT at the full learning rate.
    """
    if found := re.search(r"\.layers?\.(\d+)\.", name):
        return int(found.group(1)) + 1
    return 0 if "embeddings." in name or "pre_layrnorm" in name else num_layers + 1


def learning_rate_scale(
    learning_rates: Mapping[str, float], base: float, layer_decay: float, num_layers: int
) -> Callable[[str], float]:
    """Factors on the base learning rate by parameter name.

    Args:
        learning_rates: part -> learning rate.
        base: what the factors are relative to.
        layer_decay: the vision model's layer l gets decay^(num_layers + 1 - l) of its part's rate (run.sh of LLM2CLIP:
            0.85, so 0.0172 for the embeddings of a ViT-L).
        num_layers: blocks of the vision model.
    """

    def scale(name: str) -> float:
        part = part_of(name)
        factor = learning_rates[part] / base
        if part == "vision":
            factor *= layer_decay ** (num_layers + 1 - vision_layer(name, num_layers))
        return factor

    return scale


def read_config(path: str) -> PretrainedConfig:
    """Configuration of a model directory (or hub id), before any weight is loaded.

    Raises:
        FileNotFoundError: if it is an unfinished run, or holds no model.
    """
    if (Path(path) / IDENTITY).is_file():
        read_manifest(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path} holds no model ({error}); expected a directory of train-clip or export, or any CLIP or vision "
            "model of transformers"
        ) from error


def load_model(path: str, model_class: Any = AutoModel) -> Any:
    """Load a model in float32, all of it.

    Raises:
        ValueError: if tensors are missing or have other shapes.
    """
    model, info = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    check_weights(path, model, info)
    return model


def check_weights(
    path: str, model: nn.Module, info: Mapping[str, Any], part: str = "", unread: tuple[str, ...] = ()
) -> None:
    """Refuse weights that do not fit a model: transformers would only warn, and go on with random ones.

    Args:
        path: where they come from.
        model: that was loaded.
        info: what `from_pretrained` told with `output_loading_info`.
        part: how the names begin that matter.
        unread: how names among them begin that do not.

    Raises:
        ValueError: if tensors are missing or have other shapes.
    """
    for kind in ("missing_keys", "mismatched_keys"):
        names = {key if isinstance(key, str) else key[0] for key in info[kind]}  # the latter come with their shapes
        if bad := sorted(name for name in names if name.startswith(part) and not name.startswith(unread)):
            raise ValueError(
                f"{path}: {len(bad)} {kind.replace('_', ' ')} for {type(model).__name__}, such as {bad[0]}; "
                "the weights are not of this model, or of another transformers, or their download is not complete"
            )


def init_llm2clip(path: str | None, config: LLM2CLIPConfig) -> LLM2CLIPModel:
    """An `LLM2CLIPModel` that starts from `path`, or from scratch.

    Of an LLM2CLIP directory everything is kept. Of a CLIP directory the vision model and the logit scale are kept, of
    a vision tower the vision model; visual projection and adapter are new then, as in the paper. A logit bias that no
    loss reads is kept, but not trained.

    Args:
        path: directory or hub id, None to start from `config.vision_config` with random weights.
        config: what to build; its vision_config is replaced by that of `path`.

    Raises:
        ValueError: if an LLM2CLIP directory has other settings than `config`.
    """
    if path is None:
        return LLM2CLIPModel(config)
    found = read_config(path)
    if isinstance(found, LLM2CLIPConfig):
        _require_equal(path, found, config)
        model = load_model(path, LLM2CLIPModel)
        if model.logit_bias is not None and config.logit_bias_init_value is None:
            model.logit_bias.requires_grad_(False)  # else DDP waits for its gradient
        return model
    source = load_model(path)
    is_clip = hasattr(found, "vision_config")
    vision_model = source.vision_model if is_clip else source
    config.vision_config = vision_model.config
    if is_clip:
        config.logit_scale_init_value = source.logit_scale.item()
        if config.logit_bias_init_value is not None and hasattr(source, "logit_bias"):  # SigLIP
            config.logit_bias_init_value = source.logit_bias.item()
    model = LLM2CLIPModel(config)
    model.vision_model.load_state_dict(vision_model.state_dict())
    logger.info(
        "vision model%s of %s; new visual projection and text adapter", " and logit scale" if is_clip else "", path
    )
    return model


def _require_equal(path: str, found: LLM2CLIPConfig, wanted: LLM2CLIPConfig) -> None:
    problems = [
        f"model.{name} is {getattr(wanted, name)}, there it is {getattr(found, name)}"
        for name in ("projection_dim", "adapter_num_blocks", "adapter_expansion", "caption_normalization")
        if getattr(found, name) != getattr(wanted, name)
    ]
    if wanted.logit_bias_init_value is not None and found.logit_bias_init_value is None:
        problems.append("losses.sigmoid needs a logit bias, there is none")
    if problems:
        raise ValueError(f"{path} is an LLM2CLIP model and is continued as it is: {'; '.join(problems)}")


def init_clip(
    path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    vision_config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    *,
    projection_dim: int,
    logit_scale_init_value: float,
) -> CLIPModel:
    """A stock `CLIPModel`: continued from `path`, or from scratch with the vocabulary of `tokenizer`.

    Raises:
        ValueError: if `path` is no CLIP model.
    """
    if path is not None:
        found = read_config(path)
        if not isinstance(found, CLIPConfig):
            raise ValueError(
                f"model.init_from {path} is a {found.model_type} model; model.text: clip continues only CLIP models "
                "(model_type clip); use model.text: adapter for a vision tower or an LLM2CLIP model"
            )
        return load_model(path, CLIPModel)
    vocabulary = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        vision_config={**vision_config, "projection_dim": projection_dim},
        text_config={**text_config, **vocabulary, "projection_dim": projection_dim},
        projection_dim=projection_dim,
        logit_scale_init_value=logit_scale_init_value,
    )
    return CLIPModel(config)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot pad, or does not end a text with its end token, where CLIP's text tower pools.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model.tokenizer: {path} holds no tokenizer ({error})") from error
    if tokenizer.pad_token_id is None or tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"model.tokenizer: {path} has no padding token, or does not put its end token after a text; CLIP's text "
            "tower needs both, as CLIP's own tokenizer has them"
        )
    return tokenizer


def image_transform(path: str | None, size: int, scale: tuple[float, float]) -> tuple[ImageTransform, Any]:
    """The image transform and the image processor that it stands for: that of `path`, else CLIP's.

    Args:
        path: model directory or hub id.
        size: height and width of the vision model's images.
        scale: range of the random box in training, see `ImageTransform`.

    Raises:
        FileNotFoundError: if `path` has no image processor.
        ValueError: if its size is not the vision model's.
    """
    if path is None:
        transform = ImageTransform(size=size, scale=scale)
        return transform, transform.to_image_processor()
    try:
        processor = AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{path} holds no image processor, preprocessor_config.json ({error})") from error
    transform = ImageTransform.from_image_processor(processor, scale=scale)
    if transform.size != size:
        raise ValueError(f"{path}: image processor for {transform.size} pixels, vision model for {size}")
    return transform, processor


def count_parameters(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Trained and frozen parameters of every part."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = counts.setdefault(part_of(name), {"trained": 0, "frozen": 0})
        part["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts
