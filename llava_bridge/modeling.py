"""LLaVA as it is trained: transformers' own modules, logits only where there is a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration
from transformers.utils.generic import ModelOutput

from llava_bridge.labels import IGNORE
from llava_bridge.tower import TowerSpec, drop_unused_layers, patch_features


@dataclass
class SupervisedOutput(ModelOutput):
    """Losses of one batch, token by token."""

    token_losses: torch.Tensor | None = None
    """(num_supervised,) cross entropy in float32."""
    rows: torch.Tensor | None = None
    """(num_supervised,) sample of the batch that each belongs to."""


class LlavaForTraining(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` without the tower's unused layers.

    Three things differ from the stock forward, none of which changes a number: the tower ends at the feature layer;
    the head runs at supervised positions only (stage 1 of LLaVA-1.5 has some 20 of them in 600); and the tower and
    projector run in batches without images too, so that all processes do the same collectives.
    """

    tower_spec: TowerSpec

    def prepare_for_training(self, spec: TowerSpec) -> None:
        """Drop the unused layers of the tower, which must be whole."""
        self.tower_spec = spec
        drop_unused_layers(self.model.vision_tower, spec)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        **_: Any,
    ) -> SupervisedOutput:
        """Losses of the supervised tokens.

        Args:
            input_ids: (batch, length), with one image token for every patch feature.
            attention_mask: (batch, length), 0 on padding, which is on the right.
            labels: (batch, length), `IGNORE` where not supervised.
            pixel_values: (images, 3, image_size, image_size) of all samples in order; None without any image.

        Raises:
            ValueError: if image tokens and patch features differ in number.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            size = self.tower_spec.image_size
            blank = embeddings.new_zeros(1, 3, size, size)
            embeddings = embeddings + 0.0 * self.image_embeddings(blank).sum()
        else:
            image_embeddings = self.image_embeddings(pixel_values)
            is_image = input_ids == self.config.image_token_index
            if is_image.sum() != image_embeddings.shape[0] * image_embeddings.shape[1]:
                raise ValueError(
                    f"{int(is_image.sum())} image tokens in the batch, but {len(image_embeddings)} images of "
                    f"{image_embeddings.shape[1]} tokens each"
                )
            embeddings = embeddings.masked_scatter(is_image[..., None], image_embeddings.to(embeddings.dtype))
        hidden_states = self.model.language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # (batch, length, hidden)
        targets = labels[:, 1:]
        supervised = targets != IGNORE
        logits = self.lm_head(hidden_states[:, :-1][supervised]).float()  # (num_supervised, vocabulary)
        losses = F.cross_entropy(logits, targets[supervised], reduction="none")
        return SupervisedOutput(token_losses=losses, rows=supervised.nonzero()[:, 0])

    def image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, num_image_tokens, LLM's hidden size) of pixel values."""
        tower: Any = self.model.vision_tower
        features = patch_features(tower, self.tower_spec, pixel_values.to(tower.dtype))
        projector: Any = self.model.multi_modal_projector
        return projector(features.to(projector.linear_1.weight.dtype))
