"""Command `probe`: a linear classifier on the frozen image features of a model or of an exported vision tower.

Reads a CLIP directory or a vision tower, and labelled images for training, validation and test; writes `result.json`
with the sweep over weight decays on validation, the accuracy on test after refitting on training and validation, and
what every test image got.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_write, fingerprint, model_fingerprint

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import torch

    from llm2clip_eval.classification_data import LabelledImages

logger = logging.getLogger(__name__)

RESULT = "result.json"


@dataclass(kw_only=True)
class ProbeSet:
    """Labelled images."""

    path: Path
    """Class folders, ImageNet-V2's numbered folders, or CLIP_benchmark's WebDataset layout."""
    split: str = "test"
    """Of the WebDataset layout."""
    class_names: str | None = None
    """As for zeroshot; training, validation and test must have the same classes."""


@dataclass(kw_only=True)
class ProbeConfig(StageConfig):
    """Fit a linear classifier on frozen image features, its weight decay chosen on validation; measure it on test."""

    arm: str
    """Name of the model in results and reports."""
    clip: str
    """Directory (or hub id) of a CLIP model or of a vision tower, with its image processor."""
    train: ProbeSet
    """What the classifier is fitted on."""
    test: ProbeSet
    """What it is measured on, once."""
    val: ProbeSet | None = None
    """What the weight decay is chosen on; default a share of the training images."""
    val_fraction: float = 0.2
    """Share of each class of the training images that validates, where no val is given."""
    features: Literal["pooled", "projected"] = "pooled"
    """The vision tower's pooled output, or the normalised features that captions are compared with."""
    weight_decays: list[float] = field(default_factory=lambda: [10.0**power for power in range(-6, 3)])
    """To choose from; of the mean cross-entropy plus weight_decay / 2 * ||W||^2."""
    solver: Literal["sklearn", "torch"] = "sklearn"
    """scikit-learn on the CPU; torch on a GPU if there is one. Both find the same optimum."""
    seed: int = 0
    """Training seed of the model, recorded in the results; and of the draw of validation images."""
    batch_size: int = 128
    """Images encoded at a time."""
    num_workers: int = 0
    """Processes that decode images; 0 decodes in this one."""
    feature_cache: Path | None = None
    """Folder where image features are kept by the content of model and images; default none are kept."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.val_fraction < 1:
            problems.append(f"val_fraction: {self.val_fraction} is not between 0 and 1")
        if not self.weight_decays or min(self.weight_decays) <= 0:
            problems.append(f"weight_decays: {self.weight_decays}, expected positive numbers")
        if self.batch_size < 1:
            problems.append(f"batch_size: {self.batch_size} is not positive")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[ProbeConfig]:
    """Read the configuration of a command line."""
    return parse_stage(ProbeConfig, argv, prog="llm2clip-eval probe")


def inputs(call: StageCall[ProbeConfig]) -> dict[str, str]:
    """Fingerprints of the model and the images."""
    config = call.config
    found = {"clip": model_fingerprint(config.clip)}
    for name, data in (("train", config.train), ("val", config.val), ("test", config.test)):
        if data is not None:
            found[name] = fingerprint(data.path)
    return found


def run(call: StageCall[ProbeConfig]) -> None:
    """Encode, choose, refit, measure."""
    config = call.config
    fingerprints = inputs(call)
    with RunDir(call, stage="probe", inputs=fingerprints) as run:
        if run.complete:
            logger.info("probe: %s is complete", run.path)
            return
        facts = {"arm": config.arm, "seed": config.seed, "features": config.features, "inputs": fingerprints}
        result = probe(config)
        atomic_write(run.path / RESULT, json.dumps(facts | result) + "\n")
        logger.info(
            "%s, linear probe (weight decay %g): %s",
            config.arm,
            result["weight_decay"],
            {name: round(value, 2) for name, value in result["metrics"].items()},
        )
        run.finish(outputs=[RESULT], arm=config.arm, clip_fingerprint=fingerprints["clip"], metrics=result["metrics"])


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Do all of it.

    Returns:
        `metrics`, `weight_decay`, `sweep` (accuracy on validation by weight decay), the numbers of images, and
        `items`, a record for each test image.

    Raises:
        ValueError: if the sets differ in their classes, or too few images are there to validate on.
    """
    import numpy as np
    import torch

    from llm2clip_eval.classification import accuracies, image_records, label_ranks
    from llm2clip_eval.classification_data import open_labelled
    from llm2clip_eval.linear_probe import choose_weight_decay, fit

    def labelled(data: ProbeSet) -> LabelledImages:
        return open_labelled(data.path, split=data.split, class_names=data.class_names)

    train, test = labelled(config.train), labelled(config.test)
    val = labelled(config.val) if config.val else None
    for other in (test, *([val] if val else [])):
        if other.class_names != train.class_names:
            odd = sorted(set(train.class_names) ^ set(other.class_names))
            raise ValueError(
                f"{other.path} has {len(other.class_names)} classes, {train.path} {len(train.class_names)}, and they "
                f"are not the same in the same order; only one of them has {odd[:5]}: give both one class_names"
            )
    num_classes = len(train.class_names)
    encode = image_encoder(config)
    fitted_on = encode(train), train.labels
    if val is None:
        validates = validation_rows(train.labels, config.val_fraction, config.seed)
        tuned, checked = tuple(
            (fitted_on[0][torch.from_numpy(rows)], train.labels[rows]) for rows in (~validates, validates)
        )
        everything = fitted_on
    else:
        tuned, checked = fitted_on, (encode(val), val.labels)
        everything = torch.cat([tuned[0], checked[0]]), np.concatenate([tuned[1], checked[1]])
    weight_decay, sweep = choose_weight_decay(tuned, checked, num_classes, config.weight_decays, config.solver)
    scores = fit(*everything, num_classes, weight_decay, config.solver).scores(encode(test))
    ranks = label_ranks(scores, test.labels)
    return {
        "num_train": len(tuned[1]),
        "num_val": len(checked[1]),
        "num_test": len(test),
        "num_classes": num_classes,
        "metrics": accuracies(ranks, test.labels),
        "weight_decay": weight_decay,
        "sweep": sweep,
        "class_names": test.class_names,
        "items": image_records(test.ids, test.labels, scores, ranks),
    }


