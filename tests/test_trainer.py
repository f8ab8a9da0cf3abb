"""The trainer against a plain loop, a committed trajectory, interruptions and bad numbers."""

from __future__ import annotations

import json
import math
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from clip_data import deepspeed_forgotten
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, default_collate

from llm2clip.caption_training import TeacherTrainingArguments
from llm2clip.losses import clip_loss, in_batch_accuracy
from llm2clip.trainer import ClampLogitScale, StageTrainer
from llm2clip.training_arguments import ClipTrainingArguments, StageTrainingArguments

GOLDEN = Path(__file__).parent / "golden" / "trainer.json"
DEEPSPEED = Path(__file__).parents[1] / "configs" / "deepspeed"
STEPS, BATCH = 16, 8


class TwoTowers(nn.Module):
    """Two small towers, with dropout so that the state of torch's generator matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.text = nn.Linear(10, 8)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "image": F.normalize(self.image(images), dim=-1),
            "text": F.normalize(self.text(texts), dim=-1),
            "scale": self.logit_scale.exp(),
        }


class Stream(Dataset):
    """Samples that are a function of their position; `nan_at` is the position of a bad one."""

    def __init__(self, length: int, nan_at: int = -1) -> None:
        self.length = length
        self.nan_at = nan_at
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        self.seen.append(position)
        generator = torch.Generator().manual_seed(position)
        sample = {"images": torch.randn(12, generator=generator), "texts": torch.randn(10, generator=generator)}
        return {k: v * math.nan for k, v in sample.items()} if position == self.nan_at else sample


def objective(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "loss": clip_loss(outputs["image"], outputs["text"], outputs["scale"]),
        "accuracy": in_batch_accuracy(outputs["image"], outputs["text"]),
    }


def make_trainer(run_dir: Path, *, stream: Dataset | None = None, lr_scale: Any = None, **settings: Any) -> Any:
    ema_decay = settings.pop("ema_decay", None)
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "weight_decay": 0.05,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": 5,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = StageTrainingArguments(output_dir=str(run_dir / "checkpoints"), **{**defaults, **settings})
    model = TwoTowers()
    return StageTrainer(
        model=model,
        args=args,
        train_dataset=stream or Stream(args.max_steps * args.global_batch_size),
        data_collator=default_collate,
        objective=objective,
        lr_scale=lr_scale,
        ema_decay=ema_decay,
        callbacks=[ClampLogitScale(model.logit_scale)],
    )


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def plain_loop(num_steps: int = STEPS) -> tuple[nn.Module, list[dict[str, float]]]:
    """What the trainer computes, in twenty lines."""
    model = TwoTowers().train()
    torch.manual_seed(42)  # the default of training.seed
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 0, num_steps)
    history = []
    for step, batch in enumerate(DataLoader(Stream(num_steps * BATCH), batch_size=BATCH, collate_fn=default_collate)):
        values = objective(model(**batch))
        values["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        rate = schedule.get_last_lr()[0]
        schedule.step()
        optimizer.zero_grad()
        scalars = {"loss": values["loss"].item(), "accuracy": values["accuracy"].item(), "grad_norm": norm.item()}
        history.append({"step": step + 1, **scalars, "learning_rate": rate})
    return model, history


def test_trainer_equals_a_plain_loop_bit_for_bit(tmp_path: Path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    model, history = plain_loop()
    assert metrics(tmp_path) == history
    for (name, ours), (_, plain) in zip(trainer.model.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, plain), name


def test_golden_trajectory(tmp_path: Path):
    """A refactor must not move it. To record a wanted change: delete the file, run the test, commit the new one."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, lr_scale=lambda n: 0.3 if "text" in n else 1.0)
    trainer.train()
    found = [{key: line[key] for key in ("loss", "grad_norm")} for line in metrics(tmp_path)]
    if not GOLDEN.exists():
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cpu": platform.machine()}
        GOLDEN.write_text(json.dumps({"versions": versions, "trajectory": found}, indent=1) + "\n")
        pytest.fail(f"recorded {GOLDEN}; look at it and commit it")
    golden = json.loads(GOLDEN.read_text())["trajectory"]
    for key in ("loss", "grad_norm"):
        difference = torch.tensor([a[key] - b[key] for a, b in zip(found, golden, strict=True)])
        assert difference.abs().max() < 1e-4, key
        assert difference.mean().abs() < 1e-5, key  # a drift to one side


