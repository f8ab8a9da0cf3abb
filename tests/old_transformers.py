"""Older versions of transformers in a directory of their own, to load exports with; torch is shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGES = {
    "4.37": ("transformers==4.37.2", "tokenizers==0.15.1", "huggingface-hub==0.23.4"),  # the original LLaVA's
    "4.50": ("transformers==4.50.3", "tokenizers==0.21.4", "huggingface-hub==0.36.0"),
    "4.57": ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0"),
}


def install(version: str, target: Path) -> Path:
    """Put a version of transformers into `target`; skips the test where there is no package index."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--target", str(target)]
    result = subprocess.run([*command, *PACKAGES[version]], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no package index to take transformers {version} from: {result.stderr.strip().splitlines()[-1]}")
    return target


def check_under(packages: Path, script: str, model: Path, reference: Path) -> dict[str, Any]:
    """Run a check script with the packages of `install` in front; returns what it prints."""
    command = [sys.executable, script, str(model), str(reference)]
    environment = {**os.environ, "PYTHONPATH": str(packages), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