def image_encoder(config: ProbeConfig) -> Callable[[LabelledImages], torch.Tensor]:
    """How labelled images become (images, dim) features, from the cache where they are there."""
    import torch

    from llm2clip.images import ImageTransform
    from llm2clip.vision_tower import load_vision_model
    from llm2clip_eval.dual_encoder import DualEncoder, encode_dataset
    from llm2clip_eval.feature_cache import cached_features

    if config.features == "projected":
        dual = DualEncoder(config.clip, batch_size=config.batch_size)
        model, transform = dual.model, dual.image_transform

        def encode_batch(pixel_values: torch.Tensor) -> torch.Tensor:
            return dual.encode_image(pixel_values)

    else:
        tower, processor = load_vision_model(config.clip, pooled=True)
        model = tower.float().to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        transform = ImageTransform.from_image_processor(processor)  # type: ignore[arg-type]

        def encode_batch(pixel_values: torch.Tensor) -> torch.Tensor:
            return model(pixel_values=pixel_values.to(model.device)).pooler_output

    def encode(images: LabelledImages) -> torch.Tensor:
        return cached_features(
            config.feature_cache,
            lambda: encode_dataset(
                images, transform, encode_batch, batch_size=config.batch_size, num_workers=config.num_workers
            ),
            model=model,
            output=config.features,
            transform=transform,
            images=images,
        )

    return encode


def validation_rows(labels: Any, fraction: float, seed: int) -> Any:
    """Draw that share of every class, at least one image and never all: (images,) bool.

    Raises:
        ValueError: if no class has two images.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
            chosen[rng.permutation(rows)[:count]] = True
    if not chosen.any():
        raise ValueError("train: no class has two images, so none can validate; give val")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval probe`."""
    run(parse(argv))
