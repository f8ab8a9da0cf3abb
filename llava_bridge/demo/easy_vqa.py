"""easy-VQA (Zhou 2019, MIT): one coloured shape per picture and questions about it, read from its wheel."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from llava_bridge.demo.facts import Picture, shuffled
from llava_bridge.demo.questions import Question
from llm2clip.demo.packages import Fetched
from llm2clip.demo.wording import capitalise

SHAPES = ("circle", "rectangle", "triangle")
EVAL_WORDINGS = ("is there a", "what shape is in the image?", "what color is the shape?")
"""How questions that evaluation asks begin."""


@dataclass(frozen=True)
class Shape:
    """A picture with its questions."""

    picture: Picture
    questions: tuple[Question, ...]


def read_shapes(package: Fetched, part: Literal["train", "test"]) -> list[Shape]:
    """The pictures of one part with their questions, in the order of the package."""
    folder = f"easy_vqa/data/{part}"
    questions: dict[int, list[Question]] = {}
    for text, answer, image in json.loads(package.read(f"{folder}/questions.json")):
        questions.setdefault(image, []).append(_question(text, answer))
    return [
        Shape(Picture(f"easy-vqa-{part}-{image}", package.read(f"{folder}/images/{image}.png")), tuple(asked))
        for image, asked in sorted(questions.items())
    ]


def _question(text: str, answer: str) -> Question:
    if answer in ("yes", "no"):
        return Question("yesno", "exists", capitalise(text), answer, "en")
    return Question("category", "shape" if answer in SHAPES else "color", capitalise(text), answer, "en")


class ShapeQuestions:
    """Chooses questions so that every text is answered with yes as often as with no, give or take one.

    easy-VQA itself answers "is there a red shape?" with no in seven of eight cases. Shapes and colours are even there.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._given: Counter[tuple[str, str]] = Counter()

    def ask(self, shape: Shape, kind: str, asked: set[str]) -> Question | None:
        """One question of a type ("yesno" or "category") about a picture, or None if none keeps the balance."""
        usable = [q for q in shape.questions if q.type == kind and q.text not in asked and self._keeps_balance(q)]
        if not usable:
            return None
        rank = {answer: self._given[kind, answer] for answer in ("yes", "no")}
        question = min(usable, key=lambda q: (rank.get(q.answer, 0), self._rng.random()))
        self._given[kind, question.answer] += 1
        self._given[question.text, question.answer] += 1
        asked.add(question.text)
        return question

    def _keeps_balance(self, question: Question) -> bool:
        opposite = {"yes": "no", "no": "yes"}.get(question.answer)
        given = self._given[question.text, question.answer]
        return opposite is None or given <= self._given[question.text, opposite]


def ask_shapes(
    shapes: Sequence[Shape], num: int, per_picture: int, rng: Random
) -> Iterator[tuple[Picture, list[Question]]]:
    """Ask a few questions of each of `num` pictures, half of them yes/no, in random order.

    Args:
        shapes: pictures to draw from; drawn again only when all were.
        num: pictures to ask about.
        per_picture: questions about each, where the balance allows.
        rng: source of all randomness.
    """
    chooser = ShapeQuestions(rng)
    source = shuffled(shapes, rng)
    for number in range(num):
        shape = next(source)
        asked: set[str] = set()
        kinds = [("yesno", "category")[(turn + number) % 2] for turn in range(per_picture)]
        questions = [q for kind in kinds if (q := chooser.ask(shape, kind, asked))]
        if questions:
            yield shape.picture, rng.sample(questions, len(questions))
