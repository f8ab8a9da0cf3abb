"""Run directories: complete means a manifest, nothing good is overwritten, one process at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from llm2clip import run_dir
from llm2clip.config import StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_path, fingerprint, read_manifest


@dataclass(kw_only=True)
class Config(StageConfig):
    """A stage."""

    size: int = 1
    """A setting that matters."""


def open_run(path, *argv: str, inputs=None) -> RunDir:
    call = parse_stage(Config, ["--output_dir", str(path), *argv], prog="stage")
    return RunDir(call, stage="stage", inputs=inputs or {"data": "d1"})


def complete(path, *argv: str, content: str = "x", inputs=None) -> None:
    with open_run(path, *argv, inputs=inputs) as run:
        (run.path / "out").mkdir(exist_ok=True)
        (run.path / "out" / "file").write_text(content)
        run.finish(["out"], answer=42)


def test_complete_run_is_recognised_and_described(tmp_path):
    complete(tmp_path)
    with open_run(tmp_path) as run:
        assert run.complete
    manifest = read_manifest(tmp_path)
    assert manifest["answer"] == 42
    assert manifest["inputs"] == {"data": "d1"}
    assert list(manifest["outputs"]) == ["out/file"]
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"]
    assert (tmp_path / "config.yaml").read_text().startswith("output_dir")


def test_fingerprint_is_the_content(tmp_path):
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        complete(tmp_path / name, content=content)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") != fingerprint(tmp_path / "c")
    assert fingerprint(tmp_path / "a" / "out" / "file") == fingerprint(tmp_path / "b" / "out" / "file")


def test_unfinished_run_continues(tmp_path):
    with open_run(tmp_path) as run:
        (run.path / "half").write_text("1")
    with open_run(tmp_path) as run:
        assert not run.complete
        assert (run.path / "half").exists()


def test_failing_before_anything_is_written_leaves_nothing_to_overwrite(tmp_path):
    with pytest.raises(ValueError, match="too small"), open_run(tmp_path):
        raise ValueError("too small")
    complete(tmp_path, "--size", "2")


def test_failing_later_keeps_what_was_written(tmp_path):
    with pytest.raises(RuntimeError), open_run(tmp_path) as run:
        (run.path / "half").write_text("1")
        raise RuntimeError
    with open_run(tmp_path) as run:
        assert (run.path / "half").exists()
    with pytest.raises(ValueError, match="size was 1"):
        open_run(tmp_path, "--size", "2").__enter__()


@pytest.mark.parametrize(
    ("argv", "inputs", "named"),
    [
        (["--size", "2"], None, "settings: size was 1, is now 2"),
        ([], {"data": "d2"}, "inputs: data was d1, is now d2"),
    ],
)
def test_another_identity_is_refused_unless_told_to(tmp_path, argv, inputs, named):
    complete(tmp_path)
    with pytest.raises(ValueError, match=named):
        open_run(tmp_path, *argv, inputs=inputs).__enter__()
    assert (tmp_path / "out" / "file").read_text() == "x"
    with open_run(tmp_path, *argv, "--overwrite", "true", inputs=inputs) as run:
        assert not run.complete
        assert not (tmp_path / "out").exists()


def test_foreign_files_are_never_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    for argv in ([], ["--overwrite", "true"]):
        with pytest.raises(ValueError, match="thesis|unknown origin|no run directory"):
            open_run(tmp_path, *argv).__enter__()
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_second_process_is_refused(tmp_path):
    with open_run(tmp_path):
        code = (
            "import sys; sys.path.insert(0, sys.argv[2]); import test_run_dir as t\n"
            "try:\n    t.open_run(sys.argv[1]).__enter__()\nexcept ValueError as e:\n    print(e)"
        )
        here = os.path.dirname(__file__)
        out = subprocess.run([sys.executable, "-c", code, str(tmp_path), here], capture_output=True, text=True)
    assert "in use by another process" in out.stdout, out.stderr


def test_incomplete_input_names_the_stage(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run directory"):
        read_manifest(tmp_path)
    with open_run(tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="run stage first"):
        read_manifest(tmp_path)


def test_atomic_path_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("good")
    with pytest.raises(OSError, match="disk full"), atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "good"


def test_other_ranks_do_not_write(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with open_run(tmp_path / "run") as run:
        assert not run.complete
        run.finish([])
    assert not (tmp_path / "run").exists()
    assert not run_dir.is_main_process()


def test_unwritable_output_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_run(tmp_path / "file" / "run").__enter__()
