"""Stage `export`: a trained model as a plain Hugging Face directory.

Reads a run of finetune (or pretrain), and through it the tower and the LLM. Writes `model/`, a stock
`LlavaForConditionalGeneration` with processor and chat template, which transformers 4.50 to 5.x and vLLM read, as a
fresh process proves; or with `--for llava-original` `vision_tower/`, as the original LLaVA repository loads it, and
the commands that train with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_write, fingerprint, model_fingerprint, read_manifest

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    from llava_bridge.compose import Composed

logger = logging.getLogger(__name__)

MODEL = "model"
TOWER = "vision_tower"
ADAPTER = "adapter"


@dataclass(kw_only=True)
class ExportConfig(StageConfig):
    """Write a trained LLaVA as a stock Hugging Face directory, and prove that it loads."""

    trained: str
    """Run directory of finetune or pretrain."""
    target: Literal["transformers", "llava-original"] = "transformers"
    """Who is to read it; `--for` is another name for it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights."""
    merge_lora: bool = True
    """Add adapters to the weights; false: `adapter/` beside an unmerged model, for `PeftModel.from_pretrained`."""


def parse(argv: Sequence[str] | None = None) -> StageCall[ExportConfig]:
    """Parse the command line of `llava-bridge export`."""
    import sys

    given = list(sys.argv[1:] if argv is None else argv)
    given = [f"--target{word[5:]}" if word == "--for" or word.startswith("--for=") else word for word in given]
    return parse_stage(ExportConfig, given, prog="llava-bridge export")


def inputs(call: StageCall[ExportConfig]) -> dict[str, str]:
    """Fingerprint of the trained run."""
    return {"trained": fingerprint(call.config.trained)}


def run(call: StageCall[ExportConfig]) -> None:
    """Compose, merge, write, verify, finish."""
    with RunDir(call, stage="export", inputs=inputs(call)) as run:
        if run.complete:
            logger.info("export: %s is complete", run.path)
            return
        settings = training_settings(call.config.trained)
        composed, has_lora = restore(call.config, settings)
        if call.config.target == "llava-original":
            facts, outputs = _write_original(call.config, composed, run.path)
        else:
            facts, outputs = _write_model(call.config, settings, composed, has_lora, run.path)
        run.finish(outputs, **facts)


def training_settings(trained: str) -> dict[str, Any]:
    """Settings of a training run by dotted key, its tower and LLM checked to be what they were.

    Raises:
        FileNotFoundError: if the run is not complete, or a part of it is gone.
        ValueError: if it is no training run, or tower or LLM have changed since.
    """
    manifest = read_manifest(trained)
    if manifest["stage"] not in ("pretrain", "finetune"):
        raise ValueError(f"{trained} is a run of {manifest['stage']}; expected one of finetune or pretrain")
    settings = manifest["settings"]
    for part in ("tower", "llm"):
        path = settings[part]
        found = model_fingerprint(path)
        if found != manifest["inputs"][part]:
            raise ValueError(
                f"{path} is not the {part} that {trained} was trained with (fingerprint {found[:12]}, then "
                f"{manifest['inputs'][part][:12]}); put it back, or train again"
            )
    return settings


def restore(config: ExportConfig, settings: dict[str, Any]) -> tuple[Composed, bool]:
    """The trained model with its whole tower; whether it has adapters."""
    import torch

    from llava_bridge import tuning
    from llava_bridge.compose import compose

    composed = compose(settings["tower"], settings["llm"], feature_layer=settings["feature_layer"])
    with_lora = tuning.parts_with_lora(settings["tune.vision"], settings["tune.llm"])
    lora = tuning.LoraConfig(rank=settings["lora.rank"], alpha=settings["lora.alpha"], dropout=0.0)
    tuning.add_lora(composed.model, with_lora, lora)
    tuning.load_tensors(Path(config.trained) / tuning.WEIGHTS, composed.model)
    if with_lora and config.merge_lora:
        tuning.merge_lora(composed.model)  # in float32, before rounding
    for parameter in composed.model.parameters():  # not `.to`, which would round the frequencies of RoPE as well
        parameter.data = parameter.data.to(getattr(torch, config.dtype))
    composed.model.eval()
    return composed, bool(with_lora) and not config.merge_lora


def _write_model(
    config: ExportConfig, settings: dict[str, Any], composed: Composed, has_lora: bool, path: Path
) -> tuple[dict[str, Any], list[str]]:
    from llava_bridge import tuning
    from llava_bridge.export_files import image_processor_for, write_llava
    from llava_bridge.export_verify import CONVERSATION, make_reference, verify
    from llava_bridge.llava_card import write_model_card
    from llava_bridge.templates import export_chat_template

    conversation = CONVERSATION[:1] if settings["template"] == "plain" else CONVERSATION  # plain knows one exchange
    outputs = [MODEL, "verification.json"]
    if has_lora:
        tuning.take_out_lora(composed.model, path / ADAPTER, base=str(path / MODEL))
        outputs.append(ADAPTER)
    write_llava(
        path / MODEL,
        composed.model,
        composed.tokenizer,
        composed.image_processor,
        image_aspect=settings["data.image_aspect"],
        chat_template=export_chat_template(settings["template"], composed.tokenizer, system=settings["system"]),
    )
    reference = make_reference(
        composed.model,
        composed.tokenizer,
        image_processor_for(
            composed.image_processor, settings["data.image_aspect"], image_size=composed.spec.image_size
        ),
        prompt_ids(composed, settings, conversation),
        conversation,
    )
    report = verify(path / MODEL, reference)
    atomic_write(path / "verification.json", json.dumps(report, indent=2) + "\n")
    write_model_card(path / MODEL, config.trained, composed.model, report, has_adapters=has_lora)
    return {"num_parameters": sum(p.numel() for p in composed.model.parameters()), "merged": not has_lora}, outputs


def prompt_ids(composed: Composed, settings: dict[str, Any], conversation: Sequence[dict[str, str]]) -> list[int]:
    """Ids of a conversation's prompt, as training would write it."""
    from llava_bridge.dialogues import Turn
    from llava_bridge.templates import IMAGE_TOKEN, generation_prompt, token_ids

    turns = [Turn(message["role"], message["content"]) for message in conversation]  # type: ignore[arg-type]
    text = generation_prompt(settings["template"], turns, composed.tokenizer, system=settings["system"])
    return token_ids(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * composed.spec.num_image_tokens), composed.tokenizer)


def _write_original(config: ExportConfig, composed: Composed, path: Path) -> tuple[dict[str, Any], list[str]]:
    from llava_bridge.llava_original import export_for_original

    commands = export_for_original(composed.model.model.vision_tower, composed.image_processor, path / TOWER)
    atomic_write(path / "train.sh", commands)
    logger.info("export: the original LLaVA trains with this tower by\n%s", commands)
    return {"headline": f"{path / 'train.sh'} holds the commands for the original LLaVA"}, [TOWER, "train.sh"]


def main(argv: Sequence[str] | None = None) -> None:
    """`llava-bridge export`."""
    run(parse(argv))
