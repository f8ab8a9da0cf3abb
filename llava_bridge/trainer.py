"""Training of LLaVA's two stages on the toolkit's Trainer: its loss, its log lines and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_bridge.labels import IGNORE
from llava_bridge.tuning import WEIGHTS, load_tensors, save_tensors, trained_names
from llm2clip.trainer import Scalars, StageTrainer, StageTrainingArguments


@dataclass
class PretrainArguments(StageTrainingArguments):
    """Defaults of LLaVA's scripts/v1_5/pretrain.sh: a global batch of 256 on 8 GPUs."""

    per_device_train_batch_size: int = 32
    num_train_epochs: float = 1.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    lr_scheduler_type: str = "cosine"  # type: ignore[assignment]  # TrainingArguments turns it into its enum
    warmup_steps: float = 0.03  # a share of the steps


@dataclass
class FinetuneArguments(PretrainArguments):
    """Defaults of LLaVA's scripts/v1_5/finetune.sh: a global batch of 128 on 8 GPUs."""

    per_device_train_batch_size: int = 16
    learning_rate: float = 2e-5
    gradient_checkpointing: bool = True


class LlavaTrainer(StageTrainer):
    """`StageTrainer` for `LlavaForTraining`.

    Args:
        compat: average over micro-batches, as LLaVA on transformers 4.37; else over the supervised tokens of a step.
        metadata: texts for the header of what is written.
        inherited: names of tensors that differ from the tower's and the LLM's own though they are not trained.
        max_unsupervised: the run fails if more than this share of its samples has no supervised token.
        **settings: of `StageTrainer`.
    """

    def __init__(
        self,
        *,
        compat: bool,
        metadata: dict[str, str],
        inherited: set[str],
        max_unsupervised: float,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        # whether the Trainer counts the tokens of a step for us, or divides by the number of micro-batches
        self.model_accepts_loss_kwargs = not compat
        self.metadata = metadata
        self.names = inherited | trained_names(self.model)
        self.max_unsupervised = max_unsupervised
        self._unsupervised = 0.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch: its share of the step's mean over tokens, or in compat mode its own mean."""
        outputs = model(**inputs)
        losses, rows = outputs["token_losses"], outputs["rows"]
        if num_items_in_batch is None:
            loss = losses.sum() / max(1, losses.numel())
        else:
            supervised_tokens = torch.as_tensor(num_items_in_batch).clamp(min=1)  # of the step, on all processes
            loss = losses.sum() / supervised_tokens * self.args.world_size  # which are averaged
        with_image = (inputs["input_ids"] == self.model.config.image_token_index).any(dim=1)
        of_image = with_image[rows]
        supervised = (inputs["labels"] != IGNORE).any(dim=1)
        self.record(
            loss=loss,
            image_loss_sum=losses[of_image].sum(),
            image_tokens=of_image.sum(),
            text_loss_sum=losses[~of_image].sum(),
            text_tokens=(~of_image).sum(),
            tokens=inputs["attention_mask"].sum(),
            slots=torch.tensor(inputs["attention_mask"].numel(), device=loss.device),
            samples=torch.tensor(len(with_image), device=loss.device),
            unsupervised=(~supervised).sum(),
        )
        return (loss, outputs) if return_outputs else loss

    def summarise(self, means: Scalars, batches_per_second: float) -> tuple[Scalars, Scalars]:
        """Losses by modality, share of padding and supervised tokens; tokens per second.

        Raises:
            RuntimeError: if too many samples had no supervised token.
        """
        self._unsupervised += means["unsupervised"]
        num_samples = self.args.max_steps * self.args.global_batch_size
        if self._unsupervised > max(1, self.max_unsupervised * num_samples):
            raise RuntimeError(
                f"{self._unsupervised:.0f} of the run's {num_samples} samples have no supervised token, at most "
                f"data.max_bad_fraction {self.max_unsupervised:g} may: answers are empty, or cut off by max_length"
            )
        supervised = means["image_tokens"] + means["text_tokens"]
        metrics = {"loss": (means["image_loss_sum"] + means["text_loss_sum"]) / max(1.0, supervised)}
        for modality in ("image", "text"):
            if means[f"{modality}_tokens"]:
                metrics[f"{modality}_loss"] = means[f"{modality}_loss_sum"] / means[f"{modality}_tokens"]
        metrics["supervised_tokens"] = supervised / means["samples"]
        metrics["padding"] = 1 - means["tokens"] / means["slots"]
        return metrics, {"tokens_per_second": round(means["tokens"] * batches_per_second, 1)}

    def save_final(self, directory: Path) -> None:
        """Write every tensor that is not the tower's or the LLM's own."""
        state_dict = self.accelerator.get_state_dict(self.model_wrapped) if self.is_deepspeed_enabled else None
        if self.is_world_process_zero():
            save_tensors(directory / WEIGHTS, self.model, self.names, self.metadata, state_dict)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint holds what is trained, not the whole model; under DeepSpeed its own files hold all of it."""
        assert output_dir is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_tensors(Path(output_dir) / WEIGHTS, self.model, self.names, self.metadata, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tensors(Path(resume_from_checkpoint) / WEIGHTS, self.model)
