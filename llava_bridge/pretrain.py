"""Stage `pretrain`: LLaVA's first stage, the projector alone on images and captions.

Reads a vision tower, a decoder LLM and dialogues; writes `trained.safetensors`, whose header and manifest name the
tower and the LLM by fingerprint, and metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_bridge import stage
from llava_bridge.llava_config import PretrainConfig
from llm2clip.config import StageCall

STAGE = "pretrain"


def parse(argv: Sequence[str] | None = None) -> StageCall[PretrainConfig]:
    """Parse the command line of `llava-bridge pretrain`."""
    training = "llava_bridge.trainer:PretrainArguments"
    return stage.parse(PretrainConfig, argv, prog=f"llava-bridge {STAGE}", training_class=training)


def inputs(call: StageCall[PretrainConfig]) -> dict[str, str]:
    """Fingerprints of tower, LLM and dialogues."""
    return stage.fingerprints(call.config, stage.open_data(call.config))


def run(call: StageCall[PretrainConfig]) -> None:
    """Train, or continue a killed run.

    Raises:
        FileNotFoundError: if tower, LLM or dialogues are missing.
        ValueError: if they cannot be used, or the output directory is another run's.
        RuntimeError: if the loss is not finite; names the step.
    """
    data = stage.open_data(call.config)
    stage.run_stage(call, STAGE, stage.fingerprints(call.config, data), data)


def main(argv: Sequence[str] | None = None) -> None:
    """`llava-bridge pretrain`."""
    run(parse(argv))
