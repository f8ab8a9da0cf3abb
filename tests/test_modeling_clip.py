"""The model against its definition, its size, and what it can start from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clip_data import VISION
from tiny import tiny_clip_config
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
)

from llm2clip import clip_init
from llm2clip.modeling_clip import LLM2CLIPConfig, LLM2CLIPModel, TextAdapter


def small(**settings: Any) -> LLM2CLIPConfig:
    return LLM2CLIPConfig(**{"vision_config": VISION, "caption_embedding_dim": 12, "projection_dim": 8, **settings})


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 32, 32, generator=generator), torch.randn(3, 12, generator=generator)


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize(("dim", "parameters"), [(4096, 273_769_728), (2048, 69_776_640)])
def test_adapter_has_the_published_size(dim: int, parameters: int):
    with torch.device("meta"):
        adapter = TextAdapter(LLM2CLIPConfig(caption_embedding_dim=dim))
    assert sum(p.numel() for p in adapter.parameters()) == parameters


def test_paper_scale_model_builds_on_the_meta_device():
    """ViT-L/14-336: 304.3 M parameters and a projection to 1280 (LLM2CLIP's OpenAI variant counts both: 304.8 M)."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        model = LLM2CLIPModel(LLM2CLIPConfig(vision_config={**vision, "image_size": 336, "patch_size": 14}))
    counts = clip_init.count_parameters(model)
    # OpenAI's tower has class and position embeddings, and the projection, without bias
    assert counts["vision"]["trained"] + counts["projection"]["trained"] == 304_818_176
    assert counts["text"]["trained"] == 273_769_728


def test_adapter_is_its_formula():
    torch.manual_seed(0)
    adapter = TextAdapter(small(adapter_num_blocks=1, caption_normalization="l2"))
    _, captions = inputs()
    block = adapter.blocks[0]
    x = captions / captions.norm(dim=-1, keepdim=True)
    x = x + block.fc2(F.gelu(block.fc1(F.layer_norm(x, (12,), block.norm.weight, block.norm.bias, 1e-5))))
    expected = adapter.projection(F.layer_norm(x, (12,), adapter.norm.weight, adapter.norm.bias, 1e-5))
    assert_close(adapter(captions), expected)


def test_caption_normalization_decides_whether_length_matters():
    _, captions = inputs()
    torch.manual_seed(0)
    for normalization, same in (("none", False), ("l2", True), ("l2_standardize", True)):
        model = LLM2CLIPModel(small(caption_normalization=normalization)).eval()
        with torch.no_grad():
            assert torch.allclose(model.get_text_features(captions), model.get_text_features(5 * captions)) is same


def test_standardize_is_l2_then_moments():
    _, captions = inputs()
    torch.manual_seed(0)
    model = LLM2CLIPModel(small(caption_normalization="l2_standardize")).eval()
    mean = torch.linspace(-0.1, 0.1, 12)
    model.text_adapter.set_moments(mean, 0.25)
    plain = LLM2CLIPModel(small(caption_normalization="none")).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        expected = plain.get_text_features((F.normalize(captions, dim=-1) - mean) / 0.25)
        assert_close(model.get_text_features(captions), expected)


def test_features_are_normalised_and_captions_in_half_precision_are_taken():
    model = LLM2CLIPModel(small())
    pixels, captions = inputs()
    outputs = model(pixels, captions.bfloat16())
    assert outputs.image_embeds.shape == outputs.text_embeds.shape == (3, 8)
    assert_close(outputs.image_embeds.norm(dim=-1), torch.ones(3))
    assert_close(outputs.text_embeds.norm(dim=-1), torch.ones(3))
    assert_close(outputs.logit_scale.item(), math.log(1 / 0.07))  # log space


def test_saved_model_is_loaded_whole(tmp_path: Path):
    torch.manual_seed(0)
    model = LLM2CLIPModel(
        small(caption_normalization="l2_standardize", logit_bias_init_value=-10.0, teacher_fingerprint="abc")
    ).eval()
    model.text_adapter.set_moments(torch.randn(12), 0.5)
    model.save_pretrained(tmp_path)
    for loaded in (LLM2CLIPModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, LLM2CLIPModel)
        assert_same_weights(model, loaded)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config.vision_config, CLIPVisionConfig)
    assert (config.teacher_fingerprint, config.caption_normalization) == ("abc", "l2_standardize")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(*inputs()).text_embeds, model(*inputs()).text_embeds)


def test_new_layers_start_like_the_original():
    torch.manual_seed(0)
    model = LLM2CLIPModel(small(caption_embedding_dim=256))
    layer = model.text_adapter.blocks[0].fc1  # nn.Linear's default: uniform in +-1/sqrt(fan in)
    assert layer.weight.abs().max() <= 1 / 16
    assert_close(layer.weight.std().item(), 1 / 16 / math.sqrt(3), rtol=0.02, atol=0)
    assert_close(model.visual_projection.weight.std().item(), 16**-0.5, rtol=0.2, atol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = LLM2CLIPModel(small())
    grads = []
    for _ in range(2):
        outputs = model(*inputs())
        (outputs.image_embeds @ outputs.text_embeds.T).logsumexp(1).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.vision_model.encoder.layers)
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert_close(grads[0][name], grads[1][name])


# What a model starts from


