"""What some stages have done at the beginning and the end of training, besides what `StageTrainer` does."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


class KeepFloat32(TrainerCallback):
    """Train a model's float32 weights, and give them back to it at the end, where DeepSpeed rounds them.

    For `StageTrainingArguments.rounds_weights`: DeepSpeed makes bf16 or fp16 of all weights, also of what is not
    trained, and then trains float32 copies of the rounded ones. With this a run starts from and writes the weights it
    does with DDP, which rounds within the forward pass only.

    Args:
        model: as it is before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Any] = dict(chain(model.named_parameters(), model.named_buffers()))
        self.exact = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in self.tensors.items()
            if tensor.dtype == torch.float32
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for name in [name for name in self.exact if self.tensors[name].requires_grad]:
            start = self.exact.pop(name)
            if state.global_step == 0:  # else a checkpoint has brought it
                safe_set_full_fp32_param(self.tensors[name], start.to(self.tensors[name].device))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, tensor in self.tensors.items():
            if tensor.requires_grad:
                tensor.data = safe_get_full_fp32_param(tensor)  # gathers it: every process has to come here
            elif name in self.exact:
                tensor.data = self.exact[name].to(tensor.device)


class NoInputGradients(TrainerCallback):
    """Undo what gradient checkpointing switches on in transformers: input embeddings that require a gradient.

    Only reentrant checkpointing needs it, which is not the default. It would have the layers below the lowest adapter
    computed again and back-propagated for nothing.

    Args:
        llm: the model that checkpoints.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.llm.disable_input_require_grads()
