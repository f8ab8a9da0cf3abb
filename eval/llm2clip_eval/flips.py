"""Items that only one of two models gets right, with their pictures: what a difference in score is made of."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from llm2clip_eval.comparison import CandidateComparison, Comparison
from llm2clip_eval.comparison_tables import printable
from llm2clip_eval.neighbours import data_uri
from llm2clip_eval.task_metrics import Item, items_with, measure
from llm2clip_eval.task_results import TaskRun, pair

IMAGE_PIXELS = 224
"""Longer edge of a picture in the report."""
MAX_IMAGES = 4
"""Pictures shown of one item."""
MAX_CHARACTERS = 1500
"""Of a question or answer; questions with OCR tokens can fill pages."""
DIGEST = re.compile(r"[0-9a-f]{32}")

Side = Literal["candidate", "baseline"]


@dataclass(frozen=True)
class Flip:
    """One item and what both models said."""

    only: Side
    """Who is right."""
    doc_id: int
    category: str
    question: str
    target: str
    baseline: str
    """Response."""
    candidate: str
    images: tuple[str, ...]
    """Data URIs."""
    num_hidden_images: int


@dataclass(frozen=True)
class TaskFlips:
    """The flipped items of one task, and those of them that are shown."""

    num_candidate: int
    """Items that only the candidate gets right."""
    num_baseline: int
    shown: tuple[Flip, ...]


def choose(
    comparison: Comparison, candidate: CandidateComparison, runs: Sequence[TaskRun], *, num_per_task: int, seed: int
) -> list[TaskFlips]:
    """Draw flipped items of every task, as evenly from both sides as they come, for the first seed of both models.

    An item is right when its score is at least half of what a right answer gets.

    Args:
        comparison: names the baseline.
        candidate: one entry is returned for each of its tasks.
        runs: results of every model, task and seed.
        num_per_task: items shown of each task at most.
        seed: of the draw; a task's draw does not depend on other tasks.

    Raises:
        FileNotFoundError: if a run lacks the picture of an item.
        ValueError: if a picture's name is not a digest.
    """
    found = []
    for task in candidate.tasks:
        theirs, ours = (_first_run(runs, name, task.task) for name in (comparison.baseline, candidate.name))
        sides = _flipped(task.metric, theirs, ours)
        name = f"{candidate.name}/{task.task}/{task.metric}"
        rng = np.random.default_rng([seed, zlib.crc32(name.encode(errors="surrogatepass"))])
        counts = _share(num_per_task, len(sides["candidate"]), len(sides["baseline"]))
        shown = []
        for (only, pairs), count in zip(sides.items(), counts, strict=True):
            for row in sorted(rng.permutation(len(pairs))[:count].tolist()):
                was, now = pairs[row]
                shown.append(_flip(only, was, now, theirs.images_dir))
        found.append(TaskFlips(len(sides["candidate"]), len(sides["baseline"]), tuple(shown)))
    return found


def _first_run(runs: Sequence[TaskRun], arm: str, task: str) -> TaskRun:
    return min((run for run in runs if run.arm == arm and run.task == task), key=lambda run: run.seed)


def _flipped(metric: str, baseline: TaskRun, candidate: TaskRun) -> dict[Side, list[tuple[Item, Item]]]:
    """Pairs of records, the baseline's first, in which only one is right, by who that is."""
    both = [items_with(run.items, metric) for run in (baseline, pair(baseline, candidate))]
    theirs, ours = (measure(items, metric).scores >= 0.5 for items in both)
    pairs = list(zip(*both, strict=True))
    return {
        "candidate": [pairs[row] for row in np.flatnonzero(ours & ~theirs)],
        "baseline": [pairs[row] for row in np.flatnonzero(theirs & ~ours)],
    }


def _share(total: int, first: int, second: int) -> tuple[int, int]:
    """How many to take of each side: half of `total`, more where the other side has fewer."""
    of_first = min(first, max((total + 1) // 2, total - second))
    return of_first, min(second, total - of_first)


def _flip(only: Side, baseline: Item, candidate: Item, images_dir: Path) -> Flip:
    digests = baseline["images"]
    return Flip(
        only=only,
        doc_id=candidate["doc_id"],
        category=_text(candidate["category"] or ""),
        question=_text(candidate["question"]),
        target=_text(candidate["target"]),
        baseline=_text(baseline["response"]),
        candidate=_text(candidate["response"]),
        images=tuple(_picture(images_dir, digest) for digest in digests[:MAX_IMAGES]),
        num_hidden_images=max(0, len(digests) - MAX_IMAGES),
    )


def _text(text: object) -> str:
    found = printable(str(text)).strip()
    return found if len(found) <= MAX_CHARACTERS else found[:MAX_CHARACTERS].rstrip() + " […]"


def _picture(images_dir: Path, digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise ValueError(
            f"picture {digest!r} in {images_dir.parent}: expected 32 hexadecimal digits; run llm2clip-eval lmms again"
        )
    path = images_dir / f"{digest}.jpg"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run llm2clip-eval lmms again")
    with Image.open(path) as image:
        return data_uri(image.convert("RGB"), IMAGE_PIXELS)
