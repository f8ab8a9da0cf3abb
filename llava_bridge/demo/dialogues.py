"""Training data in the official LLaVA JSON: captions for stage 1, dialogues for stage 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from llava_bridge.demo.easy_vqa import Shape, ask_shapes
from llava_bridge.demo.facts import Picture, Scene, shuffled, stratified
from llava_bridge.demo.questions import OPENING_TYPES, Question, Questioner
from llava_bridge.demo.texts import CAPTION_REQUESTS, ENGLISH, ENGLISH_NAMES, LANGUAGES, NUM_WORDINGS, Language
from llm2clip.demo.concepts import Concept, bare

CAPTION_KINDS = {"names": 0.4, "raw": 0.3, "short": 0.3}
"""Shares of stage 1's answers: short ones teach the projector what things are called in the fewest tokens."""
SINGLES_SHARE = 0.5
"""Share of stage 1's pictures that show one enlarged thing."""
SMALL_TALK_SHARE = 0.2
"""Share of text-only dialogues that begin with a greeting or the like."""


@dataclass(frozen=True)
class Sample:
    """One sample of training data."""

    id: str
    picture: Picture | None
    questions: Sequence[Question]
    image_first: bool = True
    """Whether the picture goes before the first question, else after it."""

    def official(self) -> dict[str, Any]:
        """Its entry in a LLaVA JSON file; without a picture it has no `image` key."""
        conversation: list[dict[str, str]] = []
        for number, question in enumerate(self.questions):
            text = question.text
            if self.picture and number == 0:
                text = f"<image>\n{text}" if self.image_first else f"{text}\n<image>"
            conversation += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
        image = {"image": self.picture.file} if self.picture else {}
        return {"id": self.id, **image, "conversations": conversation}


def caption_samples(scenes: Sequence[Scene], singles: Sequence[Scene], num: int, seed: int) -> Iterator[Sample]:
    """Stage 1: pictures with a request and one caption."""
    rng = Random(f"{seed}:captions")
    sources = {"scenes": shuffled(scenes, rng), "singles": shuffled(singles, rng)}
    for number in range(num):
        of_singles = bool(singles) and (not scenes or rng.random() < SINGLES_SHARE)
        scene = next(sources["singles" if of_singles else "scenes"])
        kind = rng.choices(list(CAPTION_KINDS), weights=list(CAPTION_KINDS.values()))[0]
        answer = _names(scene) if kind == "names" else rng.choice(scene.captions[kind])
        question = Question("caption", kind, rng.choice(CAPTION_REQUESTS[kind]), answer, "en")
        yield Sample(f"caption-{number:06d}", scene.picture, [question], image_first=rng.random() < 0.5)


def _names(scene: Scene) -> str:
    """What is there in reading order, every copy of it: `star, fire, star`."""
    placed = sorted((cell, bare(group.concept.name)) for group in scene.groups for cell in group.cells)
    return ", ".join(name for _, name in placed) or bare(scene.groups[0].concept.name)


