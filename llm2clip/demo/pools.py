"""What the demo data consists of: training scenes and singles, text pairs, and the pools of val and test.

Everything here is drawn from generators seeded by the name of what is drawn, so that no sample depends on another's
randomness and counts may change without moving the rest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

from llm2clip.demo import captions, languages
from llm2clip.demo.concepts import Concept, Split, bare, held_out_pair
from llm2clip.demo.scenes import (
    DistinctScenes,
    Group,
    Groups,
    anything,
    sample,
    sample_composition,
    seen_cell,
)
from llm2clip.demo.wording import takes_article, with_article

logger = logging.getLogger(__name__)

ATTEMPTS_PER_SCENE = 40
LARGE_CAPTION_SETS = 4
Choose = Callable[[Concept, int, Random], str]


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


def training_scenes(recipe: Recipe, count: int, renderings: int) -> Iterator[Item]:
    """Scenes of training concepts, each drawn `renderings` times under the same captions."""
    for number in range(count):
        name = f"scene-{number:05d}"
        for attempt in range(ATTEMPTS_PER_SCENE):
            rng = recipe.rng("train", name, attempt)
            groups = sample(rng, recipe.train, recipe.grid)
            if groups and (texts := _training_captions(recipe, groups, rng)):
                break
        else:
            raise ValueError(f"no training scene of {len(recipe.train)} concepts can be made: use more concepts")
        for rendering in range(renderings):
            identity = f"{name}-r{rendering}"
            yield Item(identity, groups, texts, recipe.styles, f"train:{identity}")


def _training_captions(recipe: Recipe, groups: Groups, rng: Random) -> dict[str, list[str]] | None:
    """Captions in training wordings; None if the scene can't be told without a held-out one."""
    concepts = [group.concept for group in groups]

    def write(kind: str, number: int) -> list[str]:
        texts: list[str] = []
        for _ in range(4 * number):
            text = _caption(kind, groups, captions.training_phrase, recipe.grid, rng, may_drop=True)
            if text not in texts and not recipe.gives_away(text, concepts):
                texts.append(text)
            if len(texts) == number:
                break
        return texts

    texts = {"raw": write("raw", rng.choice((1, 2))), "short": write("short", 1), "long": write("long", rng.choice((2, 3)))}
    return texts if all(texts.values()) else None


def _caption(
    kind: str, groups: Sequence[Group], choose: Choose, grid: int, rng: Random, may_drop: bool = False
) -> str:
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


def training_singles(recipe: Recipe, count: int) -> Iterator[Item]:
    """One training concept a picture: enlarged, and as often at a scene's size in some cell.

    Renderings share captions, so that few texts serve many pictures.
    """
    if not recipe.train:
        return
    for number in range(count):
        concept = recipe.train[number % len(recipe.train)]
        turn = number // len(recipe.train)
        identity = f"single-{_slug(concept)}-{turn:02d}"
        if turn % 2:
            cells = [(row, column) for row in range(recipe.grid) for column in range(recipe.grid)]
            cell = recipe.rng("train", identity).choice([cell for cell in cells if seen_cell(concept, cell)])
            groups, captions_of = (Group(concept, (cell,)),), f"{concept.key}:{cell}"
        else:
            groups, captions_of = (Group(concept, ()),), f"{concept.key}:{turn // 2 % LARGE_CAPTION_SETS}"
        rng = recipe.rng("train", "single", captions_of)
        texts = {}
        for kind in ("raw", "short", "long"):
            for _ in range(ATTEMPTS_PER_SCENE):
                text = _caption(kind, groups, captions.training_phrase, recipe.grid, rng)
                if not recipe.gives_away(text, [concept]):
                    break
            else:
                raise ValueError(f"{concept.name!r} can't be named without one of its held-out wordings")
            texts[kind] = [text]
        yield Item(identity, groups, texts, recipe.styles, f"train:{identity}")


def text_pairs(recipe: Recipe) -> list[dict[str, str]]:
    """Pairs for caption-contrastive tuning: names with training wordings, keywords and categories."""
    pairs = []
    for concept in recipe.train:
        name = with_article(concept.name)
        for wording in concept.wordings["train"]:
            pairs.append({"query": name, "positive": with_article(wording), "kind": "wording"})
        if concept.keywords:
            pairs.append({"query": name, "positive": ", ".join(concept.keywords), "kind": "keywords"})
        for wording in concept.wordings["train"][:1]:
            pairs.append({"query": with_article(wording), "positive": ", ".join(concept.keywords or (concept.name,)), "kind": "keywords"})
        pairs.append({"query": name, "positive": with_article(concept.category), "kind": "category"})
        if any(recipe.gives_away(f"{pair['query']} {pair['positive']}", [concept]) for pair in pairs[-8:]):
            raise AssertionError(concept.key)
    return pairs


