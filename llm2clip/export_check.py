"""Load an exported vision tower as a stranger would, and compare it with what was exported.

Run as a script in a process of its own, `python -I export_check.py TOWER REFERENCE`, by `llm2clip export` and, under
older versions of transformers, by the tests. It imports nothing of this toolkit and makes sure that nothing else does.
Prints one JSON object.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import load_file


def check(tower: str, reference_file: str) -> dict[str, object]:
    """Load `tower` with its own class and with AutoModel and compare outputs with the reference.

    Args:
        tower: exported directory.
        reference_file: safetensors with `pixel_values`, the outputs under their names, `image` (uint8 HWC) and
            `image_pixel_values`, what the model was trained to see of it.

    Returns:
        Version of transformers, and per class its missing, unexpected and mismatched keys and the largest difference
        of each output, relative to the output's largest value where that is above one; `image`, the largest
        difference of pixel values in grey levels.
    """
    reference = load_file(reference_file)
    with open(f"{tower}/config.json", encoding="utf-8") as file:
        architecture = json.load(file)["architectures"][0]
    classes = {}
    for name in (architecture, "AutoModel"):
        model, loading = getattr(transformers, name).from_pretrained(tower, output_loading_info=True)
        model = model.float().eval()
        with torch.no_grad():
            outputs = model(pixel_values=reference["pixel_values"], output_hidden_states=True)
        found = {"last_hidden_state": outputs.last_hidden_state, "hidden_states_-2": outputs.hidden_states[-2]}
        if outputs.pooler_output is not None:
            found["pooler_output"] = outputs.pooler_output
        classes[name] = {
            "missing_keys": sorted(loading["missing_keys"]),
            "unexpected_keys": sorted(loading["unexpected_keys"]),
            "mismatched_keys": sorted(str(key) for key in loading["mismatched_keys"]),
            "difference": {key: relative_difference(value, reference[key]) for key, value in found.items()},
        }
    processor = transformers.AutoImageProcessor.from_pretrained(tower)
    pixels = processor(images=reference["image"].numpy(), return_tensors="np", input_data_format="channels_last")
    grey_level = 1 / (255 * np.asarray(processor.image_std)[:, None, None])
    distance = np.abs(np.asarray(pixels["pixel_values"][0]) - reference["image_pixel_values"].numpy()) / grey_level
    return {"transformers": transformers.__version__, "classes": classes, "image": float(distance.max())}


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the larger of one and the largest expected value; infinity for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / max(1.0, expected.abs().max().item())).item()


if __name__ == "__main__":
    for package in ("llm2clip", "llava_bridge", "llm2clip_eval"):
        sys.modules[package] = None  # type: ignore[assignment]  # any import of it fails from here on
    sys.stdout.write(json.dumps(check(sys.argv[1], sys.argv[2])) + "\n")
