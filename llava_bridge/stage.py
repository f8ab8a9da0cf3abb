"""What pretrain and finetune have in common: everything but their defaults and what they start from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_bridge.parts import check_stage_1
from llava_bridge.tuning import WEIGHTS
from llm2clip.caption_sources import write_skipped
from llm2clip.config import StageCall, parse_stage
from llm2clip.run_dir import RunDir, fingerprint, is_main_process, model_fingerprint

if TYPE_CHECKING:
    from llava_bridge.compose import Composed
    from llava_bridge.dataset import DialogueEncoder
    from llava_bridge.dialogues import DialogueData
    from llava_bridge.llava_config import FinetuneConfig, LlavaStageConfig
    from llava_bridge.trainer import PretrainArguments

logger = logging.getLogger(__name__)

PREFLIGHT = 1000
"""Dialogues that are looked at before training begins."""


def parse(config_class: type[Any], argv: Sequence[str] | None, *, prog: str, training_class: str) -> StageCall[Any]:
    """Parse a command line; `compat: llava` sets training.max_grad_norm to 0, for DeepSpeed too.

    The original's DeepSpeed files have no `gradient_clipping`, and DeepSpeed's own default is none.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    call = parse_stage(config_class, given, prog=prog, training_class=training_class)
    if call.config.compat == "llava":
        call = parse_stage(
            config_class, [*given, "--training.max_grad_norm", "0"], prog=prog, training_class=training_class
        )
    return call


def fingerprints(config: LlavaStageConfig, data: DialogueData) -> dict[str, str]:
    """Fingerprints of tower, LLM and dialogues."""
    found = {"data": data.fingerprint}
    for part in ("tower", "llm"):
        found[part] = model_fingerprint(getattr(config, part))
    return found


def open_data(config: LlavaStageConfig) -> DialogueData:
    """The dialogues."""
    from llava_bridge.dialogues import DialogueData

    root = Path(config.data.image_root) if config.data.image_root else None
    return DialogueData.open(Path(config.data.path), root, max_bad_fraction=config.data.max_bad_fraction)


def run_stage(
    call: StageCall[Any], stage: str, inputs: dict[str, str], data: DialogueData, pretrained: Path | None = None
) -> None:
    """Train, or continue a killed run, and write `trained.safetensors`.

    Args:
        call: the parsed invocation.
        stage: its name.
        inputs: fingerprint of everything that is read.
        data: the dialogues.
        pretrained: directory of the stage before, whose tensors are the start.
    """
    with RunDir(call, stage=stage, inputs=inputs) as run_dir:
        if run_dir.complete:
            logger.info("%s: already complete, %s", stage, run_dir.path)
            return
        _train(call, stage, inputs, data, pretrained, run_dir)


def _train(
    call: StageCall[Any],
    stage: str,
    inputs: dict[str, str],
    data: DialogueData,
    pretrained: Path | None,
    run_dir: RunDir,
) -> None:
    from llava_bridge import tuning
    from llava_bridge.dataset import DialogueCollator, DialogueStream, training_order
    from llava_bridge.trainer import LlavaTrainer, PretrainArguments

    config, args = call.config, call.training
    assert isinstance(args, PretrainArguments)
    composed, inherited = build(config, args, pretrained)
    encoder = encoder_of(config, composed)
    if is_main_process():
        look_at(encoder, data, config.data.max_bad_fraction, stage)
    args.max_steps = args.num_steps(-(-len(data) // args.global_batch_size) * args.global_batch_size)
    order = training_order(
        data,
        composed.tokenizer,
        num_steps=args.max_steps,
        batch_size=args.train_batch_size,
        window=args.world_size * args.gradient_accumulation_steps,
        seed=args.seed,
        grouped=config.data.group_by_modality_length,
        compat=config.compat == "llava",
    )
    stream = DialogueStream(
        data,
        encoder,
        order,
        skipped_file=run_dir.path / "skipped.jsonl",
        max_bad_fraction=config.data.max_bad_fraction,
    )
    parameters = tuning.count_parameters(composed.model)
    for part, counts in parameters.items():
        logger.info("%s: %s: %d parameters trained, %d frozen", stage, part, counts["trained"], counts["frozen"])
    logger.info("%s: %d dialogues, %d steps of %d", stage, len(data), args.max_steps, args.global_batch_size)
    trainer = LlavaTrainer(
        model=composed.model,
        args=args,
        train_dataset=stream,
        data_collator=DialogueCollator(encoder.tokenizer.pad_token_id),
        lr_scale=tuning.learning_rate_scale(
            args.learning_rate, {"vision": config.vision_learning_rate, "projector": config.projector_learning_rate}
        ),
        compat=config.compat == "llava",
        metadata={"stage": stage, "tower": inputs["tower"], "llm": inputs["llm"]},
        inherited=inherited,
        max_unsupervised=config.data.max_bad_fraction,
    )
    trainer.train()
    trainer.save_final(run_dir.path)
    if is_main_process():
        num_skipped = write_skipped(run_dir.path / "skipped.jsonl", [data])
        if num_skipped:
            logger.warning("%s: %d dialogues were skipped, see skipped.jsonl", stage, num_skipped)
        run_dir.finish(
            [WEIGHTS],
            num_steps=args.max_steps,
            global_batch_size=args.global_batch_size,
            num_dialogues=len(data),
            num_skipped=num_skipped,
            parameters=parameters,
            metrics={name: value for name, value in trainer.state.log_history[-1].items() if name != "step"},
        )
    trainer.remove_checkpoints()


def build(config: LlavaStageConfig, args: PretrainArguments, pretrained: Path | None) -> tuple[Composed, set[str]]:
    """The model to train, and the names of tensors that it inherits from stage 1.

    Frozen parts are held in bfloat16 when training is; trained parts are float32 under autocast, except under
    DeepSpeed, which keeps float32 masters of its own.
    """
    import torch

    from llava_bridge.compose import compose
    from llava_bridge.modeling import LlavaForTraining
    from llava_bridge.tuning import load_tensors, names_with_adapters, set_trainable

    low = torch.bfloat16 if args.bf16 else torch.float32

    def dtype(tuned: str) -> torch.dtype:
        return torch.float32 if tuned == "full" and args.deepspeed_plugin is None else low

    with whole_weights(args):
        composed = compose(
            config.tower,
            config.llm,
            model_class=LlavaForTraining,
            feature_layer=config.feature_layer,
            tower_dtype=dtype(config.tune.vision),
            llm_dtype=dtype(config.tune.llm),
            quantization=quantization(args) if config.tune.llm == "qlora" else None,
            seed=args.seed,
        )
    composed.model.prepare_for_training(composed.spec)
    inherited: set[str] = set()
    if pretrained is not None:
        inherited = load_tensors(pretrained / WEIGHTS, composed.model)
    set_trainable(composed.model, config.tune, config.lora)
    if args.deepspeed_plugin is None:
        for parameter in composed.model.parameters():
            if parameter.requires_grad:  # PEFT's adapters have the dtype of what they adapt
                parameter.data = parameter.data.float()
    return composed, names_with_adapters(inherited, composed.model)


@contextmanager
def whole_weights(args: PretrainArguments) -> Iterator[None]:
    """Load weights whole: under ZeRO-3 `from_pretrained` would scatter them before they are put together.

    DeepSpeed scatters the whole model when training begins.
    """
    if args.deepspeed_plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)
        else:  # the configuration is accelerate's
            args.deepspeed_plugin.set_deepspeed_weakref()


def quantization(args: PretrainArguments) -> Any:
    """Settings of QLoRA (arXiv 2305.14314): 4-bit normal floats, quantised twice.

    Raises:
        ValueError: without bitsandbytes.
    """
    from importlib.util import find_spec

    import torch
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ValueError("tune.llm is qlora, which needs bitsandbytes; pip install -e '.[qlora]', or take lora")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
    )