def pools(recipe: Recipe, split: Split, size: int, tags: Sequence[str]) -> Iterator[tuple[str, list[Item]]]:
    """The pools of val or test, by name; those that can't be filled with the packages at hand are left out.

    Args:
        recipe: concepts, styles and seed.
        split: "val" or "test".
        size: scenes in a pool; the pools of single drawings have one picture for each concept.
        tags: languages, for test only.
    """
    held_out = [concept for concept in recipe.concepts if concept.split == split]
    worded = [concept for concept in recipe.train if concept.wordings[split]]
    held_out_phrase = captions.held_out_phrase(split)
    countable = {c.key for c in worded if any(takes_article(phrase) for phrase in c.wordings[split])}
    partners = {
        concept.key: [
            other for other in recipe.train if other is not concept and held_out_pair(concept, other) == split
        ]
        for concept in recipe.train
    }

    def scenes(name: str, draw: Callable[[Random], Groups | None], choose: Choose) -> list[Item]:
        return _pool_scenes(recipe, f"{split}:{name}", size, draw, choose)

    seen = scenes("seen", lambda rng: sample(rng, recipe.train, recipe.grid), captions.training_phrase)
    concepts = scenes(
        "concepts",
        lambda rng: sample(rng, held_out, recipe.grid, pair_rule=anything, cell_rule=anything) if held_out else None,
        captions.canonical_phrase,
    )
    made = {
        "seen": seen,
        "concepts": concepts,
        "concepts_single": _pool_singles(recipe, f"{split}:concepts_single", held_out, captions.canonical_phrase),
        "compositions": scenes(
            "compositions",
            lambda rng: sample_composition(rng, recipe.train, recipe.grid, split, partners),
            captions.training_phrase,
        ),
        "wording": scenes(
            "wording",
            lambda rng: sample(rng, worded, recipe.grid, countable=lambda c: takes_article(c.name) and c.key in countable)
            if worded
            else None,
            held_out_phrase,
        ),
        "wording_single": _pool_singles(recipe, f"{split}:wording_single", worded, held_out_phrase),
    }
    if recipe.held_out_style:
        made["style"] = _in_held_out_style(recipe, seen)
        made["style_concepts"] = _in_held_out_style(recipe, concepts)
    if split == "test":
        made |= {f"lang_{tag}": _in_language(recipe, seen, tag) for tag in tags}
    for name, items in made.items():
        if len(items) < 2:
            logger.warning("%s/%s: %d picture(s) could be made, the pool is left out", split, name, len(items))
        else:
            yield name, items


def _slug(concept: Concept) -> str:
    return re.sub(r"[^a-z0-9]+", "-", concept.key.lower()).strip("-")


def _pool_scenes(
    recipe: Recipe, name: str, size: int, draw: Callable[[Random], Groups | None], choose: Choose
) -> list[Item]:
    """Scenes of which none shows all objects of another, so that captions identify them."""
    distinct = DistinctScenes()
    drawn: list[tuple[str, Groups]] = []
    for number in range(size):
        identity = f"{name.replace(':', '-')}-{number:04d}"
        for attempt in range(ATTEMPTS_PER_SCENE):
            groups = draw(recipe.rng(identity, attempt))
            if groups and distinct.add(groups):
                drawn.append((identity, groups))
                break
    items = []
    for identity, groups in drawn:
        rng = recipe.rng(identity, "captions")
        kept = captions.drop_one(groups, rng)
        if distinct.matches(frozenset((group.concept.key, group.count) for group in kept)) > 1:
            kept = groups
        texts = {
            "raw": [_caption("raw", kept, choose, recipe.grid, rng)],
            "short": [_caption("short", groups, choose, recipe.grid, rng)],
            "long": [_caption("long", groups, choose, recipe.grid, rng)],
        }
        items.append(Item(identity, groups, texts, recipe.styles, identity))
    return items


def _pool_singles(recipe: Recipe, name: str, concepts: Sequence[Concept], choose: Choose) -> list[Item]:
    """One enlarged drawing of each concept."""
    items = []
    for concept in concepts:
        identity = f"{name.replace(':', '-')}-{_slug(concept)}"
        rng = recipe.rng(identity)
        groups = (Group(concept, ()),)
        texts = {kind: [_caption(kind, groups, choose, recipe.grid, rng)] for kind in ("raw", "short", "long")}
        items.append(Item(identity, groups, texts, recipe.styles, identity))
    return items


def _in_held_out_style(recipe: Recipe, items: Sequence[Item]) -> list[Item]:
    """The same scenes and captions, drawn in the style that training never shows."""
    assert recipe.held_out_style
    return [
        Item(f"{item.id}-{recipe.held_out_style}", item.groups, item.captions, (recipe.held_out_style,), item.render_key)
        for item in items
        if all(recipe.has_held_out_style(group.concept) for group in item.groups)
    ]


def _in_language(recipe: Recipe, items: Sequence[Item], tag: str) -> list[Item]:
    """The same pictures, captioned in another language."""
    translated = []
    for item in items:
        texts = {"raw": [languages.raw_caption(item.groups, tag, recipe.rng(item.id, tag))]}
        if tag in languages.PHRASES:
            texts["long"] = [languages.long_caption(item.groups, tag, recipe.grid)]
        translated.append(Item(f"{item.id}-{tag}", item.groups, texts, item.styles, item.render_key))
    return translated


def wordings_by_split(concepts: Sequence[Concept]) -> Mapping[str, int]:
    """How many wordings of training concepts each split holds."""
    train = [concept for concept in concepts if concept.split == "train"]
    return {split: sum(len(concept.wordings[split]) for concept in train) for split in ("train", "val", "test")}
