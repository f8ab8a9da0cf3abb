"""Load an exported LLaVA as a stranger would, and compare it with the model it was exported from.

Run as a script in a process of its own, `python -I export_check.py MODEL REFERENCE`, by `llava-bridge export` and,
under older versions of transformers, by the tests. It imports nothing of this toolkit and makes sure that nothing else
does. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file


def check(directory: str, reference_file: str) -> dict[str, Any]:
    """Load configuration, processor and model with stock classes and compare them with the reference.

    Args:
        directory: exported model.
        reference_file: safetensors of `export_verify.make_reference`: `input_ids`, `attention_mask` (prompts, length),
            `pixel_values` and `logits`; `image` (uint8 HWC) and `image_pixel_values`; `prompt_ids` of a conversation
            about it, `generated_ids`; in the metadata, the `conversation` as JSON, with plain strings.

    Returns:
        Version of transformers; missing, unexpected and mismatched keys; `logits` and `image`, the largest differences
        (relative to the largest logit; in grey levels); `prompts`, for each way of asking, the token ids where they
        differ from the reference's; `generated_ids` if they differ; `num_image_tokens`, as the processor counts them
        from a size, and how many there are; and the answer.
    """
    reference = load_file(reference_file)
    with safe_open(reference_file, "pt") as file:
        conversation = json.loads(file.metadata()["conversation"])
    processor = transformers.AutoProcessor.from_pretrained(directory)
    llava: Any = transformers.LlavaForConditionalGeneration
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model, loading = llava.from_pretrained(directory, output_loading_info=True, **{dtype: torch.float32})
    model.eval()
    asked = reference["attention_mask"].bool()
    expected = reference["logits"][asked]
    with torch.no_grad():
        inputs = {name: reference[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        logits = model(**inputs).logits[asked]
    image = reference["image"].numpy()
    encoded = {
        f"{name}{end}": processor(images=[image], text=text, return_tensors="pt", **settings)
        for name, text in prompt_texts(processor, conversation).items()
        for end, settings in (("", {}), (", nothing added", {"add_special_tokens": False}))  # vLLM adds nothing
    }
    grey_level = 1 / (255 * np.asarray(processor.image_processor.image_std)[:, None, None])
    pixels = next(iter(encoded.values()))["pixel_values"][0].numpy()
    distance = np.abs(pixels - reference["image_pixel_values"].numpy()) / grey_level
    prompt_ids = reference["prompt_ids"]
    prompt = {"input_ids": prompt_ids[None], "attention_mask": torch.ones_like(prompt_ids)[None]}
    count = len(reference["generated_ids"])
    with torch.no_grad():
        answer = model.generate(**prompt, pixel_values=reference["image_pixel_values"][None], max_new_tokens=count)
    generated_ids = answer[0, len(prompt_ids) :]
    report = {
        "transformers": transformers.__version__,
        "missing_keys": sorted(loading["missing_keys"]),
        "unexpected_keys": sorted(loading["unexpected_keys"]),
        "mismatched_keys": sorted(str(key) for key in loading["mismatched_keys"]),
        "logits": ((logits - expected).abs().max() / expected.abs().max()).item(),
        "image": float(distance.max()),
        "prompts": {name: different(inputs["input_ids"][0], prompt_ids) for name, inputs in encoded.items()},
        "generated_ids": different(generated_ids, reference["generated_ids"]),
        "answer": processor.tokenizer.decode(generated_ids, skip_special_tokens=True),
    }
    if hasattr(processor, "_get_num_multimodal_tokens"):  # of 4.56 and later; vLLM's Transformers backend needs it
        counted = processor._get_num_multimodal_tokens(image_sizes=[image.shape[:2]]).num_image_tokens
        report["num_image_tokens"] = [*counted, int((prompt_ids == model.config.image_token_index).sum())]
    return report


def prompt_texts(processor: Any, conversation: list[dict[str, str]]) -> dict[str, str]:
    """The prompt as programs ask for it: from plain strings (lmms-eval) and from typed parts (pipelines, vLLM)."""
    typed = []
    for message in conversation:
        parts: list[dict[str, str]] = []
        text = message["content"]
        if text.startswith("<image>\n"):
            parts, text = [{"type": "image"}], text.removeprefix("<image>\n")
        typed.append({"role": message["role"], "content": [*parts, {"type": "text", "text": text}]})
    settings = {"tokenize": False, "add_generation_prompt": True}
    return {
        "processor, typed parts": processor.apply_chat_template(typed, **settings),
        "processor, strings": processor.apply_chat_template(conversation, **settings),
        "tokenizer, strings": processor.tokenizer.apply_chat_template(conversation, **settings),
        "tokenizer, typed parts": processor.tokenizer.apply_chat_template(typed, **settings),
    }


def different(found: torch.Tensor, expected: torch.Tensor) -> dict[str, list[int]] | None:
    """None if equal, else both."""
    if found.shape == expected.shape and bool((found == expected).all()):
        return None
    return {"found": found.tolist(), "expected": expected.tolist()}


if __name__ == "__main__":
    for package in ("llm2clip", "llava_bridge", "llm2clip_eval"):
        sys.modules[package] = None  # type: ignore[assignment]  # any import of it fails from here on
    sys.stdout.write(json.dumps(check(sys.argv[1], sys.argv[2])) + "\n")
