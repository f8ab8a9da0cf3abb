"""Losses and their gradients against closed forms and open_clip."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llm2clip.losses import LOSSES, ClipObjective, Features, clip_loss, in_batch_accuracy, info_nce, sigmoid_loss


def features(batch: int = 6, dim: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, batch, dim, generator=generator, dtype=torch.float32)
    image, text = F.normalize(pair, dim=-1)
    return image.requires_grad_(), text.requires_grad_()


def test_clip_loss_of_two_pairs_by_hand():
    """Cosines 1 and 0 at scale 2: every row is log(1 + e^-2)."""
    eye = torch.eye(2)
    assert_close(clip_loss(eye, eye, torch.tensor(2.0)), torch.tensor(math.log1p(math.exp(-2))))
    assert_close(clip_loss(eye, eye.flip(0), torch.tensor(2.0)), torch.tensor(2 + math.log1p(math.exp(-2))))


def test_clip_loss_is_the_mean_of_both_directions():
    image, text = features()
    scale = torch.tensor(7.0)
    logits = scale * image @ text.T
    labels = torch.arange(len(image))
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert_close(clip_loss(image, text, scale), expected)
    assert_close(info_nce(image, text, scale), F.cross_entropy(logits, labels))


def test_clip_loss_gradient_in_closed_form():
    """d loss / d logits = (softmax over rows + softmax over columns - 2 I) / 2B."""
    image, text = features()
    scale = torch.tensor(3.0, requires_grad=True)
    clip_loss(image, text, scale).backward()
    with torch.no_grad():
        cosines = image @ text.T
        grad = (F.softmax(3 * cosines, dim=1) + F.softmax(3 * cosines, dim=0) - 2 * torch.eye(6)) / 12
        assert_close(image.grad, 3 * grad @ text)
        assert_close(text.grad, 3 * grad.T @ image)
        assert_close(scale.grad, (grad * cosines).sum())


@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_losses_and_gradients_equal_open_clip(name: str):
    open_clip = pytest.importorskip("open_clip.loss")
    ours, theirs = [*features(), torch.tensor(9.0)], [*features(), torch.tensor(9.0)]
    bias = torch.tensor(-4.0)
    for tensors in (ours, theirs):
        tensors[2].requires_grad_()
    loss = LOSSES[name](Features(*ours, logit_bias=bias))
    if name == "contrastive":
        expected = open_clip.ClipLoss()(*theirs)
    else:
        expected = open_clip.SigLipLoss()(*theirs, bias)
    loss.backward()
    expected.backward()
    assert_close(loss, expected)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine.grad, other.grad)


def test_sigmoid_loss_of_two_pairs_by_hand():
    """Own pairs at logit 2 - 1, others at 0 - 1; two of each, over two images."""
    loss = sigmoid_loss(torch.eye(2), torch.eye(2), torch.tensor(2.0), torch.tensor(-1.0))
    assert_close(loss, torch.tensor(math.log1p(math.exp(-1)) * 2))


def test_clip_loss_does_not_depend_on_the_order_of_the_pairs():
    image, text = features()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(clip_loss(image[order], text[order], torch.tensor(5.0)), clip_loss(image, text, torch.tensor(5.0)))
    assert not torch.isclose(
        clip_loss(image[order], text, torch.tensor(5.0)), clip_loss(image, text, torch.tensor(5.0))
    )


def test_half_precision_features_are_compared_in_float32():
    image, text = (f.detach().bfloat16() for f in features())
    loss = clip_loss(image, text, torch.tensor(100.0))
    assert loss.dtype == torch.float32
    assert_close(loss, clip_loss(image.float(), text.float(), torch.tensor(100.0)))


def test_in_batch_accuracy_counts_both_directions():
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # image 2 takes text 1; text 2 takes image 0
    assert_close(in_batch_accuracy(image, text), torch.tensor(4 / 6))


def test_objective_is_the_weighted_sum_and_reports_its_parts():
    image, text = features()
    model = SimpleNamespace(logit_scale=torch.tensor(1.5), logit_bias=torch.tensor(-3.0))
    objective = ClipObjective(model, {"contrastive": 0.5, "sigmoid": 2.0})
    values = objective(SimpleNamespace(image_embeds=image, text_embeds=text))
    scale = torch.tensor(1.5).exp()
    contrastive, sigmoid = clip_loss(image, text, scale), sigmoid_loss(image, text, scale, torch.tensor(-3.0))
    assert_close(values["contrastive_loss"], contrastive)
    assert_close(values["sigmoid_loss"], sigmoid)
    assert_close(values["loss"], 0.5 * contrastive + 2 * sigmoid)
    assert values["logit_scale"] == 1.5
    only = ClipObjective(model, {"contrastive": 1.0, "sigmoid": 0.0})(
        SimpleNamespace(image_embeds=image, text_embeds=text)
    )
    assert set(only) == {"loss", "accuracy", "logit_scale"}
