"""Command `lmms`: run a suite of lmms-eval tasks for one model, each in a process of its own.

Reads any exported stock LLaVA and a suite (`configs/eval/suites`). Writes `tasks/<task>.json`, every item's response
and score with the digests by which models are compared, small copies of the pictures in `images/`, and, as they come,
`responses/<task>.jsonl`. A task that fails does not keep the others from running; the manifest is written when all are
done. Run again, finished tasks are kept and the others go on where they stopped.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2clip.cli import USER_ERRORS
from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, fingerprint
from llm2clip_eval.suites import SuiteTask, load_suite

logger = logging.getLogger(__name__)

TASKS = "tasks"
RESPONSES = "responses"
MESSAGE = 4000
"""Characters of what went wrong: a pipe that nobody reads yet holds no more than 64 kB."""
# Children are forked from a server that has imported lmms-eval once: 7 seconds less for each task.
PRELOAD = ["llm2clip_eval.lmms_task", "transformers.models.llava.processing_llava"]


@dataclass(kw_only=True)
class LmmsConfig(StageConfig):
    """Run lmms-eval tasks for one LLaVA model, with every response kept; one process per task."""

    arm: str
    """Name of the model in results and reports."""
    model: Path
    """Directory of a stock LlavaForConditionalGeneration with its processor, as llava-bridge export writes it."""
    suite: Path
    """YAML file that lists the tasks."""
    tasks: list[str] = field(default_factory=list)
    """Names of the suite's tasks to run; empty for all."""
    seed: int = 0
    """Training seed of the model, recorded in the results; greedy answers draw nothing."""
    limit: int | None = None
    """Documents per task; null for all."""
    data: dict[str, Path] = field(default_factory=dict)
    """Local copies of data by task name or pattern such as demo_*: a file, a saved dataset, a snapshot of the hub's
    repository, or a directory of files named after the split."""
    include: list[Path] = field(default_factory=lambda: [Path("eval/tasks")])
    """Directories with further task YAMLs; they come before lmms-eval's own tasks of the same name."""
    batch_size: int = 16
    """Questions answered at a time. Compare only models that were asked in equal batches."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights. Answers in float32 hardly depend on batches."""
    device: str | None = None
    """Such as cuda:1; null for the first GPU, or the CPU."""
    max_empty_fraction: float = 0.05
    """Share of empty responses in a task above which it fails: such a model is broken, not bad."""
    cache_dir: Path | None = None
    """Keep responses here, by model, instead of below output_dir: they outlive a change of settings."""

    def __post_init__(self) -> None:
        problems = [] if "/" not in self.arm else [f"arm: {self.arm!r} becomes a file name, so it cannot hold /"]
        try:
            names = [row.task for row in load_suite(self.suite, self.tasks)]
            problems += [
                f"data: {pattern!r} is no task of the suite; there are {', '.join(names)}"
                for pattern in self.data
                if not self.tasks and not fnmatch.filter(names, pattern)
            ]
        except (ValueError, OSError) as error:
            problems.append(f"suite: {error}")
        if self.batch_size < 1:
            problems.append(f"batch_size: {self.batch_size} is not positive")
        if self.limit is not None and self.limit < 1:
            problems.append(f"limit: {self.limit} is not positive; null takes all documents")
        if not 0 <= self.max_empty_fraction <= 1:
            problems.append(f"max_empty_fraction: {self.max_empty_fraction} is not between 0 and 1")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class TaskCall:
    """All that a child process is told."""

    task: SuiteTask
    arm: str
    seed: int
    model: Path
    model_fingerprint: str
    directory: Path
    """Run directory."""
    responses: Path
    """The file of responses to this task."""
    include: Sequence[Path]
    data: Path | None
    limit: int | None
    batch_size: int
    dtype: str
    device: str | None
    max_empty_fraction: float

    @property
    def file(self) -> Path:
        """What is written."""
        return self.directory / "tasks" / f"{self.task.task}.json"


def parse(argv: Sequence[str] | None = None) -> StageCall[LmmsConfig]:
    """Read the configuration of a command line."""
    return parse_stage(LmmsConfig, argv, prog="llm2clip-eval lmms")


