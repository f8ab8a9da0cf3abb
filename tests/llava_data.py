"""Tiny towers, dialogues with pictures and stage settings for the tests of llava_bridge."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny import tiny_llm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

TOWERS: dict[str, tuple[Any, Any]] = {
    "clip": (CLIPVisionConfig, CLIPVisionModel),
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
    "vit": (ViTConfig, ViTModel),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def tiny_tower(directory: Path, kind: str = "clip", *, seed: int = 0, **config: Any) -> Path:
    """Write a random tower of three layers for 32-pixel images in four patches, with its image processor."""
    config_class, model_class = TOWERS[kind]
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**settings, "image_size": 32, "patch_size": 16, **config}))
        for parameter in model.parameters():  # zeros and ones would hide mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(directory)
    return directory


def write_dialogues(directory: Path, num_images: int = 24, num_texts: int = 8, *, max_turns: int = 3) -> Path:
    """Write `dialogues.json` about plain-coloured pictures, with text-only ones among them; returns the file."""
    rng = random.Random(0)
    directory.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for index in range(num_images):
        colour = rng.choice(list(COLOURS))
        Image.new("RGB", (rng.randint(20, 60), rng.randint(20, 60)), COLOURS[colour]).save(directory / f"{index}.png")
        turns = [("human", "<image>\nWhat colour is it?"), ("gpt", colour)]
        for _ in range(rng.randint(0, max_turns - 1)):
            turns += [("human", f"Is it {(other := rng.choice(list(COLOURS)))}?"), ("gpt", str(other == colour))]
        records.append({"id": f"image-{index}", "image": f"{index}.png", "conversations": _turns(turns)})
    for index in range(num_texts):
        words = " ".join(rng.choices(("cat", "dog", "taxi", "house"), k=rng.randint(1, 9)))
        turns = [("human", f"Say {words}"), ("gpt", words)]
        records.append({"id": f"text-{index}", "conversations": _turns(turns)})
    rng.shuffle(records)
    path = directory / "dialogues.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def _turns(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


def llava_parts(directory: Path, kind: str = "clip") -> dict[str, str]:
    """Paths of a tiny tower, LLM and dialogues below `directory`, written if they are not there."""
    if not directory.is_dir():
        tiny_tower(directory / "tower", kind)
        tiny_llm(directory / "llm")
        write_dialogues(directory / "captions", num_texts=0, max_turns=1)
        write_dialogues(directory / "dialogues")
    return {name: str(directory / name) for name in ("tower", "llm")}


def stage_argv(parts: dict[str, str], data: Path, output_dir: Path, **settings: Any) -> list[str]:
    """A command line for pretrain (data: `captions`) or finetune (`dialogues`): eight steps of eight on the CPU.

    `__` in the names of settings stands for a dot.
    """
    training = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "gradient_checkpointing": False,
    }
    named = {key.replace("__", "."): value for key, value in settings.items()}
    given = {**{f"training.{key}": value for key, value in training.items()}, **parts, **named}
    argv = ["--output_dir", str(output_dir), "--data.path", str(data / "dialogues.json")]
    for key, value in given.items():
        argv += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return argv
