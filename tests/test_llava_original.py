"""`export --for llava-original`: a tower that the original LLaVA loads, and the commands that train with it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import old_transformers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_llava import llava_model, llava_tokenizer, tower_processor

from llava_bridge import llava_original
from llm2clip import export as tower_export
from llm2clip import export_check as tower_check


def original_tower(directory: Path, **settings: Any) -> tuple[torch.nn.Module, str]:
    tower = copy.deepcopy(llava_model("clip", llava_tokenizer()).model.vision_tower)
    processor = transformers.CLIPImageProcessor(
        **{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **settings}
    )
    return tower, llava_original.export_for_original(tower, processor, directory)


def test_the_original_llava_gets_a_tower_and_its_commands(tmp_path):
    tower, commands = original_tower(tmp_path / "my run" / "vision_tower")
    directory = tmp_path / "my run" / "vision_tower"
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert all(name.startswith("vision_model.") for name in file.keys())
        assert file.metadata() == {"format": "pt"}  # 4.37 refuses files without
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model" and config["torch_dtype"] == "float32"
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "CLIPImageProcessor" and "do_pad" not in settings
    assert settings["crop_size"] == {"height": 32, "width": 32} and settings["size"] == {"shortest_edge": 32}
    first, second = commands.split("# Stage 2")
    for stage, flags in (
        (first, "version plain|learning_rate 1e-3|per_device_train_batch_size 32|tune_mm_mlp_adapter True"),
        (second, "version v1|learning_rate 2e-5|per_device_train_batch_size 16|image_aspect_ratio pad"),
    ):
        shared = "mm_vision_select_layer -2|mm_projector_type mlp2x_gelu|mm_use_im_patch_token False"
        for flag in f"{flags}|{shared}|model_max_length 2048|warmup_ratio 0.03|vision_tower '{directory}'".split("|"):
            assert f"--{flag}" in stage
    assert "--deepspeed ./scripts/zero2.json" in first and "--deepspeed ./scripts/zero3.json" in second
    assert "image_aspect_ratio" not in first
    output = first.split("--output_dir ")[1].split("\n")[0].strip("'")
    assert f"--pretrain_mm_mlp_adapter '{output}/mm_projector.bin'" in second
    pixels = torch.randn(2, 3, 32, 32)
    loaded = transformers.CLIPVisionModel.from_pretrained(directory)
    torch.testing.assert_close(loaded(pixels).last_hidden_state, tower(pixels).last_hidden_state, rtol=0, atol=1e-6)


def test_the_original_llava_has_no_place_for_other_towers(tmp_path):
    tower = llava_model("siglip", llava_tokenizer()).model.vision_tower
    with pytest.raises(ValueError, match="loads every tower with CLIPVisionModel, and this one is of type 'siglip"):
        llava_original.export_for_original(tower, tower_processor("siglip"), tmp_path / "vision_tower")
    assert not (tmp_path / "vision_tower").exists()


@pytest.mark.slow
def test_the_transformers_of_the_original_llava_reads_its_tower(tmp_path):
    tower, _ = original_tower(tmp_path / "vision_tower")
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "vision_tower")
    save_file(tower_export.reference_outputs(tower, processor), tmp_path / "reference.safetensors")  # type: ignore[arg-type]
    path = old_transformers.install("4.37", tmp_path / "packages")
    arguments = (tower_check.__file__, tmp_path / "vision_tower", tmp_path / "reference.safetensors")
    report = old_transformers.check_under(path, *arguments)
    assert report["transformers"] == "4.37.2" and math.isfinite(report["image"])
    assert tower_export.find_problems(report) == []
