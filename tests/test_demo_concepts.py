"""Splits depend on keys only, and held-out wordings are clean."""

from __future__ import annotations

import demo_fakes
import pytest

from llm2clip.demo import concepts, packages


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    demo_fakes.install(monkeypatch, tmp_path, ("emoji", "cldr"))
    return packages.fetch(["emoji", "cldr"], tmp_path)


def test_splits_are_what_they_were():
    """Golden: a change would put what older models trained on into the test set."""
    assert concepts.fraction("concept:rabbit") == pytest.approx(0.760110995803629)
    found = {key: concepts.split_of(f"concept:{key}", 0.13, 0.07) for key in ("tiger", "owl", "lemon", "watermelon")}
    assert found == {"tiger": "train", "owl": "val", "lemon": "val", "watermelon": "test"}


def test_shares_of_splits(fetched):
    everything = concepts.load_concepts(fetched, ["de"])
    shares = {split: sum(c.split == split for c in everything) / len(everything) for split in concepts.SPLITS}
    assert len(everything) == len(demo_fakes.KEYS) > 800
    assert shares["test"] == pytest.approx(0.13, abs=0.03)
    assert shares["val"] == pytest.approx(0.07, abs=0.02)


def test_splits_do_not_depend_on_the_other_concepts(fetched):
    everything = {concept.key: concept for concept in concepts.load_concepts(fetched, [])}
    few = concepts.load_concepts(fetched, [], limit=60)
    assert len(few) == 60
    for concept in few:
        assert concept.split == everything[concept.key].split
        assert concept.wordings == everything[concept.key].wordings


def test_held_out_wordings_are_new_words_of_one_concept(fetched):
    everything = concepts.load_concepts(fetched, [])
    phrases = [concepts.bare(p).lower() for c in everything for part in c.wordings.values() for p in (c.name, *part)]
    train = [concept for concept in everything if concept.split == "train"]
    for concept in train:
        for held_out in (*concept.wordings["val"], *concept.wordings["test"]):
            assert not concepts.share_a_word(held_out, concept.name)
            assert not any(concepts.share_a_word(held_out, phrase) for phrase in concept.wordings["train"])
            assert phrases.count(concepts.bare(held_out).lower()) == 1
    assert sum(bool(concept.wordings["test"]) for concept in train) > 300
    assert sum(bool(concept.wordings["val"]) for concept in train) > 200


def test_keywords_that_give_a_held_out_wording_away_are_left_out(fetched):
    concept = next(c for c in concepts.load_concepts(fetched, []) if c.split == "train" and c.wordings["test"])
    secret = concepts.bare(concept.wordings["test"][0])
    rows = fetched["cldr"].read_json("package/annotations/en/annotations.json")
    rows["annotations"]["annotations"][concept.emoji]["default"] = [secret, "plain"]

    class Leaky:
        members = frozenset()

        def read_json(self, member):
            return rows

    again = concepts.load_concepts({**fetched, "cldr": Leaky()}, [])
    assert next(c for c in again if c.key == concept.key).keywords == ("plain",)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("taxi", "yellow cab", False),
        ("taxicab", "cab driver", False),  # too short to be told from "scab"
        ("bicycles", "bicycle", True),
        ("red apple", "apple", True),
        ("motorbike", "bike of a motorist", True),
        ("~king of beasts", "the king", True),
        ("bird of prey", "top of a hill", False),
    ],
)
def test_share_a_word(first, second, expected):
    assert concepts.share_a_word(first, second) is expected
    assert concepts.share_a_word(second, first) is expected


def test_unknown_language_names_those_there_are(fetched):
    with pytest.raises(ValueError, match=r"'xx' is not in the `emoji` package; use some of \['de', 'fr', 'zh'\]"):
        concepts.load_concepts(fetched, ["xx"])


def test_names_come_from_cldr_where_it_has_them(fetched):
    concept = concepts.load_concepts(fetched, ["de"], limit=20)[0]
    assert concept.translations["de"] == f"de-{concept.key}"


def test_shared_keywords(fetched):
    few = concepts.load_concepts(fetched, [], limit=30)
    assert concepts.shared_keywords(few) == {"thing"}
