"""Whether two stages are of the same tower and LLM, by fingerprint."""

from __future__ import annotations

from pathlib import Path

from llm2clip.run_dir import read_manifest


def require_same_parts(pretrained: Path, inputs: dict[str, str]) -> None:
    """Refuse the output of a stage 1 that had another tower or LLM.

    Raises:
        FileNotFoundError: if it is not complete.
        ValueError: if a part differs; names it with both fingerprints.
    """
    there = read_manifest(pretrained)["inputs"]
    for part in ("tower", "llm"):
        if there.get(part) != inputs[part]:
            raise ValueError(
                f"{pretrained} was trained with another {part} ({str(there.get(part))[:12]}) than this one "
                f"({inputs[part][:12]}); a projector fits one pair only: run pretrain with this {part}"
            )
