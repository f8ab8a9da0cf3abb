"""What is settled, and refused, before a stage takes its first step; and steps with nothing to learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from llava_data import llava_parts, stage_argv
from processes import start

from llava_bridge import export, finetune, pretrain
from llava_bridge.compose import compose
from llava_bridge.stage import build
from llm2clip.run_dir import read_manifest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llava") / "parts"
    llava_parts(directory)
    return directory


def train(stage, root: Path, output: Path, **settings) -> Path:
    data = root / ("captions" if stage is pretrain else "dialogues")
    settings = {"training__learning_rate": 0.003, "training__max_steps": 2, **settings}
    stage.run(stage.parse(stage_argv(llava_parts(root), data, output, **settings)))
    return output


@pytest.mark.parametrize("llm", ["lora", "qlora", "full"])
def test_what_is_trained_is_float32_under_autocast(root: Path, tmp_path: Path, llm: str):
    settings = {"training__bf16": True, "tune__llm": llm, "tune__vision": "lora", "lora__rank": 4}
    call = finetune.parse(stage_argv(llava_parts(root), root / "dialogues", tmp_path / "run", **settings))
    composed, _ = build(call.config, call.training, None)
    trained = {name: p.dtype for name, p in composed.model.named_parameters() if p.requires_grad}
    assert any(".lora_" in name for name in trained) and set(trained.values()) == {torch.float32}
    frozen = {
        p.dtype for name, p in composed.model.named_parameters() if "vision_tower" in name and name not in trained
    }
    assert frozen == {torch.bfloat16}


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_adapters_of_a_part_that_stage_1_trained_in_full(root: Path, tmp_path: Path, part: str):
    first = train(pretrain, root, tmp_path / "first", **{f"tune__{part}": "full"})
    settings = {"pretrained": str(first), "tune__llm": "frozen", "lora__rank": 4, f"tune__{part}": "lora"}
    run = train(finetune, root, tmp_path / "run", training__save_steps=2, **settings)
    export.main(["--trained", str(run), "--output_dir", str(tmp_path / "export"), "--dtype", "float32"])
    card = (tmp_path / "export" / "model" / "README.md").read_text()
    assert "Trained by both stages of LLaVA-1.5" in card and "adapters" not in card


def test_what_stage_2_cannot_start_from(root: Path, tmp_path: Path):
    first = train(pretrain, root, tmp_path / "first", tune__llm="full")
    with pytest.raises(
        ValueError, match=r"trained on feature_layer -2 of the tower, not -1; .* set feature_layer to -2"
    ):
        train(finetune, root, tmp_path / "run", pretrained=str(first), feature_layer=-1)
    with pytest.raises(ValueError, match=r"tune.llm is qlora, .* trained all of it; take lora or full"):
        train(finetune, root, tmp_path / "run", pretrained=str(first), tune__llm="qlora")
    assert not (tmp_path / "run").exists()


def test_a_template_that_cannot_be_used_is_an_error_at_once(root: Path, tmp_path: Path):
    parts = Path(shutil.copytree(root, tmp_path / "parts"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "llm")
    tokenizer.chat_template = None
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (parts / "llm" / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(parts / "llm")
    with pytest.raises(ValueError, match="this tokenizer has none; use the template vicuna_v1"):
        train(finetune, parts, tmp_path / "run", template="chat")


def test_llms_that_no_export_could_describe_are_refused(root: Path, tmp_path: Path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"gpt2": transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2), "phi": transformers.PhiConfig(**small)}
    for name, match in (("gpt2", "has no body `model`"), ("phi", "has a bias, which has no place")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(root / "llm")
        heads[name].vocab_size = len(tokenizer)
        transformers.AutoModelForCausalLM.from_config(heads[name]).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=match):
            compose(str(root / "tower"), str(tmp_path / name))


def test_a_step_without_anything_to_learn_is_no_disaster(root: Path, tmp_path: Path):
    parts = Path(shutil.copytree(root, tmp_path / "parts"))
    file = parts / "dialogues" / "dialogues.json"
    dialogues = json.loads(file.read_text())
    dialogues[0]["conversations"][0]["value"] += " why?" * 200  # cut off before its answer
    file.write_text(json.dumps(dialogues))
    settings = {"data__max_length": 250, "data__group_by_modality_length": False, "data__max_bad_fraction": 0.0}
    settings |= {"training__per_device_train_batch_size": 1, "training__max_steps": 32, "training__logging_steps": 1}
    run = train(finetune, parts, tmp_path / "run", tune__llm="frozen", **settings)  # one is always allowed
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses.count(0.0) == 1 and all(loss > 0.1 for loss in losses if loss)
    assert read_manifest(run)["num_steps"] == 32


@pytest.mark.slow
def test_deepspeed_that_accelerate_set_up(root: Path, tmp_path: Path):
    """`accelerate launch --use_deepspeed` tells a stage by these variables, not by training.deepspeed."""
    settings = {"training__max_steps": 2, "training__use_cpu": False}
    argv = stage_argv(llava_parts(root), root / "dialogues", tmp_path / "run", **settings)
    told = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
    one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert start("llava-bridge finetune", argv, **told, **one).wait(timeout=300) == 0
    assert read_manifest(tmp_path / "run")["num_steps"] == 2
