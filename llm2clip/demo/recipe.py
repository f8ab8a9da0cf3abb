"""What every sample of the demo data is made of: the recipe, the item, and the choice of caption writer.

Everything is drawn from generators seeded by the name of what is drawn, so that no sample depends on another's
randomness and counts may change without moving the rest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

from llm2clip.demo import captions
from llm2clip.demo.concepts import Concept, bare, held_out_pair
from llm2clip.demo.scenes import Group, Groups, anything

ATTEMPTS = 40
"""Draws for one scene or caption before giving up."""
Choose = Callable[[Concept, int, Random], str]
"""(concept, count, rng) -> the phrase that a caption uses for it."""


@dataclass(frozen=True)
class Item:
    """One picture with its captions."""

    id: str
    groups: Groups
    captions: dict[str, list[str]]
    styles: tuple[str, ...]
    """Styles its drawings are taken from."""
    render_key: str
    """Seeds the rendering: equal keys and groups give equal pictures."""

    def row(self) -> dict:
        """Its line of captions.jsonl; `objects` holds the facts that the captions were made from."""
        objects = [
            {
                "concept": group.concept.key,
                "name": bare(group.concept.name),
                "category": group.concept.category,
                "cell": list(cell) if cell else None,
            }
            for group in self.groups
            for cell in (group.cells or (None,))
        ]
        return {"id": self.id, "image": f"images/{self.id}.png", "captions": self.captions, "objects": objects}


@dataclass(frozen=True)
class Recipe:
    """Everything that generation depends on."""

    concepts: Sequence[Concept]
    seed: int
    grid: int
    styles: tuple[str, ...]
    held_out_style: str | None
    num_raw: Sequence[int]
    """Numbers of raw captions that a training scene may have, equally likely."""
    num_long: Sequence[int]
    has_held_out_style: Callable[[Concept], bool] = field(default=anything)

    @cached_property
    def train(self) -> list[Concept]:
        return [concept for concept in self.concepts if concept.split == "train"]

    @cached_property
    def held_out(self) -> dict[str, list[str]]:
        """Normalised held-out wordings by the key of a training concept."""
        return {
            concept.key: [_normalised(phrase) for part in ("val", "test") for phrase in concept.wordings[part]]
            for concept in self.train
        }

    @cached_property
    def partners(self) -> dict[str, dict[str, list[Concept]]]:
        """By split and key: the training concepts that a concept meets in no other split's scenes."""
        table: dict[str, dict[str, list[Concept]]] = {
            split: {concept.key: [] for concept in self.train} for split in ("train", "val", "test")
        }
        for first, second in itertools.combinations(self.train, 2):
            of_split = table[held_out_pair(first, second)]
            of_split[first.key].append(second)
            of_split[second.key].append(first)
        return table

    def rng(self, *name: object) -> Random:
        return Random(":".join(str(part) for part in (self.seed, *name)))

    def gives_away(self, text: str, concepts: Sequence[Concept]) -> bool:
        """Whether a training text about these concepts holds one of their held-out wordings."""
        normalised = _normalised(text)
        return any(phrase in normalised for concept in concepts for phrase in self.held_out[concept.key])


def _normalised(text: str) -> str:
    """Lower-case words between single spaces, with a space at both ends, so that `in` finds whole words."""
    words = re.findall(r"[^\W_]+", bare(text).lower())
    return f" {' '.join(words)} "


def caption(kind: str, groups: Sequence[Group], choose: Choose, grid: int, rng: Random, may_drop: bool = False) -> str:
    """Write one caption.

    Args:
        kind: "raw", "short" or "long".
        groups: what the picture shows.
        choose: what to call each of it.
        grid: cells per side.
        rng: source of all randomness.
        may_drop: whether a raw caption may leave an object out.
    """
    if kind == "raw" and may_drop:
        groups = captions.drop_one(groups, rng)
    phrases = [choose(group.concept, group.count, rng) for group in groups]
    if kind == "raw":
        return captions.raw_caption(groups, phrases, rng)
    if kind == "short":
        return captions.short_caption(groups, phrases, rng)
    if not groups[0].cells:
        return captions.single_long_caption(groups[0].concept, phrases[0], None, grid, rng)
    if len(groups) == 1:
        return captions.single_long_caption(groups[0].concept, phrases[0], groups[0].cells[0], grid, rng)
    return captions.long_caption(groups, phrases, grid, rng)


def slug(concept: Concept) -> str:
    return re.sub(r"[^a-z0-9]+", "-", concept.key.lower()).strip("-")
