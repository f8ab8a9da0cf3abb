"""Training on transformers' Trainer: deterministic for a seed, exactly resumable, quiet.

Reads a stream of samples and a model; writes `metrics.jsonl` (a pure function of configuration and seed),
`speed.jsonl` (what depends on the machine) and `checkpoints/` below the run directory.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from llm2clip.run_dir import atomic_write
from llm2clip.training_arguments import StageTrainingArguments

logger = logging.getLogger(__name__)

COMPLETE = "complete"  # holds the global batch size; a checkpoint without it was cut off while it was written
EMA_STATE = "ema.pt"

Scalars = dict[str, float]
Objective = Callable[[Any], dict[str, torch.Tensor]]
"""Model output -> named scalars; `loss` is what is minimised, all of them are logged as means over the interval."""


class StageTrainer(Trainer):
    """Trainer of every stage that trains.

    The training data is a finite stream: a map-style dataset of `max_steps * global_batch_size` positions, read in
    order. Every sample is a pure function of its position, so the data are the same for any number of workers,
    processes and interruptions.

    Args:
        model: what is trained; called with the collated batch as keyword arguments.
        args: settings; `max_steps` must be set.
        train_dataset: the stream of samples.
        data_collator: list of samples -> dict of tensors.
        objective: model output -> named scalars, see `Objective`; None if a subclass has its own `compute_loss`.
        lr_scale: parameter name -> factor on the learning rate; default 1 for all.
        ema_decay: keep an exponential moving average of the weights, float32 ones, which `save_final` then writes.
        callbacks: called before the trainer's own bookkeeping.

    Raises:
        ValueError: if one process sees several GPUs (it would split the batch, and with it the negatives).
    """

    args: StageTrainingArguments  # type: ignore[assignment]
    model: Any  # type: ignore[assignment]  # PreTrainedModel or any other module

    def __init__(
        self,
        *,
        model: nn.Module,
        args: StageTrainingArguments,
        train_dataset: Dataset,
        data_collator: Callable[[list[Any]], Mapping[str, Any]],
        objective: Objective | None = None,
        lr_scale: Callable[[str], float] | None = None,
        ema_decay: float | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process; start with `accelerate launch`, or show it one GPU")
        assert ema_decay is None or not args.rounds_weights
        assert len(train_dataset) == args.max_steps * args.global_batch_size  # type: ignore[arg-type]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,  # type: ignore[arg-type]
            callbacks=[*callbacks, _Bookkeeping(self)],
        )
        if self.is_fsdp_enabled:
            raise ValueError("FSDP would leave every process a part of what is written; use DDP or DeepSpeed ZeRO")
        self.model_accepts_loss_kwargs = False  # else accumulated gradients are summed, not averaged
        self.objective = objective
        self.lr_scale = lr_scale or (lambda name: 1.0)
        self.ema = None
        if ema_decay is not None:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.checkpoints = Path(str(args.output_dir))
        self.run_dir = self.checkpoints.parent
        if args.deepspeed_plugin is not None:
            for parameter in model.parameters():
                if parameter.ndim == 0:
                    # DeepSpeed 0.19 fails to broadcast scalars, but leaves alone what has this mark; every process
                    # starts from the same weights anyway.
                    parameter.ds_optim_param = True  # type: ignore[attr-defined]
        self._window: list[dict[str, torch.Tensor]] = []  # of the micro-batches since the last log line
        self._window_start = time.perf_counter()
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            disable_progress_bar()  # else every checkpoint shows one
        else:
            self.remove_callback(ProgressCallback)
            self.add_callback(_ProgressBar)

    # What is computed

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Objective of one micro-batch; its scalars are kept for the next log line."""
        outputs = model(**inputs)
        assert self.objective is not None
        values = self.objective(outputs)
        self.record(**values)
        return (values["loss"], outputs) if return_outputs else values["loss"]

    def record(self, **values: torch.Tensor) -> None:
        """Keep a micro-batch's scalars, `loss` among them, for the next log line."""
        # copies: a parameter among them is about to change
        self._window.append({name: value.detach().to(torch.float32, copy=True) for name, value in values.items()})

    def summarise(self, means: Scalars, batches_per_second: float) -> tuple[Scalars, Scalars]:
        """Metrics and machine-dependent figures of a log line, from the means of what was recorded.

        `batches_per_second` counts the micro-batches of all processes.
        """
        return means, {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args.optim`: weight decay on what has two dimensions, learning rates times `lr_scale`.

        This is open_clip's rule; it takes in position embeddings, which the original of LLM2CLIP leaves out. The group
        with the highest learning rate comes first: it is the one that the Trainer logs.
        """
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((self.lr_scale(name), parameter.ndim >= 2), []).append(parameter)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.args.learning_rate * scale,
                        "weight_decay": self.args.weight_decay if decayed else 0.0,
                    }
                    for (scale, decayed), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
                ],
                **settings,
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    # What is written

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append to metrics.jsonl and speed.jsonl.

        Raises:
            RuntimeError: if a loss since the last line, or the gradient, is not finite; names the step.
        """
        if not self._window:  # the Trainer's closing summary, wall-clock figures
            return
        step = self.state.global_step
        names = list(self._window[0])
        values = torch.stack([torch.stack([entry[name] for name in names]) for entry in self._window])
        reduced: Any = self.accelerator.reduce(values, reduction="mean")
        values = reduced.double().cpu()  # (micro-batches, names)
        self._window.clear()
        bad = (~values[:, names.index("loss")].isfinite()).nonzero()
        if len(bad):
            first = step - (len(values) - 1 - int(bad[0])) // self.args.gradient_accumulation_steps
            raise RuntimeError(
                f"the loss is not finite at step {first}; lower training.learning_rate or check the data"
            )
        if not math.isfinite(logs["grad_norm"]) and not self.args.fp16:  # fp16 skips such a step and goes on
            raise RuntimeError(f"the gradient is not finite at step {step}; lower training.learning_rate")
        means = dict(zip(names, values.mean(dim=0).tolist(), strict=True))
        seconds = time.perf_counter() - self._window_start
        self._window_start = time.perf_counter()
        computed, timed = self.summarise(means, len(values) / seconds * self.args.world_size)
        metrics = {"step": step, **computed, "grad_norm": logs["grad_norm"], "learning_rate": logs["learning_rate"]}
        rate = len(values) / self.args.gradient_accumulation_steps * self.args.global_batch_size / seconds
        speed = {
            "step": step,
            "samples_per_second": round(rate, 1),
            **timed,
            "eta_seconds": round((self.state.max_steps - step) * self.args.global_batch_size / rate, 1),
            "rss_gib": round(psutil.Process().memory_info().rss / 2**30, 2),
            "gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0,
        }
        self.state.log_history.append(metrics)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(metrics))
        if self.is_world_process_zero():
            _append(self.run_dir / "metrics.jsonl", metrics)
            _append(self.run_dir / "speed.jsonl", speed)
            logger.info(
                "step %d/%d  loss %.4f  %.0f samples/s  %s left  %.1f GiB",
                *(step, self.state.max_steps, metrics["loss"], rate),
                *(_clock(speed["eta_seconds"]), speed["gpu_gib"] or speed["rss_gib"]),
            )

    def save_final(self, directory: Path) -> None:
        """Write the trained model (its moving average, if one is kept) as `from_pretrained` reads it."""
        if self.ema is not None:
            averaged: Any = self.ema.module
            self.model.load_state_dict(averaged.state_dict())
        if self.is_world_process_zero():
            self.model.save_pretrained(directory)

    # Interruption

    def train(self) -> Any:  # type: ignore[override]
        """Train from the newest complete checkpoint, if there is one, to the end.

        Raises:
            ValueError: if that was written by a run with other global batches.
        """
        checkpoint = self._newest_checkpoint()
        step = 0
        if self.ema is not None:
            self.ema.to(self.args.device)  # where DeepSpeed will have put the model
        if checkpoint is not None:
            step = _step_of(checkpoint)
            written = int((checkpoint / COMPLETE).read_text())
            if written != self.args.global_batch_size:
                raise ValueError(
                    f"{checkpoint} was written with global batches of {written}, this is a run with batches of "
                    f"{self.args.global_batch_size}; start as many processes as before"
                )
            logger.info("continuing from step %d of %d", step, self.args.max_steps)
            if self.ema is not None:
                self.ema.load_state_dict(torch.load(checkpoint / EMA_STATE, weights_only=True, map_location="cpu"))
        if self.is_world_process_zero():
            for name in ("metrics.jsonl", "speed.jsonl"):
                _truncate(self.run_dir / name, step)
        set_seed(self.args.seed)  # a checkpoint brings its own state; a start over must not depend on what came before
        return super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def remove_checkpoints(self) -> None:
        """Delete the checkpoints; for when the stage has written its manifest."""
        if self.is_world_process_zero():
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; those cut off while they were written are deleted."""
        checkpoints = sorted(self.checkpoints.glob("checkpoint-*"), key=_step_of)
        complete = [path for path in checkpoints if (path / COMPLETE).is_file()]
        self.accelerator.wait_for_everyone()  # all have looked before any is deleted
        if self.is_world_process_zero():
            for path in set(checkpoints) - set(complete[-1:]):
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        return complete[-1] if complete else None

    def complete_checkpoint(self) -> None:
        """Make the checkpoint that was just saved count, and drop the one before."""
        checkpoint = self.checkpoints / f"checkpoint-{self.state.global_step}"
        if self.ema is not None and self.is_world_process_zero():
            torch.save(self.ema.state_dict(), checkpoint / EMA_STATE)
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.is_world_process_zero():
            for path in [*checkpoint.rglob("*"), self.run_dir / "metrics.jsonl"]:
                if path.is_file():
                    _sync(path)
            atomic_write(checkpoint / COMPLETE, f"{self.args.global_batch_size}\n")
        self._newest_checkpoint()


class ClampLogitScale(TrainerCallback):
    """Hold the log-space `logit_scale` in [0, ln 100] after every step (CLIP, arXiv 2103.00020, section 2.5)."""

    def __init__(self, logit_scale: nn.Parameter) -> None:
        self.logit_scale = logit_scale

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(0.0, math.log(100.0))
        if args.deepspeed_plugin is not None and self.logit_scale.requires_grad:
            # ZeRO steps on a float32 master copy of its own, which would drift away from the clamped value
            from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

            master = safe_get_full_fp32_param(self.logit_scale)
            if master is not None:
                safe_set_full_fp32_param(self.logit_scale, master.clamp(0.0, math.log(100.0)))


class _Bookkeeping(TrainerCallback):
    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._window_start = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update_parameters(self.trainer.model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last, shorter interval too

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.complete_checkpoint()


class _ProgressBar(ProgressCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The log line says it."""


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _truncate(path: Path, step: int) -> None:
    """Drop what was logged after `step`, and a line that a kill cut in the middle."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        atomic_write(path, "".join(line for line in lines if json.loads(line)["step"] <= step))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
