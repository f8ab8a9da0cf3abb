"""LLaVA's two stages: what they train and write, what they refuse, and that interruptions change nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from llava_data import llava_parts, stage_argv, tiny_tower, write_dialogues
from processes import TWO_PROCESSES, kill_when, start
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from llava_bridge import export, finetune, pretrain
from llava_bridge import stage as training_stage
from llava_bridge.dataset import training_order
from llava_bridge.dialogues import DialogueData
from llm2clip.cli import dispatch
from llm2clip.run_dir import read_manifest

PROJECTOR = "model.multi_modal_projector."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llava") / "parts"
    llava_parts(directory)
    return directory


@pytest.fixture(scope="module")
def stage1(root: Path) -> Path:
    return train(pretrain, stage_argv(llava_parts(root), root / "captions", root.parent / "stage1"))


def train(stage, argv: list[str]) -> Path:
    call = stage.parse(argv)
    stage.run(call)
    return call.config.output_dir


def tuning(root: Path, output: Path, **settings) -> list[str]:
    settings = {"learning_rate": 0.003, **settings}
    rate = settings.pop("learning_rate")
    return stage_argv(llava_parts(root), root / "dialogues", output, training__learning_rate=rate, **settings)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "trained.safetensors")


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_pretrain_writes_the_projector_and_whose_it_is(root: Path, stage1: Path):
    names = {f"{PROJECTOR}linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
    with safe_open(stage1 / "trained.safetensors", "pt") as file:
        assert set(file.keys()) == names
        header = json.loads(file.metadata()["llava_bridge"])
    inputs = read_manifest(stage1)["inputs"]
    assert {part: header[part] for part in ("tower", "llm")} == {part: inputs[part] for part in ("tower", "llm")}
    losses = [entry["loss"] for entry in metrics(stage1)]
    assert losses[-1] < losses[0] - 0.3
    assert not (stage1 / "checkpoints").exists()


def test_a_sample_is_shown_with_its_mask(root: Path, tmp_path: Path, caplog):
    caplog.set_level("INFO")
    train(finetune, tuning(root, tmp_path / "run", training__max_steps=2))
    assert "USER: <image> x 4\nWhat colour is it? ASSISTANT:[ " in caplog.text
    assert "</s>]" in caplog.text


def test_stage_2_starts_from_stage_1_and_refuses_another_pair(root: Path, stage1: Path, tmp_path: Path, capsys):
    still = train(finetune, tuning(root, tmp_path / "still", pretrained=str(stage1), learning_rate=1e-12))
    for name, tensor in weights(stage1).items():
        assert_close(weights(still)[name], tensor, rtol=0, atol=1e-9)
    other = {**llava_parts(root), "tower": str(tiny_tower(tmp_path / "other", seed=1))}
    argv = stage_argv(other, root / "dialogues", tmp_path / "refused", pretrained=str(stage1))
    commands = {"finetune": ("llava_bridge.finetune", "")}
    assert dispatch("llava-bridge", commands, ["finetune", *argv]) == 2
    assert "trained with another tower" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_missing_part_is_named(root: Path, tmp_path: Path):
    parts = {**llava_parts(root), "tower": "runs/none/tower-x/vision_tower"}
    with pytest.raises(FileNotFoundError, match="runs/none/tower-x/vision_tower does not exist"):
        pretrain.main(stage_argv(parts, root / "captions", tmp_path / "run"))


def exported(run: Path, **settings: str) -> Path:
    output = run.with_name(f"{run.name}-export")
    argv = ["--trained", str(run), "--output_dir", str(output), "--dtype", "float32"]
    export.main(argv + [word for key, value in settings.items() for word in (f"--{key}", value)])
    return output


def tower_of(model: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(model / "model.safetensors")
    return {name.removeprefix("vision_tower."): value for name, value in tensors.items() if "vision_tower." in name}


@pytest.mark.parametrize("vision", ["frozen", "full", "lora"])
def test_frozen_towers_stay_as_they_are_and_tuned_ones_are_exported(root, stage1, tmp_path, vision):
    run = train(finetune, tuning(root, tmp_path / "run", pretrained=str(stage1), tune__vision=vision, lora__rank=4))
    original = {f"vision_model.{name.removeprefix('vision_model.')}": tensor
                for name, tensor in load_file(root / "tower" / "model.safetensors").items()}  # fmt: skip
    found = tower_of(exported(run) / "model")
    assert found.keys() == original.keys()
    changed = {name for name in found if not torch.equal(found[name], original[name])}
    if vision == "frozen":
        assert not changed
    else:
        in_use = {name for name in found if "layers.2." not in name and "post_layernorm" not in name}
        assert changed and changed <= in_use  # what lies behind the feature layer is the original's
        assert changed == in_use if vision == "full" else all("weight" in name for name in changed)


def test_qlora_trains_adapters_of_the_llm_in_4_bits(root: Path, stage1: Path, tmp_path: Path, monkeypatch):
    """The same curve as LoRA of an LLM that holds what the 4 bits stand for; the export merges into all bits."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    replaced = []

    def build_dequantised(*args):
        composed, inherited = build(*args)
        for name, module in [*composed.model.named_modules()]:
            if isinstance(module, Linear4bit):
                parent, _, child = name.rpartition(".")
                values = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
                linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
                linear.weight = torch.nn.Parameter(values, requires_grad=False)
                setattr(composed.model.get_submodule(parent), child, linear)
                replaced.append(name)
        return composed, inherited

    settings = {"pretrained": str(stage1), "tune__llm": "qlora", "lora__rank": 4}
    run = train(finetune, tuning(root, tmp_path / "run", **settings))
    build = training_stage.build
    monkeypatch.setattr(training_stage, "build", build_dequantised)
    other = train(finetune, tuning(root, tmp_path / "other", **settings))
    assert len(replaced) == 7 * 3 and all(name.endswith(".base_layer") for name in replaced)
    assert [entry["loss"] for entry in metrics(run)] == [entry["loss"] for entry in metrics(other)]
    assert all(".lora_" in name or name.startswith(PROJECTOR) for name in weights(run))
    assert (exported(run) / "model" / "model.safetensors").is_file()  # verified by the export


