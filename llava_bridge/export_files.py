"""Write a LLaVA model as a directory that stock transformers 4.50, 4.57 and 5.x, vLLM and lmms-eval load.

`write_llava` writes everything but the model card; `image_processor_for` is the preprocessing that the exported files
describe, for training.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava_bridge.legacy_layout import legacy_config, legacy_state_dict
from llava_bridge.templates import IMAGE_TOKEN
from llava_bridge.tower import TowerSpec

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaImageProcessorPil, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

ImageAspect = Literal["pad", "square"]
MAX_SHARD_BYTES = 5_000_000_000


def write_llava(
    directory: Path,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    tower_processor: BaseImageProcessor,
    *,
    image_aspect: ImageAspect,
    chat_template: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model with its processor; a model that is already at `directory` is replaced.

    All is written beside `directory` and renamed at the end, so that a directory of that name is always whole.

    Args:
        directory: to write.
        model: stock, adapters merged, its tower whole; stored in the dtype it has.
        tokenizer: a fast one, with `<image>` and a pad token.
        tower_processor: the tower's own image processor.
        image_aspect: how images were made square in training; see `image_processor_for`.
        chat_template: jinja, for plain strings and typed parts.
        max_shard_bytes: of one safetensors file.

    Raises:
        ValueError: if a part cannot be exported, or `directory` holds something that is no model.
    """
    if directory.exists() and not (directory / "config.json").is_file():
        raise ValueError(f"{directory} exists and holds no model (no config.json); it is not replaced")
    config: Any = model.config
    spec = TowerSpec.of(config.vision_config, config.vision_feature_layer)
    image_processor = image_processor_for(tower_processor, image_aspect, image_size=spec.image_size)
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.mkdir(parents=True)
    try:
        write_tokenizer(unfinished, tokenizer, chat_template)
        write_processor(unfinished, image_processor, spec, config.vision_feature_select_strategy)
        write_json(unfinished / "config.json", legacy_config(model, pad_token_id=pad_token_id(tokenizer)))
        write_json(unfinished / "generation_config.json", generation_settings(model, tokenizer))
        write_weights(unfinished, legacy_state_dict(model), max_shard_bytes)
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def image_processor_for(
    tower_processor: BaseImageProcessor, image_aspect: ImageAspect, *, image_size: int | None = None
) -> LlavaImageProcessorPil:
    """The preprocessing of images that training and the export share.

    Pillow's backend, whatever is installed: LLaVA's own preprocessing bit by bit. (torchvision's, which transformers 5
    prefers where it is installed, is one grey level off.)

    Args:
        tower_processor: the tower's own, of which size, statistics and resampling are taken.
        image_aspect: `pad` puts the image into the middle of a square of the mean colour, as LLaVA-1.5 does in stage
            2 (llava/mm_utils.py, `expand2square`); `square` does what the tower's own processor does: cut the middle
            out (CLIP) or squash (SigLIP).
        image_size: pixels per side to make instead of those that `tower_processor` makes.

    Returns:
        A processor of images to pixel_values (num_images, 3, size, size).

    Raises:
        ValueError: if `tower_processor` does not make square, normalised images of one size.
    """
    from transformers import LlavaImageProcessorPil

    settings = tower_processor.to_dict()
    size = {key: value for key, value in (settings.get("size") or {}).items() if value is not None}
    cropping = bool(settings.get("do_center_crop"))
    square = (settings.get("crop_size") or {}) if cropping else size
    edge = square.get("height")
    resized = set(size) in ({"shortest_edge"}, {"height", "width"}) if cropping else True
    steps = [step for step in ("do_resize", "do_rescale", "do_normalize") if not settings.get(step)]
    if edge is None or square.get("width") != edge or not resized or steps:
        raise ValueError(
            f"{type(tower_processor).__name__} with size {size}, crop_size {settings.get('crop_size')} and without "
            f"{steps or 'anything missing'} cannot be used; expected one that resizes, makes squares of one size (by "
            "do_center_crop with crop_size, or by a size of equal height and width), rescales and normalises"
        )
    target = image_size or edge
    if image_aspect == "pad":
        size, cropping = {"shortest_edge": target}, True  # of a square: nothing is left to cut off
    else:
        size = {key: round(value * target / edge) for key, value in size.items()}
    return LlavaImageProcessorPil(
        do_pad=image_aspect == "pad",
        size=size,
        do_center_crop=cropping,
        crop_size={"height": target, "width": target},  # without cropping too: LlavaProcessor counts tokens by it
        resample=settings["resample"],
        rescale_factor=settings["rescale_factor"],
        image_mean=list(settings["image_mean"]),
        image_std=list(settings["image_std"]),
    )


def write_weights(directory: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
    """Write model.safetensors, or its shards with their index."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)


def write_processor(
    directory: Path, image_processor: LlavaImageProcessorPil, spec: TowerSpec, select_strategy: str
) -> None:
    """Write preprocessor_config.json and processor_config.json as transformers 4.x does; 5.x reads them too."""
    settings = {
        **image_processor.to_dict(),
        "image_processor_type": "LlavaImageProcessor",  # the Pil suffix is of 5.x
        "processor_class": "LlavaProcessor",
    }
    write_json(directory / "preprocessor_config.json", settings)
    write_json(
        directory / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_TOKEN,
            "patch_size": spec.patch_size,
            "vision_feature_select_strategy": select_strategy,
            "num_additional_image_tokens": spec.num_prefix_tokens,
        },
    )


def write_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
    """Write the tokenizer as a generic fast one: tokenizer.json is then all there is to it, in every version.

    The classes of single models rebuild parts of it by rules that changed between 4.x and 5.x, and 4.x does not know
    5.x's name for the generic one. It adds no special token to a text, since the chat template writes them all: some
    programs (vLLM, `tokenizer.apply_chat_template`) turn off what a tokenizer adds to a prompt, and others do not.

    Raises:
        ValueError: if there is no tokenizer.json of it.
    """
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json; expected a fast tokenizer")
    rules = json.loads(file.read_text(encoding="utf-8"))
    fixed = {"truncation": None, "padding": None}  # what its last call in training had set
    write_json(file, {**rules, **fixed, "post_processor": _adding_nothing(rules["post_processor"])})
    roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    others = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    others = [token for token in others if token not in roles.values()]  # `<image>` at least
    special_tokens = {**roles, "additional_special_tokens": others}
    added = {
        token_id: {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }
    settings = {
        **special_tokens,
        "added_tokens_decoder": added,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "left",  # for generation in batches
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "special_tokens_map.json", special_tokens)
    (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _adding_nothing(post_processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a tokenizer.json's post-processor, the part that adds no tokens: byte-level BPE's, for offsets."""
    processors = (post_processor or {}).get("processors", [post_processor])
    return next((part for part in processors if part and part["type"] == "ByteLevel"), None)


def generation_settings(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Greedy decoding that ends at any end token of the tokenizer or of the LLM's own generation settings."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if isinstance(ends, list) else [ends]
    ends = list(dict.fromkeys(end for end in (tokenizer.eos_token_id, *ends) if end is not None))
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": pad_token_id(tokenizer)}
    if tokenizer.bos_token_id is not None:
        settings["bos_token_id"] = tokenizer.bos_token_id
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return settings


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the pad token; a ValueError if there is none."""
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; add one before composing the model")
    return tokenizer.pad_token_id  # type: ignore[return-value]


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as the Hugging Face libraries format theirs."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
