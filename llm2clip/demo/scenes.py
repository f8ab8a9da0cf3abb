"""Scenes: which concepts stand in which cells, and how they are drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from llm2clip.demo.concepts import Concept, Split, held_out_cell, held_out_pair
from llm2clip.demo.wording import Cell, takes_article

PATTERNS = {(1, 1): 0.30, (1, 1, 1): 0.36, (2, 1): 0.12, (1, 1, 1, 1): 0.10, (2, 1, 1): 0.08, (3, 1): 0.04}
"""How many of each object a scene shows, with probabilities; four of a kind are left to the compositions pools."""
HELD_OUT_PATTERN = (4, 1)
CUTOUT_SHARE = 7 / 8
"""Side of an object as a share of its cell: 28 of 32 pixels; the rest is room for jitter."""
LARGE_SHARES = (0.67, 0.92)
"""Side of an enlarged single drawing as a share of the image."""
ATTEMPTS = 200


@dataclass(frozen=True)
class Group:
    """All copies of one concept in a scene."""

    concept: Concept
    cells: tuple[Cell, ...]
    """Empty for one enlarged drawing that fills the picture."""

    @property
    def count(self) -> int:
        return max(1, len(self.cells))


Groups = tuple[Group, ...]
PairRule = Callable[[Concept, Concept], bool]
CellRule = Callable[[Concept, Cell], bool]


def anything(*_: object) -> bool:
    return True


def seen_pair(first: Concept, second: Concept) -> bool:
    return held_out_pair(first, second) == "train"


def seen_cell(concept: Concept, cell: Cell) -> bool:
    return held_out_cell(concept, cell) == "train"


def sample(
    rng: Random,
    concepts: Sequence[Concept],
    grid: int,
    pattern: Sequence[int] | None = None,
    pair_rule: PairRule = seen_pair,
    cell_rule: CellRule = seen_cell,
    countable: Callable[[Concept], bool] = lambda concept: takes_article(concept.name),
    first: Concept | None = None,
) -> Groups | None:
    """One random scene.

    Args:
        rng: source of all randomness.
        concepts: what may appear.
        grid: cells per side.
        pattern: copies of each object; None draws from PATTERNS.
        pair_rule: whether two concepts may appear together.
        cell_rule: whether a concept may stand in a cell.
        countable: whether there is a word for several of a concept.
        first: a concept that has to be in it.

    Returns:
        The scene, or None when the rules left no way on.
    """
    pattern = pattern or rng.choices(list(PATTERNS), weights=list(PATTERNS.values()))[0]
    free = [(row, column) for row in range(grid) for column in range(grid)]
    groups: list[Group] = []
    cells: list[Cell] = []
    for count in pattern:
        for _ in range(ATTEMPTS):
            concept = first if first and not groups else rng.choice(concepts)
            others = [group.concept for group in groups]
            if concept in others or (count > 1 and not countable(concept)):
                continue
            cells = [cell for cell in free if cell_rule(concept, cell)]
            if len(cells) >= count and all(pair_rule(concept, other) for other in others):
                break
        else:
            return None
        chosen = sorted(rng.sample(cells, count))
        free = [cell for cell in free if cell not in chosen]
        groups.append(Group(concept, tuple(chosen)))
    return tuple(groups)


def sample_composition(
    rng: Random, concepts: Sequence[Concept], grid: int, split: Split, partners: Mapping[str, Sequence[Concept]]
) -> Groups | None:
    """A scene of training concepts that combines them as training never does.

    Three in five hold out the pair of concepts, one in five the count (four of a kind), one in five the cell.

    Args:
        rng: source of all randomness.
        concepts: training concepts.
        grid: cells per side.
        split: "val" or "test".
        partners: concepts that each concept (by key) meets in this split only.
    """
    kind = rng.choice(("pair", "pair", "pair", "count", "cell"))
    if kind == "count":
        return sample(rng, concepts, grid, pattern=HELD_OUT_PATTERN) if grid**2 >= sum(HELD_OUT_PATTERN) else None
    if kind == "cell":
        return sample(
            rng,
            concepts,
            grid,
            pattern=rng.choice(((1, 1), (1, 1, 1))),
            cell_rule=lambda concept, cell: held_out_cell(concept, cell) == split,
        )
    first = rng.choice(concepts)
    if not partners[first.key]:
        return None
    return sample(
        rng,
        partners[first.key],
        grid,
        pattern=rng.choice(((1, 1), (1, 1, 1), (2, 1))),
        pair_rule=lambda one, other: held_out_pair(one, other) in ("train", split),
        first=first,
    )


def rearrange(rng: Random, groups: Groups, grid: int) -> Groups | None:
    """The same objects in other places that training may show: half of the time in each other's, else anywhere.

    Returns:
        The scene, or None when the rules left no way on.
    """
    everywhere = [(row, column) for row in range(grid) for column in range(grid)]
    occupied = [cell for group in groups for cell in group.cells]
    for _ in range(ATTEMPTS):
        free = rng.sample(occupied, len(occupied)) if rng.random() < 0.5 else rng.sample(everywhere, len(occupied))
        moved: list[Group] = []
        for group in groups:
            moved.append(Group(group.concept, tuple(sorted(free[: group.count]))))
            free = free[group.count :]
        if tuple(moved) != groups and all(seen_cell(group.concept, cell) for group in moved for cell in group.cells):
            return tuple(moved)
    return None


class DistinctScenes:
    """Remembers the object sets of a pool, so that no scene's set contains another's."""

    def __init__(self) -> None:
        self._sets: list[frozenset[tuple[str, int]]] = []
        self._by_object: dict[tuple[str, int], set[int]] = {}

    def matches(self, objects: frozenset[tuple[str, int]]) -> int:
        """How many scenes of the pool show all of these."""
        found = [self._by_object.get(item, set()) for item in objects]
        return len(set.intersection(*found)) if found else 0

    def add(self, groups: Groups) -> bool:
        """Add a scene unless it contains or is contained in an earlier one."""
        objects = frozenset((group.concept.key, group.count) for group in groups)
        if self.matches(objects):
            return False
        near = set().union(*(self._by_object.get(item, set()) for item in objects))
        if any(self._sets[index] <= objects for index in near):
            return False
        for item in objects:
            self._by_object.setdefault(item, set()).add(len(self._sets))
        self._sets.append(objects)
        return True


class Drawings:
    """Cut-outs of every concept in every style, and the pictures composed of them.

    Args:
        images: style -> concept key -> RGBA drawing without margins.
        image_size: side of the pictures in pixels.
        grid: cells per side.
    """

    def __init__(self, images: Mapping[str, Mapping[str, Image.Image]], image_size: int, grid: int) -> None:
        self.image_size = image_size
        self.grid = grid
        self.cell_size = image_size // grid
        self.cutout_size = int(self.cell_size * CUTOUT_SHARE)
        self._large = images
        self._small = {
            style: {key: _fit(image, self.cutout_size) for key, image in of_style.items()}
            for style, of_style in images.items()
        }

    @property
    def styles(self) -> tuple[str, ...]:
        return tuple(self._large)

    def styles_of(self, concept: Concept) -> frozenset[str]:
        return frozenset(style for style, of_style in self._large.items() if concept.key in of_style)

    def render(self, groups: Groups, styles: Sequence[str], rng: Random) -> bytes:
        """Draw a scene, each object in a style of its own.

        Returns:
            An RGB PNG file.
        """
        picture = Image.new("RGB", (self.image_size, self.image_size), _background(rng))
        for group in groups:
            usable = [style for style in styles if group.concept.key in self._large[style]]
            if not group.cells:
                side = round(self.image_size * rng.uniform(*LARGE_SHARES))
                drawing = _fit(self._large[rng.choice(usable)][group.concept.key], side)
                room = (self.image_size - drawing.width, self.image_size - drawing.height)
                picture.paste(drawing, (rng.randint(0, room[0]), rng.randint(0, room[1])), drawing)
            for row, column in group.cells:
                drawing = self._small[rng.choice(usable)][group.concept.key]
                left = column * self.cell_size + rng.randint(0, self.cell_size - drawing.width)
                top = row * self.cell_size + rng.randint(0, self.cell_size - drawing.height)
                picture.paste(drawing, (left, top), drawing)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def draw_svg(svg: str, size: int) -> Image.Image:
    """Render an SVG and cut off its transparent margins.

    Args:
        svg: SVG text.
        size: side of the rendering in pixels, before the margins go.
    """
    import resvg_py

    # Without dpi, drawings sized in cm or pt fail.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, dpi=96.0, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ValueError("the SVG draws nothing")
    return image.crop(box)


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Scale so that the longer side is `side`; alpha is premultiplied by Pillow's resampling of RGBa."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def _background(rng: Random) -> tuple[int, int, int]:
    """White in two of five pictures, else a soft colour."""
    if rng.random() < 0.4:
        return (255, 255, 255)
    return (rng.randint(195, 255), rng.randint(195, 255), rng.randint(195, 255))