@pytest.fixture
def clip_dir(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = CLIPModel(tiny_clip_config())
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_directory_gives_vision_model_and_logit_scale(clip_dir: Path):
    model = clip_init.init_llm2clip(str(clip_dir), small())
    assert_same_weights(model.vision_model, CLIPModel.from_pretrained(clip_dir).vision_model)
    assert_close(model.logit_scale.item(), 4.0)
    assert model.visual_projection.weight.shape == (8, 32)


def test_vision_tower_directory_gives_the_vision_model(tmp_path: Path):
    torch.manual_seed(1)
    tower = CLIPVisionModel(tiny_clip_config().vision_config)
    tower.save_pretrained(tmp_path)
    model = clip_init.init_llm2clip(str(tmp_path), small())
    assert_same_weights(model.vision_model, tower)
    assert_close(model.logit_scale.item(), math.log(1 / 0.07))


def test_other_vision_models_work(tmp_path: Path):
    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    model = clip_init.init_llm2clip(str(tmp_path / "dino"), small())
    model.save_pretrained(tmp_path / "clip")
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "clip").eval()
    assert loaded.get_image_features(inputs()[0]).shape == (3, 8)
    assert_same_weights(loaded, model)
    depths = {name: clip_init.vision_layer(name, 2) for name, _ in model.named_parameters() if "vision_model" in name}
    assert depths["vision_model.embeddings.patch_embeddings.projection.weight"] == 0
    assert depths["vision_model.encoder.layer.1.mlp.fc1.weight"] == 2
    assert depths["vision_model.layernorm.weight"] == 3


def test_siglip_gives_vision_model_logit_scale_and_bias(tmp_path: Path):
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    source = SiglipModel(
        SiglipConfig(text_config={**shared, "vocab_size": 50}, vision_config={**shared, "image_size": 32})
    )
    with torch.no_grad():
        source.logit_scale.fill_(4.5)
        source.logit_bias.fill_(-16.0)
    source.save_pretrained(tmp_path)
    model = clip_init.init_llm2clip(str(tmp_path), small(logit_bias_init_value=clip_init.SIGLIP_BIAS))
    assert_same_weights(model.vision_model, source.vision_model)
    assert (model.logit_scale.item(), model.logit_bias.item()) == (4.5, -16.0)
    assert model(*inputs()).image_embeds.shape == (3, 8)
    assert (
        clip_init.vision_layer("vision_model.head.attention.in_proj_weight", 2) == 3
    )  # pooling comes after the blocks


def test_llm2clip_directory_is_kept_whole(tmp_path: Path):
    """Adapter and projection of an earlier run must never be dropped silently, as the original does."""
    torch.manual_seed(1)
    first = LLM2CLIPModel(small(caption_normalization="l2_standardize"))
    first.text_adapter.set_moments(torch.randn(12), 0.5)
    first.save_pretrained(tmp_path)
    torch.manual_seed(2)
    again = clip_init.init_llm2clip(str(tmp_path), small(caption_normalization="l2_standardize"))
    assert_same_weights(first, again)
    with pytest.raises(ValueError, match=r"projection_dim is 16, there it is 8.*_num_blocks is 2, there it is 4"):
        clip_init.init_llm2clip(
            str(tmp_path), small(caption_normalization="l2_standardize", projection_dim=16, adapter_num_blocks=2)
        )


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    """transformers itself only warns, and would go on with random weights."""
    CLIPVisionModel(tiny_clip_config(num_hidden_layers=1).vision_config).save_pretrained(tmp_path)
    tiny_clip_config(num_hidden_layers=2).vision_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"16 missing keys for CLIPVisionModel, such as encoder.layers.1"):
        clip_init.init_llm2clip(str(tmp_path), small())


def test_directory_without_model_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        clip_init.init_llm2clip(str(tmp_path), small())


# Learning rates and frozen parts


def test_layer_decay_has_the_published_factors():
    """0.85^(25 - layer) for 24 blocks: 0.0172 for the embeddings, 0.0202 for block 0, 1 after the blocks."""
    rates = {"vision": 1e-5, "projection": 1e-5, "text": 3e-5, "logit_scale": 1e-5}
    scale = clip_init.learning_rate_scale(rates, base=1e-5, layer_decay=0.85, num_layers=24)
    expected = {
        "vision_model.embeddings.class_embedding": 0.0172,
        "vision_model.embeddings.patch_embedding.weight": 0.0172,
        "vision_model.embeddings.position_embedding.weight": 0.0172,
        "vision_model.pre_layrnorm.weight": 0.0172,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 0.0202,
        "vision_model.encoder.layers.23.layer_norm1.bias": 0.85,
        "vision_model.post_layernorm.weight": 1.0,
        "visual_projection.weight": 1.0,
        "text_adapter.blocks.0.fc1.weight": 3.0,
        "logit_scale": 1.0,
    }
    assert {name: round(scale(name), 4) for name in expected} == pytest.approx(expected)


def test_every_parameter_of_both_models_belongs_to_a_part():
    models = [LLM2CLIPModel(small(logit_bias_init_value=-10.0)), CLIPModel(tiny_clip_config())]
    for model in models:
        assert {clip_init.part_of(name) for name, _ in model.named_parameters()} == set(clip_init.PARTS.values())


def test_freeze_stops_whole_parts():
    model = LLM2CLIPModel(small())
    clip_init.freeze(model, ["vision", "logit_scale"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("visual_p", "text_adapter"))}
