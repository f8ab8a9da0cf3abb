"""What models answered in lmms-eval tasks: runs of `llm2clip-eval lmms` are read, checked and paired.

Two models are compared item by item, so they must have been asked the very same: items are paired by the digest of
question, target and pixels, and settings that bear on the score must be equal.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llm2clip.run_dir import read_manifest
from llm2clip_eval.comparison import Judge
from llm2clip_eval.task_metrics import Item, Measured, measure

STAGE = "lmms"
REQUIRED = {
    "task",
    "seed",
    "model_fingerprint",
    "judge",
    "metric",
    "metrics",
    "identity",
    "seconds",
    "num_items",
    "items",
}


@dataclass(frozen=True)
class TaskRun:
    """One trained model's answers in one task."""

    task: str
    arm: str
    seed: int
    model_fingerprint: str
    judge: Judge | None
    metric: str | None
    """The headline metric; None if only a server can score the answers."""
    metrics: Mapping[str, float]
    """As lmms-eval's aggregations returned them."""
    identity: Mapping[str, Any]
    """What must be equal for scores to be comparable."""
    seconds: float
    items: Sequence[Item]
    directory: Path
    """Run directory of `llm2clip-eval lmms`."""

    @property
    def images_dir(self) -> Path:
        """Thumbnails of the images, by digest."""
        return self.directory / "images"

    def measured(self, metric: str) -> Measured:
        """The items' part in a metric.

        Raises:
            ValueError: if our sums do not come to what lmms-eval printed.
        """
        try:
            found = measure(self.items, metric)
        except ValueError as error:
            raise ValueError(f"{self.directory}: task {self.task}: {error}") from None
        printed = self.metrics.get(metric)
        if printed is None or not math.isclose(found.value, printed, rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(
                f"{self.directory}: task {self.task}: the items come to a {metric} of {found.value}, lmms-eval said "
                f"{printed}; this metric is not what task_metrics.py takes it for, or the file was changed"
            )
        return found


@dataclass(frozen=True)
class ArmRuns:
    """All answers of one arm."""

    name: str
    label: str
    tasks: Mapping[str, Sequence[TaskRun]]
    """For each task one entry per trained model, in the same order everywhere."""

    @property
    def models(self) -> list[str]:
        """Fingerprints of the trained models."""
        return [run.model_fingerprint for run in next(iter(self.tasks.values()))]


def load_task(file: Path, directory: Path, arm: str) -> TaskRun:
    """Read and check `tasks/<task>.json`, as a result of the arm of that name.

    Raises:
        ValueError: if it is not what `llm2clip-eval lmms` writes, or not whole.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); delete it and run llm2clip-eval lmms again") from None
    missing = REQUIRED - record.keys() if isinstance(record, Mapping) else REQUIRED
    if missing:
        raise ValueError(f"{file} is no result of llm2clip-eval lmms: it has no {', '.join(sorted(missing))}")
    items = record["items"]
    ids = Counter(item["doc_id"] for item in items)
    problem = None
    if not items or len(items) != record["num_items"]:
        problem = f"holds {len(items)} items, expected {record['num_items']}"
    elif len(ids) != len(items):
        problem = f"document {ids.most_common(1)[0][0]} is in it more than once"
    elif empty := [item["doc_id"] for item in items if not item["scores"]]:
        problem = f"document {empty[0]} has no scores"
    elif not _is_finite(record["metrics"]) or not all(_is_finite(item["scores"]) for item in items):
        problem = "a score is not finite"
    if problem:
        raise ValueError(f"{file} is not whole: {problem}; delete it and run llm2clip-eval lmms again")
    return TaskRun(
        task=record["task"],
        arm=arm,
        seed=record["seed"],
        model_fingerprint=record["model_fingerprint"],
        judge=record["judge"],
        metric=record["metric"],
        metrics=record["metrics"],
        identity=record["identity"],
        seconds=float(record["seconds"]),
        items=sorted(items, key=lambda item: item["doc_id"]),
        directory=directory,
    )


def load_arm(name: str, label: str, directories: Sequence[Path]) -> ArmRuns:
    """Read the results of one arm.

    Args:
        name: key of the arm in the configuration.
        label: what readers see.
        directories: complete runs of `llm2clip-eval lmms`; those of one model may hold different tasks, further
            models are further training seeds.

    Raises:
        FileNotFoundError: if a directory is not a complete run.
        ValueError: if it is a run of something else, a model has a task twice, or models differ in their tasks.
    """
    found: dict[str, dict[str, TaskRun]] = {}
    for directory in directories:
        manifest = read_manifest(directory)
        if manifest["stage"] != STAGE:
            raise ValueError(f"{name}: {directory} was written by {manifest['stage']}, expected {STAGE}")
        files = sorted((directory / "tasks").glob("*.json"))
        if not files:
            raise ValueError(f"{name}: {directory} holds no tasks; run llm2clip-eval lmms again")
        for file in files:
            run = load_task(file, directory, name)
            if other := found.setdefault(run.task, {}).get(run.model_fingerprint):
                raise ValueError(
                    f"{name}: {directory} and {other.directory} are answers of the very same model to {run.task}; "
                    "give one per trained model"
                )
            found[run.task][run.model_fingerprint] = run
    models = list(dict.fromkeys(model for runs in found.values() for model in runs))
    for task, runs in found.items():
        if len(runs) != len(models):
            there = ", ".join(str(run.directory) for run in runs.values())
            raise ValueError(
                f"{name}: task {task} was asked of {len(runs)} of {len(models)} models ({there}); run llm2clip-eval "
                "lmms with the same suite for every seed, or choose tasks"
            )
    return ArmRuns(name, label, {task: [runs[model] for model in models] for task, runs in sorted(found.items())})


def align(arms: Sequence[ArmRuns], tasks: Sequence[str], allow_differences: Sequence[str] = ()) -> list[ArmRuns]:
    """Bring all arms' items into one order, or refuse.

    Args:
        arms: the first one sets the order.
        tasks: names or shell patterns of those that are wanted; empty: all.
        allow_differences: see `check_same_settings`.

    Raises:
        ValueError: if an arm lacks a task, or was asked otherwise.
    """
    every = list(dict.fromkeys(task for arm in arms for task in arm.tasks))
    for pattern in tasks:
        if not any(fnmatch(task, pattern) for task in every):
            raise ValueError(f"tasks: {pattern!r} matches none of {', '.join(every)}")
    wanted = [task for task in every if not tasks or any(fnmatch(task, pattern) for pattern in tasks)]
    for task in wanted:
        if without := [arm.name for arm in arms if task not in arm.tasks]:
            raise ValueError(
                f"task {task} was not asked of {', '.join(without)}; run llm2clip-eval lmms with the same suite for "
                "every model, or choose tasks"
            )
        check_same_settings([run for arm in arms for run in arm.tasks[task]], allow_differences)
    return [
        replace(arm, tasks={task: [pair(arms[0].tasks[task][0], run) for run in arm.tasks[task]] for task in wanted})
        for arm in arms
    ]


def check_same_settings(runs: Sequence[TaskRun], allow_differences: Sequence[str] = ()) -> None:
    """Refuse results of one task that were not made in the same way.

    Args:
        runs: all models' results of the task.
        allow_differences: keys of `identity` that may differ.

    Raises:
        ValueError: naming the models and what differs.
    """
    first = runs[0]
    for run in runs[1:]:
        for part in ("metric", "judge"):
            if getattr(run, part) != getattr(first, part):
                raise ValueError(
                    f"task {first.task}: {part} is {getattr(first, part)} in {first.directory} and "
                    f"{getattr(run, part)} in {run.directory}; run llm2clip-eval lmms again for both"
                )
        differing = [
            key
            for key in sorted(first.identity.keys() | run.identity.keys())
            if first.identity.get(key) != run.identity.get(key) and key not in allow_differences
        ]
        if differing:
            listed = "; ".join(f"{key}: {_short(first, key)} and {_short(run, key)}" for key in differing)
            raise ValueError(
                f"task {first.task}: {first.directory} and {run.directory} were not made in the same way ({listed}). "
                "Run llm2clip-eval lmms again for both with the same settings, or say "
                f'--allow_differences "[{", ".join(differing)}]" if the scores are comparable nevertheless'
            )


def pair(first: TaskRun, other: TaskRun) -> TaskRun:
    """`other` with its items in the order of those of `first`, to which they are equal by digest.

    An item that is in a task several times is paired with its like in order.

    Raises:
        ValueError: if one has an item that the other has not; names one.
    """
    expected, found = (Counter(item["item"] for item in run.items) for run in (first, other))
    if expected != found:
        only = {"first": expected - found, "other": found - expected}
        run, digest = next(
            (run, next(iter(only[key]))) for key, run in (("first", first), ("other", other)) if only[key]
        )
        question = next(item["question"] for item in run.items if item["item"] == digest)
        raise ValueError(
            f"task {first.task}: {first.directory} and {other.directory} have not the same items: "
            f"{only['first'].total()} are only in the one, {only['other'].total()} only in the other, such as "
            f"{question[:80]!r}. Run llm2clip-eval lmms again for both on the same data"
        )
    waiting: dict[str, list[Item]] = {}
    for item in reversed(other.items):
        waiting.setdefault(item["item"], []).append(item)
    return replace(other, items=[waiting[item["item"]].pop() for item in first.items])


def labels_of(items: Sequence[Item], measured: Measured) -> list[list[tuple[str, Any]]]:
    """What ties each item to others: its images, and the group it is scored in."""
    return [
        [*(("image", image) for image in item["images"]), ("group", int(group))]
        for item, group in zip(items, measured.groups, strict=True)
    ]


def _short(run: TaskRun, key: str) -> str:
    text = str(run.identity.get(key, "nothing"))
    return text[:12] if len(text) == 64 else text


def _is_finite(values: Mapping[str, Any]) -> bool:
    """Whether the numbers among them are; records that lmms-eval keeps may hold a NaN that is no score."""
    return all(not isinstance(value, float) or math.isfinite(value) for value in values.values())
