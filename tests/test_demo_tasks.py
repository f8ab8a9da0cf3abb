"""The demo's lmms-eval tasks that ask in another way than their files, or for a part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from question_files import question, write_questions

from llm2clip_eval import lmms_tasks

DEMO_TASKS = Path(__file__).parents[1] / "eval" / "tasks" / "demo"
KINDS = ("animal", "boat", "fruit", "plant", "tool", "vehicle")


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("questions")
    for pool in ("seen", "concepts", "compositions"):
        rows = [
            question(
                number,
                id=f"test-{pool}-{number:05d}",
                question="What kind of thing is in the center?",
                answer=KINDS[number % 6],
                type="category",
                choices=list(KINDS),
            )
            for number in range(24)
        ]
        write_questions(directory / f"{pool}.parquet", [*rows, question(24, id=f"test-{pool}-00024")])
    kinds = ["yesno", "category", "yesno", "category"]
    rows = [question(number, id=f"test-easy_vqa-{number}", type=kind) for number, kind in enumerate(kinds)]
    write_questions(directory / "easy_vqa.parquet", rows)
    return directory


def load(name: str, questions: Path) -> tuple[Any, list[dict[str, Any]]]:
    task = lmms_tasks.load_task(name, [DEMO_TASKS], questions)
    return task, list(task.test_docs())


def test_choices_are_lettered_and_the_answer_is_among_them(questions):
    task, docs = load("demo_choice", questions)
    assert [doc["id"] for doc in docs] == [doc["id"] for doc in load("demo_category", questions)[1]]
    letters = []
    for doc in docs:
        asked, *lines, prompt = task.doc_to_text(doc).split("\n")
        assert asked == doc["question"]
        assert prompt == "Answer with the option's letter from the given choices directly."
        shown = dict(line.split(". ") for line in lines)
        assert list(shown) == ["A", "B", "C", "D"] and len(set(shown.values())) == 4 <= len(KINDS)
        assert shown[task.doc_to_target(doc)] == doc["answer"]
        letters.append(task.doc_to_target(doc))
    # No letter is a good guess: 18 of 72 each, give or take.
    assert set(letters) == set("ABCD") and max(letters.count(letter) for letter in "ABCD") < 36
    assert letters == [task.doc_to_target(doc) for doc in load("demo_choice", questions)[1]]


def test_a_choice_is_right_by_its_letter_or_its_text(questions):
    task, docs = load("demo_choice", questions)
    doc = docs[0]
    right = task.doc_to_target(doc)
    wrong = "ABCD"[("ABCD".index(right) + 1) % 4]
    for response in (
        right,
        right.lower(),
        f"{right}.",
        f"({right})",
        f"{right}. {doc['answer']}",
        doc["answer"],
        f"a {doc['answer']}",
    ):
        assert task.process_results(doc, [response]) == {"exact_match": 1.0}, response
    for response in (
        wrong,
        "",
        f"{right}{wrong}",
        f"{wrong}. {doc['answer']}",
        "boat" if doc["answer"] != "boat" else "tool",
    ):
        assert task.process_results(doc, [response]) == {"exact_match": 0.0}, response


def test_attributes_and_yes_no_questions_of_easy_vqa_are_apart(questions):
    attributes, yesno = (load(name, questions)[1] for name in ("demo_attribute", "demo_easy_vqa"))
    assert [doc["id"] for doc in attributes] == ["test-easy_vqa-1", "test-easy_vqa-3"]
    assert [doc["id"] for doc in yesno] == ["test-easy_vqa-0", "test-easy_vqa-2"]