class Killed(Exception):
    pass


def kill_at(trainer: Any, step: int) -> None:
    """Raise at the end of a step, before anything of it is logged or saved."""

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Killed

    trainer.add_callback(Kill())


@pytest.mark.parametrize("killed_at", [3, 5, 13, 16])
def test_interrupted_run_ends_the_same(tmp_path: Path, killed_at: int):
    whole = make_trainer(tmp_path / "whole", ema_decay=0.9)
    whole.train()
    first = make_trainer(tmp_path / "cut", ema_decay=0.9)
    kill_at(first, killed_at)
    with pytest.raises(Killed):
        first.train()
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a line that was cut
    stream = Stream(STEPS * BATCH)
    second = make_trainer(tmp_path / "cut", ema_decay=0.9, stream=stream)
    torch.manual_seed(1234)  # must not matter
    second.train()
    assert min(stream.seen) == (killed_at - 1) // 5 * 5 * BATCH
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(value, second.ema.state_dict()[name]), name


def test_checkpoint_that_was_cut_off_does_not_count(tmp_path: Path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    first = make_trainer(tmp_path / "cut")
    kill_at(first, 12)
    with pytest.raises(Killed):
        first.train()
    checkpoints = tmp_path / "cut" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-10"]  # one is kept
    partial = shutil.copytree(checkpoints / "checkpoint-10", checkpoints / "checkpoint-11")
    (partial / "complete").unlink()
    (partial / "optimizer.pt").write_bytes(b"half")
    second = make_trainer(tmp_path / "cut")
    second.train()
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert [path.name for path in checkpoints.iterdir()] == [f"checkpoint-{STEPS}"]
    second.remove_checkpoints()
    assert not checkpoints.exists()


def test_a_run_with_other_global_batches_does_not_continue(tmp_path: Path):
    first = make_trainer(tmp_path / "run")
    kill_at(first, 12)
    with pytest.raises(Killed):
        first.train()
    (tmp_path / "run" / "checkpoints" / "checkpoint-10" / "complete").write_text(f"{2 * BATCH}\n")
    with pytest.raises(ValueError, match=f"batches of {2 * BATCH}, .* {BATCH}; start as many processes as before"):
        make_trainer(tmp_path / "run").train()


def test_number_of_workers_changes_nothing(tmp_path: Path):
    for workers in (0, 1, 2):
        make_trainer(tmp_path / str(workers), dataloader_num_workers=workers, max_steps=4).train()
    assert metrics(tmp_path / "0") == metrics(tmp_path / "1") == metrics(tmp_path / "2")


def test_accumulated_gradients_are_averaged(tmp_path: Path):
    """The gradient norm of two micro-batches is of the size of one's, not of their sum."""
    trainer = make_trainer(tmp_path / "a", gradient_accumulation_steps=2, max_steps=1, save_strategy="no")
    trainer.model.eval()
    model = TwoTowers().eval()
    samples = [Stream(2 * BATCH)[i] for i in range(2 * BATCH)]
    for batch in (samples[:BATCH], samples[BATCH:]):
        (objective(model(**default_collate(batch)))["loss"] / 2).backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    trainer.model.image[2].p = 0.0
    trainer.train()
    assert_close(metrics(tmp_path / "a")[0]["grad_norm"], expected, rtol=1e-5, atol=0)


def test_only_matrices_are_decayed_and_rates_are_scaled(tmp_path: Path):
    trainer = make_trainer(tmp_path, lr_scale=lambda name: 0.25 if name.startswith("text") else 1.0)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert found == {
        "image.0.weight": (1e-2, 0.05),
        "image.3.weight": (1e-2, 0.05),
        "image.0.bias": (1e-2, 0.0),
        "image.3.bias": (1e-2, 0.0),
        "logit_scale": (1e-2, 0.0),
        "text.weight": (2.5e-3, 0.05),
        "text.bias": (2.5e-3, 0.0),
    }


@pytest.mark.parametrize(("start", "rate", "expected"), [(4.6, 1.0, math.log(100)), (0.01, -1.0, 0.0)])
def test_logit_scale_is_clamped_in_log_space(tmp_path: Path, start: float, rate: float, expected: float):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="no", learning_rate=0.1, weight_decay=0.0)
    model = trainer.model
    with torch.no_grad():
        model.logit_scale.fill_(start)
    # the loss falls with the scale, or rises with it
    trainer.objective = lambda outputs: {"loss": -rate * outputs["scale"] + 0 * outputs["image"].sum()}
    trainer.train()
    assert_close(model.logit_scale.item(), expected)


