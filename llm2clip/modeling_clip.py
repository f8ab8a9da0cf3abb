"""LLM2CLIP: a vision encoder and a text adapter on top of a frozen LLM's caption embeddings.

`LLM2CLIPModel` is an ordinary transformers model: `from_pretrained` and `save_pretrained` work as everywhere. The
vision encoder is any stock vision model of transformers; the LLM itself is no part of the model, its caption
embeddings are input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

CaptionNormalization = Literal["none", "l2", "l2_standardize"]


class LLM2CLIPConfig(PretrainedConfig):
    """Configuration of `LLM2CLIPModel`; the defaults are the published adapter.

    Args:
        vision_config: configuration of the vision model (an object, or a dict with `model_type`).
        caption_embedding_dim: length of the LLM's vectors (4096 for an 8B Llama, 2048 for a 1B).
        projection_dim: length of the shared features. 1280 as in LLM2CLIP's `eva_clip/model.py`.
        adapter_num_blocks: residual blocks of the adapter; 4 as there (`TextProj`).
        adapter_expansion: hidden width of a block over `caption_embedding_dim`; 2 as there (`LinearBlock`).
        caption_normalization: what is done to the vectors first: nothing, L2 (as in the original's cached path), or L2
            and then minus the mean, over the root mean square, of the training captions (kept as buffers).
        logit_scale_init_value: in log space; ln(1 / 0.07) as in CLIP.
        logit_bias_init_value: None, or the start of SigLIP's bias.
        teacher_fingerprint: content digest of the LLM whose vectors the adapter was trained on.
    """

    model_type = "llm2clip"
    sub_configs = {"vision_config": AutoConfig}  # type: ignore[assignment]

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        caption_embedding_dim: int = 4096,
        projection_dim: int = 1280,
        adapter_num_blocks: int = 4,
        adapter_expansion: int = 2,
        caption_normalization: CaptionNormalization = "l2",
        logit_scale_init_value: float = math.log(1 / 0.07),
        logit_bias_init_value: float | None = None,
        teacher_fingerprint: str | None = None,
        **kwargs: Any,
    ) -> None:
        if vision_config is None:
            vision_config = {}
        if isinstance(vision_config, dict):
            vision_config = AutoConfig.for_model(**{"model_type": "clip_vision_model", **vision_config})
        self.vision_config = vision_config
        self.caption_embedding_dim = caption_embedding_dim
        self.projection_dim = projection_dim
        self.adapter_num_blocks = adapter_num_blocks
        self.adapter_expansion = adapter_expansion
        self.caption_normalization = caption_normalization
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_bias_init_value = logit_bias_init_value
        self.teacher_fingerprint = teacher_fingerprint
        super().__init__(**kwargs)


@dataclass
class LLM2CLIPOutput(ModelOutput):
    """What `LLM2CLIPModel` returns.

    Attributes:
        image_embeds: (batch, projection_dim), L2-normalised.
        text_embeds: (batch, projection_dim), L2-normalised.
        logit_scale: scalar, in log space.
        logit_bias: scalar, or None.
    """

    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None


class AdapterBlock(nn.Module):
    """Residual inverted bottleneck, x + fc2(GELU(fc1(LayerNorm(x)))) (LLM2CLIP, `LinearBlock`; paper: FuseMix)."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, expansion * dim)
        self.fc2 = nn.Linear(expansion * dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.fc2(F.gelu(self.fc1(self.norm(hidden_states))))


class TextAdapter(nn.Module):
    """From the LLM's caption embeddings to the shared space (LLM2CLIP, `eva_clip/model.py::TextProj`)."""

    mean: torch.Tensor
    rms: torch.Tensor

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__()
        dim = config.caption_embedding_dim
        self.caption_normalization = config.caption_normalization
        if self.caption_normalization == "l2_standardize":
            self.register_buffer("mean", torch.zeros(dim))
            self.register_buffer("rms", torch.ones(()))
        self.blocks = nn.ModuleList(
            AdapterBlock(dim, config.adapter_expansion) for _ in range(config.adapter_num_blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, config.projection_dim)

    def set_moments(self, mean: torch.Tensor, rms: float) -> None:
        """Set what `l2_standardize` takes away and divides by: (caption_embedding_dim,) and a number."""
        self.mean.copy_(mean)
        self.rms.fill_(rms)

    def forward(self, caption_embeddings: torch.Tensor) -> torch.Tensor:
        """(batch, caption_embedding_dim) -> (batch, projection_dim), not normalised."""
        hidden_states = caption_embeddings
        if self.caption_normalization != "none":
            hidden_states = F.normalize(hidden_states.float(), dim=-1)
        if self.caption_normalization == "l2_standardize":
            hidden_states = (hidden_states - self.mean) / self.rms
        hidden_states = hidden_states.to(self.projection.weight.dtype)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.projection(self.norm(hidden_states))


class LLM2CLIPModel(PreTrainedModel):
    """Vision model, visual projection, text adapter and logit scale (log space)."""

    config: LLM2CLIPConfig
    config_class = LLM2CLIPConfig
    base_model_prefix = "llm2clip"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_adapter = TextAdapter(config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.logit_bias = None
        if config.logit_bias_init_value is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LLM2CLIPModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)  # type: ignore[arg-type]
            # scale of OpenAI's `visual.proj`, which LLM2CLIP makes anew
            init.normal_(module.visual_projection.weight, std=self.config.vision_config.hidden_size**-0.5)
        elif isinstance(module, nn.Linear):  # PyTorch's default, as in the original adapter
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TextAdapter) and module.caption_normalization == "l2_standardize":
            init.zeros_(module.mean)
            init.ones_(module.rms)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixel_values: (batch, 3, height, width).

        Returns:
            (batch, projection_dim) float32, L2-normalised.
        """
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        return F.normalize(self.visual_projection(pooled).float(), dim=-1)

    def get_text_features(self, caption_embeddings: torch.Tensor) -> torch.Tensor:
        """Map caption embeddings of the LLM into the shared space.

        Args:
            caption_embeddings: (batch, caption_embedding_dim), as the embedding store gives them.

        Returns:
            (batch, projection_dim) float32, L2-normalised.
        """
        return F.normalize(self.text_adapter(caption_embeddings).float(), dim=-1)

    def forward(self, pixel_values: torch.Tensor, caption_embeddings: torch.Tensor) -> LLM2CLIPOutput:
        """Encode images and captions; row i of both belong together."""
        return LLM2CLIPOutput(
            image_embeds=self.get_image_features(pixel_values),
            text_embeds=self.get_text_features(caption_embeddings),
            # not the parameters themselves: DDP looks for what is used in the graph behind the outputs
            logit_scale=self.logit_scale.clone(),
            logit_bias=None if self.logit_bias is None else self.logit_bias.clone(),
        )


AutoConfig.register("llm2clip", LLM2CLIPConfig)
AutoModel.register(LLM2CLIPConfig, LLM2CLIPModel)
