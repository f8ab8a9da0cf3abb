"""Settings of train-clip; the defaults are LLM2CLIP's published recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2clip.config import StageConfig

Part = Literal["vision", "projection", "text", "logit_scale"]


@dataclass(kw_only=True)
class ClipDataSource:
    """Images with captions."""

    path: Path
    """JSONL + image folder, WebDataset tars, parquet or a `datasets` directory."""
    fields: dict[str, str] | None = None
    """Caption kind -> field name, for files of another layout."""
    weight: float | None = None
    """Share of the samples, in any unit; None for all sources: as many as each has rows."""
    final_weight: float | None = None
    """Share at the last step, reached linearly (a curriculum); None: `weight`."""

    @property
    def last_weight(self) -> float | None:
        """Share at the last step."""
        return self.weight if self.final_weight is None else self.final_weight


@dataclass(kw_only=True)
class ClipDataConfig:
    """Images, captions and how they are drawn."""

    sources: list[ClipDataSource]
    """Caption data; every batch mixes all of it."""
    caption_kinds: dict[str, float] = field(default_factory=lambda: {"raw": 0.5, "long": 0.5})
    """Probability of each kind of caption (paper: half real, half dense); where a kind is missing the others share."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the random crop's share of the image; [1, 1] for none."""
    cache_images: bool = False
    """Keep decoded images in memory, for small data on few cores; changes nothing else."""
    max_bad_fraction: float = 0.01
    """Fail if more of a source's rows or images are unusable; fewer are skipped and listed in skipped.jsonl."""


@dataclass(kw_only=True)
class ClipModelConfig:
    """What is trained, and from what it starts."""

    text: Literal["adapter", "clip"] = "adapter"
    """Text side: LLM2CLIP's adapter on caption embeddings, or CLIP's own text tower."""
    init_from: str | None = None
    """Vision tower, CLIP or LLM2CLIP directory (or hub id) to start from; None: from scratch."""
    vision_config: dict[str, Any] = field(default_factory=dict)
    """From scratch: fields of CLIPVisionConfig, or of another vision model with its model_type."""
    patch_init: Literal["random", "pca"] = "random"
    """From scratch, a CLIP vision model: random patch filters, or the principal components of the training images."""
    text_config: dict[str, Any] = field(default_factory=dict)
    """From scratch, text: clip: fields of CLIPTextConfig."""
    tokenizer: str | None = None
    """From scratch, text: clip: directory of the tokenizer."""
    projection_dim: int = 1280
    """Length of the shared features."""
    adapter_num_blocks: int = 4
    """Residual blocks of the adapter."""
    adapter_expansion: int = 2
    """Hidden width of a block over the embeddings' dimension."""
    caption_normalization: Literal["none", "l2", "l2_standardize"] = "l2"
    """What is done to the caption embeddings before the adapter; l2_standardize also centres and scales them."""
    logit_scale_init: float = 1 / 0.07
    """Multiplier of the cosines at the start, where none is taken over."""


@dataclass(kw_only=True)
class TrainClipConfig(StageConfig):
    """Train a CLIP vision encoder against captions; defaults are LLM2CLIP's published recipe."""

    data: ClipDataConfig
    """Images and captions."""
    model: ClipModelConfig
    """What is trained."""
    embeddings: Path | None = None
    """Directory of extract-embeddings with all captions of the data; for text: adapter."""
    losses: dict[str, float] = field(default_factory=lambda: {"contrastive": 1.0})
    """Weight of each loss in the objective: contrastive (InfoNCE), sigmoid (SigLIP)."""
    vision_learning_rate: float | None = None
    """Of the vision model; None: training.learning_rate."""
    projection_learning_rate: float | None = None
    """Of the visual projection; None: training.learning_rate."""
    text_learning_rate: float | None = None
    """Of the text adapter or text tower; None: training.learning_rate."""
    layer_decay: float = 0.85
    """The vision model's layer l of L learns at layer_decay^(L + 1 - l) of its rate; 1 for none."""
    freeze: list[Part] = field(default_factory=list)
    """Parts that are not trained; [vision] is LiT."""
    ema_decay: float | None = None
    """Write an exponential moving average of the weights instead of the last ones."""

    def __post_init__(self) -> None:
        problems = [*_data_problems(self.data), *_model_problems(self.model, self.embeddings)]
        unknown = self.losses.keys() - {"contrastive", "sigmoid"}
        if unknown:
            problems.append(f"losses: unknown {', '.join(sorted(unknown))}; there are contrastive, sigmoid")
        if any(weight < 0 for weight in self.losses.values()) or not any(self.losses.values()):
            problems.append(f"losses is {self.losses}; at least one weight must be above 0 and none below")
        if self.losses.get("sigmoid") and self.model.text == "clip":
            problems.append("losses.sigmoid needs a logit bias, which CLIPModel has not; use model.text: adapter")
        if not 0 < self.layer_decay <= 1:
            problems.append(f"layer_decay is {self.layer_decay}, expected above 0 and at most 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            problems.append(f"ema_decay is {self.ema_decay}, expected between 0 and 1")
        if {"vision", "projection", "text", "logit_scale"} <= set(self.freeze):
            problems.append("freeze leaves nothing to train")
        if problems:
            raise ValueError("; ".join(problems))


def _data_problems(data: ClipDataConfig) -> list[str]:
    problems = []
    if not data.sources:
        problems.append("data.sources is empty; name at least one, such as [{path: captions}]")
    given = [source.weight is not None for source in data.sources]
    if any(given) and not all(given):
        problems.append("data.sources: give every source a weight, or none")
    if any(source.final_weight is not None for source in data.sources) and not all(given):
        problems.append("data.sources: final_weight needs a weight")
    for weights in ([s.weight for s in data.sources], [s.last_weight for s in data.sources]):
        if all(given) and (any(weight < 0 for weight in weights) or not sum(weights)):  # type: ignore[operator]
            problems.append(f"data.sources: weights are {weights}; none may be below 0 and one must be above")
    if any(p < 0 for p in data.caption_kinds.values()) or not any(data.caption_kinds.values()):
        problems.append(f"data.caption_kinds is {data.caption_kinds}; none may be below 0 and one must be above")
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        problems.append(f"data.crop_scale is {list(data.crop_scale)}, expected 0 < low <= high <= 1")
    if not 0 <= data.max_bad_fraction <= 1:
        problems.append(f"data.max_bad_fraction is {data.max_bad_fraction}, expected 0 to 1")
    return problems


def _model_problems(model: ClipModelConfig, embeddings: Path | None) -> list[str]:
    problems = []
    if model.text == "adapter" and embeddings is None:
        problems.append("embeddings is missing; model.text: adapter reads a directory of extract-embeddings")
    if model.text == "clip" and embeddings is not None:
        problems.append("embeddings is set, but model.text: clip has its own text tower and reads none")
    if model.init_from is not None:
        for name in ("vision_config", "text_config", "tokenizer"):
            if getattr(model, name):
                problems.append(
                    f"model.{name} is for training from scratch; with model.init_from it is taken from there"
                )
        if model.patch_init != "random":
            problems.append(f"model.patch_init {model.patch_init} would overwrite the filters of model.init_from")
    elif model.text == "clip" and model.tokenizer is None:
        problems.append("model.tokenizer is missing; model.text: clip from scratch needs the directory of a tokenizer")
    if model.text == "adapter" and (model.text_config or (model.tokenizer and model.init_from is None)):
        problems.append("model.text_config and model.tokenizer are for model.text: clip")
    return problems
