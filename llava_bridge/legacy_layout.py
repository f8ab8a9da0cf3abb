"""The layout of LLaVA checkpoints that every reader knows: tensor names and config.json of transformers <= 4.51.

transformers 4.50, 4.57 and 5.x and vLLM all load it. What 5.x saves of a model that was put together in memory is read
by 5.x alone: 4.x finds no tensor of a CLIP tower in it and goes on with a random one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llava_bridge.tower import TowerSpec
from llm2clip.vision_tower import PREFIXED

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedConfig

IRRELEVANT = (
    "_name_or_path",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
)
"""Fields of every configuration that say nothing about the model, or that config.json holds once, at its top."""
HEAD = "head."
"""SigLIP's pooling head, which LLaVA has no use for."""


def legacy_state_dict(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Name the tensors of a model as transformers <= 4.51 saved them; nothing is copied where names alone differ.

    Args:
        model: stock, unquantised, adapters merged, its tower whole.

    Returns:
        `language_model.model.*`, `language_model.lm_head.weight` unless it is tied to the embeddings,
        `vision_tower.*` (CLIP and SigLIP: `vision_tower.vision_model.*`) and `multi_modal_projector.*`.

    Raises:
        ValueError: if the configuration ties head and embeddings, but they differ; or a part is no stock model.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    parts: Any = model.model
    config: Any = model.config
    text_config, vision_config = config.text_config, config.vision_config
    head: Any = model.lm_head.weight
    embeddings = parts.language_model.get_input_embeddings().weight
    tied = text_config.tie_word_embeddings
    if tied and head is not embeddings and not torch.equal(head, embeddings):
        raise ValueError(
            "text_config.tie_word_embeddings is true, but lm_head.weight and the embeddings differ; a reader would "
            "load the embeddings for both: set it to false, or tie them before exporting"
        )
    body = {f"model.{name}": tensor for name, tensor in parts.language_model.state_dict().items()}
    llm = saved_names(AutoModelForCausalLM, text_config, {**body, "lm_head.weight": head.detach()})
    if tied:
        del llm["lm_head.weight"]
    tower = saved_names(AutoModel, vision_config, parts.vision_tower.state_dict())
    level = PREFIXED.get(vision_config.model_type, "")
    tower = {level + name: tensor for name, tensor in tower.items() if not (level and name.startswith(HEAD))}
    named = {
        "language_model": llm,
        "vision_tower": tower,
        "multi_modal_projector": parts.multi_modal_projector.state_dict(),
    }
    return {f"{part}.{name}": tensor for part, tensors in named.items() for name, tensor in tensors.items()}


def saved_names(
    auto_class: Any, config: PreTrainedConfig, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Undo the renames and merges that transformers 5 does in memory, as its `save_pretrained` does.

    Args:
        auto_class: AutoModel or AutoModelForCausalLM.
        config: of the model.
        state_dict: its tensors under the names of this version's modules.

    Raises:
        ValueError: if these are not the tensors of the stock model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        stock = auto_class.from_config(config)
    # A fresh model: how names are reverted depends on how the model at hand was once loaded.
    try:
        stock.load_state_dict(state_dict, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the tensors are not those of a stock {type(stock).__name__}; merge adapters, dequantise and put dropped "
            f"layers back before exporting (an LLM whose head has a bias has no place in LLaVA): {error}"
        ) from error
    return revert_weight_conversion(stock, state_dict)


def legacy_config(model: LlavaForConditionalGeneration, *, pad_token_id: int) -> dict[str, Any]:
    """Configuration of the model, for config.json, that transformers 4.50 to 5.x and vLLM understand alike.

    Every field of the parts is written out, as defaults change from version to version, and rotary embeddings are
    described twice, as 4.x and as 5.x do (4.x reads the base 10000 where it finds only 5.x's form).

    Args:
        model: as for `legacy_state_dict`.
        pad_token_id: of the tokenizer.

    Raises:
        ValueError: if 4.x has no form for the rotary embeddings of the LLM.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    config: Any = model.config
    spec = TowerSpec.of(config.vision_config, config.vision_feature_layer)
    vision = described(config.vision_config)
    vision["architectures"] = [MODEL_MAPPING_NAMES[config.vision_config.model_type]]
    if config.vision_config.model_type == "siglip_vision_model":
        vision["vision_use_head"] = False
    text = {**described(config.text_config), **legacy_rope(config.text_config)}
    text["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text_config.model_type]]
    return {
        **described(config),
        "architectures": ["LlavaForConditionalGeneration"],
        "torch_dtype": str(model.get_output_embeddings().weight.dtype).removeprefix("torch."),
        "image_seq_length": spec.grid**2
        + spec.num_prefix_tokens
        - (config.vision_feature_select_strategy == "default"),
        "pad_token_id": pad_token_id,
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
        "text_config": text,
        "vision_config": vision,
    }


def described(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that describe the model."""
    return {key: value for key, value in config.to_dict().items() if key not in IRRELEVANT}


def legacy_rope(text_config: PreTrainedConfig) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `partial_rotary_factor`, as 4.x reads them, of a decoder that has them."""
    parameters = text_config.to_dict().get("rope_parameters")
    if parameters is None:
        return {}
    if "rope_theta" not in parameters:
        raise ValueError(
            f"{text_config.model_type} has other rotary embeddings in other layers ({parameters}), for which "
            "transformers 4.x has no common form; expected an LLM with one rope_theta"
        )
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    fields: dict[str, Any] = {"rope_theta": parameters["rope_theta"]}
    if "partial_rotary_factor" in scaling:
        fields["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    return {**fields, "rope_scaling": scaling if scaling["rope_type"] != "default" else None}