def test_learning_rates_by_part(root: Path, stage1: Path, tmp_path: Path):
    """A part with a rate of nothing does not move, beside one that does."""
    argv = tuning(root, tmp_path / "run", pretrained=str(stage1), tune__vision="full", vision_learning_rate=1e-13)
    found = weights(train(finetune, argv))
    original = load_file(root / "tower" / "model.safetensors")
    name = "encoder.layers.0.mlp.fc1.weight"
    before = original.get(name, original.get(f"vision_model.{name}"))
    assert_close(found[f"model.vision_tower.{name}"], before, rtol=0, atol=1e-9)
    moved = found[f"{PROJECTOR}linear_1.weight"] - weights(stage1)[f"{PROJECTOR}linear_1.weight"]
    assert moved.abs().max() > 1e-4


@pytest.mark.parametrize("compat", [False, True])
def test_accumulated_gradients(root: Path, stage1: Path, tmp_path: Path, compat: bool):
    """Four micro-batches of two are one batch of eight; in LLaVA's own reduction they are not."""
    settings = {"pretrained": str(stage1), "data__group_by_modality_length": False, "training__max_steps": 2}
    if compat:
        settings["compat"] = "llava"
    one = train(finetune, tuning(root, tmp_path / "one", **settings))
    small = {"training__per_device_train_batch_size": 2, "training__gradient_accumulation_steps": 4}
    four = train(finetune, tuning(root, tmp_path / "four", **settings, **small))
    same = [first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
            for first, second in zip(metrics(one), metrics(four), strict=True)]  # fmt: skip
    assert all(same) is not compat
    assert metrics(one)[0]["loss"] == pytest.approx(metrics(four)[0]["loss"], rel=1e-4)  # what is logged is the same


