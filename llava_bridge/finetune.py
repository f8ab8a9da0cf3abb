"""Stage `finetune`: LLaVA's second stage, instruction tuning of projector and LLM (in full, by LoRA or QLoRA).

Reads a vision tower, a decoder LLM, the output of pretrain for the same two, and dialogues; writes
`trained.safetensors` (with what was trained before), whose header and manifest name the tower and the LLM by
fingerprint, and metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_bridge import stage
from llava_bridge.llava_config import FinetuneConfig
from llm2clip.config import StageCall

STAGE = "finetune"


def parse(argv: Sequence[str] | None = None) -> StageCall[FinetuneConfig]:
    """Parse the command line of `llava-bridge finetune`."""
    training = "llava_bridge.trainer:FinetuneArguments"
    return stage.parse(FinetuneConfig, argv, prog=f"llava-bridge {STAGE}", training_class=training)


def inputs(call: StageCall[FinetuneConfig]) -> dict[str, str]:
    """Fingerprints of tower, LLM, dialogues and stage 1."""
    return stage.finetune_inputs(call.config, stage.open_data(call.config))


def run(call: StageCall[FinetuneConfig]) -> None:
    """Train, or continue a killed run.

    Raises:
        FileNotFoundError: if tower, LLM or dialogues are missing.
        ValueError: if they cannot be used, or the output directory is another run's.
        RuntimeError: if the loss is not finite; names the step.
    """
    data = stage.open_data(call.config)
    stage.run_stage(call, STAGE, stage.finetune_inputs(call.config, data), data, call.config.pretrained)


def main(argv: Sequence[str] | None = None) -> None:
    """`llava-bridge finetune`."""
    run(parse(argv))
