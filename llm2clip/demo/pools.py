"""The pools of val and test: pictures and captions that each hold one thing out from training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from random import Random

from llm2clip.demo import captions, languages
from llm2clip.demo.concepts import Concept, Split
from llm2clip.demo.recipe import ATTEMPTS, Choose, Item, Recipe, caption, slug
from llm2clip.demo.scenes import DistinctScenes, Group, Groups, anything, sample, sample_composition
from llm2clip.demo.wording import takes_article

logger = logging.getLogger(__name__)


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
    partners = recipe.partners[split]

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
            lambda rng: (
                sample(rng, worded, recipe.grid, countable=lambda c: takes_article(c.name) and c.key in countable)
                if worded
                else None
            ),
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


def _pool_scenes(
    recipe: Recipe, name: str, size: int, draw: Callable[[Random], Groups | None], choose: Choose
) -> list[Item]:
    """Scenes of which none shows all objects of another, so that captions identify them."""
    distinct = DistinctScenes()
    drawn: list[tuple[str, Groups]] = []
    for number in range(size):
        identity = f"{name.replace(':', '-')}-{number:04d}"
        for attempt in range(ATTEMPTS):
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
            "raw": [caption("raw", kept, choose, recipe.grid, rng)],
            "short": [caption("short", groups, choose, recipe.grid, rng)],
            "long": [caption("long", groups, choose, recipe.grid, rng)],
        }
        items.append(Item(identity, groups, texts, recipe.styles, identity))
    return items


def _pool_singles(recipe: Recipe, name: str, concepts: Sequence[Concept], choose: Choose) -> list[Item]:
    """One enlarged drawing of each concept."""
    items = []
    for concept in concepts:
        identity = f"{name.replace(':', '-')}-{slug(concept)}"
        rng = recipe.rng(identity)
        groups = (Group(concept, ()),)
        texts = {kind: [caption(kind, groups, choose, recipe.grid, rng)] for kind in ("raw", "short", "long")}
        items.append(Item(identity, groups, texts, recipe.styles, identity))
    return items


def _in_held_out_style(recipe: Recipe, items: Sequence[Item]) -> list[Item]:
    """The same scenes and captions, drawn in the style that training never shows."""
    assert recipe.held_out_style
    return [
        Item(
            f"{item.id}-{recipe.held_out_style}", item.groups, item.captions, (recipe.held_out_style,), item.render_key
        )
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
