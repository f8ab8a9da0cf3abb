"""The run directory: the only thing that passes between stages.

A stage writes `config.yaml`, `environment.json` and its outputs, and last of all `manifest.json`, by rename: a
directory is complete exactly when its manifest is there. The manifest carries content digests, by which the next stage
knows what it reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from llm2clip import __version__
from llm2clip.config import StageCall, leaves

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
IDENTITY = "identity.json"
DESCRIPTION = (IDENTITY, "config.yaml", "environment.json")
VOLATILE = {
    "output_dir",
    "overwrite",
    "cache_dir",
    "feature_cache",
    "training.dataloader_num_workers",
    "training.disable_tqdm",
    "training.report_to",
    "training.logging_dir",
}
"""Settings that do not change what a stage computes, so a run may be continued with others."""
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "pillow", "deepspeed")


class RunDir:
    """One stage's output directory: locked while it runs, resumable, complete once it has a manifest.

    ```python
    with RunDir(call, stage="export", inputs={"clip": fingerprint(clip_dir)}) as run:
        if not run.complete:
            ...  # write below run.path
            run.finish(outputs=["vision_tower"], num_parameters=123)
    ```

    Only the main process (`RANK` 0) locks and writes; the others see the same `complete`.

    Args:
        call: the parsed invocation; its resolved settings and `inputs` are the identity of the run.
        stage: name of the command, such as `train-clip`.
        inputs: fingerprint of everything that is read, by name.

    Raises:
        ValueError: if the directory is in use by another process, is not a run directory but holds files, or was begun
            with other settings or inputs and `overwrite` is off.
    """

    def __init__(self, call: StageCall, *, stage: str, inputs: Mapping[str, str]) -> None:
        self.path = call.config.output_dir
        self.stage = stage
        self.complete = False
        self._call = call
        self._identity = identity(call, stage=stage, inputs=inputs)
        self._lock: int | None = None

    def __enter__(self) -> RunDir:
        if not is_main_process():
            self.complete = is_complete(self.path, self._identity)
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _acquire_lock(self.path)
        try:
            self._claim()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        if exc_type is not None and self._lock is not None:
            self._unclaim()
        self._release()

    def finish(self, outputs: Iterable[str], **facts: Any) -> None:
        """Digest `outputs` (files or directories, relative to the run) and write the manifest: the run is complete.

        Keyword arguments are stored in the manifest under their names.
        """
        if not is_main_process():
            return
        digests: dict[str, str] = {}
        for output in outputs:
            for file in _files(self.path / output):
                digests[file.relative_to(self.path).as_posix()] = _file_digest(file)
        manifest = {
            "stage": self.stage,
            "version": __version__,
            "fingerprint": _digest(digests),
            "inputs": self._identity["inputs"],
            "settings": self._identity["settings"],
            "outputs": digests,
            **facts,
        }
        atomic_write(self.path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        self.complete = True
        logger.info("%s: complete, %s", self.stage, self.path)

    def _claim(self) -> None:
        """Decide between done, resume, fresh and refuse."""
        found = _read_json(self.path / IDENTITY)
        if found == self._identity:
            self.complete = (self.path / MANIFEST).is_file()
            if not self.complete:
                logger.info("%s: continuing in %s", self.stage, self.path)
                self._describe()
            return
        leftovers = [entry for entry in self.path.iterdir() if not entry.name.startswith(".")]
        if leftovers and not self._call.config.overwrite:
            raise ValueError(
                f"{self.path} was written by something else: {_difference(found, self._identity)}; "
                "choose another --output_dir, or pass --overwrite true to delete it"
            )
        if leftovers and found is None:
            raise ValueError(
                f"{self.path} holds files but is no run directory (no {IDENTITY}); it is not deleted even with "
                "--overwrite true: choose another --output_dir or empty it yourself"
            )
        # The manifest goes first and the identity last: killed in between, this is still a deletable, unfinished run.
        for entry in sorted(leftovers, key=lambda entry: (entry.name == IDENTITY, entry.name != MANIFEST)):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        atomic_write(self.path / IDENTITY, json.dumps(self._identity, indent=2) + "\n")
        self._describe()

    def _describe(self) -> None:
        atomic_write(self.path / "config.yaml", yaml.safe_dump(self._call.resolved, sort_keys=False))
        atomic_write(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")

    def _unclaim(self) -> None:
        """Leave nothing behind if the stage failed before it wrote anything, so that mending the cause is enough."""
        described = {self.path / name for name in DESCRIPTION}
        if {entry for entry in self.path.iterdir() if not entry.name.startswith(".")} <= described:
            for file in described:
                file.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def identity(call: StageCall, *, stage: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What a run is: stage, the settings that matter and the fingerprints of its inputs, in plain JSON types."""
    settings = {key: value for key, value in leaves(call.resolved) if key not in VOLATILE}
    return json.loads(json.dumps({"stage": stage, "inputs": dict(inputs), "settings": settings}, default=str))


