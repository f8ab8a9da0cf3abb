"""The stage: what it trains and writes, what it refuses, and that interruptions and launchers change nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_data import (
    adapter_arguments,
    clip_arguments,
    deepspeed_forgotten,
    write_clip_tokenizer,
    write_embeddings,
    write_scenes,
)
from processes import ROOT, TWO_PROCESSES, kill_when, start
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from llm2clip import train_clip
from llm2clip.caption_data import CaptionData
from llm2clip.cli import COMMANDS, dispatch
from llm2clip.clip_dataset import CaptionSource, ClipStream
from llm2clip.images import ImageTransform
from llm2clip.modeling_clip import LLM2CLIPModel


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caption data, embeddings of them, a tokenizer."""
    directory = tmp_path_factory.mktemp("inputs")
    data = write_scenes(directory / "data")
    return {
        "data": data,
        "embeddings": write_embeddings(directory / "embeddings", [data]),
        "tokenizer": write_clip_tokenizer(directory / "tokenizer"),
    }


def train(arguments: list[str]) -> Path:
    call = train_clip.parse(arguments)
    train_clip.run(call)
    return call.config.output_dir


def adapter(inputs: dict[str, Path], output: Path, **overrides: Any) -> list[str]:
    return adapter_arguments(output, inputs["data"], inputs["embeddings"], **overrides)


def vanilla(inputs: dict[str, Path], output: Path, **overrides: Any) -> list[str]:
    return clip_arguments(output, inputs["data"], inputs["tokenizer"], **overrides)


