"""`export --for llava-original`: a tower directory for the original LLaVA repository, and the commands that train it.

LLaVA v1.2 takes any local path for `--vision_tower` and loads it with CLIPVisionModel and CLIPImageProcessor of
transformers 4.37, whatever it is (llava/model/multimodal_encoder/builder.py).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_bridge.export_files import image_processor_for, write_json
from llm2clip.vision_tower import write_tower

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

SHARED_FLAGS = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": "-2",
    "mm_use_im_start_end": "False",
    "mm_use_im_patch_token": "False",
    "bf16": "True",
    "num_train_epochs": "1",
    "per_device_eval_batch_size": "4",
    "gradient_accumulation_steps": "1",
    "evaluation_strategy": "no",
    "save_strategy": "steps",
    "save_total_limit": "1",
    "weight_decay": "0.",
    "warmup_ratio": "0.03",
    "lr_scheduler_type": "cosine",
    "logging_steps": "1",
    "tf32": "True",
    "model_max_length": "2048",
    "gradient_checkpointing": "True",
    "dataloader_num_workers": "4",
    "lazy_preprocess": "True",
    "report_to": "none",
}
"""What both stages have in common in LLaVA's scripts/v1_5/pretrain.sh and finetune.sh, but for wandb. The defaults of
the program are others (layer -1, a linear projector, 512 tokens): every flag is needed."""
PRETRAIN_FLAGS = {
    "version": "plain",
    "data_path": "./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "image_folder": "./playground/data/LLaVA-Pretrain/images",
    "tune_mm_mlp_adapter": "True",
    "per_device_train_batch_size": "32",
    "save_steps": "24000",
    "learning_rate": "1e-3",
}
"""scripts/v1_5/pretrain.sh; a global batch of 256 on eight GPUs."""
FINETUNE_FLAGS = {
    "version": "v1",
    "data_path": "./playground/data/llava_v1_5_mix665k.json",
    "image_folder": "./playground/data",
    "image_aspect_ratio": "pad",
    "group_by_modality_length": "True",
    "per_device_train_batch_size": "16",
    "save_steps": "50000",
    "learning_rate": "2e-5",
}
"""scripts/v1_5/finetune.sh; a global batch of 128 on eight GPUs."""


def export_for_original(
    vision_model: PreTrainedModel,
    tower_processor: BaseImageProcessor,
    directory: Path,
    *,
    llm: str = "lmsys/vicuna-7b-v1.5",
) -> str:
    """Write the tower and say how to train with it.

    Args:
        vision_model: of type clip_vision_model, whole.
        tower_processor: its own image processor.
        directory: to write.
        llm: directory or hub id of a Llama or Vicuna model.

    Returns:
        Shell commands of both stages, to be run in the original repository.

    Raises:
        ValueError: if the original repository cannot load such a tower.
    """
    model_type = vision_model.config.model_type
    if model_type != "clip_vision_model":
        raise ValueError(
            f"the original LLaVA loads every tower with CLIPVisionModel, and this one is of type {model_type!r}; "
            "expected 'clip_vision_model'. Train it with llava-bridge instead"
        )
    config: Any = vision_model.config
    processor = image_processor_for(tower_processor, "square", image_size=config.image_size)
    write_tower(vision_model, tower_processor, directory)
    settings = processor.to_dict()
    del settings["do_pad"]  # LLaVA pads by itself where image_aspect_ratio says so
    write_json(directory / "preprocessor_config.json", {**settings, "image_processor_type": "CLIPImageProcessor"})
    written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    dtype = str(vision_model.dtype).removeprefix("torch.")
    written = {key: value for key, value in written.items() if key != "dtype"}  # of 5.x
    write_json(directory / "config.json", {**written, "torch_dtype": dtype})
    return training_commands(directory.resolve(), llm=llm)


def training_commands(tower: Path, *, llm: str) -> str:
    """The commands of both stages of LLaVA-1.5 with a tower, as its own scripts have them."""
    name = f"llava-v1.5-{Path(llm).name}-{tower.parent.name}-{tower.name}"
    projector = f"./checkpoints/{name}-pretrain"
    pretrain = {**PRETRAIN_FLAGS, "output_dir": projector}
    finetune = {
        **FINETUNE_FLAGS,
        "pretrain_mm_mlp_adapter": f"{projector}/mm_projector.bin",
        "output_dir": f"./checkpoints/{name}",
    }
    both = {"model_name_or_path": llm, "vision_tower": str(tower), **SHARED_FLAGS}
    return (
        "# In a checkout of the original LLaVA, on eight GPUs; scale the batch size or accumulation for fewer.\n"
        "# The trained model loads the tower from this directory again: keep it where it is.\n"
        f"\n# Stage 1\n{deepspeed_command('./scripts/zero2.json', {**both, **pretrain})}\n"
        f"\n# Stage 2\n{deepspeed_command('./scripts/zero3.json', {**both, **finetune})}\n"
    )


def deepspeed_command(config: str, flags: dict[str, str]) -> str:
    """One command over several lines."""
    lines = [f"--{flag} {shlex.quote(value)}" for flag, value in {"deepspeed": config, **flags}.items()]
    return " \\\n    ".join(["deepspeed llava/train/train_mem.py", *lines])
