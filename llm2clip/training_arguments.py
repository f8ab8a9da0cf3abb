"""Settings of the stages that train, `training.*`."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class StageTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what every stage needs; checkpoints go to `<run directory>/checkpoints`."""

    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)  # of DeepSpeed that the stage can be trained with

    logging_steps: float = 10
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False  # true for towers that do not use all they have (DINOv2's mask)

    def __post_init__(self) -> None:
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        super().__post_init__()
        problems = []
        if self.save_strategy not in ("steps", "no"):
            problems.append(f"training.save_strategy is {self.save_strategy}; only 'steps' and 'no' are supported")
        for name in ("logging_steps", "save_steps"):
            if (value := getattr(self, name)) != int(value) or value < 1:
                problems.append(f"training.{name} is {value}; give a whole number of steps")
        if not problems and self.save_strategy == "steps" and self.save_steps % self.logging_steps:
            problems.append(
                f"training.save_steps {self.save_steps:g} is no multiple of training.logging_steps "
                f"{self.logging_steps:g}; a resumed run could not repeat its metrics exactly"
            )
        if self.save_only_model:
            problems.append("training.save_only_model drops the optimizer, so a killed run could not be continued")
        if self.save_total_limit is not None:
            problems.append("training.save_total_limit: the newest complete checkpoint is kept, always exactly one")
        if self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage not in self.zero_stages:
            problems.append(
                f"training.deepspeed: ZeRO stage {self.deepspeed_plugin.zero_stage} is not supported by this command, "
                f"expected one of {', '.join(map(str, self.zero_stages))}, such as configs/deepspeed/zero2.json"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step, over all processes and accumulated micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def contrast_batch_size(self) -> int:
        """Samples that a contrastive loss sees at once: a micro-batch of all processes.

        Accumulated micro-batches are not contrasted with each other.
        """
        return self.train_batch_size * self.world_size

    def warn_of_accumulation(self, what: str) -> None:
        """Say that accumulated micro-batches are not contrasted with each other, only with `what` is in their own."""
        if self.gradient_accumulation_steps > 1 and self.process_index == 0:
            logger.warning(
                "training.gradient_accumulation_steps: a sample is contrasted with the %d %s of its micro-batch, not "
                "with the %d of the step",
                *(self.contrast_batch_size, what, self.global_batch_size),
            )

    @property
    def rounds_weights(self) -> bool:
        """Whether the model's weights in training are bf16 or fp16 copies of float32 ones that DeepSpeed keeps."""
        return self.deepspeed_plugin is not None and (self.bf16 or self.fp16)

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps: `max_steps`, else `num_train_epochs` passes over `num_samples`."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * num_samples / self.global_batch_size)


@dataclass
class ClipTrainingArguments(StageTrainingArguments):
    """Settings of train-clip; defaults are LLM2CLIP's `run.sh`, with the paper's 4 epochs (run.sh says 20)."""

    zero_stages = (1, 2)  # 3 leaves every process a part of what is written

    per_device_train_batch_size: int = 512  # on 8 GPUs: 4096
    num_train_epochs: float = 4.0
    learning_rate: float = 1e-5
    weight_decay: float = 0.05
    lr_scheduler_type: str = "cosine"  # to 0, no warm-up
    max_grad_norm: float = 5.0
