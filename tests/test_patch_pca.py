"""Patch filters from principal components: centred, decorrelated, of the right size, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from llm2clip.patch_pca import REGULARIZATION, init_patch_embedding

SIZE, PATCH, WIDTH = 16, 8, 12


def clip_vision() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    torch.manual_seed(0)
    return CLIPVisionModel(config)


def images(num: int = 500) -> torch.Tensor:
    """Images of which the directions of the patches vary by known, different amounts."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(3 * PATCH * PATCH, 20, generator=generator))[0].T  # (20, 192)
    weights = torch.randn(4 * num, 20, generator=generator) * torch.linspace(6, 1, 20)
    patches = (weights @ directions + 0.7).view(num, 4, -1).transpose(1, 2)
    return torch.nn.functional.fold(patches, SIZE, PATCH, stride=PATCH)


def patch_tokens(model: CLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    embeddings = next(m for m in model.modules() if type(m).__name__ == "CLIPVisionEmbeddings")
    return embeddings(pixel_values)[:, 1:].flatten(0, 1)


def test_tokens_are_centred_and_decorrelated():
    model, pixel_values = clip_vision(), images()
    embeddings = next(m for m in model.modules() if type(m).__name__ == "CLIPVisionEmbeddings")
    torch.nn.init.zeros_(embeddings.position_embedding.weight)
    init_patch_embedding(model, pixel_values)
    with torch.no_grad():
        tokens = patch_tokens(model, pixel_values)  # (2000, WIDTH)
    torch.testing.assert_close(tokens.mean(dim=0), torch.zeros(WIDTH), atol=1e-4, rtol=0)
    covariance = tokens.T @ tokens / len(tokens)
    deviation = (
        torch.linalg.svdvals(
            (p := torch.nn.functional.unfold(pixel_values, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1))
            - p.mean(0)
        )[:WIDTH]
        / len(tokens) ** 0.5
    )
    expected = torch.diag((deviation / (deviation + REGULARIZATION * deviation[0])) ** 2)
    torch.testing.assert_close(covariance, expected, atol=0.02, rtol=0)  # the randomised SVD is that exact


def test_everything_else_and_the_random_state_stay():
    model = clip_vision()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    init_patch_embedding(model, images())
    assert torch.equal(torch.get_rng_state(), state)
    changed = {
        name.rpartition("embeddings.")[2] for name, v in model.state_dict().items() if not v.equal(before[name])
    }
    assert changed == {"patch_embedding.weight", "position_embedding.weight"}


def test_same_images_same_filters():
    first, second = clip_vision(), clip_vision()
    init_patch_embedding(first, images())
    torch.rand(3)
    init_patch_embedding(second, images())
    for name, value in first.state_dict().items():
        assert value.equal(second.state_dict()[name])


def test_flat_images_and_other_models_are_refused():
    with pytest.raises(ValueError, match="0 patches with content"):
        init_patch_embedding(clip_vision(), torch.zeros(500, 3, SIZE, SIZE))
    vit = ViTModel(ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="CLIP vision models"):
        init_patch_embedding(vit, images(2))