def is_complete(path: Path, expected: Mapping[str, Any]) -> bool:
    """Whether `path` is a complete run of this identity."""
    return (path / MANIFEST).is_file() and _read_json(path / IDENTITY) == expected


def fingerprint(path: str | Path) -> str:
    """Content digest of a file or directory; of a complete run directory the one in its manifest.

    Raises:
        FileNotFoundError: if there is nothing at `path`, or an unfinished run.
    """
    path = Path(path)
    if (path / IDENTITY).is_file():
        return read_manifest(path)["fingerprint"]
    if path.is_file():
        return _file_digest(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    return _digest({file.relative_to(path).as_posix(): _file_digest(file) for file in _files(path)})


def model_fingerprint(name: str | Path) -> str:
    """Fingerprint of a model directory; a hub id stands for itself.

    Raises:
        FileNotFoundError: for what can only be a path, and is not there.
    """
    if Path(name).exists():
        return fingerprint(name)
    if str(name).count("/") > 1 or str(name).startswith((".", "/")):
        raise FileNotFoundError(f"{name} does not exist; run the stage that makes it first, or give a hub id")
    return str(name)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a complete run directory.

    Raises:
        FileNotFoundError: if the directory is missing or not complete; names the command to run.
    """
    manifest = _read_json(Path(path) / MANIFEST)
    if manifest is None:
        begun = _read_json(Path(path) / IDENTITY)
        stage = begun["stage"] if begun else "the stage that writes it"
        state = "is not complete (no manifest.json)" if begun else "is no run directory"
        raise FileNotFoundError(f"{path} {state}; run {stage} first, a killed run continues where it stopped")
    return manifest


def is_main_process() -> bool:
    """True in the process that writes: rank 0 under accelerate, torchrun and deepspeed, and in a plain process."""
    return int(os.environ.get("RANK", "0")) == 0


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it is synced and renamed to `path` if the block succeeds, else removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions, machine and git commit, for environment.json."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "llm2clip": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "accelerator": _accelerator(),
        "git_commit": _git_commit(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _git_commit() -> str | None:
    root = Path(__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or installed without a checkout
        return None


def _acquire_lock(path: Path) -> int:
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{path} is in use by another process; wait for it or choose another --output_dir") from None
    return descriptor


def _difference(found: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> str:
    if found is None:
        return "it holds files of unknown origin"
    if found["stage"] != expected["stage"]:
        return f"stage {found['stage']}, not {expected['stage']}"
    differing = []
    for part in ("inputs", "settings"):
        for key in sorted(found[part].keys() | expected[part].keys()):
            old, new = found[part].get(key), expected[part].get(key)
            if old != new:
                differing.append(f"{part}: {key} was {_short(old)}, is now {_short(new)}")
    return "; ".join(differing)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _files(path: Path) -> list[Path]:
    """All files below `path` (or itself), sorted; hidden files and lock files do not count."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(digests: Mapping[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
