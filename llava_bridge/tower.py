"""What LLaVA needs to know of a vision tower, all of it derived from the tower itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "vit": 1,
    "deit": 2,  # class and distillation
    "dinov2": 1,
    "dinov2_with_registers": 1,  # and config.num_register_tokens
}
"""Tokens in front of the patches, by model type: the towers that LlavaForConditionalGeneration runs in transformers
4.57 and 5.x alike, and that were tested here."""
NORM_BEHIND_LAYERS = ("post_layernorm", "layernorm")
"""What CLIP and SigLIP, ViT and DINOv2 call the norm behind their last layer."""
STABLE_LAST_STATE = ("clip_vision_model", "siglip_vision_model")
"""Types whose `hidden_states[-1]` is the state before the final norm in every version of transformers."""


@dataclass(frozen=True)
class TowerSpec:
    """Geometry of a tower and of the features that LLaVA takes from it."""

    model_type: str
    hidden_size: int
    num_layers: int
    image_size: int
    patch_size: int
    num_prefix_tokens: int
    """Class and register tokens in front of the patches."""
    feature_layer: int
    """Index into the hidden states, as `vision_feature_layer`; negative."""

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def select_strategy(self) -> Literal["default", "full"]:
        """`vision_feature_select_strategy`: `default` drops the class token, where there is one."""
        return "default" if self.num_prefix_tokens else "full"

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image in the LLM's sequence; registers are kept, as stock LLaVA has no way to drop them."""
        return self.grid**2 + max(0, self.num_prefix_tokens - 1)

    @property
    def num_kept_layers(self) -> int:
        """Layers up to the one that features are taken from."""
        return self.num_layers + 1 + self.feature_layer

    @classmethod
    def of(cls, config: PreTrainedConfig, feature_layer: int = -2) -> TowerSpec:
        """Read a vision model's configuration.

        Args:
            config: of the vision model, not of a whole CLIP.
            feature_layer: negative index into the hidden states; -2 is LLaVA-1.5's.

        Raises:
            ValueError: for a model that stock LLaVA cannot use as a tower, or a layer that it does not have.
        """
        if config.model_type not in PREFIX_TOKENS:
            raise ValueError(
                f"model type {config.model_type!r} cannot be LLaVA's vision tower here; expected one of "
                f"{', '.join(PREFIX_TOKENS)}"
            )
        settings: dict[str, Any] = config.to_dict()
        size, patch = settings["image_size"], settings["patch_size"]
        if not isinstance(size, int) or not isinstance(patch, int) or size % patch:
            raise ValueError(
                f"{config.model_type}: image_size {size} and patch_size {patch}; expected square images that whole "
                "patches cover"
            )
        num_layers = settings["num_hidden_layers"]
        first = -1 if config.model_type in STABLE_LAST_STATE else -2
        if not -num_layers - 1 <= feature_layer <= first:
            reason = "; its last state means different things in transformers 4 and 5" if first == -2 else ""
            raise ValueError(
                f"feature_layer {feature_layer}: expected {-num_layers - 1} to {first} for a {config.model_type} of "
                f"{num_layers} layers{reason}"
            )
        return cls(
            model_type=config.model_type,
            hidden_size=settings["hidden_size"],
            num_layers=num_layers,
            image_size=size,
            patch_size=patch,
            num_prefix_tokens=PREFIX_TOKENS[config.model_type] + settings.get("num_register_tokens", 0),
            feature_layer=feature_layer,
        )


def layers_of(tower: nn.Module, num_layers: int) -> nn.ModuleList:
    """The tower's transformer layers, as the list that it runs through."""
    found = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(found) != 1:
        raise ValueError(f"{type(tower).__name__}: found {len(found)} lists of {num_layers} layers, expected one")
    return found[0]


def drop_unused_layers(tower: Any, spec: TowerSpec) -> None:
    """Delete what lies behind the feature layer, in place: `last_hidden_state` is then what LLaVA takes.

    Saves the memory and time of those layers, and leaves no parameter without a gradient when the tower is trained.
    The export puts them back from the original tower, for readers that count layers from the end.
    """
    layers = layers_of(tower, spec.num_layers)
    del layers[spec.num_kept_layers :]
    for name in NORM_BEHIND_LAYERS:
        if hasattr(tower, name):
            setattr(tower, name, nn.Identity())
    for name in ("head", "pooler"):
        if hasattr(tower, name):
            setattr(tower, name, None)
    if hasattr(tower, "use_head"):
        tower.use_head = False  # SigLIP's attention pooling


def patch_features(tower: PreTrainedModel, spec: TowerSpec, pixel_values: torch.Tensor) -> torch.Tensor:
    """Features of a tower without unused layers.

    Args:
        tower: after `drop_unused_layers`.
        spec: of the whole tower.
        pixel_values: (images, 3, image_size, image_size).

    Returns:
        (images, num_image_tokens, hidden_size): what stock LLaVA selects by `vision_feature_layer` and
        `vision_feature_select_strategy`, row by row.
    """
    features = tower(pixel_values=pixel_values).last_hidden_state
    return features[:, 1:] if spec.select_strategy == "default" else features
