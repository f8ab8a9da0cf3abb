"""Tiny random towers and LLMs put together as stock LLaVA models, every parameter away from its start."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny import tiny_tokenizer

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TOWERS = {
    "clip": transformers.CLIPVisionConfig(**VISION, intermediate_size=64),
    "siglip": transformers.SiglipVisionConfig(**VISION, intermediate_size=64),
    "vit": transformers.ViTConfig(**VISION, intermediate_size=64, layer_norm_eps=1e-6),
    "dinov2": transformers.Dinov2Config(**VISION, mlp_ratio=2),
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig(**VISION, mlp_ratio=2, num_register_tokens=3),
}
IMAGE_TOKENS = {"clip": 16, "siglip": 16, "vit": 16, "dinov2": 16, "dinov2_with_registers": 19}
"""A 4 x 4 grid; LLaVA drops the first token of a tower with a class token, and no registers."""
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CLASSES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "phi": transformers.PhiConfig,
}


def llava_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tiny tokenizer with `<image>` and a pad token of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([transformers.AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def tower_processor(kind: str) -> Any:
    """An image processor as towers of this kind have it."""
    square = {"height": 32, "width": 32}
    if kind == "siglip":
        return transformers.SiglipImageProcessor(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    if kind == "vit":
        return transformers.ViTImageProcessor(size=square)
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)


def chat_inputs(processor: Any, *content: dict[str, Any]) -> Any:
    """A user's turn of typed parts as tensors, by the processor's own way from messages to ids."""
    return processor.apply_chat_template(
        [{"role": "user", "content": [*content]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def llava_model(
    kind: str, tokenizer: Any, *, llm: str = "llama", **text: Any
) -> transformers.LlavaForConditionalGeneration:
    """A random model.

    Args:
        kind: of `TOWERS`.
        tokenizer: gives the token ids.
        llm: of `CLASSES`.
        text: further fields of the LLM's configuration.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vocabulary = {"vocab_size": -(-len(tokenizer) // 64) * 64}
    config = transformers.LlavaConfig(
        vision_config=TOWERS[kind],
        text_config=CLASSES[llm](**{**TEXT, **vocabulary, **ids, **text}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if kind == "siglip" else "default",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()
