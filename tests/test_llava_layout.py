"""Tensor names and configuration of exported LLaVA models are those that transformers <= 4.51 wrote."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny_llava import IMAGE_TOKENS, TOWERS, llava_model, llava_tokenizer, tower_processor

from llava_bridge.export_files import write_llava
from llava_bridge.legacy_layout import legacy_config, legacy_rope, legacy_state_dict

LAYERS = {
    "clip": r"vision_model\.encoder\.layers\.\d\.(self_attn\.[qkv]_proj|self_attn\.out_proj|layer_norm\d|mlp\.fc\d)",
    "siglip": r"vision_model\.encoder\.layers\.\d\.(self_attn\.[qkv]_proj|self_attn\.out_proj|layer_norm\d|mlp\.fc\d)",
    "vit": r"encoder\.layer\.\d\.(attention\.attention\.(query|key|value)|attention\.output\.dense|intermediate\.dense"
    r"|output\.dense|layernorm_(before|after))",
    "dinov2": r"encoder\.layer\.\d\.(attention\.attention\.(query|key|value)|attention\.output\.dense|norm\d|mlp\.fc\d"
    r"|layer_scale\d)",
}
LAYERS["dinov2_with_registers"] = LAYERS["dinov2"]
"""What 4.50 and 4.57 call the layers of each tower, below `vision_tower.`."""


@pytest.mark.parametrize("kind", TOWERS)
def test_names_are_the_legacy_ones_and_tensors_the_model_s(kind):
    model = llava_model(kind, llava_tokenizer())
    tensors = legacy_state_dict(model)
    assert {name.split(".")[0] for name in tensors} == {"language_model", "vision_tower", "multi_modal_projector"}
    layers = [name for name in tensors if re.match(r"vision_tower\..*layers?\.\d", name)]
    pattern = re.compile(rf"vision_tower\.{LAYERS[kind]}\.(weight|bias|lambda1)")
    assert len(layers) >= 16 * 3 and all(pattern.fullmatch(name) for name in layers), layers
    # No tensor is lost, doubled or changed: the same storage under another name, but for SigLIP's pooling head.
    ours = sorted(tensor.data_ptr() for tensor in tensors.values())
    kept = [t.data_ptr() for name, t in model.state_dict().items() if not (kind == "siglip" and ".head." in name)]
    assert ours == sorted(kept)
    projector = model.model.multi_modal_projector
    assert tensors["multi_modal_projector.linear_1.weight"].data_ptr() == projector.linear_1.weight.data_ptr()
    query = re.compile(r"vision_tower\..*\.1\..*(q_proj|query)\.weight")  # in whatever version
    found, expected = (
        [tensor for name, tensor in named.items() if query.search(name)] for named in (tensors, model.state_dict())
    )
    assert len(found) == len(expected) == 1 and torch.equal(found[0], expected[0])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_name_has_a_place_in_vllm(kind, tmp_path):
    """vLLM 0.33: prefixes of its Llava model, below which CLIP and SigLIP have the `vision_model.` level.

    Its loader raises on any other name. (vllm/model_executor/models/llava.py `hf_to_vllm_mapper`, which maps the names
    of 4.52 and later to these and leaves these alone; clip.py and siglip.py.)
    """
    later_names = ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector.", "lm_head.")
    layer = (
        r"encoder\.layers\.\d+\.(self_attn\.[qkv]_proj|self_attn\.out_proj|layer_norm[12]|mlp\.fc[12])\.(weight|bias)"
    )
    embeddings = r"embeddings\.(class_embedding|(patch|position)_embedding\.weight|patch_embedding\.bias)"
    places = re.compile(
        rf"language_model\.(model\.(embed_tokens|norm|layers\.\d+\.[a-z_.]+)|lm_head)\.weight"
        rf"|vision_tower\.vision_model\.({layer}|{embeddings}|(pre_layrnorm|post_layernorm)\.(weight|bias))"
        rf"|multi_modal_projector\.linear_[12]\.(weight|bias)"
    )
    tokenizer = llava_tokenizer()
    write_llava(
        tmp_path / "llava",
        llava_model(kind, tokenizer),
        tokenizer,
        tower_processor(kind),
        image_aspect="pad",
        chat_template="",
    )
    with safe_open(tmp_path / "llava" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert [name for name in names if name.startswith(later_names) or not places.fullmatch(name)] == []
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert isinstance(config["vision_feature_layer"], int)  # vLLM's projector takes one layer
    assert config["vision_config"]["image_size"] % config["vision_config"]["patch_size"] == 0


def test_a_tied_head_is_left_out_and_must_be_tied():
    model = llava_model("clip", llava_tokenizer(), tie_word_embeddings=True)
    model.tie_weights()
    tensors = legacy_state_dict(model)
    assert "language_model.lm_head.weight" not in tensors
    assert "language_model.model.embed_tokens.weight" in tensors
    config = legacy_config(model, pad_token_id=3)
    assert config["tie_word_embeddings"] is True and config["text_config"]["tie_word_embeddings"] is True
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head.weight and the embeddings differ"):
        legacy_state_dict(model)


def test_experts_are_written_one_by_one_as_4_x_has_them():
    model = llava_model("clip", llava_tokenizer(), llm="mixtral", num_local_experts=4)
    tensors = legacy_state_dict(model)
    layer = "language_model.model.layers.0.block_sparse_moe"
    experts = {name for name in tensors if name.startswith(f"{layer}.experts.")}
    assert experts == {f"{layer}.experts.{expert}.w{n}.weight" for expert in range(4) for n in (1, 2, 3)}


def test_the_dtype_is_kept():
    model = llava_model("clip", llava_tokenizer())
    model.model.vision_tower.half()
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()
    dtypes = {name.split(".")[0]: tensor.dtype for name, tensor in legacy_state_dict(model).items()}
    assert dtypes == {
        "language_model": torch.bfloat16,
        "vision_tower": torch.float16,
        "multi_modal_projector": torch.float32,
    }
    assert legacy_config(model, pad_token_id=3)["torch_dtype"] == "bfloat16"


def test_a_tower_without_its_last_layers_is_refused():
    model = llava_model("clip", llava_tokenizer())
    del model.model.vision_tower.encoder.layers[-1]
    with pytest.raises(
        ValueError, match="not those of a stock CLIPVisionModel; merge adapters, dequantise and put dropped"
    ):
        legacy_state_dict(model)


@pytest.mark.parametrize("kind", TOWERS)
def test_the_configuration_says_everything(kind):
    tokenizer = llava_tokenizer()
    model = llava_model(kind, tokenizer)
    config = legacy_config(model, pad_token_id=tokenizer.pad_token_id)
    assert config["model_type"] == "llava" and config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("<image>")
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["image_seq_length"] == IMAGE_TOKENS[kind]
    assert config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == ("full" if kind == "siglip" else "default")
    assert config["projector_hidden_act"] == "gelu" and config["multimodal_projector_bias"] is True
    assert config["torch_dtype"] == "float32"
    assert config["text_config"]["model_type"] == "llama"
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    vision = config["vision_config"]
    assert vision["model_type"] == TOWERS[kind].model_type
    for field in ("hidden_act", "layer_norm_eps", "image_size", "patch_size", "num_hidden_layers", "hidden_size"):
        assert vision[field] == getattr(TOWERS[kind], field)
    assert vision.get("vision_use_head", False) is False
    assert json.loads(json.dumps(config)) == config
    parts = (config, config["text_config"], vision)
    assert not any(key in part for part in parts for key in ("dtype", "_name_or_path", "transformers_version"))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_rotary_embeddings_are_described_as_4_x_and_as_5_x_do():
    model = llava_model("clip", llava_tokenizer(), rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    text = legacy_config(model, pad_token_id=3)["text_config"]
    assert text["rope_theta"] == 500000.0 and text["rope_scaling"] == LLAMA3
    assert text["rope_parameters"] == {**LLAMA3, "rope_theta": 500000.0}
    read = transformers.LlamaConfig(**text)  # both forms together are no contradiction to 5.x
    assert read.rope_parameters == {**LLAMA3, "rope_theta": 500000.0}
    model = llava_model("clip", llava_tokenizer(), llm="qwen2", rope_parameters={"rope_theta": 1e6})
    text = legacy_config(model, pad_token_id=3)["text_config"]
    assert text["rope_theta"] == 1e6 and text["rope_scaling"] is None
    assert legacy_rope(transformers.PhiConfig())["partial_rotary_factor"] == 0.5
    assert legacy_rope(transformers.GPT2Config()) == {}
    with pytest.raises(ValueError, match="gemma3_text has other rotary embeddings in other layers"):
        legacy_rope(transformers.Gemma3TextConfig())
