"""Captions against wrong ones: SugarCrepe's and Winoground's formats and scores, and the demo's negatives."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from tiny_dual import picture, write_clip, write_llm2clip, write_teacher

from llm2clip.demo import captions
from llm2clip.demo.concepts import Concept
from llm2clip.demo.recipe import Item
from llm2clip.demo.scenes import anything, sample
from llm2clip.demo.wording import NUMBERS, plural
from llm2clip_eval import compositional
from llm2clip_eval.compositional_data import ImageList, ImagePairs, read_sugarcrepe, read_winoground
from llm2clip_eval.demo_negatives import KINDS, RELATION, demo_negatives, reverse_relation
from llm2clip_eval.dual_encoder import DualEncoder

NAMES = ("cat", "dog", "taxi", "house", "apple", "turkey", "tree", "owl", "bus", "car", "car key", "ant")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    teacher = write_teacher(root / "teacher")
    return write_clip(root / "clip"), write_llm2clip(root / "llm2clip", teacher), teacher


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for seed in range(4):
        picture(seed).save(tmp_path / "images" / f"ex_{seed}.png")
    return tmp_path / "images"


def measure(output_dir: Path, clip: Path, sets: dict, **settings: object) -> dict[str, dict]:
    file = output_dir.with_suffix(".yaml")
    config = {"arm": "arm", "clip": str(clip), "output_dir": str(output_dir), "sets": sets, **settings}
    file.write_text(yaml.safe_dump(config))
    compositional.main(["--config", str(file)])
    return {path.stem: json.loads(path.read_text()) for path in (output_dir / "results").glob("*.json")}


def write_sugarcrepe(root: Path) -> Path:
    root.mkdir()
    texts = {
        "swap_obj": [("a cat left of a dog", "a dog left of a cat"), ("a red taxi", "a red bus")],
        "replace_att": [("a red cat", "a blue cat"), ("the same", "the same"), ("two apples", "one apple")],
    }
    for category, pairs in texts.items():
        items = {
            str(number): {"filename": f"ex_{number}.png", "caption": caption, "negative_caption": negative}
            for number, (caption, negative) in enumerate(pairs)
        }
        (root / f"{category}.json").write_text(json.dumps(items))
    return root


@pytest.mark.parametrize("kind", ["clip", "llm2clip"])
def test_sugarcrepe_agrees_with_a_naive_loop_and_a_tie_is_a_miss(tmp_path, models, images, kind):
    clip, llm2clip, teacher = models
    model, live = (clip, None) if kind == "clip" else (llm2clip, teacher)
    data = write_sugarcrepe(tmp_path / "sugarcrepe")
    settings = {"teacher": str(live)} if live else {}
    sets = {"crepe": {"format": "sugarcrepe", "data": str(data), "images": str(images)}}
    result = measure(tmp_path / "out", model, sets, batch_size=2, **settings)["crepe"]
    encoder = DualEncoder(model, teacher=live)
    hits = {}
    for file in sorted(data.glob("*.json")):
        for number, item in json.loads(file.read_text()).items():
            image = encoder.encode_image([picture(int(number))])[0]
            right, wrong = encoder.encode_text([item["caption"], item["negative_caption"]]) @ image
            hits[f"{file.stem}-{number}"] = item["caption"] != item["negative_caption"] and bool(right > wrong)
    assert {item["id"]: item["correct"] for item in result["items"]} == hits
    assert result["num_items"] == {"replace_att": 3, "swap_obj": 2}
    by_hand = {
        name: 100 * sum(hit for key, hit in hits.items() if key.startswith(name)) / count
        for name, count in result["num_items"].items()
    }
    assert result["metrics"] == pytest.approx(
        by_hand | {"mean": sum(by_hand.values()) / 2, "all": 100 * sum(hits.values()) / 5}
    )


def test_another_picture_of_the_same_name_is_another_run(tmp_path, models, images):
    sets = {
        "crepe": {"format": "sugarcrepe", "data": str(write_sugarcrepe(tmp_path / "crepe")), "images": str(images)}
    }
    measure(tmp_path / "out", models[0], sets)
    picture(9).save(images / "ex_0.png")
    with pytest.raises(ValueError, match=r"sets\.crepe\.images was"):
        measure(tmp_path / "out", models[0], sets)


class FixedFeatures:
    """Stands in for a model: image n and caption "n" have given features."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        self.images = images
        self.texts = texts

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return self.texts[[int(text) for text in texts]]


