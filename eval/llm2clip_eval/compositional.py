"""Command `compositional`: does a model tell a caption from one that differs in a single fact?

Reads a CLIP directory (LLM2CLIPModel with its teacher, or a stock CLIP or SigLIP model) and sets of three kinds:

    sugarcrepe  a folder of JSON files, one per category: {"0": {"filename", "caption", "negative_caption"}, ...}
    winoground  examples.jsonl with image_0, image_1, caption_0, caption_1 and their folder of images
    demo        a pool of `llm2clip data demo`; wrong captions are made from its facts (`demo_negatives`)

Writes `results/<set>.json`: accuracy by category, and what the model did with every item. A tie is a miss.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_write, fingerprint, model_fingerprint

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    from typing import Any

    import torch

    from llm2clip_eval.compositional_data import ImagePairs, NegativeCaptions
    from llm2clip_eval.dual_encoder import DualEncoder, Images

logger = logging.getLogger(__name__)

RESULTS = "results"


@dataclass(kw_only=True)
class CompositionalSet:
    """Captions and nearly the same, wrong ones."""

    format: Literal["sugarcrepe", "winoground", "demo"]
    """See the command's description."""
    data: Path
    """SugarCrepe: folder of JSON files, or one of them; Winoground: examples.jsonl; demo: directory of a pool."""
    images: Path | None = None
    """Folder of the images; the demo's pools have their own."""


@dataclass(kw_only=True)
class CompositionalConfig(StageConfig):
    """Tell captions from wrong ones in SugarCrepe's and Winoground's format, and on the demo's own scenes."""

    arm: str
    """Name of the model in results and reports."""
    clip: str
    """Directory (or hub id) of the model: LLM2CLIPModel, or a stock CLIP or SigLIP model with its tokenizer."""
    sets: dict[str, CompositionalSet]
    """What to tell apart, by name."""
    teacher: Path | None = None
    """Teacher of an LLM2CLIPModel, which embeds the captions; left out for other models."""
    seed: int = 0
    """Training seed of the model, recorded in the results; nothing is drawn here."""
    batch_size: int = 128
    """Images or captions encoded at a time."""
    num_workers: int = 0
    """Processes that decode images; 0 decodes in this one."""
    feature_cache: Path | None = None
    """Folder where image features are kept by the content of model and images; default none are kept."""

    def __post_init__(self) -> None:
        problems = [] if self.sets else ["sets: at least one is needed"]
        for name, data in self.sets.items():
            if "/" in name:
                problems.append(f"sets: {name!r} becomes a file name, so it cannot hold /")
            if (data.images is None) != (data.format == "demo"):
                wanted = "has its own images, leave it out" if data.format == "demo" else "needs the folder of images"
                problems.append(f"sets.{name}.images: {data.format} {wanted}")
        if self.batch_size < 1:
            problems.append(f"batch_size: {self.batch_size} is not positive")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[CompositionalConfig]:
    """Read the configuration of a command line."""
    return parse_stage(CompositionalConfig, argv, prog="llm2clip-eval compositional")


def inputs(call: StageCall[CompositionalConfig]) -> dict[str, str]:
    """Fingerprints of the model, its teacher, the sets and their folders of images."""
    config = call.config
    found = {"clip": model_fingerprint(config.clip)}
    if config.teacher is not None:
        found["teacher"] = fingerprint(config.teacher)
    for name, data in config.sets.items():
        found[f"sets.{name}"] = fingerprint(data.data)
        if data.images is not None:
            found[f"sets.{name}.images"] = fingerprint(data.images)
    return found


def run(call: StageCall[CompositionalConfig]) -> None:
    """Measure every set; results that a killed run left are kept."""
    config = call.config
    fingerprints = inputs(call)
    with RunDir(call, stage="compositional", inputs=fingerprints) as run:
        if run.complete:
            logger.info("compositional: %s is complete", run.path)
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
                    "format": data.format,
                    "seed": config.seed,
                    "clip_fingerprint": fingerprints["clip"],
                    "data": str(data.data),
                    "data_fingerprint": fingerprints[f"sets.{name}"],
                }
                atomic_write(path, json.dumps(facts | measure(encoder, data, config)) + "\n")
            metrics[name] = json.loads(path.read_text(encoding="utf-8"))["metrics"]
            logger.info(
                "%s on %s: %s", config.arm, name, {key: round(value, 1) for key, value in metrics[name].items()}
            )
        run.finish(outputs=[RESULTS], arm=config.arm, clip_fingerprint=fingerprints["clip"], metrics=metrics)


