"""English captions of a scene: raw (alt-text-like), short (one clean sentence) and long (dense)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

from llm2clip.demo.concepts import Concept, bare
from llm2clip.demo.scenes import Group
from llm2clip.demo.wording import (
    NUMBERS,
    Cell,
    capitalise,
    counted,
    definite,
    join,
    place,
    plural,
    relation,
    takes_article,
    verb,
    with_article,
)

SEPARATORS = (", ", " ", " / ", " - ", " + ", "_", "; ", " and ", " & ", ",")
FILLERS_BEFORE = ("", "", "", "", "", "picture of", "image:", "clipart", "icons", "pic", "stock art", "emoji set")
FILLERS_AFTER = ("", "", "", "", "", "clipart", "icons", "png", "free vector", "drawing", "sticker set", "...")
CANONICAL_SHARE = 0.6
DROP_SHARE = 0.3


def training_phrase(concept: Concept, count: int, rng: Random) -> str:
    """What training captions call a concept: mostly its name, else one of its training wordings."""
    others = [phrase for phrase in concept.wordings.get("train", ()) if count == 1 or takes_article(phrase)]
    return concept.name if not others or rng.random() < CANONICAL_SHARE else rng.choice(others)


def canonical_phrase(concept: Concept, count: int, rng: Random) -> str:
    """The concept's name."""
    return concept.name


def held_out_phrase(split: str):
    """A chooser of wordings that are held out for `split`."""

    def choose(concept: Concept, count: int, rng: Random) -> str:
        return rng.choice([p for p in concept.wordings[split] if count == 1 or takes_article(p)])  # pyright: ignore

    return choose


def drop_one(groups: Sequence[Group], rng: Random) -> Sequence[Group]:
    """Now and then leave out one object of three or more, as alt texts do."""
    if len(groups) < 3 or rng.random() >= DROP_SHARE:
        return groups
    left_out = rng.choice(groups)
    return [group for group in groups if group is not left_out]


def raw_caption(groups: Sequence[Group], phrases: Sequence[str], rng: Random) -> str:
    """Names in any order, with odd separators and filler."""
    words = []
    for group, phrase in zip(groups, phrases, strict=True):
        if group.count == 1:
            words.append(bare(phrase))
        else:
            words.append(f"{rng.choice((NUMBERS[group.count], str(group.count)))} {plural(phrase)}")
    rng.shuffle(words)
    text = rng.choice(SEPARATORS).join(words)
    text = " ".join(part for part in (rng.choice(FILLERS_BEFORE), text, rng.choice(FILLERS_AFTER)) if part)
    return text if rng.random() < 0.2 else text.lower()


def short_caption(groups: Sequence[Group], phrases: Sequence[str], rng: Random) -> str:
    """One clean sentence that names every object."""
    order = list(zip(groups, phrases, strict=True))
    rng.shuffle(order)
    parts = [counted(phrase, group.count) for group, phrase in order]
    listed = join(parts, rng.choice((" and ", " and ", " as well as ")))
    template = rng.choice(
        ("{}.", "A picture of {}.", "{} in one picture.", "A drawing with {}.", "This shows {}.", "You see {}.",
         "A simple scene with {}.", "There is {} here.", "An illustration of {}.", "{}, drawn on a flat background.")
    )  # fmt: skip
    if template.startswith("There is") and (order[0][0].count > 1 or verb(order[0][1], "is", "are") == "are"):
        template = "There are {} here."
    return capitalise(template.format(listed))


def long_caption(groups: Sequence[Group], phrases: Sequence[str], grid: int, rng: Random) -> str:
    """A dense caption: every object, how often, where, some relations, and often the categories."""
    order = list(zip(groups, phrases, strict=True))
    if rng.random() < 0.5:
        rng.shuffle(order)
    else:
        order.sort(key=lambda item: item[0].cells[0])
    body = rng.choice((_listing, _listing, _sentences, _sentences, _by_row))(order, grid, rng)
    return f"{body} {_closing(groups, grid, rng)}".strip()


def single_long_caption(concept: Concept, phrase: str, cell: Cell | None, grid: int, rng: Random) -> str:
    """A sentence or two about one drawing: enlarged, or at the size of a scene's object in a cell."""
    thing, kind = with_article(phrase), with_article(concept.category)
    if cell is None:
        templates = (
            f"{thing}, {kind} shown on its own, as large as the picture.",
            f"one large drawing of {thing}, {kind}, and nothing else.",
            f"a close view of {thing}: {kind}.",
            f"{thing}, {kind}, drawn large on a flat background.",
        )
    else:
        where = place(cell, grid, rng)
        templates = (
            f"{thing}, {kind}, {where}; the rest is empty.",
            f"{where} there {verb(phrase, 'is', 'are')} {thing}, drawn small, and nothing else.",
            f"a small drawing of {thing} {where}: {kind}.",
            f"only {thing} {where}, everything else is blank.",
        )
    return capitalise(rng.choice(templates))


