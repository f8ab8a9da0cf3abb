"""Captions in other languages, for the cross-lingual test pools. Training is in English only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from llm2clip.demo.scenes import Group
from llm2clip.demo.wording import Cell, capitalise


@dataclass(frozen=True)
class Phrases:
    """What a simple sentence about a grid needs; no articles, so that no genders are needed."""

    opening: str
    rows: tuple[str, str, str]
    columns: tuple[str, str, str]
    center: str
    last: str
    times: tuple[str, str, str]


PHRASES = {
    "de": Phrases("{} Dinge", ("oben", "mittlere Reihe", "unten"),
                  ("links", "in der Mitte", "rechts"), "in der Mitte", " und ", ("zweimal", "dreimal", "viermal")),
    "fr": Phrases("{} objets", ("en haut", "au milieu", "en bas"),
                  ("à gauche", "au centre", "à droite"), "au centre", " et ",
                  ("deux fois", "trois fois", "quatre fois")),
    "es": Phrases("{} objetos", ("arriba", "en el medio", "abajo"),
                  ("a la izquierda", "en el centro", "a la derecha"), "en el centro", " y ",
                  ("dos veces", "tres veces", "cuatro veces")),
    "it": Phrases("{} oggetti", ("in alto", "a metà", "in basso"),
                  ("a sinistra", "al centro", "a destra"), "al centro", " e ",
                  ("due volte", "tre volte", "quattro volte")),
    "pt": Phrases("{} objetos", ("em cima", "no meio", "em baixo"),
                  ("à esquerda", "ao centro", "à direita"), "no centro", " e ",
                  ("duas vezes", "três vezes", "quatro vezes")),
}  # fmt: skip
"""Languages that get a long caption; all others get names only."""


def raw_caption(groups: Sequence[Group], language: str, rng: Random) -> str:
    """Names in any order."""
    names = [group.concept.translations[language] for group in groups]
    rng.shuffle(names)
    return ("、" if language in ("zh", "ja") else ", ").join(names)


def long_caption(groups: Sequence[Group], language: str, grid: int) -> str:
    """Every object, how often, and where: `3 Dinge: oben links Taxi; in der Mitte Hase.`"""
    phrases = PHRASES[language]
    parts = []
    for group in groups:
        name = group.concept.translations[language]
        where = [_place(cell, grid, phrases) for cell in group.cells]
        if group.count > 1:
            name = f"{name} {phrases.times[group.count - 2]}"
        parts.append(f"{phrases.last.join(where)} {name}")
    opening = phrases.opening.format(str(sum(group.count for group in groups)))
    return capitalise(f"{opening}: {'; '.join(parts)}.")


def _place(cell: Cell, grid: int, phrases: Phrases) -> str:
    row, column = (index if grid == 3 else 2 * index for index in cell)
    return phrases.center if row == column == 1 else f"{phrases.rows[row]} {phrases.columns[column]}"
