"""The commands as a user meets them: help at once, exit codes, messages instead of tracebacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llm2clip import cli
from llm2clip_eval import cli as eval_cli

COMMANDS = [*(("llm2clip.cli", name) for name in cli.COMMANDS), *(("llm2clip_eval.cli", n) for n in eval_cli.COMMANDS)]


def run(module: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True)


@pytest.mark.parametrize(("module", "command"), COMMANDS, ids=lambda value: value)
def test_help_does_not_load_torch(module, command):
    code = (
        f"import sys; from {module.rpartition('.')[0]} import cli\n"
        f"try:\n    cli.main({[*command.split(), '--help']!r})\n"
        "except SystemExit as e:\n    assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout


@pytest.mark.parametrize("module", ["llm2clip.cli", "llm2clip_eval.cli"])
def test_commands_are_listed(module):
    result = run(module, "--help")
    assert result.returncode == 0
    assert all(command in result.stdout for name, command in COMMANDS if name == module)
    assert run(module, "trian").returncode == 2


def test_bad_input_is_a_message_and_exit_code_2(tmp_path):
    result = run("llm2clip.cli", "export", "--clip", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_fault_of_ours_is_a_traceback_and_exit_code_1(monkeypatch, capsys):
    import llm2clip.export

    def broken(argv):
        raise KeyError("a bug")

    monkeypatch.setattr(llm2clip.export, "main", broken)
    assert cli.dispatch("llm2clip", cli.COMMANDS, ["export"]) == 1
    assert "KeyError" in capsys.readouterr().err
