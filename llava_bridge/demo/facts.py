"""Scenes, and the facts about them that can be asked for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

from llm2clip.demo.concepts import Concept
from llm2clip.demo.scenes import Group, Groups
from llm2clip.demo.wording import takes_article

SUBTYPES = {
    "count": ("total", "object"),
    "yesno": ("exists", "exists_category", "exists_number", "exists_more", "exists_place"),
    "category": ("category",),
    "relation": ("what_side", "is_side"),
    "name": ("name",),
}
"""Kinds of questions by type; a type asks each of its own equally often where nothing else is said."""
TYPES = tuple(SUBTYPES)
TYPE_OF = {subtype: kind for kind, subtypes in SUBTYPES.items() for subtype in subtypes}
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
    def cells(self) -> set[tuple[int, int]]:
        return {cell for group in self.groups for cell in group.cells}

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


class Fact(NamedTuple):
    """Something that can be asked of a scene."""

    subtype: str
    slots: Mapping[str, Any]
    answer: Value
    topic: str
    """What it is about; asked once per dialogue."""


def total_facts(scene: Scene, other: Scene) -> list[Fact]:
    """How many things there are."""
    return [Fact("total", {}, scene.total, "total")]


def object_facts(scene: Scene, other: Scene) -> list[Fact]:
    """How many of each countable object of this scene or of the other, which may be none."""
    counts = {group.concept.key: (group.concept, 0) for group in other.groups}
    counts |= {group.concept.key: (group.concept, group.count) for group in scene.groups}
    return [
        Fact("object", {"thing": concept}, count, key)
        for key, (concept, count) in counts.items()
        if takes_article(concept.name)
    ]


def category_facts(scene: Scene, other: Scene) -> list[Fact]:
    """The category of what stands in each cell."""
    return [
        Fact("category", {"cell": cell}, group.concept.category, f"category {cell}")
        for group in scene.groups
        for cell in group.cells
    ]


def name_facts(scene: Scene, other: Scene) -> list[Fact]:
    """The name of what stands in each cell."""
    return [
        Fact("name", {"cell": cell}, group.concept, f"name {cell}") for group in scene.groups for cell in group.cells
    ]


def what_side_facts(scene: Scene, other: Scene) -> list[Fact]:
    """What is on one side of an object, where only one kind of thing is.

    `left` means in any column further left, whatever the row, and so on.
    """
    facts = []
    for anchor, side in itertools.product(_singles(scene), OPPOSITE):
        found = [g for g in scene.groups if any(_is_on_side(cell, anchor.cells[0], side) for cell in g.cells)]
        if len(found) == 1:
            slots = {"thing": anchor.concept, "side": side}
            facts.append(Fact("what_side", slots, found[0].concept, f"{side} {anchor.concept.key}"))
    return facts


def is_side_facts(scene: Scene, other: Scene) -> list[Fact]:
    """Whether one object is on a side of another."""
    facts = []
    for (one, two), side in itertools.product(itertools.permutations(_singles(scene), 2), OPPOSITE):
        holds = _is_on_side(one.cells[0], two.cells[0], side)
        if holds or _is_on_side(one.cells[0], two.cells[0], OPPOSITE[side]):
            slots = {"thing": one.concept, "other": two.concept, "side": side}
            topic = " ".join(sorted((one.concept.key, two.concept.key)))
            facts.append(Fact("is_side", slots, holds, topic))
    return facts


def _singles(scene: Scene) -> list[Group]:
    return [group for group in scene.groups if group.count == 1]


def _is_on_side(cell: tuple[int, int], anchor: tuple[int, int], side: str) -> bool:
    down, right = cell[0] - anchor[0], cell[1] - anchor[1]
    return {"left": right < 0, "right": right > 0, "above": down < 0, "below": down > 0}[side]


def exists_facts(holder: Scene, other: Scene) -> list[Fact]:
    """Objects of `holder` that `other` does not show; of the following functions likewise."""
    return [
        Fact("exists", {"thing": group.concept}, True, group.concept.key)
        for group in holder.groups
        if group.concept.key not in other.keys
    ]


def exists_category_facts(holder: Scene, other: Scene) -> list[Fact]:
    """Categories."""
    categories = sorted(holder.categories - other.categories)
    return [Fact("exists_category", {"category": category}, True, f"is {category}") for category in categories]


def exists_number_facts(holder: Scene, other: Scene) -> list[Fact]:
    """The number of things."""
    facts = [Fact("exists_number", {"number": holder.total}, True, "total")]
    return facts if holder.total != other.total else []


def exists_more_facts(holder: Scene, other: Scene) -> list[Fact]:
    """Numbers, two at least, that the number of things is above."""
    numbers = range(max(2, other.total), holder.total)
    return [Fact("exists_more", {"number": number}, True, "total") for number in numbers]


def exists_place_facts(holder: Scene, other: Scene) -> list[Fact]:
    """Cells in which there is something."""
    cells = sorted(holder.cells - other.cells)
    return [Fact("exists_place", {"cell": cell}, True, f"is {cell}") for cell in cells]


FACTS: dict[str, Callable[[Scene, Scene], list[Fact]]] = {
    "total": total_facts, "object": object_facts, "category": category_facts, "name": name_facts,
    "what_side": what_side_facts, "is_side": is_side_facts,
}  # fmt: skip
"""By subtype, what can be asked of (a scene, given another)."""
DIFFERENCES: dict[str, Callable[[Scene, Scene], list[Fact]]] = {
    "exists": exists_facts, "exists_category": exists_category_facts, "exists_number": exists_number_facts,
    "exists_more": exists_more_facts, "exists_place": exists_place_facts,
}  # fmt: skip
"""By subtype, what holds of (a scene, and not of another)."""
