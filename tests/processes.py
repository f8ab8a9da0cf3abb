"""Start a stage as a process of its own, and kill it as a power cut would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
TWO_PROCESSES = (
    *(ACCELERATE, "launch", "--config_file", "configs/accelerate/ddp.yaml"),
    *("--num_processes", "2", "--main_process_port", "0"),
)
"""What starts two CPU processes of a stage."""


def start(command: str, arguments: list[str], *launcher: str, **environment: str) -> subprocess.Popen:
    """Start `llava-bridge pretrain` and the like, by a launcher such as `TWO_PROCESSES` or plainly.

    Args:
        command: program and stage.
        arguments: of the stage.
        *launcher: command that is put in front; empty for Python.
        **environment: additional variables.
    """
    program, stage = command.split(maxsplit=1)
    module = {"llm2clip": "llm2clip.cli", "llava-bridge": "llava_bridge.cli", "llm2clip-eval": "llm2clip_eval.cli"}[
        program
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "LLM2CLIP_DEBUG": "1", **environment}
    argv = [*(launcher or (sys.executable,)), "-m", module, *stage.split(), *arguments]
    return subprocess.Popen(argv, cwd=ROOT, env=variables)


def kill_when(process: subprocess.Popen, condition: Callable[[], bool]) -> bool:
    """kill -9 the process and its children as soon as `condition()`; False if it ended before."""
    while process.poll() is None:
        if condition():
            children = psutil.Process(process.pid).children(recursive=True)
            for member in (*children, process):
                member.kill()
            psutil.wait_procs(children, timeout=60)
            process.wait()
            return True
        time.sleep(0.001)
    return False
