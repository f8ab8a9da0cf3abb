"""Comparisons of LLaVA models with made-up numbers, and the answers behind them; shared by tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llm2clip_eval.comparison import (
    CandidateComparison,
    CategoryDifference,
    Comparison,
    MacroDifference,
    TaskDifference,
)
from llm2clip_eval.task_results import TaskRun

NUM_ITEMS = 40


def task_difference(task: str, difference: float = 1.5, **changes: Any) -> TaskDifference:
    """A task in which 61.25 became more by `difference`, with an interval of 2 points on both sides."""
    verdict = "better" if difference > 2 else "worse" if difference < -2 else "undecided"
    facts: dict[str, Any] = {
        "task": task,
        "metric": "exact_match",
        "judge": None,
        "scale": 100.0,
        "num_items": 1234,
        "num_clusters": 617,
        "baseline": 61.25,
        "candidate": 61.25 + difference,
        "difference": difference,
        "low": difference - 2,
        "high": difference + 2,
        "p": 0.0213,
        "test": "exact McNemar",
        "p_holm": 0.0639,
        "mde": 2.8,
        "wins": 71,
        "losses": 52,
        "ties": 1111,
        "margin": 1.0,
        "equivalence_p": 0.4,
        "verdict": verdict,
        "categories": (),
    }
    return TaskDifference(**{**facts, **changes})


def categories(*names: str) -> tuple[CategoryDifference, ...]:
    return tuple(CategoryDifference(name, 50 + place, 40.1, 43.3, 3.2, -1.7, 8.1) for place, name in enumerate(names))


def compared(*candidates: CandidateComparison, **changes: Any) -> Comparison:
    run = {
        "label": "CLIP",
        "name": "clip",
        "seed": 0,
        "model_fingerprint": "0123456789abcdef" * 4,
        "directory": "lmms-clip",
        "minutes": 3.25,
        "commit": "c" * 40,
        "machine": "a processor",
        "versions": {"torch": "2.12.1", "lmms-eval": "0.7.3"},
    }
    facts: dict[str, Any] = {
        "title": "Towers compared",
        "baseline": "clip",
        "baseline_label": "CLIP",
        "num_seeds": 1,
        "candidates": candidates,
        "confidence": 0.95,
        "num_resamples": 10_000,
        "single_seed": True,
        "recipe_differences": {candidate.name: (("tower", "clip", "llm2clip"),) for candidate in candidates},
        "provenance": (run,),
    }
    return Comparison(**{**facts, **changes})


MACRO = MacroDifference(3, 60.4, 62.7, 2.3, 0.6, 4.0, 0.0077)
TASKS = (
    task_difference("gqa", 2.4, p=0.0004, p_holm=0.0012, categories=categories("count", "colour")),
    task_difference("pope_adv", -3.1, metric="pope_f1_score", test="cluster bootstrap"),
    task_difference("textvqa_val", 0.7, test="sign-flip permutation"),
    task_difference(
        "mme", 31.0, metric="mme_perception_score", scale=1.0, baseline=1401.5, candidate=1432.5, mde=40.0
    ),
    task_difference("mmvet", 9.9, judge="llm", baseline=30.2, candidate=40.1),
)


def two_candidates() -> Comparison:
    llm2clip = CandidateComparison("llm2clip", "LLM2CLIP", TASKS, MACRO, 1)
    continued = CandidateComparison("continued", "CLIP, continued", tuple(reversed(TASKS)), MACRO, 1)
    return compared(llm2clip, continued)


def task_runs(
    directory: Path, comparison: Comparison, text: str = "", accuracies: Mapping[str, float] | None = None
) -> list[TaskRun]:
    """Answers to yes/no questions about coloured squares, right with a given probability."""
    rng = np.random.default_rng(0)
    names = [comparison.baseline, *(candidate.name for candidate in comparison.candidates)]
    (directory / "images").mkdir(parents=True, exist_ok=True)
    digests = [f"{number:032x}" for number in range(NUM_ITEMS)]
    for digest in digests:
        Image.new("RGB", (64, 48), tuple(rng.integers(0, 256, 3).tolist())).save(
            directory / "images" / f"{digest}.jpg"
        )
    runs = []
    for task in dict.fromkeys(task.task for candidate in comparison.candidates for task in candidate.tasks):
        for name in names:
            right = rng.random(NUM_ITEMS) < (accuracies or {}).get(name, 0.5)
            items = [
                {
                    "doc_id": number,
                    "item": f"{task} {number}",
                    "images": [digest],
                    "question": f"Question {number} of {task}? {text}",
                    "target": f"yes {text}",
                    "response": f"{'yes' if right[number] else 'no'} says {name} {text}",
                    "category": text or None,
                    "scores": {metric: float(right[number]) for metric in {t.metric for t in TASKS}},
                }
                for number, digest in enumerate(digests)
            ]
            for item in items:  # those that lmms-eval keeps as records
                score = item["scores"]["exact_match"]
                said = "yes" if score else "no"
                item["scores"]["pope_f1_score"] = {"prediction": said, "ground_truth": "yes", "score": score}
                item["scores"]["mme_perception_score"] = {
                    "category": "color",
                    "question_id": item["doc_id"] // 2,
                    "score": score,
                }
            identity = {"scorer": "5" * 64, "generation": {"do_sample": False}, "batch_size": 8}
            runs.append(TaskRun(task, name, 0, name, None, "exact_match", {}, identity, 1.0, items, directory))
    return runs
