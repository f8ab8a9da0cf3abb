"""Prove that an exported model is the one it was exported from: a process that does not know this package loads it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_bridge.export_files import generation_settings
from llava_bridge.tower import TowerSpec
from llm2clip.fresh_process import MAX_GREY_LEVELS, check_in_fresh_process

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaImageProcessorPil, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CONVERSATION = (
    {"role": "user", "content": "<image>\nWhat is in the image?"},
    {"role": "assistant", "content": "A red cat."},
    {"role": "user", "content": "Where is it?"},
)
"""What is asked about the image; its form for `templates.generation_prompt` is the caller's."""
MAX_LOGIT_DIFFERENCE = 1e-3
"""In float32, relative to the largest logit: kernels of other versions and devices round differently."""
NUM_GENERATED = 8


@dataclass(frozen=True)
class Reference:
    """What an exported model must reproduce; see `export_check.check`."""

    tensors: dict[str, torch.Tensor]
    conversation: Sequence[dict[str, str]]

    @property
    def metadata(self) -> dict[str, str]:
        """The header of the file that `export_check.py` reads."""
        return {"conversation": json.dumps(list(self.conversation))}


def make_reference(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: LlavaImageProcessorPil,
    prompt_ids: Sequence[int],
    conversation: Sequence[dict[str, str]] = CONVERSATION,
) -> Reference:
    """Ask the model in memory.

    Args:
        model: stock; it is moved to float32, where it stays.
        tokenizer: its own.
        image_processor: of `image_processor_for`.
        prompt_ids: the conversation's prompt as training tokenizes it, every image token written out.
        conversation: messages with plain strings, the image in front of the first; the last is the user's.

    Raises:
        ValueError: if the model's rotary frequencies have been rounded, so that no reader would have them.
    """
    import numpy as np
    import torch
    from PIL import Image
    from transformers import GenerationConfig

    rounded = [name for name, buffer in model.named_buffers() if buffer.dtype in (torch.bfloat16, torch.float16)]
    if rounded:
        raise ValueError(
            f"the buffer {rounded[0]} has been rounded to half precision, as model.to(dtype) does, and stays rounded; "
            "readers compute it in float32. Cast parameters alone: parameter.data = parameter.data.to(dtype)"
        )
    config: Any = model.config
    size = TowerSpec.of(config.vision_config, config.vision_feature_layer).image_size
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((2 * size, 3 * size // 2), Image.Resampling.BICUBIC)
    pixels = image_processor(images=image, return_tensors="pt")["pixel_values"]  # (1, 3, size, size)
    prompt = torch.tensor(list(prompt_ids))
    words = prompt[prompt != config.image_token_index]  # a prompt without an image
    input_ids = torch.full((2, len(prompt)), int(tokenizer.pad_token_id))  # type: ignore[arg-type]
    input_ids[0], input_ids[1, : len(words)] = prompt, words
    attention_mask = (torch.arange(len(prompt)) < torch.tensor([[len(prompt)], [len(words)]])).long()
    exact: Any = model.float().eval()
    device = exact.device
    # The model's own would fill in what the exported settings leave out, such as a penalty on repetition.
    exact.generation_config = GenerationConfig(**generation_settings(model, tokenizer), max_new_tokens=NUM_GENERATED)
    with torch.no_grad():
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixels}
        logits = exact(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        asked = prompt[None].to(device)
        answer = exact.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            pixel_values=pixels.to(device),
        )
    tensors = {
        **batch,
        "logits": logits,
        "image": torch.from_numpy(np.array(image)),
        "image_pixel_values": pixels[0],
        "prompt_ids": prompt,
        "generated_ids": answer[0, len(prompt) :],
    }
    return Reference({name: tensor.cpu().clone() for name, tensor in tensors.items()}, conversation)


def verify(directory: Path, reference: Reference) -> dict[str, Any]:
    """Load an exported model in a fresh process that cannot import this package, and compare.

    Returns:
        What `export_check.check` found.

    Raises:
        RuntimeError: saying what differs.
    """
    script = Path(__file__).with_name("export_check.py")
    report = check_in_fresh_process(script, directory, reference.tensors, reference.metadata)
    if problems := find_problems(report):
        raise RuntimeError(f"{directory} is not the model it was exported from: {'; '.join(problems)}")
    logger.info("export: %s loads with transformers %s, all keys, same logits", directory, report["transformers"])
    return report


def find_problems(report: dict[str, Any]) -> list[str]:
    """What is wrong in a report of `export_check.check`; empty if the model is faithful."""
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := report[kind]:
            problems.append(f"{len(keys)} {kind.replace('_', ' ')}, first {keys[0]}")
    if not report["logits"] <= MAX_LOGIT_DIFFERENCE:
        problems.append(f"logits differ by {report['logits']:.2g}, at most {MAX_LOGIT_DIFFERENCE:g} expected")
    if not report["image"] <= MAX_GREY_LEVELS:
        problems.append(f"pixel values differ by {report['image']:.1f} grey levels, at most {MAX_GREY_LEVELS:g}")
    for name, ids in report["prompts"].items():
        if ids:
            problems.append(f"prompt of {name}: token ids {ids['found']}, in training {ids['expected']}")
    if ids := report["generated_ids"]:
        problems.append(f"it answers {ids['found']}, expected {ids['expected']}")
    if len(set(report.get("num_image_tokens", []))) > 1:
        counted, actual = report["num_image_tokens"]
        problems.append(f"the processor counts {counted} tokens per image, there are {actual}")
    return problems
