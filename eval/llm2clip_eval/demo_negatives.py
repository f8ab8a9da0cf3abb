"""Wrong captions for the demo's scenes: its own captions with one fact changed, false by the scene's recorded facts.

`swap_objects`      two objects of a long caption trade places; the caption names places only, and no cell holds two
`replace_object`    an object of a short caption becomes another of its category that the scene does not show
`reverse_relation`  "below and to the right of" in a long caption becomes "above and to the left of"
`change_count`      "two pencils" in a short caption becomes "three pencils"

Reads `captions.jsonl` of a pool, whose rows carry the `objects` that their captions were made from. A caption is used
where it names the object in the words of the facts, exactly once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from llm2clip.demo.wording import NUMBERS, capitalise, plural, with_article

KINDS = ("swap_objects", "replace_object", "reverse_relation", "change_count")
COUNTS = (2, 3, 4)
"""How many of a kind a scene of the demo may show, beyond one."""
OPPOSITES = {"above": "below", "over": "under", "below": "above", "under": "over", "left": "right", "right": "left"}
# How llm2clip.demo.wording.relation writes how one cell lies from another; `place` writes none of these.
RELATION = re.compile(
    r"\b(above|over|below|under) and to the (left|right) of\b|\b(left|right)(?= (?:side )?of\b)"
    r"|\b(above|over|below|under)(?= (?:it|them|the)\b)"
)


class Negative(NamedTuple):
    """A caption of a picture and a wrong one."""

    id: str
    """Of the picture's row."""
    kind: str
    caption: str
    negative_caption: str


def demo_negatives(pool: Path, seed: int = 0) -> list[Negative]:
    """Change every caption of a pool in every way that its facts allow, at most once in each.

    Args:
        pool: directory of one of the demo's pools.
        seed: of what an object is replaced by and which of several facts is changed.

    Raises:
        FileNotFoundError: if there is no captions.jsonl.
        ValueError: if a row has no facts, or no caption can be changed; names the row.
    """
    path = pool / "captions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a pool that llm2clip data demo wrote")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not row.get("objects"):
            raise ValueError(f"{path}:{number} ({row.get('id')}) has no objects; only data of llm2clip data demo does")
    others = _countable_names(rows)
    found = []
    for row in rows:
        rng = Random(f"{seed}:{row['id']}")
        for kind, caption, wrong in _changes(row, others, rng):
            found.append(Negative(row["id"], kind, caption, wrong))
    if not found:
        raise ValueError(f"{path}: none of {len(rows)} rows has a caption that names its objects by their own names")
    return found


def _changes(
    row: Mapping[str, Any], others: Mapping[str, Sequence[tuple[str, str]]], rng: Random
) -> Iterator[tuple[str, str, str]]:
    counts = Counter(thing["name"] for thing in row["objects"])
    # "a car" is no mention of the car where there is a car key
    counts = {
        name: count for name, count in counts.items() if not any(name in other for other in counts if other != name)
    }
    single = [name for name, count in counts.items() if count == 1]
    for caption in row["captions"].get("long", [])[:1]:
        if wrong := swap_objects(caption, single, rng):
            yield "swap_objects", caption, wrong
        if wrong := reverse_relation(caption):
            yield "reverse_relation", caption, wrong
    for caption in row["captions"].get("short", [])[:1]:
        if wrong := replace_object(caption, row["objects"], single, others, rng):
            yield "replace_object", caption, wrong
        if wrong := change_count(caption, counts, rng):
            yield "change_count", caption, wrong


def swap_objects(caption: str, names: Sequence[str], rng: Random) -> str | None:
    """Let two objects trade places; None where the caption says relations, or does not name two of them once."""
    if RELATION.search(caption):
        return None  # a relation may hold for the swapped objects, too
    spans = [(name, span) for name in names if (span := _mention(caption, with_article(name)))]
    if len(spans) < 2:
        return None
    (first, (start, end)), (second, (start2, end2)) = sorted(rng.sample(spans, 2), key=lambda item: item[1])
    return capitalise(
        caption[:start] + with_article(second) + caption[end:start2] + with_article(first) + caption[end2:]
    )


def reverse_relation(caption: str) -> str | None:
    """Turn the first relation round; None where there is none."""
    match = RELATION.search(caption)
    if match is None:
        return None
    turned = re.sub(r"\b(?:above|over|below|under|left|right)\b", lambda word: OPPOSITES[word[0]], match[0])
    return caption[: match.start()] + turned + caption[match.end() :]


def replace_object(
    caption: str,
    objects: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    others: Mapping[str, Sequence[tuple[str, str]]],
    rng: Random,
) -> str | None:
    """Put another object of the same category in the place of one of `names`; None where none fits."""
    shown = {thing["concept"] for thing in objects}
    category_of = {thing["name"]: thing["category"] for thing in objects}
    for name in rng.sample(names, len(names)):
        span = _mention(caption, with_article(name))
        choices = [other for concept, other in others.get(category_of[name], ()) if concept not in shown]
        if span and choices:
            return capitalise(caption[: span[0]] + with_article(rng.choice(choices)) + caption[span[1] :])
    return None


def change_count(caption: str, counts: Mapping[str, int], rng: Random) -> str | None:
    """Say another number of the objects of which there are several; None where the caption names no such."""
    for name, count in counts.items():
        span = _mention(caption, f"{NUMBERS[count]} {plural(name)}") if count > 1 else None
        if span:
            other = rng.choice([number for number in COUNTS if number != count])
            return capitalise(f"{caption[: span[0]]}{NUMBERS[other]} {plural(name)}{caption[span[1] :]}")
    return None


def _mention(caption: str, phrase: str) -> tuple[int, int] | None:
    """Where the only mention of a phrase is; None if there is none, or another of its last word."""
    found = list(re.finditer(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", caption, re.IGNORECASE))
    last_word = re.escape(phrase.split()[-1])
    if len(found) != 1 or len(re.findall(rf"(?<![\w-]){last_word}(?![\w-])", caption, re.IGNORECASE)) != 1:
        return None
    return found[0].span()


def _countable_names(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """(concept, name) by category, of the objects that some caption names with an article."""
    text = "\n".join(text.lower() for row in rows for texts in row["captions"].values() for text in texts)
    found: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        for thing in row["objects"]:
            found.setdefault(thing["category"], set()).add((thing["concept"], thing["name"]))
    return {
        category: sorted(pair for pair in pairs if with_article(pair[1]).lower() in text)
        for category, pairs in found.items()
    }
