"""The whole build on stand-in packages: contents, hold-outs, determinism, bad settings."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import demo_fakes
import pytest
from PIL import Image

from llm2clip.caption_data import CaptionData
from llm2clip.demo import build, concepts, packages, scenes, training
from llm2clip.run_dir import read_manifest

SMALL = ["--num_concepts=120", "--num_scenes=60", "--num_renderings=2", "--num_singles=300", "--languages=[de,zh]"]
SMALL += ["--num_val_scenes=12", "--num_test_scenes=12", "--num_layout_pairs=100"]
ALL = ("openmoji", "emoji", "fluent", "twemoji", "noto", "cldr")


def run_build(monkeypatch: pytest.MonkeyPatch, folder: Path, names: tuple[str, ...] = ALL, *options: str) -> Path:
    demo_fakes.install(monkeypatch, folder / "cache", names)
    build.main([f"--output_dir={folder / 'data'}", f"--cache_dir={folder / 'cache'}", *SMALL, *options])
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_build(monkeypatch, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, concepts.Concept]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        cache = tmp_path_factory.mktemp("cache")
        demo_fakes.install(monkeypatch, cache, ("emoji", "cldr"))
        loaded = concepts.load_concepts(packages.fetch(["emoji", "cldr"], cache), [], 120)
    return {concept.key: concept for concept in loaded}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]


def shown(row: dict) -> Counter:
    return Counter(thing["concept"] for thing in row["objects"])


def words(text: str) -> str:
    found = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(found)} "


def test_every_part_is_caption_data(data):
    folders = [path.parent for path in data.rglob("captions.jsonl")]
    assert len(folders) == 2 + 8 + 10
    for folder in folders:
        read = CaptionData.open(folder)
        assert len(read) == len(rows(folder)) == len(list((folder / "images").iterdir()))
        image = read.load_image(len(read) - 1)
        assert image.size == (96, 96) and image.mode == "RGB"
    assert len(rows(data / "train" / "scenes")) == 120
    assert (data / "data_card.md").read_text().count("| pools/test/lang_de |") == 2
    assert Image.open(data / "contact_sheet.png").width == 2000


def test_renderings_share_captions_but_not_pictures(data):
    folder = data / "train" / "scenes"
    for first, second in zip(rows(folder)[::2], rows(folder)[1::2], strict=True):
        assert first["captions"] == second["captions"]
        assert (folder / first["image"]).read_bytes() != (folder / second["image"]).read_bytes()


def test_scene_captions_by_kind(data):
    for row in rows(data / "train" / "scenes"):
        numbers = {kind: len(texts) for kind, texts in row["captions"].items()}
        assert set(numbers) == {"raw", "short", "long"}
        assert numbers["raw"] in (1, 2) and numbers["short"] == 1 and numbers["long"] in (2, 3)


def test_training_shows_nothing_that_is_held_out(data, known):
    for part in ("scenes", "singles"):
        for row in rows(data / "train" / part):
            things = [known[key] for key in shown(row)]
            assert {thing.split for thing in things} == {"train"}
            assert max(shown(row).values()) <= 3, "four of a kind are held out"
            for first, second in itertools.combinations(things, 2):
                assert concepts.held_out_pair(first, second) == "train"
            for thing in row["objects"]:
                if thing["cell"]:
                    assert concepts.held_out_cell(known[thing["concept"]], tuple(thing["cell"])) == "train"


def test_training_texts_use_no_held_out_wording(data, known):
    def check(text: str, keys) -> None:
        for key in keys:
            for held_out in (*known[key].wordings["val"], *known[key].wordings["test"]):
                assert words(concepts.bare(held_out)) not in words(text), (key, text)

    for part in ("scenes", "singles"):
        for row in rows(data / "train" / part):
            for text in itertools.chain.from_iterable(row["captions"].values()):
                check(text, shown(row))
    by_name = {words(concepts.bare(concept.name)): key for key, concept in known.items() if concept.split == "train"}
    pairs = [json.loads(line) for line in (data / "train" / "text_pairs.jsonl").read_text().splitlines()]
    assert {pair["kind"] for pair in pairs} == {"wording", "keywords", "category"}
    for pair in pairs:
        name = words(re.sub(r"^(an?|the) ", "", pair["query"]))
        if name in by_name:
            check(f"{pair['query']} {pair['positive']}", [by_name[name]])
    assert sum(words(re.sub(r"^(an?|the) ", "", pair["query"])) in by_name for pair in pairs) > len(by_name)


def test_layout_pairs_tell_the_same_things_in_other_places(data, known):
    pairs = [json.loads(line) for line in (data / "train" / "layout_pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 100
    names = {key: words(concepts.bare(concept.name)) for key, concept in known.items() if concept.split == "train"}
    for pair in pairs:
        assert pair["query"] != pair["positive"]
    for first in range(training.NUM_LAYOUT_SETS):
        same_objects = pairs[first :: training.NUM_LAYOUT_SETS]
        assert len({pair["query"] for pair in same_objects}) == len(same_objects) > 3
        named = [{key for key, name in names.items() if name in words(pair["query"])} for pair in same_objects]
        assert set.union(*named), "none of the captions of a set calls a thing by its name"
        for pair in same_objects:
            text = words(f"{pair['query']} {pair['positive']}")
            held_out = [
                phrase for key in set.union(*named) for s in ("val", "test") for phrase in known[key].wordings[s]
            ]
            assert not any(words(concepts.bare(phrase)) in text for phrase in held_out)


def test_rearranged_scenes_show_the_same_things_in_allowed_cells(known):
    things = [concept for concept in known.values() if concept.split == "train"]
    for seed in range(50):
        rng = Random(seed)
        shown = scenes.sample(rng, things, 3)
        assert shown
        moved = scenes.rearrange(rng, shown, 3)
        assert moved and moved != shown
        assert [(group.concept, group.count) for group in moved] == [(group.concept, group.count) for group in shown]
        cells = [cell for group in moved for cell in group.cells]
        assert len(set(cells)) == len(cells)
        assert all(scenes.seen_cell(group.concept, cell) for group in moved for cell in group.cells)


@pytest.mark.parametrize("split", ["val", "test"])
def test_pools_hold_out_what_they_say(data, known, split):
    pools = data / "pools" / split
    for name in ("seen", "wording", "compositions"):
        assert all(known[key].split == "train" for row in rows(pools / name) for key in shown(row))
    for name in ("concepts", "concepts_single", "style_concepts"):
        assert all(known[key].split == split for row in rows(pools / name) for key in shown(row))
    for name in ("wording", "wording_single"):
        for row in rows(pools / name):
            for kind in ("short", "long"):
                text = words(row["captions"][kind][0])
                for key, count in shown(row).items():
                    assert words(concepts.bare(known[key].name)) not in text
                    if count == 1:
                        held_out = [words(concepts.bare(phrase)) for phrase in known[key].wordings[split]]
                        assert any(phrase in text for phrase in held_out), (key, text)
    for row in rows(pools / "compositions"):
        things = [known[key] for key in shown(row)]
        pair = any(concepts.held_out_pair(*pair) == split for pair in itertools.combinations(things, 2))
        count = max(shown(row).values()) == 4
        cells = [(known[thing["concept"]], tuple(thing["cell"])) for thing in row["objects"]]
        assert pair or count or all(concepts.held_out_cell(*cell) == split for cell in cells)


@pytest.mark.parametrize("split", ["val", "test"])
def test_captions_identify_their_picture(data, split):
    for pool in (data / "pools" / split).iterdir():
        pool_rows = rows(pool)
        sets = [frozenset(shown(row).items()) for row in pool_rows]
        for first, second in itertools.combinations(sets, 2):
            assert not first <= second and not second <= first
        for kind in pool_rows[0]["captions"]:
            texts = [row["captions"][kind][0] for row in pool_rows]
            assert len(set(texts)) == len(texts), (pool, kind)


def test_style_and_language_pools_are_the_seen_scenes(data):
    test = data / "pools" / "test"
    seen = rows(test / "seen")
    assert [row["captions"] for row in rows(test / "style")] == [row["captions"] for row in seen]
    german = rows(test / "lang_de")
    assert [shown(row) for row in german] == [shown(row) for row in seen]
    assert set(german[0]["captions"]) == {"raw", "long"} and set(rows(test / "lang_zh")[0]["captions"]) == {"raw"}
    for own, other, restyled in zip(seen, german, rows(test / "style"), strict=True):
        picture = (test / "seen" / own["image"]).read_bytes()
        assert picture == (test / "lang_de" / other["image"]).read_bytes()
        assert picture != (test / "style" / restyled["image"]).read_bytes()


def test_build_is_the_same_byte_for_byte_also_in_parallel(monkeypatch, tmp_path, data):
    monkeypatch.setattr(build, "PARALLEL_FROM", 1)
    again = run_build(monkeypatch, tmp_path)
    assert read_manifest(again)["outputs"] == read_manifest(data)["outputs"]


def test_interrupted_build_is_finished_by_the_next(monkeypatch, tmp_path, data):
    render = scenes.Drawings.render
    calls = itertools.count()

    def fail_late(*args):
        if next(calls) == 100:
            raise KeyboardInterrupt
        return render(*args)

    with monkeypatch.context() as patch:
        patch.setattr(scenes.Drawings, "render", fail_late)
        with pytest.raises(KeyboardInterrupt):
            run_build(monkeypatch, tmp_path)
    assert not (tmp_path / "data" / "manifest.json").exists()
    again = run_build(monkeypatch, tmp_path)
    assert read_manifest(again)["outputs"] == read_manifest(data)["outputs"]


def test_more_scenes_leave_the_others_alone(monkeypatch, tmp_path, data):
    more = run_build(monkeypatch, tmp_path, ALL, "--num_scenes=70", "--num_test_scenes=14")
    assert rows(more / "train" / "scenes")[:120] == rows(data / "train" / "scenes")
    assert rows(more / "pools" / "test" / "seen")[:12] == rows(data / "pools" / "test" / "seen")


def test_pip_alone(monkeypatch, tmp_path):
    """The pools that need npm's packages are left out where those are not asked for."""
    data = run_build(monkeypatch, tmp_path, ("openmoji", "emoji"), "--optional_packages=false")
    pools = {path.name for path in (data / "pools" / "test").iterdir()}
    assert {"seen", "concepts", "wording", "compositions", "lang_de"} <= pools
    assert not pools & {"style", "style_concepts"}
    assert json.loads((data / "sources.json").read_text()).keys() == {"openmoji", "emoji"}


