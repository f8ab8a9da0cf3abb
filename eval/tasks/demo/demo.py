"""Questions of the demo's held-out parquet files as lmms-eval tasks: which of them a task asks, and when one is right.

The files are those of `llava-bridge data questions`; `llm2clip_eval.questions` says what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from string import ascii_uppercase
from typing import Any

from llm2clip_eval.questions import is_correct

NUM_OPTIONS = 4
LETTERED = re.compile(r"\(?([a-z])(?:[.):]+\s*(.*))?", re.IGNORECASE)
"""A letter and perhaps the option's text; `a boat` is a text."""


def image(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if all of the response is the expected answer, as `llm2clip_eval.questions.normalized` has it."""
    return {"exact_match": float(is_correct(results[0], doc["answer"]))}


def options(doc: dict[str, Any]) -> list[str]:
    """The answer and other answers to such questions, in an order that the question's id draws."""
    rng = Random(doc["id"])
    others = [answer for answer in doc["choices"] if answer != doc["answer"]]
    chosen = [doc["answer"], *rng.sample(others, min(NUM_OPTIONS - 1, len(others)))]
    return rng.sample(chosen, len(chosen))


def lettered(doc: dict[str, Any]) -> str:
    """The question with its options, as LLaVA-1.5 was trained to be asked (A-OKVQA's prompt)."""
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options(doc), strict=False)]
    prompt = "Answer with the option's letter from the given choices directly."
    return "\n".join([doc["question"], *lines, prompt])


def letter(doc: dict[str, Any]) -> str:
    return ascii_uppercase[options(doc).index(doc["answer"])]


def score_choice(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for the letter of the answer, the answer, or both (`B. animal`)."""
    stated = LETTERED.fullmatch(results[0].strip())
    text = stated[2] if stated else results[0]
    right = (not stated or stated[1].upper() == letter(doc)) and (not text or is_correct(text, doc["answer"]))
    return {"exact_match": float(right and bool(results[0].strip()))}


def count(dataset: Any) -> Any:
    return english(dataset, "count")


def yesno(dataset: Any) -> Any:
    return english(dataset, "yesno")


def category(dataset: Any) -> Any:
    return english(dataset, "category")


def relation(dataset: Any) -> Any:
    return english(dataset, "relation")


def name(dataset: Any) -> Any:
    return english(dataset, "name")


def german(dataset: Any) -> Any:
    return only(dataset, lambda kind, language: language == "de")


def spanish(dataset: Any) -> Any:
    return only(dataset, lambda kind, language: language == "es")


def french(dataset: Any) -> Any:
    return only(dataset, lambda kind, language: language == "fr")


def english(dataset: Any, wanted: str) -> Any:
    """The English questions of one type."""
    return only(dataset, lambda kind, language: (kind, language) == (wanted, "en"))


def only(dataset: Any, wanted: Callable[[str, str], bool]) -> Any:
    """The questions whose type and language are wanted, in their order, each with its pool.

    A question's id begins with it: test-concepts-00012 is of `concepts`.
    """
    pairs = zip(dataset["type"], dataset["language"], strict=True)
    chosen = dataset.select([number for number, pair in enumerate(pairs) if wanted(*pair)])
    return chosen.add_column("pool", [row.split("-")[1] for row in chosen["id"]])