@pytest.mark.parametrize(("logging_steps", "bad_step"), [(1, 3), (4, 6)])
def test_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path, logging_steps: int, bad_step: int):
    stream = Stream(STEPS * BATCH, nan_at=(bad_step - 1) * BATCH + 2)
    trainer = make_trainer(tmp_path, stream=stream, logging_steps=logging_steps, save_steps=4)
    with pytest.raises(RuntimeError, match=f"not finite at step {bad_step};"):
        trainer.train()
    assert all(math.isfinite(value) for line in metrics(tmp_path) for value in line.values())
    for checkpoint in (tmp_path / "checkpoints").glob("*"):
        assert int(checkpoint.name.rpartition("-")[2]) < bad_step


def test_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tmp_path: Path):
    trainer = make_trainer(tmp_path, max_steps=1)
    scale = trainer.model.logit_scale
    trainer.objective = lambda outputs: {"loss": outputs["image"].sum() + (scale - scale.detach()).abs().sqrt()}
    with pytest.raises(RuntimeError, match="the gradient is not finite at step 1;"):
        trainer.train()
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_last_interval_is_logged_though_it_is_shorter(tmp_path: Path):
    make_trainer(tmp_path, max_steps=7, logging_steps=3, save_strategy="no").train()
    every_step = tmp_path / "every"
    make_trainer(every_step, max_steps=7, save_strategy="no").train()
    lines, steps = metrics(tmp_path), metrics(every_step)
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert_close(lines[0]["loss"], sum(line["loss"] for line in steps[:3]) / 3)
    assert lines[2]["loss"] == steps[6]["loss"]
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in speed] == [3, 6, 7]
    assert all(entry["samples_per_second"] > 0 and entry["rss_gib"] > 0 for entry in speed)
    assert speed[-1]["eta_seconds"] == 0


def test_logged_parameter_is_the_mean_of_what_the_steps_began_with(tmp_path: Path):
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=3, save_strategy="no")
    trainer.objective = lambda outputs: {**objective(outputs), "logit_scale": trainer.model.logit_scale}
    values = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            values.append(trainer.model.logit_scale.item())

    trainer.add_callback(Watch())
    trainer.train()
    assert len(set(values)) == 3
    assert_close(metrics(tmp_path)[0]["logit_scale"], sum(values) / 3)


def test_moving_average_is_what_is_saved(tmp_path: Path):
    trainer = make_trainer(tmp_path, ema_decay=0.5, max_steps=3, save_strategy="no", lr_scheduler_type="constant")
    states = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            states.append(trainer.model.text.weight.detach().clone())

    trainer.add_callback(Watch())
    trainer.train()
    expected = 0.25 * states[0] + 0.25 * states[1] + 0.5 * states[2]
    assert_close(trainer.ema.module.text.weight, expected)
    assert not torch.allclose(trainer.model.text.weight, expected)
    trainer.model.save_pretrained = lambda directory: None
    trainer.save_final(tmp_path)
    assert_close(trainer.model.text.weight, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_steps": 5, "logging_steps": 2}, "save_steps 5 is no multiple of training.logging_steps 2"),
        ({"logging_steps": 0.5}, "training.logging_steps is 0.5"),
        ({"save_strategy": "epoch"}, "training.save_strategy"),
        ({"save_only_model": True}, "training.save_only_model"),
        ({"save_total_limit": 3}, "training.save_total_limit"),
    ],
)
def test_settings_that_would_break_resuming_are_refused(tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize("arguments", [ClipTrainingArguments, TeacherTrainingArguments])
def test_zero3_is_refused_where_whole_weights_are_written(tmp_path: Path, arguments: type[StageTrainingArguments]):
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with deepspeed_forgotten():
        arguments(**settings, deepspeed=f"{DEEPSPEED}/zero2.json")
        with pytest.raises(ValueError, match="ZeRO stage 3 is not supported .* one of 1, 2, such"):
            arguments(**settings, deepspeed=f"{DEEPSPEED}/zero3.json")
        args = StageTrainingArguments(**settings, deepspeed=f"{DEEPSPEED}/zero3.json")
        assert args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3  # LLaVA's stages take it
    assert not transformers.integrations.is_deepspeed_zero3_enabled()
