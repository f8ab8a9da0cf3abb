"""Whether two stages are of the same tower and LLM, by fingerprint."""

from __future__ import annotations

from pathlib import Path

from llm2clip.run_dir import read_manifest


def require_same_parts(pretrained: Path, inputs: dict[str, str], feature_layer: int) -> None:
    """Refuse the output of a stage 1 that had another tower, feature layer or LLM.

    Raises:
        FileNotFoundError: if it is not complete.
        ValueError: if something differs; names it with both values.
    """
    manifest = read_manifest(pretrained)
    if (layer := manifest["settings"]["feature_layer"]) != feature_layer:
        raise ValueError(
            f"{pretrained} was trained on feature_layer {layer} of the tower, not {feature_layer}; a projector fits "
            f"one layer only: set feature_layer to {layer}, or run pretrain with {feature_layer}"
        )
    there = manifest["inputs"]
    for part in ("tower", "llm"):
        if there.get(part) != inputs[part]:
            raise ValueError(
                f"{pretrained} was trained with another {part} ({str(there.get(part))[:12]}) than this one "
                f"({inputs[part][:12]}); a projector fits one pair only: run pretrain with this {part}"
            )
