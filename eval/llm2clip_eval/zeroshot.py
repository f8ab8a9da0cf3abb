"""Command `zeroshot`: classify images by the names of their classes, in the words of several templates.

Reads a CLIP directory (LLM2CLIPModel with its teacher, or a stock CLIP or SigLIP model) and labelled images; writes
`results/<set>.json` with acc1, acc5 and mean_per_class_recall as CLIP_benchmark defines them, and what every image
got.

A class is the normalised mean of the normalised features of its name in all templates (open_clip's
`build_zero_shot_classifier`). Of classes with one name (ImageNet has "missile" and "sunglasses" twice) the first is
found, as by CLIP_benchmark's argmax; every other tie is a miss, so that a model which tells nothing apart scores zero.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_write, fingerprint, model_fingerprint

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    from typing import Any

    import torch

    from llm2clip_eval.dual_encoder import DualEncoder

logger = logging.getLogger(__name__)

RESULTS = "results"


@dataclass(kw_only=True)
class ZeroShotSet:
    """Labelled images."""

    path: Path
    """Class folders, ImageNet-V2's numbered folders, or CLIP_benchmark's WebDataset layout."""
    split: str = "test"
    """Of the WebDataset layout."""
    class_names: str | None = None
    """File of names: one a line, a JSON list, or a JSON object from folder to name; `imagenet`: open_clip's. Default
    the folders' names, or classnames.txt."""
    templates: str | None = None
    """File of templates with {c} for the name: one a line, or a JSON list; `imagenet`: open_clip's. Default the data's
    own, or "a photo of a {c}."."""


@dataclass(kw_only=True)
class ZeroShotConfig(StageConfig):
    """Classify images by the names of their classes: acc1, acc5, mean recall per class, and what every image got."""

    arm: str
    """Name of the model in results and reports."""
    clip: str
    """Directory (or hub id) of the model: LLM2CLIPModel, or a stock CLIP or SigLIP model with its tokenizer."""
    sets: dict[str, ZeroShotSet]
    """What to classify, by name."""
    teacher: Path | None = None
    """Teacher of an LLM2CLIPModel, which embeds the class names; left out for other models."""
    seed: int = 0
    """Training seed of the model, recorded in the results; nothing is drawn here."""
    batch_size: int = 128
    """Images or texts encoded at a time."""
    num_workers: int = 0
    """Processes that decode images; 0 decodes in this one."""
    feature_cache: Path | None = None
    """Folder where image features are kept by the content of model and images; default none are kept."""

    def __post_init__(self) -> None:
        problems = [] if self.sets else ["sets: at least one is needed"]
        problems += [f"sets: {name!r} becomes a file name, so it cannot hold /" for name in self.sets if "/" in name]
        if self.batch_size < 1:
            problems.append(f"batch_size: {self.batch_size} is not positive")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[ZeroShotConfig]:
    """Read the configuration of a command line."""
    return parse_stage(ZeroShotConfig, argv, prog="llm2clip-eval zeroshot")


def inputs(call: StageCall[ZeroShotConfig]) -> dict[str, str]:
    """Fingerprints of the model, its teacher, the images and the files of names and templates."""
    config = call.config
    found = {"clip": model_fingerprint(config.clip)}
    if config.teacher is not None:
        found["teacher"] = fingerprint(config.teacher)
    for name, data in config.sets.items():
        found[f"sets.{name}"] = fingerprint(data.path)
        for field in ("class_names", "templates"):
            file = getattr(data, field)
            if file is not None and file != "imagenet":
                found[f"sets.{name}.{field}"] = fingerprint(file)
    return found


def run(call: StageCall[ZeroShotConfig]) -> None:
    """Classify every set; results that a killed run left are kept."""
    config = call.config
    fingerprints = inputs(call)
    with RunDir(call, stage="zeroshot", inputs=fingerprints) as run:
        if run.complete:
            logger.info("zeroshot: %s is complete", run.path)
            return
        from llm2clip_eval.dual_encoder import DualEncoder

        (run.path / RESULTS).mkdir(exist_ok=True)
        encoder = DualEncoder(config.clip, teacher=config.teacher, batch_size=config.batch_size)
        metrics = {}
        for name, data in config.sets.items():
            path = run.path / RESULTS / f"{name}.json"
            if not path.is_file():
                facts = {
                    "arm": config.arm,
                    "set": name,
                    "seed": config.seed,
                    "clip_fingerprint": fingerprints["clip"],
                    "data": str(data.path),
                    "data_fingerprint": fingerprints[f"sets.{name}"],
                }
                atomic_write(path, json.dumps(facts | classify(encoder, data, config)) + "\n")
            metrics[name] = json.loads(path.read_text(encoding="utf-8"))["metrics"]
            logger.info(
                "%s on %s: %s", config.arm, name, {key: round(value, 2) for key, value in metrics[name].items()}
            )
        run.finish(outputs=[RESULTS], arm=config.arm, clip_fingerprint=fingerprints["clip"], metrics=metrics)


def classify(encoder: DualEncoder, data: ZeroShotSet, config: ZeroShotConfig) -> dict[str, Any]:
    """Classify one set.

    Returns:
        `metrics`, `class_names`, `templates`, and `items`, a record for each image.
    """
    import numpy as np

    from llm2clip_eval.classification import accuracies, image_records, label_ranks
    from llm2clip_eval.classification_data import open_labelled, read_templates
    from llm2clip_eval.feature_cache import projected_features

    images = open_labelled(data.path, split=data.split, class_names=data.class_names)
    templates = read_templates(data.templates, data.path)
    # A name is encoded and scored once, so that its classes tie exactly: rounding would let any of them win.
    names, texts = np.unique(images.class_names, return_inverse=True)
    classifier = class_features(encoder, names.tolist(), templates).cpu()
    features = projected_features(
        encoder, images, batch_size=config.batch_size, num_workers=config.num_workers, cache=config.feature_cache
    )
    scores = (features @ classifier.T)[:, texts]  # (images, classes)
    ranks = label_ranks(scores, images.labels, texts)
    return {
        "num_images": len(images),
        "num_classes": len(images.class_names),
        "metrics": accuracies(ranks, images.labels),
        "class_names": images.class_names,
        "templates": templates,
        "items": image_records(images.ids, images.labels, scores, ranks),
    }


def class_features(encoder: DualEncoder, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """The classifier's weights: (classes, dim), L2-normalised."""
    import torch.nn.functional as F

    from llm2clip_eval.classification_data import fill_template

    texts = [fill_template(template, name) for name in class_names for template in templates]
    features = encoder.encode_text(texts).unflatten(0, (len(class_names), len(templates)))
    return F.normalize(features.mean(dim=1), dim=-1)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval zeroshot`."""
    run(parse(argv))
