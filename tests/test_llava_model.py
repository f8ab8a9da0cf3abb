"""Any tower in LLaVA: geometry, features, composition, and the training forward against transformers' own."""

from __future__ import annotations

import pytest
import torch
from llava_data import TOWERS, tiny_tower
from tiny import tiny_llm
from transformers import AutoConfig, CLIPVisionConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from llava_bridge.compose import PAD_TOKEN, compose
from llava_bridge.labels import IGNORE
from llava_bridge.modeling import LlavaForTraining
from llava_bridge.tower import TowerSpec
from llava_bridge.tuning import (
    LoraConfig,
    TuneConfig,
    count_parameters,
    learning_rate_scale,
    merge_lora,
    part_of,
    set_trainable,
    trained_names,
)

KINDS = list(TOWERS)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return str(tiny_llm(tmp_path_factory.mktemp("llm") / "llm"))


def composed(tmp_path, llm, kind="clip", **settings):
    return compose(str(tiny_tower(tmp_path / "tower", kind)), llm, **settings)


def batch_of(parts, num_texts=0):
    """Two samples with an image, and some without."""
    generator = torch.Generator().manual_seed(0)
    count = parts.spec.num_image_tokens
    input_ids = torch.randint(5, 300, (2 + num_texts, count + 8), generator=generator)
    input_ids[:2, 1 : 1 + count] = parts.model.config.image_token_index
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -2:] = 0
    labels = torch.where(torch.arange(count + 8) >= count + 4, input_ids, IGNORE)
    labels[attention_mask == 0] = IGNORE
    pixel_values = torch.randn(2, 3, 32, 32, generator=generator)
    return {
        "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "pixel_values": pixel_values
    }  # fmt: skip


