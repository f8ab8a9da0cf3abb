"""Zero-shot classification: figures worked out by hand, open_clip's on random features, and every layout."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from sklearn.metrics import balanced_accuracy_score
from tiny_dual import picture, write_class_folders, write_clip, write_llm2clip, write_teacher

from llm2clip_eval import zeroshot
from llm2clip_eval.classification import accuracies, image_records, label_ranks
from llm2clip_eval.classification_data import fill_template, open_labelled, read_templates
from llm2clip_eval.dual_encoder import DualEncoder


def test_ranks_and_figures_of_a_hand_computed_table():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.8], [0.3, 0.6, 0.1], [0.4, 0.4, 0.4], [0.1, 0.2, 0.3]])
    labels = np.array([0, 1, 0, 2, 2])
    ranks = label_ranks(scores, labels)
    assert ranks.tolist() == [0, 1, 1, 2, 0]  # a tie counts against the right class
    # class 0: 1 of 2, class 1: 0 of 1, class 2: 1 of 2
    assert accuracies(ranks, labels) == pytest.approx(
        {"acc1": 40.0, "acc5": 100.0, "mean_per_class_recall": 100 / 3 * (0.5 + 0 + 0.5)}
    )
    records = image_records(list("abcde"), labels, scores, ranks)
    assert records[2] == {"id": "c", "label": 0, "prediction": 1, "rank": 1, "correct": False}


def test_of_classes_with_one_text_the_first_is_found_and_other_ties_are_misses():
    texts = np.array([0, 1, 0, 2])
    scores = torch.tensor([[0.9, 0.1, 0.5]] * 2 + [[0.4, 0.4, 0.1]] * 2 + [[0.2, 0.2, 0.2]] * 4)[:, texts]
    labels = np.array([0, 2, 0, 2, 0, 1, 2, 3])
    assert label_ranks(scores, labels, texts).tolist() == [0, 1, 1, 2, 2, 3, 3, 3]
    assert label_ranks(scores, labels).tolist() == [1, 1, 2, 2, 3, 3, 3, 3]


def test_a_class_without_images_does_not_count():
    assert accuracies(np.array([0, 1]), np.array([0, 7]))["mean_per_class_recall"] == 50.0


def test_figures_are_clip_benchmarks_and_scikit_learns_on_random_scores():
    scores = torch.randn(200, 17, generator=torch.Generator().manual_seed(0))
    labels = np.random.default_rng(0).integers(0, 17, 200)
    found = accuracies(label_ranks(scores, labels), labels)
    # The rule of `accuracy` in CLIP_benchmark and open_clip_train, which both fail under NumPy 2.4.
    correct = scores.topk(5, dim=1).indices == torch.from_numpy(labels)[:, None]
    assert found["acc1"] == pytest.approx(100 * correct[:, :1].any(dim=1).float().mean().item())
    assert found["acc5"] == pytest.approx(100 * correct.any(dim=1).float().mean().item())
    balanced = balanced_accuracy_score(labels, scores.argmax(dim=1).numpy())
    assert found["mean_per_class_recall"] == pytest.approx(100 * balanced)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        label_ranks(torch.tensor([[0.1, float("nan")]]), np.array([0]))


def test_folders_are_classes_in_alphabetical_order(tmp_path):
    root = write_class_folders(tmp_path / "data", {"taxi": 2, "apple": 1})
    (root / "apple" / "notes.txt").write_text("no image")
    images = open_labelled(root)
    assert images.class_names == ["apple", "taxi"]
    assert images.ids == ["apple/0.png", "taxi/0.png", "taxi/1.png"] and images.labels.tolist() == [0, 1, 1]
    assert images.load_image(1).size == (40, 36)


def test_wordnet_folders_get_names_in_order_or_by_folder(tmp_path):
    root = write_class_folders(tmp_path / "val", {"n02": 1, "n01": 1})
    names = tmp_path / "names.txt"
    names.write_text("tench\ngreat white shark\n")
    assert open_labelled(root, class_names=str(names)).class_names == ["tench", "great white shark"]
    mapping = tmp_path / "names.json"
    mapping.write_text(json.dumps({"n02": "great white shark", "n01": "tench", "n03": "hen"}))
    assert open_labelled(root, class_names=str(mapping)).class_names == ["tench", "great white shark"]
    names.write_text("tench\n")
    with pytest.raises(ValueError, match="2 folders, class_names 1 names"):
        open_labelled(root, class_names=str(names))
    mapping.write_text(json.dumps({"n01": "tench"}))
    with pytest.raises(ValueError, match="no name for the folder 'n02'"):
        open_labelled(root, class_names=str(mapping))


def test_numbered_folders_are_numbers_of_classes(tmp_path):
    root = write_class_folders(tmp_path / "v2", {"0": 1, "10": 1, "9": 1})  # ImageNet-V2 does not show every class
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {number}" for number in range(11)))
    images = open_labelled(root, class_names=str(names))
    assert {name: images.class_names[label] for name, label in zip(images.ids, images.labels, strict=True)} == {
        "0/0.png": "class 0",
        "10/0.png": "class 10",
        "9/0.png": "class 9",
    }
    names.write_text("only\ntwo")
    with pytest.raises(ValueError, match="of class 10, but there are 2 class names"):
        open_labelled(root, class_names=str(names))


def write_webdataset(root: Path, labels: list[str], num_shards: int = 2) -> Path:
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("cat\ndog\ntaxi\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of a {c}.\n")
    (root / "test" / "nshards.txt").write_text(f"{num_shards}\n")
    for shard in range(num_shards):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard, len(labels), num_shards):
                png = io.BytesIO()
                picture(number).save(png, "PNG")
                for name, content in ((f"s{number}.cls", labels[number].encode()), (f"s{number}.png", png.getvalue())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


def test_the_webdataset_layout_of_clip_benchmark(tmp_path):
    root = write_webdataset(tmp_path / "wds", ["2", "0", "1", "2\n"])
    images = open_labelled(root)
    assert images.ids == ["0.tar/s0", "0.tar/s2", "1.tar/s1", "1.tar/s3"]
    assert images.labels.tolist() == [2, 1, 0, 2] and images.class_names == ["cat", "dog", "taxi"]
    assert np.array_equal(np.asarray(images.load_image(2)), np.asarray(picture(1)))
    assert read_templates(None, root) == ["a photo of a {c}.", "a drawing of a {c}."]


def test_bad_samples_of_tars_are_named(tmp_path):
    root = write_webdataset(tmp_path / "wds", ["2", "dog", "1"])
    with pytest.raises(ValueError, match=r"1 bad samples, such as 1\.tar/s1: its \.cls holds 'dog'"):
        open_labelled(root)
    (root / "test" / "1.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.tar does not exist"):
        open_labelled(root)
    with pytest.raises(FileNotFoundError, match=r"has the splits \['test'\]"):
        open_labelled(root, split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no folder of a class"):
        open_labelled(tmp_path / "empty")


def test_templates(tmp_path):
    assert read_templates(None, tmp_path) == ["a photo of a {c}."]
    assert fill_template("a {c}, {c}.", "cat") == "a cat, cat." and fill_template("a {}.", "{x}") == "a {x}."
    assert len(read_templates("imagenet", tmp_path)) == 80
    assert read_templates("imagenet", tmp_path)[0] == "a bad photo of a {c}."
    (tmp_path / "t.json").write_text(json.dumps(["a photo of a {c}.", "a photo."]))
    with pytest.raises(ValueError, match="template 2, 'a photo.', has no {c}"):
        read_templates(str(tmp_path / "t.json"), tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    teacher = write_teacher(root / "teacher")
    return write_clip(root / "clip"), write_llm2clip(root / "llm2clip", teacher), teacher


def classify(output_dir: Path, clip: Path, **settings: object) -> dict:
    config = {"arm": "arm", "clip": str(clip), "output_dir": str(output_dir), **settings}
    file = output_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    zeroshot.main(["--config", str(file)])
    return {path.stem: json.loads(path.read_text()) for path in (output_dir / "results").glob("*.json")}


@pytest.mark.parametrize("kind", ["clip", "llm2clip"])
def test_the_stage_agrees_with_a_naive_loop(tmp_path, models, kind):
    clip, llm2clip, teacher = models
    data = write_class_folders(tmp_path / "data", {"cat": 3, "dog": 2, "taxi": 4})
    (tmp_path / "templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    settings = {"sets": {"three": {"path": str(data), "templates": str(tmp_path / "templates.txt")}}}
    settings |= {"teacher": str(teacher)} if kind == "llm2clip" else {}
    result = classify(tmp_path / "out", llm2clip if kind == "llm2clip" else clip, batch_size=4, **settings)["three"]
    encoder = DualEncoder(llm2clip if kind == "llm2clip" else clip, teacher=teacher if kind == "llm2clip" else None)
    weights = []
    for name in ("cat", "dog", "taxi"):
        weights.append(F.normalize(encoder.encode_text([f"a photo of a {name}.", f"the {name}"]).mean(dim=0), dim=0))
    for item in result["items"]:
        name, _, file = item["id"].partition("/")
        number = ["cat", "dog", "taxi"].index(name)
        image = encoder.encode_image([picture(1000 * number + int(file.removesuffix(".png")))])[0]
        scores = [float(image @ weight) for weight in weights]
        assert item["label"] == number and item["prediction"] == int(np.argmax(scores))
        assert item["rank"] == sum(score > scores[number] for score in scores)
    hits = [item["correct"] for item in result["items"]]
    assert result["metrics"]["acc1"] == pytest.approx(100 * np.mean(hits))
    assert (result["num_images"], result["num_classes"]) == (9, 3)


def test_a_repeated_class_name_counts_as_in_clip_benchmark(tmp_path, models):
    data = write_class_folders(tmp_path / "data", {"n1": 3, "n2": 2})
    names = tmp_path / "names.txt"
    names.write_text("missile\nmissile\n")
    result = classify(tmp_path / "out", models[0], sets={"a": {"path": str(data), "class_names": str(names)}})["a"]
    assert [(item["prediction"], item["rank"]) for item in result["items"]] == [(0, 0)] * 3 + [(0, 1)] * 2
    assert result["metrics"] == {"acc1": 60.0, "acc5": 100.0, "mean_per_class_recall": 50.0}
    assert result["num_classes"] == 2 and result["class_names"] == ["missile", "missile"]


def test_a_killed_run_keeps_its_results(tmp_path, models):
    data = write_class_folders(tmp_path / "data", {"cat": 1, "dog": 1})
    sets = {name: {"path": str(data)} for name in ("a", "b")}
    first = classify(tmp_path / "out", models[0], sets=sets, feature_cache=str(tmp_path / "cache"))
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "results" / "b.json").unlink()
    kept = (tmp_path / "out" / "results" / "a.json").stat().st_mtime_ns
    assert classify(tmp_path / "out", models[0], sets=sets, feature_cache=str(tmp_path / "cache")) == first
    assert (tmp_path / "out" / "results" / "a.json").stat().st_mtime_ns == kept
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1  # both sets show the same images
