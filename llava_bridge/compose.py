"""Put a vision tower and a decoder LLM together as a stock `LlavaForConditionalGeneration`."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    set_seed,
)

from llava_bridge.legacy_layout import legacy_rope
from llava_bridge.templates import IMAGE_TOKEN
from llava_bridge.tower import TowerSpec
from llm2clip.vision_tower import load_vision_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"
VOCABULARY_MULTIPLE = 64
"""As transformers' convert_llava_weights_to_hf.py pads it, for tensor cores."""


@dataclass(frozen=True)
class Composed:
    """A model with what turns dialogues into its inputs."""

    model: Any
    """Of the class asked for, its tower whole."""
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    """The tower's own."""
    spec: TowerSpec


def compose(
    tower: str,
    llm: str,
    *,
    model_class: type[LlavaForConditionalGeneration] = LlavaForConditionalGeneration,
    feature_layer: int = -2,
    tower_dtype: torch.dtype = torch.float32,
    llm_dtype: torch.dtype = torch.float32,
    quantization: Any = None,
    seed: int = 0,
) -> Composed:
    """Load both parts, add `<image>` and a pad token, and draw a projector.

    Args:
        tower: directory or hub id of a CLIP-like model or of a vision model alone, with its image processor.
        llm: directory or hub id of a decoder LLM with its tokenizer.
        model_class: the stock class, or one derived from it.
        feature_layer: see `TowerSpec`.
        tower_dtype: of the tower's weights.
        llm_dtype: of the LLM's weights; the projector is float32.
        quantization: a `BitsAndBytesConfig` for the LLM.
        seed: of the projector and the two new embeddings; applied before they are drawn.

    Raises:
        ValueError: if a part is missing or cannot be used, or an export could not describe it.
    """
    vision_model: Any
    vision_model, image_processor = load_vision_model(tower)
    vision_model.to(tower_dtype)
    spec = TowerSpec.of(vision_model.config, feature_layer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(llm)
        language_model: Any = AutoModelForCausalLM.from_pretrained(
            llm, dtype=llm_dtype, quantization_config=quantization
        )
    except (OSError, KeyError, ValueError, ImportError) as error:
        raise ValueError(f"{llm} holds no decoder LLM with its tokenizer ({error})") from error
    set_seed(seed)
    add_tokens(tokenizer, language_model)
    model = assemble(model_class, vision_model, language_model, tokenizer, spec)
    return Composed(model, tokenizer, image_processor, spec)


def add_tokens(tokenizer: PreTrainedTokenizerBase, language_model: PreTrainedModel) -> None:
    """Add `<image>`, and `<pad>` unless there is a pad token that is nothing else; pad the vocabulary."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.eos_token, tokenizer.unk_token):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    embeddings: Any = language_model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows or rows % VOCABULARY_MULTIPLE:
        size = math.ceil(max(len(tokenizer), rows) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        language_model.resize_token_embeddings(size, pad_to_multiple_of=VOCABULARY_MULTIPLE)


def check_llm(language_model: Any) -> None:
    """Refuse at once an LLM that could be trained but not exported.

    Raises:
        ValueError: saying why.
    """
    name = type(language_model).__name__
    if not hasattr(language_model, "model"):
        raise ValueError(f"{name} has no body `model`, as transformers' LLaVA needs; expected one like Llama or Qwen2")
    if language_model.lm_head.bias is not None:
        raise ValueError(
            f"the head of {name} has a bias, which has no place in transformers' LLaVA; expected an LLM without one"
        )
    legacy_rope(language_model.config)


def assemble(
    model_class: type[LlavaForConditionalGeneration],
    vision_model: PreTrainedModel,
    language_model: Any,
    tokenizer: Any,
    spec: TowerSpec,
) -> LlavaForConditionalGeneration:
    """The model of these very modules, with a projector drawn from the global generator."""
    text_config = language_model.config
    check_llm(language_model)
    config = LlavaConfig(
        vision_config=vision_model.config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=spec.num_image_tokens,
        vision_feature_layer=spec.feature_layer,
        vision_feature_select_strategy=spec.select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        model = model_class(config)
    body: Any = model.model
    if not isinstance(language_model.model, type(body.language_model)):
        raise ValueError(
            f"{type(language_model).__name__} is no plain decoder LLM: its body is a "
            f"{type(language_model.model).__name__}, expected a {type(body.language_model).__name__}"
        )
    body.vision_tower = vision_model
    body.language_model = language_model.model
    model.lm_head = language_model.lm_head
    for linear in (body.multi_modal_projector.linear_1, body.multi_modal_projector.linear_2):
        linear.to_empty(device="cpu")
        nn.Linear.reset_parameters(linear)  # PyTorch's, as LLaVA draws it
    model.config = config
    model.generation_config = language_model.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
