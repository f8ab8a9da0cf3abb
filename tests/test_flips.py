"""Items that one model answers rightly and the other does not: which are shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from comparison_data import TASKS, task_runs, two_candidates

from llm2clip_eval import flips
from llm2clip_eval.comparison import Comparison


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return two_candidates()


def test_flipped_items_are_those_that_one_side_gets_right(comparison, tmp_path):
    runs = task_runs(tmp_path / "run", comparison, accuracies={"clip": 0.2, "llm2clip": 0.8})
    llm2clip = comparison.candidates[0]
    found = flips.choose(comparison, llm2clip, runs, num_per_task=6, seed=0)
    assert len(found) == len(TASKS)
    for task, of_task in zip(TASKS, found, strict=True):
        theirs, ours = (
            [run for run in runs if (run.arm, run.task) == (arm, task.task)][0].items for arm in ("clip", "llm2clip")
        )
        right = np.array([[item["scores"]["exact_match"] for item in items] for items in (theirs, ours)])
        assert of_task.num_candidate == ((right[1] == 1) & (right[0] == 0)).sum() > of_task.num_baseline
        assert len(of_task.shown) == 6 and len({flip.doc_id for flip in of_task.shown}) == 6
        for flip in of_task.shown:
            assert flip.candidate.startswith("yes" if flip.only == "candidate" else "no")
            assert flip.baseline.startswith("no" if flip.only == "candidate" else "yes")
    assert flips.choose(comparison, llm2clip, runs, num_per_task=6, seed=0) == found
    assert flips.choose(comparison, llm2clip, list(reversed(runs)), num_per_task=6, seed=0) == found
    assert flips.choose(comparison, llm2clip, runs, num_per_task=6, seed=1) != found


def test_items_in_another_order_are_paired_by_their_digest(comparison, tmp_path):
    runs = task_runs(tmp_path / "run", comparison)
    shuffled = [replace(run, items=run.items[::-1]) if run.arm == "llm2clip" else run for run in runs]
    expected, found = (
        flips.choose(comparison, comparison.candidates[0], of, num_per_task=100, seed=0) for of in (runs, shuffled)
    )
    assert expected == found


@pytest.mark.parametrize(
    ("total", "sides", "shares"),
    [
        (6, (9, 9), (3, 3)),
        (6, (9, 1), (5, 1)),
        (6, (1, 9), (1, 5)),
        (6, (2, 2), (2, 2)),
        (5, (9, 9), (3, 2)),
        (6, (0, 0), (0, 0)),
        (0, (9, 9), (0, 0)),
    ],
)
def test_both_sides_are_shown_as_evenly_as_they_come(total, sides, shares):
    assert flips._share(total, *sides) == shares
