"""Settings of LLaVA's two training stages; defaults are the recipe of LLaVA-1.5 (haotian-liu/LLaVA, scripts/v1_5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_bridge.tuning import LoraConfig, TuneConfig
from llm2clip.config import StageConfig


@dataclass(kw_only=True)
class DialogueConfig:
    """Dialogues and their images."""

    path: str
    """Official LLaVA JSON (a list), or JSONL of the same records."""
    image_root: str | None = None
    """Folder that image paths are relative to; None is that of `path`."""
    image_aspect: Literal["pad", "square"] = "pad"
    """`pad`: a square of the mean colour around the whole image. `square`: the tower's own resizing (CLIP crops)."""
    max_length: int = 2048
    """Tokens of a sample, images included; the rest is cut off."""
    group_by_modality_length: bool = True
    """Batches of one modality and similar length (window: processes times accumulated micro-batches)."""
    max_bad_fraction: float = 0.001
    """Share of dialogues that may be bad, or without a supervised token, before the run fails."""


@dataclass(kw_only=True)
class LlavaStageConfig(StageConfig):
    """What both stages share."""

    tower: str
    """Vision tower: directory or hub id of a CLIP, SigLIP, ViT or DINOv2 model, or a `vision_tower/` of llm2clip."""
    llm: str
    """Decoder LLM: directory or hub id."""
    data: DialogueConfig
    """What is trained on."""
    feature_layer: int = -2
    """Hidden state of the tower that the projector reads; the layers behind it are dropped."""
    template: Literal["plain", "vicuna_v1", "chat"] = "vicuna_v1"
    """`plain` and `vicuna_v1` as in LLaVA; `chat`: the LLM's own chat template."""
    system: str | None = None
    """System message in place of the template's own."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """What is trained of each part."""
    vision_learning_rate: float | None = None
    """For the tower; None is training.learning_rate. LLaVA-NeXT takes 2e-6, a tenth of its LLM's."""
    projector_learning_rate: float | None = None
    """For the projector; None is training.learning_rate. 2e-5 beside an LLM with LoRA, in finetune_lora.sh."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Size of the adapters, where `tune` asks for any."""
    compat: Literal["llava"] | None = None
    """`llava`: the loss of a step is the mean over micro-batches of their means, sampler lengths are counted in words,
    nothing is clipped, as the original trains. None: every supervised token of a step counts the same."""

    def __post_init__(self) -> None:
        problems = []
        if not self.data.path:
            problems.append("data.path is missing: the dialogues, official LLaVA JSON or JSONL")
        if self.template == "plain" and self.system is not None:
            problems.append(f"system is {self.system!r}, but the template plain has no system message")
        if self.tune.vision_last_layers is not None and self.tune.vision != "full":
            problems.append(f"tune.vision_last_layers needs tune.vision full, not {self.tune.vision}")
        if self.vision_learning_rate is not None and self.tune.vision == "frozen":
            problems.append("vision_learning_rate is given, but tune.vision is frozen")
        if self.projector_learning_rate is not None and self.tune.projector == "frozen":
            problems.append("projector_learning_rate is given, but tune.projector is frozen")
        if (self.tune.vision, self.tune.projector, self.tune.llm) == ("frozen",) * 3:
            problems.append("tune: every part is frozen, there is nothing to train")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(kw_only=True)
class PretrainConfig(LlavaStageConfig):
    """Stage 1: train the projector alone on images and captions (scripts/v1_5/pretrain.sh)."""

    data: DialogueConfig = field(
        default_factory=lambda: DialogueConfig(path="", image_aspect="square", group_by_modality_length=False)
    )
    """Images with one caption each, as dialogues."""
    template: Literal["plain", "vicuna_v1", "chat"] = "plain"
    """`plain`: image and caption, nothing else."""
    tune: TuneConfig = field(default_factory=lambda: TuneConfig(llm="frozen"))
    """What is trained of each part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "lora" in (self.tune.vision, self.tune.llm) or self.tune.llm == "qlora":
            raise ValueError("tune: adapters belong to finetune; pretrain writes plain weights for it to start from")


@dataclass(kw_only=True)
class FinetuneConfig(LlavaStageConfig):
    """Stage 2: instruction tuning of projector and LLM (scripts/v1_5/finetune.sh)."""

    pretrained: Path | None = None
    """Output of pretrain for the same tower and LLM; None starts from a random projector."""
