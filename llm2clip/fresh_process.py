"""Check an export as a stranger would load it: by a script in a process that cannot import this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MAX_GREY_LEVELS = 2.0
"""Between pixel values: transformers' torchvision and PIL backends differ by one, and interpolation by another."""


def check_in_fresh_process(
    script: Path, directory: Path, reference: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run `python -I script DIRECTORY REFERENCE`.

    Args:
        script: a program that imports nothing of this toolkit and prints one JSON object last.
        directory: the export.
        reference: what it must reproduce; written beside the directory while the script runs.
        metadata: texts for the header of that file.

    Returns:
        What the script printed.

    Raises:
        RuntimeError: if the script failed.
    """
    from safetensors.torch import save_file

    file = directory.with_name(f".{directory.name}.reference.safetensors")
    save_file(dict(reference), file, metadata=dict(metadata or {}))
    command = [sys.executable, "-I", str(script), str(directory), str(file)]
    result = subprocess.run(command, capture_output=True, text=True)
    file.unlink()
    if result.returncode:
        raise RuntimeError(f"{directory} does not load in a fresh process:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])
