"""Training data: scenes, single drawings, and text pairs for caption-contrastive tuning."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from llm2clip.demo import captions
from llm2clip.demo.concepts import shared_keywords
from llm2clip.demo.recipe import ATTEMPTS, Item, Recipe, caption, slug
from llm2clip.demo.scenes import Group, Groups, rearrange, sample, seen_cell
from llm2clip.demo.wording import with_article

LARGE_CAPTION_SETS = 4
"""Enlarged drawings of one concept share this many sets of captions."""
NUM_LAYOUT_SETS = 12
"""Sets of objects among the layout pairs: a batch of 64 holds about five pairs of each."""


def training_scenes(recipe: Recipe, count: int, renderings: int) -> Iterator[Item]:
    """Scenes of training concepts, each drawn `renderings` times under the same captions."""
    for number in range(count):
        name = f"scene-{number:05d}"
        for attempt in range(ATTEMPTS):
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
            text = caption(kind, groups, captions.training_phrase, recipe.grid, rng, may_drop=True)
            if text not in texts and not recipe.gives_away(text, concepts):
                texts.append(text)
            if len(texts) == number:
                break
        return texts

    texts = {
        "raw": write("raw", rng.choice(recipe.num_raw)),
        "short": write("short", 1),
        "long": write("long", rng.choice(recipe.num_long)),
    }
    return texts if all(texts.values()) else None


def training_singles(recipe: Recipe, count: int) -> Iterator[Item]:
    """One training concept a picture: enlarged, and as often at a scene's size in some cell.

    Renderings share captions, so that few texts serve many pictures.
    """
    if not recipe.train:
        return
    for number in range(count):
        concept = recipe.train[number % len(recipe.train)]
        turn = number // len(recipe.train)
        identity = f"single-{slug(concept)}-{turn:02d}"
        if turn % 2:
            cells = [(row, column) for row in range(recipe.grid) for column in range(recipe.grid)]
            cell = recipe.rng("train", identity).choice([cell for cell in cells if seen_cell(concept, cell)])
            groups, captions_of = (Group(concept, (cell,)),), f"{concept.key}:{cell}"
        else:
            groups, captions_of = (Group(concept, ()),), f"{concept.key}:{turn // 2 % LARGE_CAPTION_SETS}"
        rng = recipe.rng("train", "single", captions_of)
        texts = {}
        for kind in ("raw", "short", "long"):
            for _ in range(ATTEMPTS):
                text = caption(kind, groups, captions.training_phrase, recipe.grid, rng)
                if not recipe.gives_away(text, [concept]):
                    break
            else:
                raise ValueError(f"{concept.name!r} can't be named without one of its held-out wordings")
            texts[kind] = [text]
        yield Item(identity, groups, texts, recipe.styles, f"train:{identity}")


def text_pairs(recipe: Recipe) -> list[dict[str, str]]:
    """Pairs for caption-contrastive tuning: names with training wordings, keyword lists and categories.

    A keyword list is used only if some keyword in it tells its concept from most others.
    """
    shared = shared_keywords(recipe.concepts)
    pairs = []
    for concept in recipe.train:
        name = with_article(concept.name)
        wordings = [with_article(wording) for wording in concept.wordings["train"]]
        own = [{"query": name, "positive": wording, "kind": "wording"} for wording in wordings]
        if set(concept.keywords) - shared:
            listed = ", ".join(concept.keywords)
            own += [{"query": query, "positive": listed, "kind": "keywords"} for query in (name, *wordings)]
        own.append({"query": name, "positive": with_article(concept.category), "kind": "category"})
        assert not any(recipe.gives_away(f"{pair['query']}, {pair['positive']}", [concept]) for pair in own), concept
        pairs += own
    return pairs


def layout_pairs(recipe: Recipe, count: int) -> list[dict[str, str]]:
    """Pairs of long captions of one scene; the scenes show few sets of objects in ever other places.

    Objects alone tell random scenes apart, and an encoder tuned on those only forgets where things are. In a batch of
    these pairs it is the places that tell captions apart.
    """
    names = [("train", "layout", number) for number in range(NUM_LAYOUT_SETS)]
    sets = [
        next(filter(None, (sample(recipe.rng(*name, n), recipe.train, recipe.grid) for n in range(ATTEMPTS))))
        for name in names
    ]
    pairs = []
    for number in range(count):
        for attempt in range(ATTEMPTS):
            rng = recipe.rng(*names[number % NUM_LAYOUT_SETS], number, attempt)
            if not (moved := rearrange(rng, sets[number % NUM_LAYOUT_SETS], recipe.grid)):
                continue
            texts = [caption("long", moved, captions.training_phrase, recipe.grid, rng) for _ in range(2)]
            if texts[0] != texts[1] and not any(
                recipe.gives_away(text, [group.concept for group in moved]) for text in texts
            ):
                pairs.append({"query": texts[0], "positive": texts[1], "kind": "layout"})
                break
    return pairs