def test_compat_does_not_clip(root: Path, stage1: Path, tmp_path: Path):
    settings = {"pretrained": str(stage1), "training__max_steps": 2, "training__max_grad_norm": 1e-3,
                "training__optim": "sgd"}  # fmt: skip
    clipped = weights(train(finetune, tuning(root, tmp_path / "clipped", **settings)))
    free = weights(train(finetune, tuning(root, tmp_path / "free", compat="llava", **settings)))
    start_from = weights(stage1)
    name = f"{PROJECTOR}linear_2.weight"
    assert (free[name] - start_from[name]).norm() > 100 * (clipped[name] - start_from[name]).norm()


def test_every_epoch_begins_with_a_step_of_its_own(root: Path):
    """Else batches of the second epoch would mix modalities."""
    data = DialogueData.open(root / "dialogues" / "dialogues.json")
    settings = {"batch_size": 3, "window": 2, "seed": 0, "grouped": True, "compat": True}
    order = training_order(data, None, num_steps=12, **settings)
    assert len(order) == 72 and set(order[:36]) == set(range(32)) == set(order[36:])
    assert order[:36] == training_order(data, None, num_steps=6, **settings) != order[36:]
    mixed = [len({bool(data[i].images) for i in order[at : at + 6]}) > 1 for at in range(0, 72, 6)]
    assert sum(mixed) <= 2 * 2  # the tail of an epoch, and what fills it up


def test_samples_without_a_target_fail_the_run(root: Path, tmp_path: Path):
    argv = tuning(root, tmp_path / "run", data__max_length=45)  # the system message alone is longer
    with pytest.raises(ValueError, match=r"32 of 32 dialogues cannot be trained on .* too long: \d+ tokens"):
        finetune.main(argv)


def test_a_bad_image_is_replaced_and_listed(tmp_path: Path):
    parts = llava_parts(tmp_path / "parts")
    data = tmp_path / "parts" / "dialogues"
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:70])
    argv = stage_argv(parts, data, tmp_path / "few", data__max_bad_fraction=0.0, training__max_steps=8)
    run = train(finetune, argv)  # one is always allowed
    listed = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "image: " in listed[0]["reason"] and "image-3" in listed[0]["where"]
    for index in range(12):
        (data / f"{index}.png").write_bytes(b"")
    argv = stage_argv(parts, data, tmp_path / "many", data__max_bad_fraction=0.0, training__max_steps=8)
    with pytest.raises(ValueError, match=r"dialogues cannot be used, more than .*skipped\.jsonl lists them"):
        finetune.main(argv)


@pytest.mark.parametrize(("settings", "match"), [
    ({"tune__llm": "frozen", "tune__projector": "frozen"}, "nothing to train"),
    ({"vision_learning_rate": 1e-6}, "tune.vision is frozen"),
    ({"tune__vision_last_layers": 2}, "needs tune.vision full"),
    ({"template": "plain", "system": "Be short."}, "the template plain has no system message"),
    ({"data__path": ""}, "data.path is missing"),
    ({"tune__vision": "half", "template": "v1"}, "tune.vision.*\n.*template|template.*\n.*tune.vision"),
])  # fmt: skip
def test_contradicting_settings(root: Path, tmp_path: Path, settings, match):
    with pytest.raises(ValueError, match=match):
        finetune.parse(tuning(root, tmp_path / "run", **settings))
    with pytest.raises(ValueError, match="adapters belong to finetune"):
        pretrain.parse(tuning(root, tmp_path / "run", tune__llm="lora"))


