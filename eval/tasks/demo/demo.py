"""Questions of the demo's held-out parquet files as lmms-eval tasks: which of them a task asks, and when one is right.

The files are those of `llava-bridge data questions`; `llm2clip_eval.questions` says what is in them.
"""
# ruff: noqa: INP001

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm2clip_eval.questions import is_correct


def image(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if all of the response is the expected answer, as `llm2clip_eval.questions.normalized` has it."""
    return {"exact_match": float(is_correct(results[0], doc["answer"]))}


def everything(dataset: Any) -> Any:
    return with_pool(dataset)


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
    """The questions whose type and language are wanted, in their order."""
    pairs = zip(dataset["type"], dataset["language"], strict=True)
    return with_pool(dataset.select([number for number, pair in enumerate(pairs) if wanted(*pair)]))


def with_pool(dataset: Any) -> Any:
    """Name the pool of every question, which its id begins with: test-concepts-00012 is of `concepts`."""
    return dataset.add_column("pool", [row.split("-")[1] for row in dataset["id"]])