def continued(inputs: dict[str, Path], output: Path, init_from: Path, **overrides: Any) -> list[str]:
    """Vanilla CLIP that goes on from a directory."""
    arguments = vanilla(inputs, output, **{"model.init_from": init_from, **overrides})
    for name in ("--model.vision_config", "--model.text_config", "--model.tokenizer"):
        index = arguments.index(name)
        del arguments[index : index + 2]
    return arguments


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def metrics(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def llm2clip_run(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(adapter(inputs, tmp_path_factory.mktemp("runs") / "llm2clip"))


@pytest.fixture(scope="module")
def clip_run(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(vanilla(inputs, tmp_path_factory.mktemp("runs") / "clip"))


# What is written


def test_llm2clip_directory_is_complete(llm2clip_run: Path):
    model, info = LLM2CLIPModel.from_pretrained(llm2clip_run, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.teacher_fingerprint, model.config.caption_embedding_dim) == ("teacher-a", 12)
    transform = ImageTransform.from_image_processor(AutoImageProcessor.from_pretrained(llm2clip_run))
    assert transform.size == 32
    manifest = json.loads((llm2clip_run / "manifest.json").read_text())
    assert set(manifest["outputs"]) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert (manifest["num_steps"], manifest["teacher_fingerprint"]) == (6, "teacher-a")
    assert manifest["parameters"]["vision"]["frozen"] == 0
    assert [line["step"] for line in metrics(llm2clip_run)] == [1, 2, 3, 4, 5, 6]
    assert set(metrics(llm2clip_run)[0]) == {"step", "loss", "accuracy", "logit_scale", "grad_norm", "learning_rate"}
    assert not (llm2clip_run / "checkpoints").exists()


def test_clip_directory_is_complete(clip_run: Path, inputs: dict[str, Path]):
    model, info = CLIPModel.from_pretrained(clip_run, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(clip_run)
    assert tokenizer("a cat")["input_ids"] == AutoTokenizer.from_pretrained(inputs["tokenizer"])("a cat")["input_ids"]
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(
        json.loads((clip_run / "manifest.json").read_text())["outputs"]
    )


def test_rerun_does_nothing(llm2clip_run: Path, inputs: dict[str, Path]):
    before = {path.name: path.stat().st_mtime_ns for path in llm2clip_run.iterdir() if path.name != ".lock"}
    train(adapter(inputs, llm2clip_run, **{"data.cache_images": True, "training.dataloader_num_workers": 1}))
    assert before == {path.name: path.stat().st_mtime_ns for path in llm2clip_run.iterdir() if path.name != ".lock"}


# What is trained


@pytest.mark.parametrize("freeze", [[], ["vision"], ["text", "logit_scale"]])
def test_trained_parts_change_and_frozen_parts_do_not(inputs: dict[str, Path], tmp_path: Path, freeze: list[str]):
    arguments = {"freeze": freeze, "model.caption_normalization": "l2_standardize"}
    run = train(adapter(inputs, tmp_path / "run", **arguments))
    start = train(adapter(inputs, tmp_path / "start", **arguments, **{"training.learning_rate": 1e-30}))
    prefixes = {"vision": ("vision_model",), "text": ("text_adapter",), "logit_scale": ("logit_scale",)}
    frozen = tuple(prefix for part in freeze for prefix in prefixes[part])
    moments = ("text_adapter.mean", "text_adapter.rms")
    for name, value in weights(run).items():
        kept = name in moments or name.startswith(frozen)
        assert torch.equal(value, weights(start)[name]) is kept, name


def test_training_learns_to_tell_the_images_apart(inputs: dict[str, Path], tmp_path: Path):
    steps = {"training.max_steps": 150, "training.logging_steps": 50, "training.save_steps": 150}
    settings = {
        "training.learning_rate": 3e-3,
        "layer_decay": 1.0,
        "data.crop_scale": [1, 1],
        "data.cache_images": True,
    }
    run = train(adapter(inputs, tmp_path / "run", **steps, **settings))
    lines = metrics(run)
    assert lines[-1]["accuracy"] > 0.5  # by chance 0.125
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]


def test_curriculum_and_several_sources_run(inputs: dict[str, Path], tmp_path: Path):
    other = write_scenes(tmp_path / "other", 10, seed=3)
    embeddings = write_embeddings(tmp_path / "embeddings", [inputs["data"], other])
    sources = [
        {"path": str(inputs["data"]), "weight": 1.0, "final_weight": 0.0},
        {"path": str(other), "weight": 0.0, "final_weight": 1.0},
    ]
    run = train(adapter({**inputs, "embeddings": embeddings}, tmp_path / "run", **{"data.sources": sources}))
    assert json.loads((run / "manifest.json").read_text())["num_images"] == 34


def test_llm2clip_starts_from_the_vision_model_of_a_clip_directory(
    inputs: dict[str, Path], clip_run: Path, tmp_path: Path
):
    settings = {"model.init_from": clip_run, "model.vision_config": {}, "freeze": ["vision", "logit_scale"]}
    run = train(adapter(inputs, tmp_path / "lit", **settings))
    kept = {name for name in weights(clip_run) if name.startswith(("vision_model", "logit_scale"))}
    assert len(kept) > 30
    for name in kept:
        assert torch.equal(weights(run)[name], weights(clip_run)[name]), name
    assert json.loads((run / "manifest.json").read_text())["init_from"] == str(clip_run)


def test_llm2clip_and_clip_are_continued_whole(
    inputs: dict[str, Path], llm2clip_run: Path, clip_run: Path, tmp_path: Path
):
    """With a learning rate of nothing, everything is as it was."""
    still = {"training.learning_rate": 1e-30, "training.max_steps": 1}
    again = train(
        adapter(inputs, tmp_path / "a", **{"model.init_from": llm2clip_run, "model.vision_config": {}, **still})
    )
    clip_again = train(continued(inputs, tmp_path / "c", clip_run, **still))
    for run, begun in ((again, llm2clip_run), (clip_again, clip_run)):
        assert weights(run).keys() == weights(begun).keys()
        for name, value in weights(begun).items():
            assert torch.equal(value, weights(run)[name]), name


def test_standardisation_is_measured_on_the_training_captions(inputs: dict[str, Path], tmp_path: Path):
    settings = {"model.caption_normalization": "l2_standardize", "data.caption_kinds": {"raw": 1.0}}
    model = LLM2CLIPModel.from_pretrained(train(adapter(inputs, tmp_path / "run", **settings)))
    from clip_data import text_vector

    from llm2clip.caption_data import CaptionData

    texts = [c.text for sample in CaptionData.open(inputs["data"]) for c in sample.captions if c.kind == "raw"]
    vectors = torch.nn.functional.normalize(torch.stack([text_vector(text, 12) for text in texts]), dim=-1)
    assert_close(model.text_adapter.mean, vectors.mean(dim=0))
    assert_close(model.text_adapter.rms, (vectors - vectors.mean(dim=0)).square().mean().sqrt())


def test_moving_average_is_written(inputs: dict[str, Path], tmp_path: Path, llm2clip_run: Path):
    run = train(adapter(inputs, tmp_path / "run", ema_decay=0.5))
    assert metrics(run) == metrics(llm2clip_run)  # the same training
    assert any(not torch.equal(value, weights(llm2clip_run)[name]) for name, value in weights(run).items())


def test_sigmoid_loss_trains_a_bias(inputs: dict[str, Path], tmp_path: Path):
    run = train(adapter(inputs, tmp_path / "run", losses={"contrastive": 0.5, "sigmoid": 1.0}))
    assert weights(run)["logit_bias"] != -10.0
    line = metrics(run)[0]
    assert_close(line["loss"], 0.5 * line["contrastive_loss"] + line["sigmoid_loss"])


def test_a_bias_that_no_loss_reads_is_kept_and_not_trained(inputs: dict[str, Path], tmp_path: Path):
    """Else a run of several processes waits for its gradient."""
    begun = train(adapter(inputs, tmp_path / "sigmoid", losses={"sigmoid": 1.0}))
    run = train(adapter(inputs, tmp_path / "run", **{"model.init_from": begun, "model.vision_config": {}}))
    assert torch.equal(weights(run)["logit_bias"], weights(begun)["logit_bias"])
    assert not torch.equal(weights(run)["logit_scale"], weights(begun)["logit_scale"])
    parameters = json.loads((run / "manifest.json").read_text())["parameters"]
    assert parameters["logit_scale"] == {"trained": 1, "frozen": 1}


def test_gradient_checkpointing_and_bf16_run(inputs: dict[str, Path], tmp_path: Path, llm2clip_run: Path):
    checkpointed = train(adapter(inputs, tmp_path / "gc", **{"training.gradient_checkpointing": True}))
    for ours, plain in zip(metrics(checkpointed), metrics(llm2clip_run), strict=True):
        assert_close(ours["loss"], plain["loss"])
    half = train(adapter(inputs, tmp_path / "bf16", **{"training.bf16": True}))
    assert weights(half)["visual_projection.weight"].dtype == torch.float32
    assert_close(metrics(half)[0]["loss"], metrics(llm2clip_run)[0]["loss"], rtol=0.02, atol=0)
    assert metrics(half)[0]["loss"] != metrics(llm2clip_run)[0]["loss"]


def test_workers_and_image_cache_change_nothing(inputs: dict[str, Path], tmp_path: Path, llm2clip_run: Path):
    for name, settings in (
        ("workers", {"training.dataloader_num_workers": 2}),
        ("cache", {"data.cache_images": True}),
    ):
        run = train(adapter(inputs, tmp_path / name, **settings))
        for file in ("metrics.jsonl", "model.safetensors"):
            assert (run / file).read_bytes() == (llm2clip_run / file).read_bytes(), (name, file)


def test_steps_follow_from_epochs(inputs: dict[str, Path], tmp_path: Path):
    settings = {"training.max_steps": -1, "training.num_train_epochs": 2.5, "training.gradient_accumulation_steps": 2}
    run = train(adapter(inputs, tmp_path / "run", **settings))
    assert json.loads((run / "manifest.json").read_text())["num_steps"] == 4  # 2.5 * 24 / (8 * 2), rounded up


def test_accumulation_does_not_widen_the_contrast(
    inputs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = train(adapter(inputs, tmp_path / "run", **{"training.gradient_accumulation_steps": 2}))
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["global_batch_size"], manifest["contrast_batch_size"]) == (16, 8)
    assert "contrasted with the 8 captions of its micro-batch, not with the 16 of the step" in caplog.text


def test_unreadable_image_is_skipped_and_listed(tmp_path: Path):
    data = write_scenes(tmp_path / "data")
    (data / "images" / "scene-3.png").write_bytes(b"")
    embeddings = write_embeddings(tmp_path / "embeddings", [data])
    run = train(adapter_arguments(tmp_path / "run", data, embeddings, **{"data.max_bad_fraction": 0.1}))
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [line["where"] for line in skipped] == ["scene-3"]
    assert json.loads((run / "manifest.json").read_text())["num_skipped"] == 1


def test_unreadable_images_are_counted_over_all_workers(tmp_path: Path):
    """One batch for each of three workers, with one bad image in it, which is what each of them may have."""
    data = write_scenes(tmp_path / "data")
    source = CaptionSource(CaptionData.open(data), {"raw": 0.5, "long": 0.5})
    transform = ImageTransform(size=32)
    stream = ClipStream(
        [source], weights=[1], final_weights=[1], transform=transform, num_steps=3, batch_size=8, seed=42
    )
    embeddings = write_embeddings(tmp_path / "embeddings", [data])
    for position in (0, 8, 16):
        (data / "images" / f"{source.data[stream.locate(position)[1]].id}.png").write_bytes(b"")
    settings = {"data.max_bad_fraction": 0.05, "training.dataloader_num_workers": 3, "training.max_steps": 3}
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"3 of 24 images cannot be read, more than data.max_bad_fraction 0.05"):
        train(adapter_arguments(run, data, embeddings, **settings, **{"training.save_steps": 3}))
    assert len(metrics(run)) == 3  # no worker saw more than it may
    assert not (run / "model.safetensors").exists()


# What is refused


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Exit code 2, nothing written, the message."""
    output = Path(arguments[arguments.index("--output_dir") + 1])
    assert dispatch("llm2clip", COMMANDS, ["train-clip", *arguments]) == 2
    assert not list(output.glob("*.safetensors")) and not (output / "manifest.json").exists()
    return capsys.readouterr().err


def test_embeddings_of_another_teacher_are_refused(
    inputs: dict[str, Path], llm2clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = write_embeddings(tmp_path / "other", [inputs["data"]], teacher="teacher-b")
    settings = {"model.init_from": llm2clip_run, "model.vision_config": {}}
    message = refused(adapter({**inputs, "embeddings": other}, tmp_path / "run", **settings), capsys)
    assert "teacher-b" in message and "teacher-a" in message and "extract-embeddings" in message


def test_adapter_for_another_llm_size_is_refused(
    inputs: dict[str, Path], llm2clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    big = write_embeddings(tmp_path / "big", [inputs["data"]], dim=24)
    settings = {"model.init_from": llm2clip_run, "model.vision_config": {}}
    message = refused(adapter({**inputs, "embeddings": big}, tmp_path / "run", **settings), capsys)
    assert "24" in message and "12" in message and str(big) in message and str(llm2clip_run) in message


def test_embeddings_of_other_captions_are_refused(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_scenes(tmp_path / "data", 30)
    message = refused(adapter({**inputs, "data": data}, tmp_path / "run"), capsys)
    assert "no embeddings of these captions" in message and "extract-embeddings" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.caption_kinds": {"raw": 0.5, "fr": 0.5}}, "no source has captions of kind fr; there are long, raw"),
        ({"data.sources": [{"path": "nowhere"}]}, "nowhere does not exist"),
        ({"model.init_from": "no/where", "model.vision_config": {}}, "no/where holds no model"),
    ],
)
def test_what_is_missing_is_named(
    inputs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, Any],
    message: str,
):
    assert message in refused(adapter(inputs, tmp_path / "run", **overrides), capsys)


def test_missing_embeddings_are_named(inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    message = refused(adapter({**inputs, "embeddings": tmp_path / "nowhere"}, tmp_path / "run"), capsys)
    assert str(tmp_path / "nowhere") in message
    assert not (tmp_path / "run").exists()


def test_unfinished_run_is_no_start(
    inputs: dict[str, Path], llm2clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "unfinished").mkdir()
    for name in ("identity.json", "config.json", "model.safetensors"):
        (tmp_path / "unfinished" / name).write_bytes((llm2clip_run / name).read_bytes())
    settings = {"model.init_from": tmp_path / "unfinished", "model.vision_config": {}}
    assert "is not complete" in refused(adapter(inputs, tmp_path / "run", **settings), capsys)


def test_tokenizer_that_clip_cannot_pool_with_is_refused(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = vanilla({**inputs, "tokenizer": tmp_path / "tokenizer"}, tmp_path / "run")
    assert "does not put its end token after a text" in refused(arguments, capsys)


def test_vanilla_clip_does_not_continue_an_llm2clip_model(
    inputs: dict[str, Path], llm2clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run").mkdir()
    AutoTokenizer.from_pretrained(inputs["tokenizer"]).save_pretrained(tmp_path / "model")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / "model" / name).write_bytes((llm2clip_run / name).read_bytes())
    message = refused(continued(inputs, tmp_path / "run", tmp_path / "model"), capsys)
    assert "is a llm2clip model" in message and "model.text: adapter" in message


def test_mistakes_in_the_settings_are_told_all_at_once(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sources = [{"path": "a", "weight": 1.0}, {"path": "b"}]
    settings = {"data.sources": sources, "losses": {"infonce": 1.0}, "layer_decay": 2.0, "model.text": "clip"}
    message = refused(adapter(inputs, tmp_path / "run", **settings), capsys)
    for part in (
        "data.sources: give every source a weight, or none",
        "losses: unknown infonce",
        "layer_decay is 2.0",
        "model.text: clip has its own text tower",
        "model.tokenizer is missing",
    ):
        assert part in message
    assert not (tmp_path / "run").exists()


def test_moving_average_of_rounded_weights_is_refused(inputs: dict[str, Path], tmp_path: Path):
    settings = {"ema_decay": 0.9, "training.deepspeed": str(ROOT / "configs" / "deepspeed" / "zero2.json")}
    with deepspeed_forgotten():
        assert not train_clip.parse(adapter(inputs, tmp_path / "run", **settings)).training.rounds_weights
        with pytest.raises(ValueError, match="ema_decay averages float32 weights, but DeepSpeed with training.bf16"):
            train_clip.parse(adapter(inputs, tmp_path / "run", **settings, **{"training.bf16": True}))


def test_nan_stops_the_run_and_nothing_is_left_half_written(inputs: dict[str, Path], tmp_path: Path):
    import clip_data

    original = clip_data.text_vector
    try:
        clip_data.text_vector = lambda text, dim: original(text, dim) * (float("nan") if text == "1 red dog" else 1)
        embeddings = write_embeddings(tmp_path / "embeddings", [inputs["data"]])
    finally:
        clip_data.text_vector = original
    arguments = adapter({**inputs, "embeddings": embeddings}, tmp_path / "run", **{"training.max_steps": 30})
    with pytest.raises(RuntimeError, match=r"loss is not finite at step \d+"):
        train(arguments)
    assert not list((tmp_path / "run").glob("*.safetensors")) and not (tmp_path / "run" / "manifest.json").exists()
    with pytest.raises(
        RuntimeError, match=r"loss is not finite at step \d+"
    ):  # and again, from the last good checkpoint
        train(arguments)


# Interruptions and launchers

COMMAND = "llm2clip train-clip"


def last_step(run: Path) -> int:
    """The last whole line of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True) if (run / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.mark.slow
def test_kill_at_random_moments_changes_nothing(inputs: dict[str, Path], tmp_path: Path):
    settings = {"training.max_steps": 120, "training.logging_steps": 2, "training.save_steps": 4, "ema_decay": 0.9}
    whole = train(adapter(inputs, tmp_path / "whole", **settings))
    run = tmp_path / "killed"
    arguments = adapter(inputs, run, **settings, **{"training.dataloader_num_workers": 1})
    moments = random.Random(0)

    def in_the_middle_of_a_checkpoint(after: int) -> bool:
        newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]), default=None)
        return newest is not None and int(newest.name[11:]) > after and not (newest / "complete").exists()

    kills = 0
    for attempt in range(6):
        begun_at = last_step(run)
        if attempt % 2:
            kills += kill_when(start(COMMAND, arguments), lambda s=begun_at: in_the_middle_of_a_checkpoint(s + 4))
        else:
            target = begun_at + moments.randint(1, 15)
            kills += kill_when(start(COMMAND, arguments), lambda t=target: last_step(run) >= t)
    assert kills >= 4  # else there was nothing to continue
    assert start(COMMAND, arguments).wait() == 0
    for file in ("metrics.jsonl", "model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["ddp", "deepspeed"])
def test_two_processes_train_like_one(inputs: dict[str, Path], tmp_path: Path, launcher: str):
    """Also where the logit scale is clamped, of which DeepSpeed has a copy of its own; also after kill -9."""
    settings = {
        "model.logit_scale_init": 1.0,  # ln 1 = 0 is the lower end; the loss first wants to go below, then up
        "training.learning_rate": 3e-3,
        "layer_decay": 1.0,
        "training.max_steps": 16,
        "training.save_steps": 4,
    }
    one = train(adapter(inputs, tmp_path / "one", **settings))
    settings["training.per_device_train_batch_size"] = 4
    if launcher == "deepspeed":
        settings["training.deepspeed"] = "configs/deepspeed/zero2.json"
    run = tmp_path / launcher
    arguments = adapter(inputs, run, **settings)
    checkpoint = run / "checkpoints" / "checkpoint-8" / "complete"
    assert kill_when(start(COMMAND, arguments, *TWO_PROCESSES, DS_ACCELERATOR="cpu"), checkpoint.exists)
    assert start(COMMAND, arguments, *TWO_PROCESSES, DS_ACCELERATOR="cpu").wait() == 0
    expected = metrics(one)
    assert expected[8]["logit_scale"] == 0.0 < expected[-1]["logit_scale"]  # held, then let go
    for ours, single in zip(metrics(run), expected, strict=True):
        for key in ("loss", "grad_norm", "logit_scale", "learning_rate"):
            assert ours[key] == pytest.approx(single[key], rel=1e-3, abs=1e-6), (ours["step"], key)
    for name, value in weights(one).items():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding, which Adam blows up
            assert_close(weights(run)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_deepspeed_in_bf16_writes_float32_weights(inputs: dict[str, Path], tmp_path: Path):
    """Those of the same run without DeepSpeed, up to the rounding within the forward pass; frozen ones exactly."""
    settings = {
        "freeze": ["vision"],
        "model.caption_normalization": "l2_standardize",
        "training.bf16": True,
        "training.learning_rate": 1e-5,
    }
    one = train(adapter(inputs, tmp_path / "one", **settings))
    settings |= {"training.per_device_train_batch_size": 4, "training.deepspeed": "configs/deepspeed/zero2.json"}
    run = tmp_path / "run"
    assert start(COMMAND, adapter(inputs, run, **settings), *TWO_PROCESSES, DS_ACCELERATOR="cpu").wait() == 0
    assert json.loads((run / "config.json").read_text())["dtype"] == "float32"
    frozen = ("vision_model.", "text_adapter.mean", "text_adapter.rms")
    for name, value in weights(one).items():
        assert weights(run)[name].dtype == torch.float32
        if name.startswith(frozen):
            assert torch.equal(weights(run)[name], value), name
        else:
            assert not torch.equal(weights(run)[name], weights(run)[name].bfloat16().float()), name
            # Adam's steps, 3.5e-5 in all, may go either way; bf16, also of the start only, is off by 2e-3 of a value
            assert_close(weights(run)[name], value, rtol=0, atol=8e-5)