def test_grid_size_and_seed_are_settings(monkeypatch, tmp_path, data):
    other = run_build(monkeypatch, tmp_path, ALL, "--seed=1", "--grid=2", "--image_size=64")
    scenes_there = rows(other / "train" / "scenes")
    assert [row["captions"] for row in scenes_there] != [row["captions"] for row in rows(data / "train" / "scenes")]
    assert {tuple(thing["cell"]) for row in scenes_there for thing in row["objects"]} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    }
    assert Image.open(other / "train" / "scenes" / scenes_there[0]["image"]).size == (64, 64)


def test_second_run_does_nothing(monkeypatch, data):
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    cache = data.parent / "cache"
    demo_fakes.install(monkeypatch, cache, ALL)
    build.main([f"--output_dir={data}", f"--cache_dir={cache}", *SMALL])


def test_bad_settings_are_named_together(tmp_path):
    with pytest.raises(
        ValueError, match="(?s)num_scenes is 0.*num_long_captions.*num_concepts is 3.*image_size is 20"
    ):
        build.DemoConfig(output_dir=tmp_path, num_scenes=0, num_concepts=3, image_size=20, num_long_captions=[])


def test_objects_are_drawn_in_their_cells(known):
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    first, second = list(known.values())[:2]
    images = {
        "flat": {
            first.key: Image.new("RGBA", (40, 40), (*colours["red"], 255)),
            second.key: Image.new("RGBA", (40, 20), (*colours["blue"], 255)),
        }
    }
    drawings = scenes.Drawings(images, image_size=96, grid=3)
    groups = (scenes.Group(first, ((0, 0), (2, 2))), scenes.Group(second, ((1, 0),)))
    for seed in range(10):
        picture = Image.open(io.BytesIO(drawings.render(groups, ("flat",), Random(seed))))
        assert [picture.getpixel(point) for point in ((16, 16), (80, 80))] == [colours["red"]] * 2
        found = [picture.crop((0, 32, 32, 64)).getpixel((16, y)) == colours["blue"] for y in range(32)]
        assert sum(found) == 14, "28 pixels wide at 2:1"
        assert picture.getpixel((48, 48)) == picture.getpixel((48, 16)), "an empty cell is background"


def test_distinct_scenes_refuse_parts_of_each_other(known):
    things = list(known.values())[:4]

    def scene(*numbers: int) -> scenes.Groups:
        return tuple(scenes.Group(things[number], ((0, number % 3),)) for number in numbers)

    pool = scenes.DistinctScenes()
    assert pool.add(scene(0, 1, 2))
    assert not pool.add(scene(1, 0)), "part of an earlier scene"
    assert not pool.add(scene(3, 0, 1, 2)), "contains an earlier scene"
    assert pool.add(scene(1, 3))
    assert pool.matches(frozenset({(things[1].key, 1)})) == 2
