"""English phrases: articles, plurals, mentions, places in the grid and relations between cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from llm2clip.demo.concepts import bare

Cell = tuple[int, int]

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IRREGULAR = {
    "mouse": "mice", "goose": "geese", "ox": "oxen", "person": "people", "child": "children", "tooth": "teeth",
    "foot": "feet", "cactus": "cacti", "die": "dice", "wolf": "wolves", "knife": "knives", "leaf": "leaves",
    "loaf": "loaves", "scarf": "scarves", "bacterium": "bacteria", "tomato": "tomatoes", "potato": "potatoes",
    "mango": "mangoes", "mosquito": "mosquitoes", "tornado": "tornadoes", "volcano": "volcanoes", "hero": "heroes",
}  # fmt: skip
UNCHANGED = frozenset(
    "sheep deer moose bison shrimp squid dice elk salmon trout carp cattle series aircraft spacecraft".split()
)
MAN = re.compile(r"(?<!cai)(?<!hu)man$")
AN = re.compile(r"(?:[aeiou]|x-ray|hour|honest|atm|suv|f1|8|fm|s with|nba|nhl|lp|mri)", re.IGNORECASE)
NOT_AN = re.compile(r"(?:uni(?!dent)|use|ufo|ute|eu|ewe|one|uku|urn-?like|u-)", re.IGNORECASE)
HEAD_END = re.compile(
    r" (?:with|of|in|on|for|at|without|from|to|that|by|behind|after|between|over|under|beyond|before|slid|outside) "
)

ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "center", "right")}


def takes_article(phrase: str) -> bool:
    """Whether a lexicon phrase is a countable singular."""
    return not phrase.startswith(("~", "the "))


def with_article(phrase: str) -> str:
    """`taxi` -> `a taxi`, `~glitter` -> `glitter`, `the Kaaba` -> `the Kaaba`."""
    if not takes_article(phrase):
        return phrase.removeprefix("~")
    an = AN.match(phrase) is not None and NOT_AN.match(phrase) is None
    return f"{'an' if an else 'a'} {phrase}"


def verb(phrase: str, singular: str, many: str) -> str:
    """The verb form for one mention of a phrase: `a taxi is`, `glitter is`, `socks are`."""
    match = HEAD_END.search(phrase)
    head = phrase[: match.start()] if match else phrase
    is_plural = phrase.startswith("~") and re.search(r"(?:[^s']s|people|teeth|feet)$", head) is not None
    return many if is_plural and not bare(phrase)[:1].isupper() else singular


def definite(phrase: str) -> str:
    """`taxi` -> `the taxi`; names (`~Santa Claus`) stay as they are."""
    plain = bare(phrase)
    is_name = phrase.startswith("~") and plain[:1].isupper()
    return plain if is_name else f"the {plain}"


def plural(phrase: str) -> str:
    """Plural of a countable noun phrase: its head, the word before the first preposition, is inflected."""
    match = HEAD_END.search(phrase)
    head, rest = (phrase[: match.start()], phrase[match.start() :]) if match else (phrase, "")
    return _plural_word(head) + rest


def _plural_word(head: str) -> str:
    match = re.fullmatch(r"(.*[ -])?([^ -]+)", head)
    assert match, head
    start, word = match[1] or "", match[2]
    if word in UNCHANGED or word.endswith("fish"):
        return head
    if word in IRREGULAR:
        return start + IRREGULAR[word]
    if MAN.search(word):
        return f"{start}{word[:-2]}en"
    if re.search(r"(?:s|x|z|ch|sh)$", word):
        return f"{head}es"
    if re.search(r"[^aeiou]y$", word):
        return f"{head[:-1]}ies"
    return f"{head}s"


def counted(phrase: str, count: int) -> str:
    """`a taxi`, `two taxis`.

    Raises:
        ValueError: for several of a phrase that takes no article.
    """
    if count == 1:
        return with_article(phrase)
    if not takes_article(phrase):
        raise ValueError(f"{phrase!r} is not countable: {count} of it cannot be named")
    return f"{NUMBERS[count]} {plural(phrase)}"


def join(parts: Sequence[str], last: str = " and ") -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def capitalise(sentence: str) -> str:
    """First letter upper case, the rest untouched."""
    return sentence[:1].upper() + sentence[1:]


def place(cell: Cell, grid: int, rng: Random) -> str:
    """Where a cell is, in one of two wordings: `in the top left corner`."""
    row, column = ROWS[grid][cell[0]], COLUMNS[grid][cell[1]]
    if row == "middle" and column == "center":
        return rng.choice(("in the center", "in the middle"))
    if row == "middle":
        return rng.choice((f"at the center {column}", f"in the middle row on the {column}"))
    if column == "center":
        return rng.choice((f"at the {row} center", f"in the middle of the {row} row"))
    return rng.choice((f"at the {row} {column}", f"in the {row} {column} corner"))


def relation(cell: Cell, other: Cell, rng: Random) -> str:
    """How `cell` lies from `other`: `above`, `below and to the left of`."""
    down, right = cell[0] - other[0], cell[1] - other[1]
    vertical = "" if down == 0 else rng.choice(("below", "under")) if down > 0 else rng.choice(("above", "over"))
    side = "" if right == 0 else "right" if right > 0 else "left"
    if not side:
        return rng.choice(("directly ", "straight ", "")) + vertical
    if not vertical:
        return rng.choice((f"to the {side} of", f"{side} of", f"on the {side} side of"))
    return f"{vertical} and to the {side} of"