def inputs(call: StageCall[LmmsConfig]) -> dict[str, str]:
    """Fingerprints of the model, the chosen part of the suite, our own task files and local data."""
    config = call.config
    rows = [asdict(row) for row in load_suite(config.suite, config.tasks)]
    found = {"model": fingerprint(config.model), "suite": _digest(rows)}
    for place, directory in enumerate(config.include):
        if not directory.is_dir():
            raise FileNotFoundError(f"include: {directory} does not exist; expected a directory of task YAMLs")
        # All of them: templates that YAMLs include have any name, mostly without .yaml.
        files = [file for file in directory.rglob("*") if file.is_file() and file.parent.name != "__pycache__"]
        digests = {file.relative_to(directory).as_posix(): fingerprint(file) for file in files}
        found[f"include.{place}"] = _digest(digests)
    for pattern, path in config.data.items():
        try:
            found[f"data.{pattern}"] = fingerprint(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data of {pattern}: {error}") from None
    return found


def run(call: StageCall[LmmsConfig]) -> None:
    """Run every task that is not done.

    Raises:
        RuntimeError: if tasks failed, naming them and why; the others are kept.
    """
    config = call.config
    fingerprints = inputs(call)
    with RunDir(call, stage="lmms", inputs=fingerprints) as run:
        if run.complete:
            logger.info("lmms: %s is complete", run.path)
            return
        suite = load_suite(config.suite, config.tasks)
        failed: dict[str, str] = {}
        for number, row in enumerate(suite, 1):
            name = f"[{number}/{len(suite)}] {config.arm}, {row.task}"
            file = run.path / TASKS / f"{row.task}.json"
            if file.is_file():
                logger.info("%s: done before", name)
            elif cause := run_in_child(task_call(config, row, fingerprints["model"])):
                failed[row.task] = cause
                logger.error("%s failed: %s", name, cause)
            else:
                logger.info("%s: %s", name, _headline(file))
        if failed:
            listed = "\n".join(f"  - {task}: {cause}" for task, cause in failed.items())
            raise RuntimeError(
                f"lmms: {len(failed)} of {len(suite)} tasks failed for {config.arm}; the others are kept, run the "
                f"same command again when this is mended:\n{listed}"
            )
        metrics = {row.task: _read(run.path / TASKS / f"{row.task}.json")["metrics"] for row in suite}
        run.finish(
            outputs=[TASKS],  # the pictures are named after their content
            arm=config.arm,
            seed=config.seed,
            model_fingerprint=fingerprints["model"],
            suite=config.suite.stem,
            metrics=metrics,
        )


def task_call(config: LmmsConfig, row: SuiteTask, model_fingerprint: str) -> TaskCall:
    """What a child is told about one task."""
    responses = config.output_dir / RESPONSES
    if config.cache_dir is not None:
        responses = config.cache_dir / model_fingerprint[:32]
    return TaskCall(
        task=row,
        arm=config.arm,
        seed=config.seed,
        model=config.model,
        model_fingerprint=model_fingerprint,
        directory=config.output_dir,
        responses=responses / f"{row.task}.jsonl",
        include=config.include,
        data=next((path for pattern, path in config.data.items() if fnmatch.fnmatch(row.task, pattern)), None),
        limit=config.limit,
        batch_size=config.batch_size,
        dtype=config.dtype,
        device=config.device,
        max_empty_fraction=config.max_empty_fraction,
    )


def run_in_child(call: TaskCall) -> str | None:
    """Run one task in a process of its own.

    Returns:
        What went wrong, or None.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # lmms-eval's bars, one per phase
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(call, sender))
    child.start()
    sender.close()
    child.join()
    try:
        return receiver.recv()
    except EOFError:  # it said nothing
        pass
    finally:
        receiver.close()
    if child.exitcode:
        return (
            f"its process ended with exit code {child.exitcode}{' (out of memory?)' if child.exitcode == -9 else ''}"
        )
    return None


def _child(call: TaskCall, sender: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    from llm2clip_eval.lmms_task import run_task

    try:
        run_task(call)
    except (Exception, SystemExit) as error:  # the parent tells of it
        if not isinstance(error, USER_ERRORS):
            logger.exception("%s, %s", call.arm, call.task.task)
        sender.send(f"{type(error).__name__}: {error}"[:MESSAGE])
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    """A parent that was killed cannot end its children, and one that goes on would stand in the way of the next."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _headline(file: Path) -> str:
    record = _read(file)
    score = (
        "for a server to score"
        if record["metric"] is None
        else f"{record['metric']} {record['metrics'][record['metric']]:.4f}"
    )
    return f"{score} ({record['num_items']} items, {record['seconds']:.0f} s)"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval lmms`."""
    run(parse(argv))
