"""`llava-bridge chat MODEL --image FILE`: talk with an exported model about an image, in the terminal.

Reads any stock `LlavaForConditionalGeneration` directory (or hub id) with its processor. Without `--question` it asks
for questions until an empty line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="llava-bridge chat", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="exported model: directory or hub id")
    parser.add_argument("--image", type=Path, required=True, help="what to talk about")
    parser.add_argument("--question", help="answer this one question and end")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--device", default=None, help="such as cpu or cuda; default: the first GPU there is")
    return parser.parse_args(argv)


def load(model: str, device: str | None) -> tuple[Any, Any]:
    """Model and processor, ready to generate."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    try:
        processor = AutoProcessor.from_pretrained(model)
        llava: Any = LlavaForConditionalGeneration.from_pretrained(model, dtype="auto")
    except (OSError, KeyError) as error:
        raise ValueError(f"{model} holds no LLaVA model with its processor ({error}); expected an export") from error
    return llava.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor


def answer(
    llava: Any,
    processor: Any,
    messages: list[dict[str, Any]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> str:
    """Generate the next turn, printing it as it comes.

    Args:
        llava: stock model.
        processor: its processor.
        messages: typed turns; the first holds `{"type": "image", "image": ...}`, the last is the user's.
        max_new_tokens: at most this many.
        temperature: 0 is greedy.

    Returns:
        The answer.
    """
    import torch
    from transformers import TextStreamer

    batch = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(llava.device, llava.dtype)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode():
        ids = llava.generate(**batch, streamer=streamer, max_new_tokens=max_new_tokens, **sampling)
    return processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(argv: Sequence[str] | None = None) -> None:
    """`llava-bridge chat`."""
    from llm2clip.images import decode_image

    args = parse(argv)
    image = decode_image(args.image.read_bytes())
    llava, processor = load(args.model, args.device)
    messages: list[dict[str, Any]] = []
    question = args.question
    while True:
        if question is None:
            sys.stdout.write("> ")
            sys.stdout.flush()
            question = sys.stdin.readline().strip()
        if not question:
            return
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image", "image": image})
        messages.append({"role": "user", "content": content})
        text = answer(llava, processor, messages, max_new_tokens=args.max_new_tokens, temperature=args.temperature)
        if args.question is not None:
            return
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        question = None