def test_winoground_scores_of_hand_computed_items(monkeypatch):
    # Similarity of caption c (row) and image i (column), chosen freely: images are the identity.
    tables = [
        [[0.9, 0.1], [0.2, 0.8]],  # all right
        [[0.9, 0.95], [0.2, 0.96]],  # text: .9 > .2 and .96 > .95; image: .9 > .95 fails
        [[0.5, 0.1], [0.6, 0.7]],  # text: .5 > .6 fails; image: .5 > .1 and .7 > .6
        [[0.5, 0.5], [0.5, 0.5]],  # ties are misses
    ]
    texts = torch.tensor(tables).transpose(0, 1).reshape(8, 2)  # caption 0 of each item, then caption 1
    monkeypatch.setattr(compositional, "_image_features", lambda encoder, images, config: encoder.images)
    data = ImagePairs(
        images=ImageList(Path(), []),
        image_rows=[(0, 1)] * 4,
        captions=[(str(item), str(4 + item)) for item in range(4)],
        tags=["Object", "Object", "Relation", ""],
        ids=list("abcd"),
    )
    result = compositional.score_pairs(FixedFeatures(torch.eye(2), texts), data, None)  # type: ignore[arg-type]
    assert [(item["text"], item["image"], item["group"]) for item in result["items"]] == [
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (False, False, False),
    ]
    assert {name: result["metrics"][name] for name in ("text", "image", "group")} == {
        "text": 50.0,
        "image": 50.0,
        "group": 25.0,
    }
    assert result["metrics"]["Object: text"] == 100.0 and result["metrics"]["Relation: group"] == 0.0


def test_winoground_is_read_with_images_named_without_extension(tmp_path, images, models):
    lines = [
        {
            "id": number,
            "image_0": f"ex_{number}",
            "image_1": "ex_3",
            "caption_0": "a cat sees a dog",
            "caption_1": "a dog sees a cat",
            "collapsed_tag": "Object",
        }
        for number in range(2)
    ]
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = read_winoground(file, images)
    assert data.image_rows == [(0, 1), (2, 1)] and data.images.names == ["ex_0.png", "ex_3.png", "ex_1.png"]
    sets = {"wino": {"format": "winoground", "data": str(file), "images": str(images)}}
    result = measure(tmp_path / "out", models[0], sets)["wino"]
    assert [item["id"] for item in result["items"]] == ["0", "1"] and set(result["metrics"]) >= {
        "text",
        "Object: text",
    }


def test_bad_items_are_named(tmp_path, images):
    data = write_sugarcrepe(tmp_path / "sugarcrepe")
    item = {"filename": "gone.png", "caption": "a", "negative_caption": "b"}
    (data / "swap_obj.json").write_text(json.dumps({"7": item}))
    with pytest.raises(ValueError, match=r"swap_obj\.json, item 7: missing image: 'gone\.png'"):
        read_sugarcrepe(data, images)
    (data / "swap_obj.json").write_text(json.dumps({"7": {**item, "filename": "../images/ex_0.png"}}))
    with pytest.raises(ValueError, match="item 7: unsafe path"):
        read_sugarcrepe(data, images)
    (data / "swap_obj.json").write_text(json.dumps([{**item, "negative_caption": " "}]))
    with pytest.raises(ValueError, match="item 0: .* none in negative_caption"):
        read_sugarcrepe(data, images)
    (tmp_path / "examples.jsonl").write_text('{"image_0": "ex_0"}\n')
    with pytest.raises(ValueError, match=r"examples\.jsonl:1: .* none in image_1, caption_0, caption_1"):
        read_winoground(tmp_path / "examples.jsonl", images)


