"""The README.md of an exported vision tower: what it is, how to load it, where it comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip import __version__
from llm2clip.run_dir import MANIFEST, atomic_write, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [clip, llm2clip, vision-tower]
---

# Vision tower ({model_type})

The image encoder of a CLIP model, without its projection, as a plain `{architecture}`: {num_parameters:.1f} M
parameters, {num_layers} layers of width {hidden_size}, {image_size} px images in {patch_size} px patches. {origin}

## Use

```python
from transformers import AutoImageProcessor, {architecture}

model = {architecture}.from_pretrained("vision_tower")
processor = AutoImageProcessor.from_pretrained("vision_tower")
pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]  # of an RGB PIL image
outputs = model(pixel_values=pixel_values, output_hidden_states=True)
patch_features = outputs.hidden_states[-2]  # what LLaVA-1.5 reads; outputs.pooler_output describes the whole image
```

`AutoModel` works as well. Tensors are named as transformers 4.x names them; 4.57 and 5.x load every key. A fresh
process with transformers {transformers} and without the training code found the same features
(largest relative difference {difference:.1e}).

## Where it comes from

Each line is one stage; its fingerprint is a digest of everything that it wrote.

| stage | fingerprint | read |
|---|---|---|
{stages}

Made by llm2clip {version}.

## Licence

The weights carry no licence of their own. What may be done with them follows from the licences of the images, captions
and pretrained models named by the data stage above; state those, and this method, when you publish the weights.
LLM2CLIP is described in Huang et al. 2024, arXiv 2411.04997.
"""


def write_model_card(tower: Path, clip: str, vision_model: PreTrainedModel, verification: Mapping[str, Any]) -> None:
    """Write `tower/README.md`.

    Args:
        tower: exported directory.
        clip: what was exported; if it is a run directory, its manifest and those of its inputs are told.
        vision_model: the exported model.
        verification: report of `export_check.check`.
    """
    config = vision_model.config
    history = list(provenance(Path(clip)))
    card = TEMPLATE.format(
        model_type=config.model_type,
        architecture=type(vision_model).__name__,
        num_parameters=sum(parameter.numel() for parameter in vision_model.parameters()) / 1e6,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        origin="" if history else f"Exported from `{Path(clip).name}`, which records no history.",
        transformers=verification["transformers"],
        difference=max(max(result["difference"].values()) for result in verification["classes"].values()),
        stages="\n".join(stage_row(directory, manifest) for directory, manifest in history) or "| not recorded | | |",
        version=__version__,
    )
    atomic_write(tower / "README.md", card)


def provenance(run_dir: Path, seen: set[Path] | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run directories that led to one, nearest first: those that its recorded settings point to.

    Directories that were deleted since are left out; their fingerprints are still in the manifest that read them.
    """
    seen = set() if seen is None else seen
    if run_dir.resolve() in seen or not (run_dir / MANIFEST).is_file():
        return
    seen.add(run_dir.resolve())
    manifest = read_manifest(run_dir)
    yield run_dir, manifest
    for value in filter(os.path.exists, _strings(manifest.get("settings", {}))):
        for directory in (Path(value), *Path(value).parents[:3]):  # data below a run directory names a part of it
            yield from provenance(directory, seen)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def stage_row(directory: Path, manifest: Mapping[str, Any]) -> str:
    reads = ", ".join(f"{name} `{str(digest)[:12]}`" for name, digest in manifest.get("inputs", {}).items())
    return f"| {manifest.get('stage', 'data')} ({directory.name}) | `{manifest['fingerprint'][:12]}` | {reads} |"
