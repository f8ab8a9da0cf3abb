"""The `llava-bridge` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm2clip.cli import dispatch

COMMANDS = {
    "data questions": ("llava_bridge.demo.build", "build the demo's dialogues and questions"),
    "check": ("llava_bridge.check", "report what is wrong with dialogues and their images, row by row"),
    "pretrain": ("llava_bridge.pretrain", "stage 1: train the projector on images and captions"),
    "finetune": ("llava_bridge.finetune", "stage 2: instruction tuning, in full, by LoRA or QLoRA"),
    "export": ("llava_bridge.export", "write a stock LlavaForConditionalGeneration that every reader loads"),
    "chat": ("llava_bridge.chat", "talk with an exported model about an image"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `llava-bridge` command."""
    sys.exit(dispatch("llava-bridge", COMMANDS, list(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
