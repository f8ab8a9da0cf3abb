"""English phrases are grammatical, and captions state the facts of their scene."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from llm2clip.demo import captions, languages, wording
from llm2clip.demo.scenes import Group


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("taxi", "a taxi"),
        ("eagle", "an eagle"),
        ("unicorn", "a unicorn"),
        ("unidentified object", "an unidentified object"),
        ("X-ray", "an X-ray"),
        ("UFO", "a UFO"),
        ("SUV", "an SUV"),
        ("ewe", "a ewe"),
        ("hourglass", "an hourglass"),
        ("one-eyed smiley", "a one-eyed smiley"),
        ("~glitter", "glitter"),
        ("the Kaaba", "the Kaaba"),
    ],
)
def test_article(phrase, expected):
    assert wording.with_article(phrase) == expected


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("taxi", "taxis"),
        ("box", "boxes"),
        ("cherry", "cherries"),
        ("donkey", "donkeys"),
        ("mouse", "mice"),
        ("goldfish", "goldfish"),
        ("snowman", "snowmen"),
        ("caiman", "caimans"),
        ("king's son", "king's sons"),
        ("maple leaf", "maple leaves"),
        ("house with a garden", "houses with a garden"),
        ("two-hump ox", "two-hump oxen"),
        ("yo-yo", "yo-yos"),
    ],
)
def test_plural(phrase, expected):
    assert wording.plural(phrase) == expected


def test_counting_what_cannot_be_counted():
    assert wording.counted("taxi", 3) == "three taxis"
    with pytest.raises(ValueError, match="glitter.*not countable"):
        wording.counted("~glitter", 2)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [("taxi", "is"), ("~glitter", "is"), ("~socks", "are"), ("~Ray-Bans", "is"), ("glass", "is")],
)
def test_verb(phrase, expected):
    assert wording.verb(phrase, "is", "are") == expected


def test_places_are_told_apart():
    for grid in (2, 3):
        cells = [(row, column) for row in range(grid) for column in range(grid)]
        said = {cell: {wording.place(cell, grid, Random(seed)) for seed in range(200)} for cell in cells}
        everything = [phrase for phrases in said.values() for phrase in phrases]
        assert len(everything) == len(set(everything)), "two cells share a phrase"
        assert all(len(phrases) >= 2 for phrases in said.values())


@pytest.mark.parametrize(
    ("cell", "other", "words"),
    [
        ((0, 0), (0, 2), {"left"}),
        ((0, 2), (0, 0), {"right"}),
        ((2, 1), (0, 1), {"below", "under"}),
        ((0, 1), (1, 1), {"above", "over"}),
        ((2, 2), (0, 0), {"right"}),
    ],
)
def test_relation(cell, other, words):
    for seed in range(20):
        assert words & set(wording.relation(cell, other, Random(seed)).split())


def concept(name: str, category: str = "animal", **other: Any) -> Any:
    return SimpleNamespace(key=name, name=name, category=category, wordings={"train": ()}, **other)


SCENE = (
    Group(concept("tiger"), ((0, 0), (1, 1))),
    Group(concept("taxi", "vehicle"), ((0, 2),)),
    Group(concept("~socks", "garment"), ((2, 1),)),
)
PHRASES = ["tiger", "taxi", "~socks"]


def test_long_captions_hold_every_fact_in_varied_words():
    texts = {captions.long_caption(SCENE, PHRASES, 3, Random(seed)) for seed in range(300)}
    assert len(texts) > 250
    for text in texts:
        lowered = text.lower()
        assert "taxi" in lowered and "socks" in lowered
        assert "two tigers" in lowered or lowered.count("a tiger") == 2
        assert text[0].isupper() and text.endswith(".")
        assert "~" not in text and "  " not in text and "a socks" not in lowered
    assert any("vehicle" in text for text in texts)
    assert any("left of" in text or "left side of" in text for text in texts)


def test_short_and_raw_captions_name_every_object():
    for seed in range(100):
        short = captions.short_caption(SCENE, PHRASES, Random(seed)).lower()
        raw = captions.raw_caption(SCENE, PHRASES, Random(seed)).lower()
        assert "two tigers" in short and "a taxi" in short and "socks" in short
        assert "tigers" in raw and "taxi" in raw and "socks" in raw


def test_dropping_leaves_two_or_more():
    kept = [captions.drop_one(SCENE, Random(seed)) for seed in range(200)]
    assert {len(groups) for groups in kept} == {2, 3}
    assert all(len(captions.drop_one(SCENE[:2], Random(seed))) == 2 for seed in range(50))


def test_other_languages_hold_positions():
    scene = (
        Group(concept("tiger", translations={"de": "Tiger", "zh": "老虎"}), ((0, 0), (1, 1))),
        Group(concept("taxi", translations={"de": "Taxi", "zh": "出租车"}), ((2, 2),)),
    )
    text = languages.long_caption(scene, "de", 3)
    assert text == "3 Dinge: oben links und in der Mitte Tiger zweimal; unten rechts Taxi."
    assert sorted(languages.raw_caption(scene, "zh", Random(0)).split("、")) == ["出租车", "老虎"]
    assert "unten rechts Taxi" in languages.long_caption((Group(scene[1].concept, ((1, 1),)),) * 2, "de", 2)
