"""Scenes, the facts about them that can be asked for, and which of them is asked.

What makes the answers hard to guess without the picture:

* yes/no questions come in complementary pairs, as in VQA v2 (Goyal et al. 2017, section 3): the same text is asked of
  two scenes, true of one and false of the other, and a coin says of which. P(yes | text) is exactly one half.
* of the other facts about a scene the one whose answer was given least often so far is asked, which makes answers as
  equally frequent as the scenes allow. An object counted zero times is one of the other scene of the pair, so that
  absent objects are as frequent as present ones.
* whether one object is above or left of another is asked in both senses and both orders alike.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

from llava_bridge.demo.texts import NUM_WORDINGS, Language
from llm2clip.demo.concepts import Concept
from llm2clip.demo.scenes import Group, Groups
from llm2clip.demo.wording import takes_article

TYPES = ("count", "yesno", "category", "relation", "name")
OPENING_TYPES = ("count", "yesno")
"""Asked first in a dialogue: the others mention what is there."""
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
T = TypeVar("T")
Value = Concept | bool | int | str


@dataclass(frozen=True)
class Picture:
    """An image file, on disk or in memory."""

    id: str
    source: Path | bytes

    @property
    def file(self) -> str:
        """Its path below an image root."""
        return f"images/{self.id}.png"

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class Scene:
    """A picture, what it shows, and its captions by kind."""

    picture: Picture
    groups: Groups
    captions: Mapping[str, Sequence[str]]

    @property
    def total(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def keys(self) -> set[str]:
        return {group.concept.key for group in self.groups}

    @property
    def categories(self) -> set[str]:
        return {group.concept.category for group in self.groups}


def read_scenes(folder: Path, concepts: Mapping[str, Concept]) -> list[Scene]:
    """Read a part of `llm2clip data demo`, such as `train/scenes`.

    Args:
        folder: directory with `captions.jsonl` and `images/`.
        concepts: every concept by key.

    Raises:
        FileNotFoundError: if the part is not there.
        ValueError: if it shows a concept that the lexicon does not have.
    """
    scenes = []
    with (folder / "captions.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            cells: dict[str, list[tuple[int, int]]] = {}
            for thing in row["objects"]:
                if thing["concept"] not in concepts:
                    raise ValueError(
                        f"{folder}: {row['id']} shows {thing['concept']!r}, which lexicon.json does not have; "
                        "build the data again with this version of llm2clip data demo"
                    )
                cells.setdefault(thing["concept"], []).extend([tuple(thing["cell"])] if thing["cell"] else [])
            groups = tuple(Group(concepts[key], tuple(places)) for key, places in cells.items())
            scenes.append(Scene(Picture(row["id"], folder / row["image"]), groups, row["captions"]))
    return scenes


def shuffled(items: Sequence[T], rng: Random) -> Iterator[T]:
    """All items in random order, again and again."""
    while items:
        yield from rng.sample(items, len(items))


def stratified(scenes: Sequence[Scene], rng: Random) -> Iterator[Scene]:
    """Scenes for ever, numbers of things in turn, and within a number its compositions (3 = 2 + 1 = 1 + 1 + 1)."""
    strata: dict[int, dict[tuple[int, ...], list[Scene]]] = {}
    for scene in scenes:
        composition = tuple(sorted(group.count for group in scene.groups))
        strata.setdefault(scene.total, {}).setdefault(composition, []).append(scene)
    turns = [
        itertools.cycle([shuffled(alike, rng) for _, alike in sorted(of_total.items())])
        for _, of_total in sorted(strata.items())
    ]
    while True:
        for turn in turns:
            yield next(next(turn))


@dataclass(frozen=True)
class Question:
    """One question with its answer, in words."""

    type: str
    subtype: str
    text: str
    answer: str
    language: str


class Fact(NamedTuple):
    """Something that can be asked of a scene."""

    type: str
    subtype: str
    slots: Mapping[str, Any]
    answer: Value
    topic: str
    """What it is about; asked once per dialogue."""


def count_facts(scene: Scene, other: Scene) -> list[list[Fact]]:
    """How many things, and how many of each countable object here or in the other scene."""
    counts = {group.concept.key: (group.concept, 0) for group in other.groups}
    counts |= {group.concept.key: (group.concept, group.count) for group in scene.groups}
    facts = [Fact("count", "total", {}, scene.total, "total")]
    facts += [
        Fact("count", "object", {"thing": concept}, count, key)
        for key, (concept, count) in counts.items()
        if takes_article(concept.name)
    ]
    return [facts]


def category_facts(scene: Scene, other: Scene) -> list[list[Fact]]:
    """The category of what stands in each cell."""
    return [
        [
            Fact("category", "category", {"cell": cell}, group.concept.category, f"category {cell}")
            for group in scene.groups
            for cell in group.cells
        ]
    ]


def name_facts(scene: Scene, other: Scene) -> list[list[Fact]]:
    """The name of what stands in each cell."""
    return [
        [
            Fact("name", "name", {"cell": cell}, group.concept, f"name {cell}")
            for group in scene.groups
            for cell in group.cells
        ]
    ]


def relation_facts(scene: Scene, other: Scene) -> list[list[Fact]]:
    """What is on one side of an object, where only one kind of thing is; whether an object is on a side of another.

    `left` means in any column further left, whatever the row, and so on.
    """
    whats, whethers = [], []
    singles = [group for group in scene.groups if group.count == 1]
    for anchor, side in itertools.product(singles, OPPOSITE):
        found = [g for g in scene.groups if any(_is_on_side(cell, anchor.cells[0], side) for cell in g.cells)]
        if len(found) == 1:
            slots = {"thing": anchor.concept, "side": side}
            whats.append(Fact("relation", "what_side", slots, found[0].concept, f"{side} {anchor.concept.key}"))
    for (one, two), side in itertools.product(itertools.permutations(singles, 2), OPPOSITE):
        holds = _is_on_side(one.cells[0], two.cells[0], side)
        if holds or _is_on_side(one.cells[0], two.cells[0], OPPOSITE[side]):
            slots = {"thing": one.concept, "other": two.concept, "side": side}
            topic = " ".join(sorted((one.concept.key, two.concept.key)))
            whethers.append(Fact("relation", "is_side", slots, holds, topic))
    return [whats, whethers]


def _is_on_side(cell: tuple[int, int], anchor: tuple[int, int], side: str) -> bool:
    down, right = cell[0] - anchor[0], cell[1] - anchor[1]
    return {"left": right < 0, "right": right > 0, "above": down < 0, "below": down > 0}[side]


def difference_facts(scene: Scene, other: Scene) -> list[list[Fact]]:
    """Yes/no facts that hold of `scene` and not of `other`: objects, categories, the number of things."""
    objects = [
        Fact("yesno", "exists", {"thing": group.concept}, True, group.concept.key)
        for group in scene.groups
        if group.concept.key not in other.keys
    ]
    categories = [
        Fact("yesno", "exists_category", {"category": category}, True, f"is {category}")
        for category in sorted(scene.categories - other.categories)
    ]
    numbers = [Fact("yesno", "exists_number", {"number": scene.total}, True, "total")]
    return [objects, categories, numbers if scene.total != other.total else []]


FACTS: dict[str, Callable[[Scene, Scene], list[list[Fact]]]] = {
    "count": count_facts, "category": category_facts, "relation": relation_facts, "name": name_facts,
}  # fmt: skip
"""(scene, another scene) -> lists of facts; every list is asked from equally often."""


@dataclass
class Questioner:
    """Chooses facts of scenes and asks for them in one language, keeping answers balanced over all it asked."""

    language: Language
    grid: int
    rng: Random
    vary: bool
    """Use all wordings; false: the first of each."""
    _given: Counter[tuple] = field(default_factory=Counter)

    def ask(self, kind: str, scene: Scene, other: Scene, asked: set[str]) -> Question | None:
        """Ask one question of a scene.

        Args:
            kind: one of TYPES, without `yesno`.
            scene: what is asked about.
            other: another scene; its objects are counted zero times.
            asked: topics of this scene to leave out; the new one is added.

        Returns:
            The question, or None when nothing is left to ask.
        """
        fact = self._choose(FACTS[kind](scene, other), asked)
        if fact is None:
            return None
        asked.add(fact.topic)
        return self._worded(fact, self._wording())

    def ask_pair(
        self, first: Scene, second: Scene, asked: tuple[set[str], set[str]]
    ) -> tuple[Question, Question] | None:
        """Ask one yes/no question of two scenes, true of exactly one of them.

        Args:
            first: a scene.
            second: another scene.
            asked: topics of each to leave out; the new one is added to both.
        """
        first_holds = self.rng.random() < 0.5
        holder, other = (first, second) if first_holds else (second, first)
        fact = self._choose(difference_facts(holder, other), asked[0] | asked[1])
        if fact is None:
            return None
        for topics in asked:
            topics.add(fact.topic)
        wording = self._wording()
        yes, no = self._worded(fact, wording), self._worded(fact._replace(answer=False), wording)
        return (yes, no) if first_holds else (no, yes)

    def _choose(self, lists: Sequence[Sequence[Fact]], asked: set[str]) -> Fact | None:
        """The fact whose answer was given least, from a list drawn at random; ties are drawn too."""
        usable = [kept for facts in lists if (kept := [fact for fact in facts if fact.topic not in asked])]
        if not usable:
            return None
        facts = self.rng.choice(usable)
        fact = min(facts, key=lambda fact: (self._given[_answer_key(fact)], self.rng.random()))
        self._given[_answer_key(fact)] += 1
        return fact

    def _wording(self) -> int:
        return self.rng.randrange(NUM_WORDINGS) if self.vary else 0

    def _worded(self, fact: Fact, wording: int) -> Question:
        text = self.language.question(fact.subtype, wording, self.grid, **fact.slots)
        return Question(fact.type, fact.subtype, text, self.language.answer(fact.answer), self.language.tag)


def _answer_key(fact: Fact) -> tuple:
    """What is to be equally frequent: the answer; of yes/no pairs, where answers are even, what is asked for."""
    value = next(iter(fact.slots.values())) if fact.type == "yesno" else fact.answer
    return fact.subtype, value.key if isinstance(value, Concept) else value