def measure(encoder: DualEncoder, data: CompositionalSet, config: CompositionalConfig) -> dict[str, Any]:
    """Read one set and score it: `metrics` in percent, and `items`."""
    from llm2clip_eval import compositional_data

    if data.format == "winoground":
        assert data.images is not None
        return score_pairs(encoder, compositional_data.read_winoground(data.data, data.images), config)
    if data.format == "demo":
        return score_negatives(encoder, compositional_data.read_demo(data.data), config)
    assert data.images is not None
    return score_negatives(encoder, compositional_data.read_sugarcrepe(data.data, data.images), config)


def score_negatives(encoder: DualEncoder, data: NegativeCaptions, config: CompositionalConfig) -> dict[str, Any]:
    """Is the caption nearer to its image than the wrong one?

    Returns:
        `metrics` (percent by category, `mean` over categories as SugarCrepe is reported, `all` over items), the number
        of items by category, and `items`.
    """
    import numpy as np
    import torch

    from llm2clip.metrics import TIE_TOLERANCE

    images = _image_features(encoder, data.images, config)[torch.tensor(data.image_rows)]
    right, wrong = ((images * _text_features(encoder, texts)).sum(dim=1) for texts in (data.captions, data.negatives))
    correct = (right > wrong + TIE_TOLERANCE).tolist()
    categories = list(dict.fromkeys(data.categories))
    of_category = {
        name: [hit for hit, category in zip(correct, data.categories, strict=True) if category == name]
        for name in categories
    }
    metrics = {name: float(100 * np.mean(hits)) for name, hits in of_category.items()}
    items = [
        {"id": name, "category": category, "correct": hit, "margin": margin}
        for name, category, hit, margin in zip(
            data.ids, data.categories, correct, (right - wrong).tolist(), strict=True
        )
    ]
    return {
        "metrics": metrics | {"mean": float(np.mean(list(metrics.values()))), "all": float(100 * np.mean(correct))},
        "num_items": {name: len(hits) for name, hits in of_category.items()},
        "items": items,
    }


def score_pairs(encoder: DualEncoder, data: ImagePairs, config: CompositionalConfig) -> dict[str, Any]:
    """Winoground's text, image and group score (Thrush et al. 2022, equations 1 to 3).

    Returns:
        `metrics` (percent, over all items and by tag), the number of items by tag, and `items`.
    """
    import numpy as np
    import torch

    from llm2clip.metrics import TIE_TOLERANCE

    images = _image_features(encoder, data.images, config)
    sides = [images[torch.tensor([rows[side] for rows in data.image_rows])] for side in (0, 1)]
    texts = [_text_features(encoder, [captions[side] for captions in data.captions]) for side in (0, 1)]
    # score[c][i]: (items,) similarity of caption c and image i
    score = [[(texts[c] * sides[i]).sum(dim=1) for i in (0, 1)] for c in (0, 1)]

    def above(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return one > other + TIE_TOLERANCE

    text = above(score[0][0], score[1][0]) & above(score[1][1], score[0][1])
    image = above(score[0][0], score[0][1]) & above(score[1][1], score[1][0])
    hits = {"text": text.numpy(), "image": image.numpy(), "group": (text & image).numpy()}
    tags = np.array(data.tags)
    metrics = {name: float(100 * values.mean()) for name, values in hits.items()}
    for tag in sorted(set(data.tags) - {""}):
        metrics |= {f"{tag}: {name}": float(100 * values[tags == tag].mean()) for name, values in hits.items()}
    items = [
        {"id": name, "category": tag, **{key: bool(values[row]) for key, values in hits.items()}}
        for row, (name, tag) in enumerate(zip(data.ids, data.tags, strict=True))
    ]
    return {"metrics": metrics, "num_items": {"all": len(items)}, "items": items}


def _image_features(encoder: DualEncoder, images: Images, config: CompositionalConfig) -> torch.Tensor:
    from llm2clip_eval.feature_cache import projected_features

    return projected_features(
        encoder, images, batch_size=config.batch_size, num_workers=config.num_workers, cache=config.feature_cache
    )


def _text_features(encoder: DualEncoder, texts: Sequence[str]) -> torch.Tensor:
    """(texts, dim) on the CPU; a text that occurs often is encoded once."""
    import torch

    distinct = list(dict.fromkeys(texts))
    row_of = {text: row for row, text in enumerate(distinct)}
    return encoder.encode_text(distinct).cpu()[torch.tensor([row_of[text] for text in texts])]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval compositional`."""
    run(parse(argv))
