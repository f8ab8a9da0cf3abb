"""Tiny models that put images and texts into one space, and labelled pictures, for the tests of the stages before
LLaVA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from clip_data import write_clip_tokenizer
from PIL import Image
from tiny import tiny_clip_config, tiny_llm

from llm2clip.images import ImageTransform
from llm2clip.modeling_clip import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip.run_dir import fingerprint
from llm2clip.teacher import CaptionEncoder, TeacherSpec


def write_clip(directory: Path, seed: int = 0) -> Path:
    """A stock CLIP with its tokenizer and image processor; returns `directory`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.CLIPModel(tiny_clip_config()).save_pretrained(directory)
    ImageTransform(size=32).to_image_processor().save_pretrained(directory)
    return write_clip_tokenizer(directory)


def write_teacher(directory: Path, seed: int = 0) -> Path:
    """An untuned teacher of width 32; returns `directory`."""
    llm = tiny_llm(directory.with_name(f"{directory.name}-llm"), seed=seed)
    CaptionEncoder.from_llm(str(llm), spec=TeacherSpec(base_model="tiny", num_hidden_layers=3)).save_pretrained(
        directory
    )
    return directory


def write_llm2clip(directory: Path, teacher: Path, seed: int = 0) -> Path:
    """An LLM2CLIPModel that belongs to a teacher; returns `directory`."""
    config = LLM2CLIPConfig(
        vision_config=tiny_clip_config().vision_config.to_dict(),
        caption_embedding_dim=32,
        projection_dim=16,
        adapter_num_blocks=1,
        teacher_fingerprint=fingerprint(teacher),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LLM2CLIPModel(config).save_pretrained(directory)
    ImageTransform(size=32).to_image_processor().save_pretrained(directory)
    return directory


def picture(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A coarse random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def write_class_folders(root: Path, classes: Mapping[str, int], colours: Sequence[tuple[int, int, int]] = ()) -> Path:
    """So many pictures of each class, below a folder of its name; returns `root`.

    With `colours`, class n is that colour with a little noise, so that a probe can learn it; else all are random.
    """
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = picture(1000 * number + index)
            if colours:
                image = Image.blend(Image.new("RGB", image.size, colours[number]), image, 0.15)
            image.save(root / name / f"{index}.png")
    return root
