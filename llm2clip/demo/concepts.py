"""What the demo's pictures show: concepts, their names in several languages, their wordings and their splits.

`lexicon.json` is our own table: category -> emoji name -> other English wordings for that very thing. A first entry
`=name` replaces the emoji's name; `~` before a phrase marks one that takes no article (plurals, masses, names).

Every split is a function of a stable key, never of an order, so that adding a row moves no other row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from llm2clip.demo.packages import Fetched

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

TEST_CONCEPTS = 0.13
VAL_CONCEPTS = 0.07
TEST_WORDINGS = 0.40
VAL_WORDINGS = 0.20
HELD_OUT_PAIRS = {"test": 0.10, "val": 0.05}
HELD_OUT_CELLS = {"test": 0.06, "val": 0.04}
MAX_CONCEPTS_PER_KEYWORD = 2
EMOJI_FULLY_QUALIFIED = 2  # `emoji` package: STATUS["fully_qualified"]
STOP_WORDS = frozenset("a an the of in on at to with for from by and or that this s one your off up down out".split())


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on nothing but `key`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(key: str, test: float, val: float) -> Split:
    """The split of a stable key, for the given shares of test and val."""
    value = fraction(key)
    return "test" if value < test else "val" if value < test + val else "train"


@dataclass(frozen=True)
class Concept:
    """One kind of thing that can be drawn."""

    key: str
    """English name of the emoji: the stable key of all splits."""
    name: str
    """Canonical English phrase used in captions."""
    category: str
    emoji: str
    split: Split
    wordings: Mapping[Split, tuple[str, ...]]
    """Other English phrases for it, by the split that may use them. Those of a held-out concept are all its own."""
    keywords: tuple[str, ...]
    """English CLDR keywords that give no held-out wording away; empty without the optional package."""
    translations: Mapping[str, str]
    """Name by language tag."""

    @cached_property
    def code_points(self) -> str:
        return "-".join(f"{ord(character):x}" for character in self.emoji)


def bare(phrase: str) -> str:
    """A lexicon phrase without its no-article mark and without a leading "the"."""
    return phrase.removeprefix("~").removeprefix("the ")


def content_words(phrase: str) -> set[str]:
    """Lower-case words that carry meaning, without plural s."""
    words = re.findall(r"[^\W_]+", bare(phrase).lower())
    return {word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words} - STOP_WORDS


def share_a_word(first: str, second: str) -> bool:
    """Whether two phrases share a content word, or one word contains a word of the other (cab, taxicab)."""
    for left in content_words(first):
        for right in content_words(second):
            if left == right or (min(len(left), len(right)) > 3 and (left in right or right in left)):
                return True
    return False


def split_wordings(key: str, name: str, wordings: list[str], ambiguous: set[str]) -> dict[Split, tuple[str, ...]]:
    """Deal a train concept's other wordings out to train, val and test.

    A held-out wording shares no content word with the concept's name, and the concept's training wordings share none
    with a held-out one; what would break that goes to training or is left out.

    Args:
        key: the concept's key.
        name: its canonical phrase.
        wordings: its other phrases.
        ambiguous: lower-case bare phrases that more than one concept has.
    """
    dealt: dict[Split, list[str]] = {"train": [], "val": [], "test": []}
    for wording in wordings:
        phrase = bare(wording).lower()
        split = split_of(f"wording:{key}:{phrase}", TEST_WORDINGS, VAL_WORDINGS)
        if phrase in ambiguous or share_a_word(wording, name):
            split = "train"
        dealt[split].append(wording)
    held_out = dealt["val"] + dealt["test"]
    dealt["train"] = [w for w in dealt["train"] if not any(share_a_word(w, held) for held in held_out)]
    return {split: tuple(phrases) for split, phrases in dealt.items()}


def load_concepts(
    packages: Mapping[str, Fetched], languages: list[str], limit: int | None = None, seed: int = 0
) -> list[Concept]:
    """Read the lexicon and the packages' names and keywords.

    Args:
        packages: `emoji`, and `cldr` when it is there.
        languages: tags to read names for.
        limit: keep this many concepts, chosen by hash; None keeps all.
        seed: of the hashes that choose concepts and hold some of them out; another one makes a new test.

    Raises:
        ValueError: if the lexicon names an emoji, or the configuration a language, that the packages don't have.
    """
    lexicon = json.loads(Path(__file__).with_name("lexicon.json").read_text(encoding="utf-8"))
    rows = {key: (category, phrases) for category, group in lexicon.items() for key, phrases in group.items()}
    kept = sorted(rows, key=lambda key: fraction(f"{seed}:keep:{key}"))[:limit]
    emoji = _emoji_by_name(packages["emoji"])
    if unknown := sorted(set(rows) - set(emoji)):
        raise ValueError(f"lexicon.json: no emoji of the `emoji` package is called {unknown}")
    names = {
        key: phrases[0][1:] if phrases and phrases[0].startswith("=") else key for key, (_, phrases) in rows.items()
    }
    others = {key: [p for p in phrases if not p.startswith("=")] for key, (_, phrases) in rows.items()}
    uses = Counter(
        phrase for key in rows for phrase in {bare(names[key]).lower(), *(bare(p).lower() for p in others[key])}
    )
    ambiguous = {phrase for phrase, count in uses.items() if count > 1}
    translations = _translations(packages, languages)
    keywords = _keywords(packages)
    concepts = []
    for key in sorted(kept):
        split = split_of(f"{seed}:concept:{key}", TEST_CONCEPTS, VAL_CONCEPTS)
        wordings: dict[Split, tuple[str, ...]]
        if split == "train":
            wordings = split_wordings(key, names[key], others[key], ambiguous)
        else:
            wordings = {split: tuple(others[key])}
        held_out = (
            [phrase for part in ("val", "test") for phrase in wordings.get(part, ())] if split == "train" else []
        )
        own_keywords = tuple(
            word
            for word in keywords.get(_plain(emoji[key]), ())
            if word != names[key].lower() and not any(share_a_word(word, phrase) for phrase in held_out)
        )
        concepts.append(
            Concept(
                key=key,
                name=names[key],
                category=rows[key][0],
                emoji=emoji[key],
                split=split,
                wordings=wordings,
                keywords=own_keywords,
                translations={tag: table[_plain(emoji[key])] for tag, table in translations.items()},
            )
        )
    return concepts


def _plain(emoji: str) -> str:
    """Without variation selectors: packages disagree about them."""
    return emoji.replace("\ufe0f", "")


def _emoji_by_name(package: Fetched) -> dict[str, str]:
    table = package.read_json("emoji/unicode_codes/emoji.json")
    return {
        row["en"].strip(":").replace("_", " "): emoji
        for emoji, row in table.items()
        if row["status"] == EMOJI_FULLY_QUALIFIED
    }


def _translations(packages: Mapping[str, Fetched], languages: list[str]) -> dict[str, dict[str, str]]:
    """Names by language and emoji. CLDR's keep the capitals of German nouns, which `emoji` loses."""
    tables = {}
    for tag in languages:
        member = f"emoji/unicode_codes/emoji_{tag}.json"
        if member not in packages["emoji"].members:
            raise ValueError(f"languages: {tag!r} is not in the `emoji` package; use some of {_languages(packages)}")
        tables[tag] = {
            _plain(emoji): name.strip(":").replace("_", " ")
            for emoji, name in packages["emoji"].read_json(member).items()
        }
        cldr = f"package/annotations/{tag}/annotations.json"
        if "cldr" in packages and cldr in packages["cldr"].members:
            annotations = packages["cldr"].read_json(cldr)["annotations"]["annotations"]
            tables[tag].update({_plain(emoji): row["tts"][0] for emoji, row in annotations.items() if "tts" in row})
    return tables