def test_adapters_merged_and_apart_are_the_same_model(root: Path, stage1: Path, tmp_path: Path):
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    argv = tuning(root, tmp_path / "run", pretrained=str(stage1), tune__llm="lora", lora__rank=4)
    run = train(finetune, argv)
    merged = LlavaForConditionalGeneration.from_pretrained(exported(run) / "model")
    run.rename(tmp_path / "again")
    apart = exported(tmp_path / "again", merge_lora="false")
    base = LlavaForConditionalGeneration.from_pretrained(apart / "model")
    ids = torch.arange(5, 25)[None]
    plain = base(input_ids=ids).logits
    model = PeftModel.from_pretrained(base, apart / "adapter")
    assert_close(model(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert (plain - merged(input_ids=ids).logits).abs().max() > 1e-2


def test_changed_parts_are_not_exported(root: Path, tmp_path: Path):
    parts = llava_parts(tmp_path / "parts")
    run = train(pretrain, stage_argv(parts, tmp_path / "parts" / "captions", tmp_path / "run", training__max_steps=2))
    tiny_tower(tmp_path / "parts" / "tower", seed=5)
    with pytest.raises(ValueError, match="is not the tower that .* was trained with"):
        exported(run)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune-lora"])
def test_kill_at_random_moments_changes_nothing(root: Path, stage1: Path, tmp_path: Path, stage: str):
    settings = {"training__max_steps": 60, "training__save_steps": 4}
    data = root / ("captions" if stage == "pretrain" else "dialogues")
    if stage == "finetune-lora":
        settings |= {"pretrained": str(stage1), "template": "chat"}
        settings |= {"tune__llm": "lora", "lora__rank": 4, "tune__vision": "full"}
    command = f"llava-bridge {stage.partition('-')[0]}"
    module = pretrain if stage == "pretrain" else finetune
    whole = train(module, stage_argv(llava_parts(root), data, tmp_path / "whole", **settings))
    run = tmp_path / "killed"
    argv = stage_argv(llava_parts(root), data, run, **settings)
    moments, kills = random.Random(stage), 0

    def last_step() -> int:
        return metrics(run)[-1]["step"] if (run / "metrics.jsonl").is_file() and metrics(run) else 0

    for _ in range(3):
        target = last_step() + moments.randint(1, 14)
        kills += kill_when(start(command, argv, DS_ACCELERATOR="cpu"), lambda t=target: last_step() >= t)
    assert kills >= 2  # else there was nothing to continue
    assert start(command, argv).wait() == 0
    for file in ("metrics.jsonl", "trained.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_two_processes_train_like_one(root: Path, stage1: Path, tmp_path: Path, launcher: str):
    """On batches with and without images, also after kill -9 (DDP: tests/test_train_clip.py, the same trainer)."""
    write_dialogues(tmp_path / "mixed", num_images=20, num_texts=20)
    settings = {"pretrained": str(stage1), "template": "chat", "training__max_steps": 12, "tune__vision": "full",
                "training__save_steps": 4, "data__group_by_modality_length": False}  # fmt: skip
    parts = llava_parts(root)
    one = train(finetune, stage_argv(parts, tmp_path / "mixed", tmp_path / "one", **settings))
    settings["training__per_device_train_batch_size"] = 4
    settings["training__deepspeed"] = f"configs/deepspeed/{launcher}.json"
    run = tmp_path / launcher
    argv = stage_argv(parts, tmp_path / "mixed", run, **settings)
    checkpoint = run / "checkpoints" / "checkpoint-8" / "complete"
    assert kill_when(start("llava-bridge finetune", argv, *TWO_PROCESSES, DS_ACCELERATOR="cpu"), checkpoint.exists)
    assert start("llava-bridge finetune", argv, *TWO_PROCESSES, DS_ACCELERATOR="cpu").wait() == 0
    for ours, single in zip(metrics(run), metrics(one), strict=True):
        for key in ("loss", "image_loss", "text_loss", "grad_norm"):
            assert ours[key] == pytest.approx(single[key], rel=2e-3), (ours["step"], key)
    for name, value in weights(one).items():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding, which Adam blows up
            assert_close(weights(run)[name], value, rtol=1e-3, atol=2e-4)
