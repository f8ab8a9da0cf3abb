"""Suites: which lmms-eval tasks belong together, and what is told of each.

A suite is a YAML file with `description` and `tasks`, a list of

    task       lmms-eval's name, or that of a task of our own (eval/tasks)
    metric     the headline metric, as lmms-eval calls it; none for tasks that only a server can score
    judge      llm or server, for tasks that lmms-eval does not score by itself (optional)
    category   field of the documents by which differences are broken down (optional)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

JUDGES = (None, "llm", "server")


@dataclass(frozen=True)
class SuiteTask:
    """One row of a suite."""

    task: str
    metric: str | None = None
    judge: str | None = None
    category: str | None = None

    def __post_init__(self) -> None:
        if self.judge not in JUDGES:
            raise ValueError(f"{self.task}: judge is {self.judge!r}, expected llm, server or nothing")
        if (self.metric is None) != (self.judge == "server"):
            raise ValueError(f"{self.task}: every task has a metric, but those with judge: server")
        if "/" in self.task:
            raise ValueError(f"{self.task}: becomes a file name, so it cannot hold /")


def load_suite(path: Path, tasks: Sequence[str] = ()) -> list[SuiteTask]:
    """Read a suite.

    Args:
        path: its YAML file.
        tasks: names of those to keep, in the suite's order; empty for all.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no suite, or lacks some of `tasks`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; suites are in configs/eval/suites")
    content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} is no suite: expected a mapping with a list of tasks")
    known = {field.name for field in fields(SuiteTask)}
    suite = []
    for row in rows:
        if not isinstance(row, dict) or "task" not in row or row.keys() - known:
            raise ValueError(f"{path}: expected a task with {', '.join(sorted(known))}, got {row!r}")
        try:
            suite.append(SuiteTask(**row))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    names = [row.task for row in suite]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: {', '.join(sorted(repeated))} is there more than once")
    if unknown := set(tasks) - set(names):
        raise ValueError(f"{path} has no task {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [row for row in suite if not tasks or row.task in tasks]