def text_batch(parts):
    batch = batch_of(parts, num_texts=2)
    return {name: batch[name][2:] for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize(("kind", "tokens", "strategy"), [
    ("clip", 4, "default"), ("siglip", 4, "full"), ("vit", 4, "default"), ("dinov2_with_registers", 8, "default"),
])  # fmt: skip
def test_geometry_is_derived_from_the_tower(tmp_path, llm, kind, tokens, strategy):
    parts = composed(tmp_path, llm, kind)
    config = parts.model.config
    assert (parts.spec.num_image_tokens, config.image_seq_length) == (tokens, tokens)
    assert config.vision_feature_select_strategy == strategy
    assert parts.model.model.multi_modal_projector.linear_1.in_features == 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature_layer", [-2, -3])
def test_features_of_the_shortened_tower_are_transformers_own(tmp_path, llm, kind, feature_layer):
    parts = composed(tmp_path, llm, kind, model_class=LlavaForTraining, feature_layer=feature_layer)
    model = parts.model.eval()
    pixel_values = batch_of(parts)["pixel_values"]
    with torch.no_grad():
        whole = torch.stack(list(model.get_image_features(pixel_values, return_dict=True).pooler_output))
        before = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
        model.prepare_for_training(parts.spec)
        assert torch.equal(model.image_embeddings(pixel_values), whole)
    assert sum(parameter.numel() for parameter in model.model.vision_tower.parameters()) < before


def test_clip_features_before_the_final_norm(tmp_path, llm):
    """feature_layer -1: allowed for CLIP, whose last state means the same in all versions; not for ViT."""
    parts = composed(tmp_path, llm, "clip", model_class=LlavaForTraining, feature_layer=-1)
    pixel_values = batch_of(parts)["pixel_values"]
    with torch.no_grad():
        whole = torch.stack(list(parts.model.get_image_features(pixel_values, return_dict=True).pooler_output))
        parts.model.prepare_for_training(parts.spec)
        assert torch.equal(parts.model.image_embeddings(pixel_values), whole)
    vit = AutoConfig.from_pretrained(tiny_tower(tmp_path / "vit", "vit"))
    with pytest.raises(ValueError, match="feature_layer -1.*transformers 4 and 5"):
        TowerSpec.of(vit, -1)


@pytest.mark.parametrize(("config", "match"), [
    (PixtralVisionConfig(), "pixtral.*cannot be LLaVA's vision tower"),
    (CLIPVisionConfig(image_size=30, patch_size=16), "whole patches"),
])  # fmt: skip
def test_unusable_towers_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        TowerSpec.of(config)


def test_losses_are_those_of_the_stock_model(tmp_path, llm):
    parts = composed(tmp_path, llm, model_class=LlavaForTraining)
    stock = composed(tmp_path, llm)
    assert type(stock.model) is LlavaForConditionalGeneration
    stock.model.load_state_dict(parts.model.state_dict())
    batch = batch_of(parts)
    expected = stock.model(**batch)
    parts.model.prepare_for_training(parts.spec)
    output = parts.model(**batch)
    torch.testing.assert_close(output.token_losses.mean(), expected.loss, rtol=1e-6, atol=0)
    assert output.rows.tolist() == [0, 0, 0, 0, 1, 1]
    output.token_losses.mean().backward()
    expected.loss.backward()
    for part in (
        "multi_modal_projector.linear_1",
        "language_model.layers.0.self_attn.q_proj",
        "language_model.embed_tokens",
    ):
        ours = parts.model.model.get_submodule(part).weight.grad
        torch.testing.assert_close(ours, stock.model.model.get_submodule(part).weight.grad, rtol=1e-4, atol=1e-7)


def test_tower_and_projector_run_without_images_too(tmp_path, llm):
    """Else processes of a ZeRO-3 run would wait for each other for ever."""
    parts = composed(tmp_path, llm, model_class=LlavaForTraining)
    parts.model.prepare_for_training(parts.spec)
    set_trainable(parts.model, TuneConfig(vision="full"), LoraConfig())
    text_only = text_batch(parts)
    loss = parts.model(**text_only).token_losses.mean()
    loss.backward()
    gradients = [p.grad for p in parts.model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    assert not parts.model.model.multi_modal_projector.linear_1.weight.grad.any()
    stock = composed(tmp_path, llm)
    stock.model.load_state_dict(parts.model.state_dict(), strict=False)
    torch.testing.assert_close(loss, stock.model(**text_only).loss, rtol=1e-6, atol=0)


def test_wrong_number_of_images_is_an_error(tmp_path, llm):
    parts = composed(tmp_path, llm, model_class=LlavaForTraining)
    parts.model.prepare_for_training(parts.spec)
    batch = batch_of(parts)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(ValueError, match="8 image tokens in the batch, but 1 images of 4"):
        parts.model(**batch)


def test_new_tokens(tmp_path, llm):
    parts = composed(tmp_path, llm)
    tokenizer = parts.tokenizer
    assert tokenizer("a<image>b", add_special_tokens=False)["input_ids"][1] == parts.model.config.image_token_index
    assert tokenizer.pad_token == PAD_TOKEN  # the LLM's own is its eos
    rows = parts.model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0 and rows >= len(tokenizer) and parts.model.lm_head.weight.shape[0] == rows
    assert parts.model.config.text_config.vocab_size == rows


def test_projector_is_a_function_of_the_seed(tmp_path, llm):
    first, again, other = (composed(tmp_path, llm, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(*(s["model.multi_modal_projector.linear_1.weight"] for s in (first, other)))


@pytest.mark.parametrize(("tune", "expected"), [
    (TuneConfig(llm="frozen"), {"projector"}),
    (TuneConfig(), {"projector", "llm"}),
    (TuneConfig(vision="full", projector="frozen", llm="frozen"), {"vision"}),
    (TuneConfig(vision="lora", llm="lora"), {"vision", "projector", "llm"}),
])  # fmt: skip
def test_parts_that_are_trained(tmp_path, llm, tune, expected):
    parts = composed(tmp_path, llm, "dinov2_with_registers", model_class=LlavaForTraining)
    parts.model.prepare_for_training(parts.spec)
    set_trainable(parts.model, tune, LoraConfig(rank=2))
    assert {part_of(name) for name in trained_names(parts.model)} == expected
    counts = count_parameters(parts.model)
    for part in expected:
        if getattr(tune, part) == "lora":
            assert counts[part]["trained"] < counts[part]["frozen"] / 2
        else:  # all of it, but for DINOv2's mask token, which only its own pretraining uses
            assert counts[part]["frozen"] == (32 if part == "vision" else 0)


def test_last_layers_of_the_tower(tmp_path, llm):
    parts = composed(tmp_path, llm, model_class=LlavaForTraining)
    parts.model.prepare_for_training(parts.spec)  # leaves two of three layers
    set_trainable(parts.model, TuneConfig(vision="full", vision_last_layers=1), LoraConfig())
    names = {name for name in trained_names(parts.model) if part_of(name) == "vision"}
    assert names and all(".layers.1." in name for name in names)
    with pytest.raises(ValueError, match="vision_last_layers is 3; expected 1 to 2"):
        set_trainable(parts.model, TuneConfig(vision="full", vision_last_layers=3), LoraConfig())


def test_merged_adapters_compute_the_same(tmp_path, llm):
    parts = composed(tmp_path, llm, model_class=LlavaForTraining)
    parts.model.prepare_for_training(parts.spec)
    set_trainable(parts.model, TuneConfig(vision="lora", llm="lora"), LoraConfig(rank=2, alpha=4))
    names = set(dict(parts.model.named_parameters()))
    assert not any("lm_head" in name and "lora" in name for name in names)
    for name, parameter in parts.model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = batch_of(parts)
    parts.model.eval()
    before = parts.model(**batch).token_losses
    merge_lora(parts.model)
    assert not any(".lora_" in name or "base_layer" in name for name in parts.model.state_dict())
    torch.testing.assert_close(parts.model(**batch).token_losses, before, rtol=1e-4, atol=1e-5)


def test_learning_rates_by_part():
    scale = learning_rate_scale(2e-4, {"projector": 2e-5, "vision": None})
    assert scale("model.multi_modal_projector.linear_1.weight") == pytest.approx(0.1)
    assert scale("model.vision_tower.encoder.layers.0.mlp.fc1.weight") == 1.0
    assert scale("lm_head.weight") == scale("model.language_model.norm.weight") == 1.0
    with pytest.raises(ValueError, match="no part"):
        part_of("something.else")
