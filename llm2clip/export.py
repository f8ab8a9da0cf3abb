"""Stage `export`: write the vision tower of a CLIP model as a plain Hugging Face directory.

Reads a directory of `train-clip` (LLM2CLIPModel or CLIPModel) or any stock CLIP, SigLIP or ViT model, or another one
with an image processor like theirs; DINOv2's own, which resizes to 256 and cuts out 224, is not.
Writes `vision_tower/` (config, model.safetensors, preprocessor_config.json, README.md), which transformers 4.57 and
5.x load with every key, and `verification.json`, the proof: a fresh process without this package loaded it and found
the same features.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.fresh_process import MAX_GREY_LEVELS, check_in_fresh_process
from llm2clip.run_dir import RunDir, atomic_write, model_fingerprint
from llm2clip.vision_tower import load_vision_model, write_tower

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

TOWER = "vision_tower"
MAX_DIFFERENCE = 1e-6
"""Of features in float32, relative where they exceed one."""


@dataclass(kw_only=True)
class ExportConfig(StageConfig):
    """Write the vision tower of a CLIP model as a stock Hugging Face directory, and prove that it loads."""

    clip: str
    """Directory of train-clip, or any directory (or hub id) of a stock CLIP, SigLIP or ViT model."""


def parse(argv: Sequence[str] | None = None) -> StageCall[ExportConfig]:
    """Read the configuration of a command line."""
    return parse_stage(ExportConfig, argv, prog="llm2clip export")


def inputs(call: StageCall[ExportConfig]) -> dict[str, str]:
    """Fingerprint of the model that is read."""
    return {"clip": model_fingerprint(call.config.clip)}


def run(call: StageCall[ExportConfig]) -> None:
    """Export, verify, finish."""
    with RunDir(call, stage="export", inputs=inputs(call)) as run:
        if run.complete:
            logger.info("export: %s is complete", run.path)
            return
        from llm2clip.model_card import write_model_card

        vision_model, processor = load_vision_model(call.config.clip, pooled=True)
        tower = run.path / TOWER
        write_tower(vision_model, processor, tower)
        report = verify_tower(tower, vision_model, processor)
        atomic_write(run.path / "verification.json", json.dumps(report, indent=2) + "\n")
        write_model_card(tower, call.config.clip, vision_model, report)
        run.finish(
            outputs=[TOWER, "verification.json"],
            model_type=vision_model.config.model_type,
            num_parameters=sum(parameter.numel() for parameter in vision_model.parameters()),
        )


def verify_tower(tower: Path, vision_model: PreTrainedModel, processor: BaseImageProcessor) -> dict[str, Any]:
    """Load the tower in a fresh process that cannot import this package, and compare.

    Returns:
        What `export_check.check` found.

    Raises:
        RuntimeError: if a key is missing, unexpected or of another shape, or features or pixels differ.
    """
    script = Path(__file__).with_name("export_check.py")
    report = check_in_fresh_process(script, tower, reference_outputs(vision_model, processor))
    if problems := find_problems(report):
        raise RuntimeError(f"{tower} is not the model it was exported from: {'; '.join(problems)}")
    logger.info("export: %s loads with transformers %s, all keys, same features", tower, report["transformers"])
    return report


def find_problems(report: dict[str, Any]) -> list[str]:
    """What is wrong in a report of `export_check.check`; empty if the tower is faithful."""
    problems = []
    for name, result in report["classes"].items():
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := result[kind]:
                problems.append(f"{name}: {len(keys)} {kind.replace('_', ' ')}, first {keys[0]}")
        for output, difference in result["difference"].items():
            if not difference <= MAX_DIFFERENCE:
                problems.append(f"{name}: {output} differs by {difference:.2g}, at most {MAX_DIFFERENCE:g} expected")
    if not report["image"] <= MAX_GREY_LEVELS:
        problems.append(f"pixel values differ by {report['image']:.1f} grey levels, at most {MAX_GREY_LEVELS:g}")
    return problems


def reference_outputs(vision_model: PreTrainedModel, processor: BaseImageProcessor) -> dict[str, torch.Tensor]:
    """What the tower must reproduce: see `export_check.check`."""
    import numpy as np
    import torch
    from PIL import Image

    from llm2clip.images import ImageTransform

    transform = ImageTransform.from_image_processor(processor)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((2 * transform.size, transform.size * 3 // 2), Image.Resampling.BICUBIC)
    noise = torch.from_numpy(rng.standard_normal((3, transform.size, transform.size), dtype=np.float32))
    pixel_values = torch.stack([transform.evaluate(image), noise])  # (2, 3, size, size)
    exact = vision_model.float().eval()
    with torch.no_grad():
        outputs = exact(pixel_values=pixel_values, output_hidden_states=True)
    reference = {
        "pixel_values": pixel_values,
        "image": torch.from_numpy(np.array(image)),
        "image_pixel_values": pixel_values[0],
        "last_hidden_state": outputs.last_hidden_state,
        "hidden_states_-2": outputs.hidden_states[-2],
    }
    if outputs.pooler_output is not None:
        reference["pooler_output"] = outputs.pooler_output
    return {name: tensor.clone().contiguous() for name, tensor in reference.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip export`."""
    run(parse(argv))