def scenes(count: int) -> list[tuple[Item, dict]]:
    """Scenes as the demo makes them, captioned in canonical words, with their rows."""
    concepts = [Concept(name, name, "thing", "", "train", {}, (), {}) for name in NAMES]
    found = []
    for number in range(count):
        rng = Random(number)
        groups = sample(rng, concepts, 3, pair_rule=anything, cell_rule=anything)
        assert groups
        phrases = [group.concept.name for group in groups]
        texts = {
            "short": [captions.short_caption(groups, phrases, rng)],
            "long": [captions.long_caption(groups, phrases, 3, rng)],
        }
        item = Item(f"scene-{number}", groups, texts, (), "")
        found.append((item, item.row()))
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, dict[str, Item]]:
    root = tmp_path_factory.mktemp("demo")
    (root / "images").mkdir()
    made = scenes(150)
    for number, (item, _) in enumerate(made):
        picture(number).save(root / "images" / f"{item.id}.png")
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for _, row in made))
    return root, {item.id: item for item, _ in made}


def test_negatives_of_the_demo_are_false_by_its_facts(demo):
    root, items = demo
    negatives = demo_negatives(root)
    assert negatives == demo_negatives(root) != demo_negatives(root, seed=1)
    assert min(Counter(negative.kind for negative in negatives)[kind] for kind in KINDS) >= 5
    for negative in negatives:
        groups = items[negative.id].groups
        own = items[negative.id].captions["long" if negative.kind in ("swap_objects", "reverse_relation") else "short"]
        assert negative.caption == own[0] != negative.negative_caption
        names = {group.concept.name: group for group in groups}
        changed = negative.negative_caption
        if negative.kind == "change_count":
            said = [
                (name, number)
                for name in names
                for number in (2, 3, 4)
                if re.search(rf"\b{NUMBERS[number]} {plural(name)}\b", changed, re.IGNORECASE)
            ]
            assert any(names[name].count != number for name, number in said)
        elif negative.kind == "replace_object":
            assert [
                name
                for name in NAMES
                if name not in names and re.search(rf"\ban? {name}(?! key)\b", changed, re.IGNORECASE)
            ]
        elif negative.kind == "swap_objects":
            before, after = (_order(text) for text in (negative.caption, changed))
            assert sorted(before) == sorted(after) and sum(a != b for a, b in zip(before, after, strict=True)) == 2
            assert not RELATION.search(negative.caption)  # each object's place is said: another one's is wrong
        else:
            assert _order(negative.caption) == _order(changed)
            assert reverse_relation(changed) == negative.caption


def _order(caption: str) -> list[str]:
    """The single objects of a caption in order."""
    longest_first = "|".join(sorted(NAMES, key=len, reverse=True))
    return [name.lower() for name in re.findall(rf"\ban? ({longest_first})\b", caption, re.IGNORECASE)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A cat is below and to the right of it.", "A cat is above and to the left of it."),
        ("A cat is to the left of the dog.", "A cat is to the right of the dog."),
        ("A cat, on the right side of it a dog.", "A cat, on the left side of it a dog."),
        ("A cat is directly above them.", "A cat is directly below them."),
        ("A cat at the top left and a dog in the middle row on the right.", None),
        ("Top row: a cat on the left; bottom row: a dog on the right.", None),
    ],
)
def test_relations_are_turned_round_and_places_are_no_relations(caption, expected):
    assert reverse_relation(caption) == expected


def test_a_name_within_another_is_no_mention(tmp_path):
    row = {
        "id": "1",
        "image": "images/1.png",
        "captions": {
            "short": ["A car key and a motor."],
            "long": ["A car key at the top left and a motor at the top."],
        },
        "objects": [
            {"concept": name, "name": name, "category": "thing", "cell": [0, place]}
            for place, name in enumerate(("car", "car key"))
        ],
    }
    (tmp_path / "captions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="none of 1 rows"):
        demo_negatives(tmp_path)
    (tmp_path / "captions.jsonl").write_text(json.dumps({**row, "objects": []}) + "\n")
    with pytest.raises(ValueError, match=r"captions\.jsonl:1 \(1\) has no objects"):
        demo_negatives(tmp_path)


def test_the_stage_on_a_pool_of_the_demo(tmp_path, demo, models):
    sets = {"demo": {"format": "demo", "data": str(demo[0])}}
    result = measure(tmp_path / "out", models[0], sets)["demo"]
    assert set(result["metrics"]) == {*KINDS, "mean", "all"}
    assert len(result["items"]) == sum(result["num_items"].values()) == len(demo_negatives(demo[0]))
    with pytest.raises(ValueError, match="demo has its own images"):
        measure(tmp_path / "x", models[0], {"demo": {"format": "demo", "data": str(demo[0]), "images": str(demo[0])}})