def encoder_of(config: LlavaStageConfig, composed: Composed) -> DialogueEncoder:
    """What turns dialogues into tensors for this model."""
    from llava_bridge.dataset import DialogueEncoder
    from llava_bridge.export_files import image_processor_for

    return DialogueEncoder(
        template=config.template,
        system=config.system,
        tokenizer=composed.tokenizer,
        image_processor=image_processor_for(
            composed.image_processor, config.data.image_aspect, image_size=composed.spec.image_size
        ),
        num_image_tokens=composed.spec.num_image_tokens,
        max_length=config.data.max_length,
    )


def look_at(encoder: DialogueEncoder, data: DialogueData, max_bad_fraction: float, stage: str) -> None:
    """Encode an even selection of the dialogues and show one with its mask.

    Raises:
        ValueError: if the template cannot be used, or too many of them cannot be encoded or have no supervised token.
    """
    from llava_bridge.labels import IGNORE
    from llava_bridge.templates import export_chat_template

    export_chat_template(encoder.template, encoder.tokenizer, system=encoder.system)
    indices = range(0, len(data), -(-len(data) // PREFLIGHT))
    lengths, bad, shown = [], [], False
    for index in indices:
        dialogue = data[index]
        try:
            ids, labels = encoder.tokens(dialogue)
        except ValueError as error:
            bad.append(f"{dialogue.id}: {error}")
            continue
        lengths.append(len(ids))
        if all(label == IGNORE for label in labels):
            bad.append(f"{dialogue.id}: no supervised token; is data.max_length large enough?")
        elif not shown:
            logger.info("%s: a sample, [what is trained on] in brackets:\n%s", stage, show(encoder, ids, labels))
            shown = True
    logger.info(
        "%s: %d of %d dialogues looked at: %.0f tokens on average, %d at most",
        *(stage, len(lengths), len(data), sum(lengths) / max(1, len(lengths)), max(lengths, default=0)),
    )
    for problem in bad[:3]:
        logger.warning("%s: dialogue %s", stage, problem)
    if len(bad) > max(1, max_bad_fraction * len(indices)):
        raise ValueError(
            f"{len(bad)} of {len(indices)} dialogues cannot be trained on (at most data.max_bad_fraction "
            f"{max_bad_fraction} may), first {bad[0]}"
        )


def show(encoder: DialogueEncoder, ids: Sequence[int], labels: Sequence[int]) -> str:
    """A sample as text, supervised spans in brackets, image tokens as one."""
    from itertools import groupby

    from llava_bridge.labels import IGNORE
    from llava_bridge.templates import IMAGE_TOKEN

    text, position = "", 0
    for supervised, run in groupby(labels, key=lambda label: label != IGNORE):
        length = len(list(run))
        piece = encoder.tokenizer.decode(list(ids[position : position + length]), skip_special_tokens=False)
        text += f"[{piece}]" if supervised else piece
        position += length
    images = IMAGE_TOKEN * encoder.num_image_tokens
    return text.replace(images, f"{IMAGE_TOKEN} x {encoder.num_image_tokens}")


def finetune_inputs(config: FinetuneConfig, data: DialogueData) -> dict[str, str]:
    """Fingerprints of stage 2, checked against the stage 1 that it starts from."""
    found = fingerprints(config, data)
    if config.pretrained is not None:
        check_stage_1(config.pretrained, config, found)
        found["pretrained"] = fingerprint(config.pretrained)
    return found
