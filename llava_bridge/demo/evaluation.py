"""Evaluation questions: one `datasets`-readable parquet file per split and pool, pictures inside."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from llava_bridge.demo.easy_vqa import EVAL_WORDINGS, Shape, ShapeQuestions
from llava_bridge.demo.facts import SUBTYPES, TYPES, Picture, Scene, shuffled, stratified
from llava_bridge.demo.questions import Question, Questioner
from llava_bridge.demo.texts import LANGUAGES
from llm2clip.run_dir import atomic_path

SCENE_POOLS = ("seen", "concepts", "compositions")
SHAPE_POOL = "easy_vqa"
OPEN_SUBTYPES = frozenset({"name", "what_side"})
"""Answered with a name: no list of choices."""
PATIENCE = 4
"""How often all scenes are gone through without a new question before giving up on more."""


class Asked(NamedTuple):
    """A question about a picture."""

    picture: Picture
    question: Question


def scene_questions(
    scenes: Sequence[Scene], tag: str, num: Mapping[str, int], grid: int, name: str, seed: int
) -> list[Asked]:
    """Questions about a pool's scenes.

    Args:
        scenes: the pool; at least two.
        tag: language.
        num: questions of each type, if the scenes allow as many; even, for scenes are asked in pairs.
        grid: cells per side.
        name: of the pool, to seed with.
        seed: seed of everything random.
    """
    return [
        asked
        for kind in TYPES
        for asked in _of_type(kind, scenes, tag, num[kind], grid, Random(f"{seed}:eval:{name}:{tag}:{kind}"))
    ]


def _of_type(kind: str, scenes: Sequence[Scene], tag: str, num: int, grid: int, rng: Random) -> list[Asked]:
    # Large numbers are rare: counting goes round them, everything else round the scenes.
    source = (stratified if kind == "count" else shuffled)(scenes, rng)
    asker = Questioner(LANGUAGES[tag], grid, rng, vary=False)
    topics: dict[str, set[str]] = {scene.picture.id: set() for scene in scenes}
    subtypes = itertools.cycle(SUBTYPES[kind])
    made: list[Asked] = []
    idle = 0
    while len(made) < num and idle < PATIENCE * len(scenes):
        pair = (next(source), next(source))
        questions = None
        if pair[0] is not pair[1]:
            asked = (topics[pair[0].picture.id], topics[pair[1].picture.id])
            questions = asker.ask_both(next(subtypes), pair, asked)
        for scene, question in zip(pair, questions or (), strict=False):
            made.append(Asked(scene.picture, question))
        idle = 0 if questions else idle + 2
    return made


def shape_questions(shapes: Sequence[Shape], num: Mapping[str, int], seed: int, split: str) -> list[Asked]:
    """Questions about easy-VQA's pictures; yes/no texts are kept only where both answers are equally frequent."""
    chosen = [
        Shape(shape.picture, tuple(q for q in shape.questions if q.text.lower().startswith(EVAL_WORDINGS)))
        for shape in shapes
    ]
    made: list[Asked] = []
    for kind in ("yesno", "category"):
        rng = Random(f"{seed}:eval:{split}:easy-vqa:{kind}")
        chooser = ShapeQuestions(rng)
        of_kind = [
            Asked(shape.picture, question)
            for shape in rng.sample(chosen, len(chosen))
            if (question := chooser.ask(shape, kind, set()))
        ]
        made += (_evened(of_kind) if kind == "yesno" else _in_turn(of_kind))[: num[kind]]
    return made


def _evened(asked: Sequence[Asked]) -> list[Asked]:
    """Pairs of a yes and a no to the same text, in turn; what has no partner is left out."""
    waiting: dict[tuple[str, str], list[Asked]] = {}
    pairs: list[Asked] = []
    for item in asked:
        text, answer = item.question.text, item.question.answer
        partners = waiting.setdefault((text, {"yes": "no", "no": "yes"}[answer]), [])
        if partners:
            pairs += [partners.pop(), item]
        else:
            waiting.setdefault((text, answer), []).append(item)
    return pairs


def _in_turn(asked: Sequence[Asked]) -> list[Asked]:
    """One question with each answer, then another with each, and so on: every beginning has its answers even."""
    seen: Counter[str] = Counter()
    rounds = []
    for item in asked:
        rounds.append(seen[item.question.answer])
        seen[item.question.answer] += 1
    return [item for _, item in sorted(zip(rounds, asked, strict=True), key=lambda pair: pair[0])]


def rows(name: str, asked: Sequence[Asked]) -> list[dict]:
    """The rows of a parquet file, with what a guess would get right.

    `choices` are all answers to questions of that subtype and language in this file; open answers (names) have none.
    `chance` is one over their number.
    """
    answers: dict[tuple[str, str], set[str]] = {}
    for _, question in asked:
        answers.setdefault((question.subtype, question.language), set()).add(question.answer)
    made = []
    for number, (picture, question) in enumerate(asked):
        distinct = sorted(answers[question.subtype, question.language])
        made.append(
            {
                "id": f"{name.replace('/', '-')}-{number:05d}",
                "image_id": picture.id,
                "image": {"bytes": picture.read(), "path": f"{picture.id}.png"},
                "question": question.text,
                "answer": question.answer,
                "type": question.type,
                "subtype": question.subtype,
                "language": question.language,
                "choices": [] if question.subtype in OPEN_SUBTYPES else distinct,
                "chance": 1 / len(distinct),
            }
        )
    return made


def write(path: Path, made: Sequence[dict]) -> None:
    """Write rows as a parquet file whose `image` column `datasets` reads as pictures."""
    import datasets
    import pyarrow.parquet

    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "image_id")}
        | {"image": datasets.Image()}
        | {name: datasets.Value("string") for name in ("question", "answer", "type", "subtype", "language")}
        | {"choices": [datasets.Value("string")], "chance": datasets.Value("float64")}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(list(made), features=features)
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table.data.table, temporary)  # its schema holds the features
