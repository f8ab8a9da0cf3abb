"""Tuning a caption encoder by the caption contrastive loss, on `StageTrainer`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import set_seed

from llm2clip.callbacks import KeepFloat32, NoInputGradients
from llm2clip.caption_loss import PairFeatures, caption_loss
from llm2clip.caption_pairs import PairExample, PairSource, PairStream, text_key
from llm2clip.llm import add_lora
from llm2clip.teacher import CaptionEncoder, CaptionTokenizer
from llm2clip.trainer import StageTrainer, StageTrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class TeacherTrainingArguments(StageTrainingArguments):
    """Defaults of LLM2CLIP `llm_caption_contrastive/train_configs/supervised/MetaLlama3_cc3m.json`, 8 processes."""

    zero_stages = (1, 2)  # 3 leaves every process a part of the LLM, which is measured and written whole

    per_device_train_batch_size: int = 64
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "linear"  # type: ignore[assignment]  # TrainingArguments turns it into its enum
    warmup_steps: float = 300
    bf16: bool = True
    save_steps: float = 200


class PairCollator:
    """Examples to a batch of tokens; texts of similar length are padded together.

    Args:
        tokenize: the encoder's tokenizer.
        has_negatives: whether examples of this stream may have a negative; the same for all batches and processes.
        length_groups: parts of equal size that the texts, sorted by length, are encoded in. More of them compute less
            padding; the result is the same.
    """

    def __init__(self, tokenize: CaptionTokenizer, *, has_negatives: bool, length_groups: int) -> None:
        self._tokenize = tokenize
        self._has_negatives = has_negatives
        self._length_groups = length_groups

    def __call__(self, examples: Sequence[PairExample]) -> dict[str, Any]:
        """Collate.

        Returns:
            `groups`: token batches, which together hold all queries, then all positives, then all negatives, in the
            order `order`; `keys`: (5, batch) int64, the fields of `PairFeatures` from `query_keys` on.
        """
        texts = [example.query for example in examples] + [example.positive for example in examples]
        instructions = [example.instruction for example in examples] + [""] * len(examples)
        if self._has_negatives:
            texts += [example.negative or example.query for example in examples]  # the key 0 says which to ignore
            instructions += [""] * len(examples)
        encoded = self._tokenize.encode(texts, instructions)
        by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]))
        size = -(-len(encoded) // self._length_groups)
        parts = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        order = torch.empty(len(encoded), dtype=torch.long)
        order[torch.tensor(by_length)] = torch.arange(len(encoded))
        keys = [
            [text_key(example.query) for example in examples],
            [text_key(example.positive) for example in examples],
            [text_key(example.negative) if example.negative else 0 for example in examples],
            [text_key(example.group) for example in examples],
            [text_key(example.negative_group) for example in examples],
        ]
        return {
            "groups": [self._tokenize.pad([encoded[index] for index in part]) for part in parts],
            "order": order,
            "keys": torch.tensor(keys),
        }


class PairModel(nn.Module):
    """Caption encoder that takes `PairCollator`'s batches."""

    def __init__(self, encoder: CaptionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, groups: list[dict[str, torch.Tensor]], order: torch.Tensor, keys: torch.Tensor) -> PairFeatures:
        """Encode all texts of a batch."""
        embeddings = torch.cat([self.encoder(**group) for group in groups])[order]  # (2 or 3 * batch, dim)
        queries, positives, *negatives = embeddings.split(keys.shape[1])
        return PairFeatures(
            queries=queries,
            positives=positives,
            negatives=negatives[0] if negatives else None,
            query_keys=keys[0],
            positive_keys=keys[1],
            negative_keys=keys[2],
            groups=keys[3],
            negative_groups=keys[4],
        )

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Pass on what the Trainer asks for."""
        self.encoder.llm.activation_checkpointing_enable(**settings)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The same, as older versions of transformers spell it."""
        self.encoder.llm.gradient_checkpointing_enable(**settings)


def tune_encoder(
    encoder: CaptionEncoder,
    training: TeacherTrainingArguments,
    pairs: Sequence[PairSource],
    weights: Sequence[float],
    *,
    batches: Literal["one_source", "mixed"],
    lora: dict[str, Any],
    merge_share: float,
    loss: dict[str, Any],
    length_groups: int,
) -> StageTrainer:
    """Train LoRA on the encoder, merge it, and record the stage in its spec.

    Args:
        encoder: changed in place.
        training: settings; an epoch is as many examples as the sources have rows.
        pairs: sources of examples.
        weights: share of each source.
        batches: see `PairStream`.
        lora: settings of `add_lora`.
        merge_share: how much of the learned change is merged, 1 for all.
        loss: settings of `caption_loss`.
        length_groups: see `PairCollator`.

    Returns:
        The trainer, whose checkpoints are still there.
    """
    training.max_steps = training.num_steps(sum(len(source) for source in pairs))
    stream = PairStream(
        pairs,
        weights,
        num_positions=training.max_steps * training.global_batch_size,
        batch_size=training.contrast_batch_size,
        batches=batches,
        seed=training.seed,
    )
    training.warn_of_accumulation("pairs")
    set_seed(training.seed)  # LoRA starts from random numbers
    model = add_lora(PairModel(encoder), encoder.llm, **lora)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(
        "%s rows, %d steps of %d pairs; %d of %d layers, %.2f M LoRA parameters",
        *(" + ".join(str(len(source)) for source in pairs), training.max_steps, training.global_batch_size),
        *(lora["num_layers"] or encoder.spec.num_hidden_layers, encoder.spec.num_hidden_layers, trainable / 1e6),
    )
    trainer = StageTrainer(
        model=model,
        args=training,
        train_dataset=stream,  # type: ignore[arg-type]  # map-style by its methods
        data_collator=PairCollator(encoder.tokenize, has_negatives=stream.has_negatives, length_groups=length_groups),
        objective=partial(caption_loss, **loss),
        callbacks=[NoInputGradients(encoder.llm), *([KeepFloat32(model)] if training.rounds_weights else [])],
    )
    trainer.train()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(merge_share)
    model.merge_and_unload()  # type: ignore[operator]
    encoder.spec.stages.append(
        {
            "stage": "caption-contrastive",
            "num_steps": training.max_steps,
            "global_batch_size": training.global_batch_size,
            "contrast_batch_size": training.contrast_batch_size,
            "lora": lora,
            "merge_share": merge_share,
            "loss": loss,
        }
    )
    return trainer