Ordered = Sequence[tuple[Group, str]]


def _located(group: Group, phrase: str, grid: int, rng: Random) -> str:
    """`two taxis, one at the top left and one in the center`."""
    places = [place(cell, grid, rng) for cell in group.cells]
    if group.count == 1:
        return f"{with_article(phrase)} {places[0]}"
    start = rng.choice(("one ", ""))
    return f"{counted(phrase, group.count)}, {join([start + where for where in places])}"


def _listing(order: Ordered, grid: int, rng: Random) -> str:
    total = sum(group.count for group, _ in order)
    number = NUMBERS[total]
    opening = rng.choice(
        ("", "", f"{number} objects: ", f"a picture with {number} things: ", f"the image shows {number} drawings, ",
         "on a plain background: ", "this scene has ")
    )  # fmt: skip
    parts = [_located(group, phrase, grid, rng) for group, phrase in order]
    return capitalise(f"{opening}{join(parts, rng.choice((' and ', ', and ', ' plus ')))}.")


def _sentences(order: Ordered, grid: int, rng: Random) -> str:
    """Clauses that place each object in the grid or relative to the one before."""
    clauses = []
    previous: tuple[Group, str] | None = None
    for group, phrase in order:
        subject, be = counted(phrase, group.count), verb(phrase, "is", "are")
        if group.count > 1:
            clauses.append(f"there are {_located(group, phrase, grid, rng)}")
        elif previous and previous[0].count == 1 and rng.random() < 0.6:
            where = relation(group.cells[0], previous[0].cells[0], rng)
            pronoun = verb(previous[1], "it", "them")
            anchor = pronoun if len(previous[1].split()) > 2 else rng.choice((pronoun, definite(previous[1])))
            clauses.append(rng.choice(("{0} {3} {1} {2}", "{1} {2} there {3} {0}")).format(subject, where, anchor, be))
        else:
            where = place(group.cells[0], grid, rng)
            stands = rng.choice((be, verb(phrase, "sits", "sit"), "can be seen", verb(phrase, "appears", "appear")))
            clauses.append(rng.choice((f"{subject} {stands} {where}", f"{where} there {be} {subject}")))
        previous = (group, phrase)
    return capitalise(join(clauses, rng.choice((", and ", "; ", " and "))) + ".")


def _by_row(order: Ordered, grid: int, rng: Random) -> str:
    """Row by row, from the top."""
    rows: dict[int, list[tuple[int, str]]] = {}
    for group, phrase in order:
        for row, column in group.cells:
            rows.setdefault(row, []).append((column, phrase))
    row_names = ("top", "bottom") if grid == 2 else ("top", "middle", "bottom")
    column_names = ("left", "right") if grid == 2 else ("left", "middle", "right")
    parts = []
    for row in sorted(rows):
        things = [
            f"{with_article(phrase)} {'in' if column_names[column] == 'middle' else 'on'} the {column_names[column]}"
            for column, phrase in sorted(rows[row])
        ]
        parts.append(f"{row_names[row]} row: {join(things)}")
    return capitalise("; ".join(parts) + ".")


def _closing(groups: Sequence[Group], grid: int, rng: Random) -> str:
    """Nothing, the categories, the number of objects, or an empty place."""
    choice = rng.random()
    if choice < 0.45:
        return ""
    if choice < 0.8:
        kinds = Counter()
        for group in groups:
            kinds[group.concept.category] += group.count
        listed = join([counted(kind, count) for kind, count in sorted(kinds.items(), key=lambda item: rng.random())])
        return capitalise(rng.choice(("{}.", "in all {}.", "that makes {}.")).format(listed))
    if choice < 0.9:
        number = NUMBERS[sum(group.count for group in groups)]
        return capitalise(rng.choice((f"{number} things in total.", f"altogether {number} drawings.")))
    used = {cell for group in groups for cell in group.cells}
    free = [(row, column) for row in range(grid) for column in range(grid) if (row, column) not in used]
    return f"Nothing is {place(rng.choice(free), grid, rng)}." if free else ""
