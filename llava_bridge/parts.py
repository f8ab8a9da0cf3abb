"""Whether stage 2 may start from a stage 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llm2clip.run_dir import read_manifest

if TYPE_CHECKING:
    from llava_bridge.llava_config import FinetuneConfig


def check_stage_1(pretrained: Path, config: FinetuneConfig, inputs: Mapping[str, str]) -> None:
    """Refuse the output of a stage 1 that had another tower, feature layer or LLM, or whose LLM would be lost.

    Args:
        pretrained: run directory of the stage 1.
        config: of the stage 2.
        inputs: fingerprints of the stage 2.

    Raises:
        FileNotFoundError: if it is not complete.
        ValueError: if it does not fit; names what, with both values.
    """
    manifest = read_manifest(pretrained)
    settings = manifest["settings"]
    if (layer := settings["feature_layer"]) != config.feature_layer:
        raise ValueError(
            f"{pretrained} was trained on feature_layer {layer} of the tower, not {config.feature_layer}; a projector "
            f"fits one layer only: set feature_layer to {layer}, or run pretrain with {config.feature_layer}"
        )
    there = manifest["inputs"]
    for part in ("tower", "llm"):
        if there.get(part) != inputs[part]:
            raise ValueError(
                f"{pretrained} was trained with another {part} ({str(there.get(part))[:12]}) than this one "
                f"({inputs[part][:12]}); a projector fits one pair only: run pretrain with this {part}"
            )
    if config.tune.llm == "qlora" and settings["tune.llm"] == "full":
        raise ValueError(
            f"tune.llm is qlora, which holds the LLM as it was in 4 bits, but {pretrained} trained all of it; take "
            "lora or full"
        )
