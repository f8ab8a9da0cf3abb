"""The linear probe: both solvers find the optimum, validation chooses, and test images are scored once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_dual import write_class_folders, write_clip

from llm2clip_eval import linear_probe, probe
from llm2clip_eval.linear_probe import Probe, choose_weight_decay, fit

COLOURS = ((220, 30, 30), (30, 200, 40), (40, 40, 220))


def clusters(num_images: int, seed: int, noise: float = 1.0) -> tuple[torch.Tensor, np.ndarray]:
    """Three overlapping clusters far from the origin."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, num_images)
    centers = np.random.default_rng(99).normal(size=(3, 5)) + 4
    return torch.from_numpy(centers[labels] + noise * rng.normal(size=(num_images, 5))).float(), labels


@pytest.mark.parametrize("solver", ["sklearn", "torch"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_gradient_of_the_objective_is_zero(solver, num_classes):
    features, labels = clusters(80, 0)
    labels = labels % num_classes
    found = fit(features, labels, num_classes, 0.03, solver)
    weight, bias = found.weight.double().requires_grad_(), found.bias.double().requires_grad_()
    loss = F.cross_entropy(features.double() @ weight.T + bias, torch.from_numpy(labels))
    (loss + 0.03 / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 2e-4 and bias.grad.abs().max() < 2e-4


def test_both_solvers_give_the_same_scores():
    features, labels = clusters(80, 0)
    one, other = (fit(features, labels, 3, 0.03, solver).scores(features) for solver in ("sklearn", "torch"))
    torch.testing.assert_close(one.softmax(dim=1), other.softmax(dim=1), rtol=0, atol=2e-3)


def test_a_class_that_training_never_showed_is_last():
    features, labels = clusters(40, 0)
    scores = fit(features, np.where(labels == 1, 3, labels), 5, 0.1, "torch").scores(features)
    assert torch.isfinite(scores).all()
    assert (scores[:, [1, 4]].amax(dim=1) < scores[:, [0, 2, 3]].amin(dim=1)).all()
    with pytest.raises(ValueError, match="at least two classes"):
        fit(features, np.zeros(40, int), 5, 0.1, "torch")


def test_validation_chooses_and_equals_go_to_the_larger(monkeypatch):
    right, wrong = Probe(torch.eye(2), torch.zeros(2)), Probe(-torch.eye(2), torch.zeros(2))
    fitted = {1e-3: wrong, 1e-2: right, 1e-1: right, 1.0: wrong}
    monkeypatch.setattr(linear_probe, "fit", lambda features, labels, classes, decay, solver: fitted[decay])
    data = torch.eye(2), np.array([0, 1])
    best, sweep = choose_weight_decay(data, data, 2, [1.0, 1e-1, 1e-2, 1e-3], "torch")
    assert best == 1e-1 and sweep == {"0.001": 0.0, "0.01": 100.0, "0.1": 100.0, "1": 0.0}


def test_validation_images_are_drawn_from_every_class_that_can_spare_one():
    labels = np.array([0] * 10 + [1] * 3 + [2])
    chosen = probe.validation_rows(labels, 0.2, seed=0)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [2, 1, 0]
    assert np.array_equal(chosen, probe.validation_rows(labels, 0.2, seed=0))
    assert not np.array_equal(chosen, probe.validation_rows(labels, 0.2, seed=1))
    with pytest.raises(ValueError, match="give val"):
        probe.validation_rows(np.array([0, 1]), 0.2, seed=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


def measure(output_dir: Path, clip: Path, **settings: object) -> dict:
    file = output_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"arm": "arm", "clip": str(clip), "output_dir": str(output_dir), **settings}))
    probe.main(["--config", str(file)])
    return json.loads((output_dir / "result.json").read_text())


@pytest.mark.parametrize(("features", "solver"), [("pooled", "sklearn"), ("projected", "torch")])
def test_colours_are_learnt_from_the_features_of_a_random_tower(tmp_path, clip, features, solver):
    train = write_class_folders(tmp_path / "train", {"red": 8, "green": 8, "blue": 8}, COLOURS)
    test = write_class_folders(tmp_path / "test", {"red": 2, "green": 3, "blue": 2}, COLOURS)
    settings = {"weight_decays": [1e-4, 1e-2], "features": features, "solver": solver, "seed": 3}
    result = measure(tmp_path / "out", clip, train={"path": str(train)}, test={"path": str(test)}, **settings)
    assert result["metrics"]["acc1"] == 100.0 and result["metrics"]["mean_per_class_recall"] == 100.0
    assert (result["num_train"], result["num_val"], result["num_test"]) == (18, 6, 7)
    assert [item["id"] for item in result["items"]] == sorted(item["id"] for item in result["items"])
    assert set(result["sweep"]) == {"0.0001", "0.01"}


def test_validation_of_its_own_and_a_tower_without_projection(tmp_path, clip):
    from llm2clip.vision_tower import load_vision_model, write_tower

    tower, processor = load_vision_model(str(clip))
    write_tower(tower, processor, tmp_path / "tower")
    folders = {
        part: {"path": str(write_class_folders(tmp_path / part, {"red": 4, "green": 4, "blue": 4}, COLOURS))}
        for part in ("train", "val", "test")
    }
    whole = measure(tmp_path / "a", clip, weight_decays=[1e-3], **folders)
    bare = measure(tmp_path / "b", tmp_path / "tower", weight_decays=[1e-3], **folders)
    assert (whole["num_train"], whole["num_val"]) == (12, 12)
    assert whole["items"] == bare["items"] and whole["metrics"] == bare["metrics"]


def test_sets_of_other_classes_are_refused(tmp_path, clip):
    train = write_class_folders(tmp_path / "train", {"red": 2, "green": 2})
    test = write_class_folders(tmp_path / "test", {"red": 2, "blue": 2})
    with pytest.raises(ValueError, match=r"only one of them has \['blue', 'green'\]"):
        measure(tmp_path / "out", clip, train={"path": str(train)}, test={"path": str(test)})
    with pytest.raises(ValueError, match="weight_decays.*val_fraction|val_fraction.*weight_decays"):
        measure(
            tmp_path / "x",
            clip,
            train={"path": str(train)},
            test={"path": str(test)},
            weight_decays=[0.0],
            val_fraction=1.0,
        )