def scene_samples(
    scenes: Sequence[Scene],
    num: int,
    num_questions: int,
    weights: Mapping[str, float],
    tags: Sequence[str],
    share: float,
    grid: int,
    seed: int,
) -> Iterator[Sample]:
    """Stage 2: dialogues about scenes, made in pairs that share their yes/no questions.

    Args:
        scenes: training scenes.
        num: dialogues; an odd number is rounded down, for dialogues come in pairs.
        num_questions: questions in each.
        weights: how likely each subtype of question is asked, relative to the others.
        tags: languages other than English.
        share: share of dialogues in those.
        grid: cells per side.
        seed: seed of everything random.
    """
    rng = Random(f"{seed}:dialogues")
    askers = {tag: Questioner(LANGUAGES[tag], grid, rng, vary=True) for tag in ("en", *tags)}
    source = stratified(scenes, rng)
    for pair in range(num // 2):
        asker = askers[rng.choice(tags) if tags and rng.random() < share else "en"]
        scenes_of_pair = (next(source), next(source))
        for side, questions in enumerate(_dialogue_pair(asker, scenes_of_pair, num_questions, weights, rng)):
            yield Sample(f"scene-dialogue-{2 * pair + side:06d}", scenes_of_pair[side].picture, questions)


def _dialogue_pair(
    asker: Questioner, scenes: tuple[Scene, Scene], num: int, weights: Mapping[str, float], rng: Random
) -> tuple[list[Question], list[Question]]:
    """Ask both scenes questions of the same kinds, drawn by weight without repetition as long as there are others."""
    asked: tuple[set[str], set[str]] = (set(), set())
    dialogues: tuple[list[Question], list[Question]] = ([], [])
    drawn: list[str] = []
    idle = 0
    while len(dialogues[0]) < num and idle < len(weights):
        if not drawn:  # weighted sampling without replacement (Efraimidis & Spirakis 2006), the likeliest last
            drawn = sorted(weights, key=lambda subtype: rng.random() ** (1 / weights[subtype]))
        questions = asker.ask_both(drawn.pop(), scenes, asked)
        idle = 0 if questions else idle + 1
        for dialogue, question in zip(dialogues, questions or (), strict=False):
            dialogue.append(question)
    for dialogue in dialogues:
        dialogue.sort(key=lambda question: question.type not in OPENING_TYPES)
    return dialogues


def shape_samples(shapes: Sequence[Shape], num: int, num_questions: int, seed: int) -> Iterator[Sample]:
    """Stage 2: dialogues about easy-VQA's pictures."""
    asked = ask_shapes(shapes, num, num_questions, Random(f"{seed}:easy-vqa"))
    for number, (picture, questions) in enumerate(asked):
        yield Sample(f"easy-vqa-dialogue-{number:06d}", picture, questions)


def text_samples(
    concepts: Sequence[Concept], num: int, num_questions: int, tags: Sequence[str], share: float, seed: int
) -> Iterator[Sample]:
    """Stage 2: dialogues without a picture, about words.

    Args:
        concepts: training concepts; only their training wordings are used.
        num: dialogues.
        num_questions: questions in each.
        tags: languages other than English.
        share: share of dialogues in those.
        seed: seed of everything random.
    """
    for number in range(num):
        rng = Random(f"{seed}:text:{number}")
        language = LANGUAGES[rng.choice(tags)] if tags and rng.random() < share else ENGLISH
        questions = []
        if rng.random() < SMALL_TALK_SHARE:
            questions = [Question("text", "small_talk", *rng.choice(language.small_talk), language.tag)]
        chosen = rng.sample(concepts, min(len(concepts), num_questions - len(questions)))
        questions += [_word_question(concept, language, tags, rng) for concept in chosen]
        yield Sample(f"text-dialogue-{number:06d}", None, questions)


def _word_question(concept: Concept, language: Language, tags: Sequence[str], rng: Random) -> Question:
    """The category of a word, another word for it, or its translation."""
    name = bare(concept.name)
    asked: list[tuple[str, Mapping[str, Any], str]] = [
        ("word_category", {"thing": concept}, language.category(concept.category))
    ]
    if language is not ENGLISH:
        asked.append(("word_from", {"thing": concept}, name))
    if language is ENGLISH and concept.wordings["train"]:
        asked.append(("word_other", {"name": name}, bare(rng.choice(concept.wordings["train"]))))
    if language is ENGLISH and tags:
        tag = rng.choice(tags)
        asked.append(("word_to", {"name": name, "language": ENGLISH_NAMES[tag]}, concept.translations[tag]))
    subtype, slots, answer = rng.choice(asked)
    text = language.question(subtype, rng.randrange(NUM_WORDINGS), 3, **slots)
    return Question("text", subtype, text, answer, language.tag)
