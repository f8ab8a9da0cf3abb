"""lmms-eval's tasks by name, on local copies of their data if there are any; and digests of what defines them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lmms_eval.tasks
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.utils import load_yaml_config
from tenacity import RetryError

from llm2clip_eval.lmms_plugin import MODEL_ID
from llm2clip_eval.response_store import digest

DATA = ("dataset_path", "dataset_name", "dataset_kwargs", "process_docs")
"""Where data come from: no part of what a task is, for the data have digests of their own."""
BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
FETCH_IMAGES = {"gqa_process_docs"}
"""`process_docs` that take images from the hub; not for local data that hold them."""
OWN_CODE = ("lmms_eval", "llm2clip_eval")


def load_task(name: str, include: Sequence[Path], data: Path | None = None) -> ConfigurableMessagesTask:
    """A task with its documents.

    Args:
        name: of a single task, no group.
        include: directories with task YAMLs, which come before lmms-eval's own.
        data: local copy of its data, as `with_local_data` takes it.

    Raises:
        FileNotFoundError: if the data are not there.
        ValueError: if there is no such task, or it is a group.
    """
    config = task_config(name, include)
    if data is not None:
        config = with_local_data(config, data)
    # Where a task states no stop string lmms-eval fills in the blank line of few-shot prompts. Its own LLaVA models
    # heed none; ours would end MM-Vet's long answers at the first paragraph.
    config["generation_kwargs"] = {"until": [], **(config.get("generation_kwargs") or {})}
    try:
        return ConfigurableMessagesTask(config=config, model_name=MODEL_ID)
    except RetryError as error:  # lmms-eval tries five times; what went wrong is inside
        cause = error.last_attempt.exception()
        raise FileNotFoundError(f"its data cannot be loaded: {type(cause).__name__}: {cause}") from cause


def task_config(name: str, include: Sequence[Path]) -> dict[str, Any]:
    """A task's YAML with everything that it includes."""
    found: Mapping[str, Any] = {}
    for with_defaults in (False, True):  # lmms-eval's own 1,700 take seconds to go through
        if found := _index(tuple(map(str, include)), with_defaults).get(name, {}):
            break
    if not found:
        raise ValueError(f"lmms-eval has no task {name}, and there is none in {', '.join(map(str, include))}")
    if found["type"] != "task":
        raise ValueError(f"{name} is a {found['type']} of tasks; name its tasks one by one")
    return load_yaml_config(found["yaml_path"], mode="full")


@cache
def _index(include: tuple[str, ...], with_defaults: bool) -> Mapping[str, Mapping[str, Any]]:
    return lmms_eval.tasks.TaskManager(include_path=list(include), include_defaults=with_defaults).task_index


def with_local_data(config: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """A task's configuration, reading a local copy instead of the hub.

    Args:
        config: of the task.
        data: what stands for the task's data set. A file (parquet, json, jsonl, csv or arrow); a directory written by
            `DatasetDict.save_to_disk`; a snapshot of the hub's repository; a directory of files named after the split,
            such as test.parquet or test-0.parquet, below a directory named after the configuration if there is one.
            For a task that names files, the directory that holds them.

    Raises:
        FileNotFoundError: if there is nothing at `data`.
        ValueError: if it is none of these, or files of the split are in several directories.
    """
    if not data.exists():
        raise FileNotFoundError(f"{data} does not exist; expected a local copy of the data")
    split = config.get("test_split") or config.get("validation_split")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if data.is_file():
        if data.suffix not in BUILDERS:
            raise ValueError(f"{data}: expected a file of kind {', '.join(BUILDERS)}, or a directory")
        source = {"dataset_path": BUILDERS[data.suffix], "dataset_kwargs": {"data_files": {split: str(data)}}}
    elif files is not None:
        source = {"dataset_path": config["dataset_path"], "dataset_kwargs": {"data_files": _moved(files, data)}}
    elif (data / "dataset_dict.json").is_file():
        source = {"dataset_path": str(data), "dataset_kwargs": {"load_from_disk": True}}
    elif (data / "README.md").is_file():  # as on the hub: its header names configurations
        source = {"dataset_path": str(data), "dataset_name": config.get("dataset_name"), "dataset_kwargs": {}}
    else:
        source = _split_files(data, str(split), config.get("dataset_name"))
    local = {**config, "dataset_name": None, **source}
    process = config.get("process_docs")
    if process is not None and process.__name__ in FETCH_IMAGES and _has_images(local, str(split)):
        local["process_docs"] = None
    return local


def describe(task: ConfigurableMessagesTask) -> dict[str, str]:
    """Digests of a task's configuration, without where its data come from, and of the code that scores it."""
    config = {name: value for name, value in vars(task.config).items() if name not in DATA and value is not None}
    functions = [task.config.process_results, *task.aggregation().values()]
    return {
        "task_config": digest(_named(config)),
        "scorer": digest(sorted({_source_digest(file) for function in functions for file in _files_of(function)})),
    }


def _moved(files: Any, directory: Path) -> Any:
    if isinstance(files, Mapping):
        return {name: _moved(value, directory) for name, value in files.items()}
    if isinstance(files, list):
        return [_moved(value, directory) for value in files]
    file = directory / Path(files).name
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; the task reads it")
    return str(file)


def _split_files(data: Path, split: str, name: str | None) -> dict[str, Any]:
    if name is not None and (data / name).is_dir():
        data = data / name
    for suffix, builder in BUILDERS.items():
        # Not "test*", which takes testdev-*.
        if files := sorted(file for end in ("", "-*") for file in data.rglob(f"{split}{end}{suffix}")):
            if len(directories := sorted({str(file.parent) for file in files})) > 1:
                raise ValueError(
                    f"{data} holds data of split {split} in several directories, {', '.join(directories)}; name "
                    "the one that is meant"
                )
            return {"dataset_path": builder, "dataset_kwargs": {"data_files": {split: list(map(str, files))}}}
    raise ValueError(
        f"{data} holds no data of split {split}; expected files such as {split}.parquet, or a saved dataset"
    )


def _has_images(config: Mapping[str, Any], split: str) -> bool:
    import datasets

    kwargs = dict(config["dataset_kwargs"])
    if kwargs.pop("load_from_disk", False):
        found: Any = datasets.load_from_disk(config["dataset_path"])[split]
    else:
        found = datasets.load_dataset(config["dataset_path"], config["dataset_name"], split=split, **kwargs)
    return "image" in found.features


def _named(value: Any) -> Any:
    """A configuration in JSON types: functions by name, without the addresses that lmms-eval prints."""
    if isinstance(value, Mapping):
        return {str(key): _named(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_named(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else value.__qualname__


def _files_of(function: Callable[..., Any] | None) -> set[Path]:
    """Where a function is written, and what it uses of this package and lmms-eval beside; nothing for no function."""
    if function is None:
        return set()
    own = inspect.getsourcefile(function)
    around = inspect.unwrap(function).__globals__.values()
    used = [value if inspect.isfunction(value) or inspect.isclass(value) else type(value) for value in around]
    ours = [value for value in used if str(value.__module__).partition(".")[0] in OWN_CODE]
    return {Path(file) for file in (own, *map(inspect.getsourcefile, ours)) if file}


def _source_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