def _languages(packages: Mapping[str, Fetched]) -> list[str]:
    found = (re.fullmatch(r"emoji/unicode_codes/emoji_(\w+)\.json", name) for name in packages["emoji"].members)
    return sorted(match[1] for match in found if match)


def _keywords(packages: Mapping[str, Fetched]) -> dict[str, tuple[str, ...]]:
    if "cldr" not in packages:
        return {}
    annotations = packages["cldr"].read_json("package/annotations/en/annotations.json")["annotations"]["annotations"]
    return {_plain(emoji): tuple(row["default"]) for emoji, row in annotations.items() if "default" in row}


def shared_keywords(concepts: Iterable[Concept]) -> set[str]:
    """Keywords of more than MAX_CONCEPTS_PER_KEYWORD concepts: they identify nothing."""
    uses = Counter(word for concept in concepts for word in concept.keywords)
    return {word for word, count in uses.items() if count > MAX_CONCEPTS_PER_KEYWORD}


def held_out_pair(first: Concept, second: Concept) -> Split:
    """The only split whose scenes may show these two together; "train" when all may."""
    low, high = sorted((first.key, second.key))
    return split_of(f"pair:{low}|{high}", HELD_OUT_PAIRS["test"], HELD_OUT_PAIRS["val"])


def held_out_cell(concept: Concept, cell: tuple[int, int]) -> Split:
    """The only split whose scenes may show this concept in this cell; "train" when all may."""
    return split_of(f"cell:{concept.key}:{cell[0]},{cell[1]}", HELD_OUT_CELLS["test"], HELD_OUT_CELLS["val"])
