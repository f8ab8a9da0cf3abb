"""Every YAML in configs/ is one that its command accepts, and the paper-scale ones build."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

ROOT = Path(__file__).parents[1]
STAGE_CONFIGS = sorted((ROOT / "configs" / "llm2clip").glob("*.yaml"))
CHAINS = sorted((ROOT / "configs").glob("*/llm2clip.yaml"))
LLAVA_CHAINS = [*sorted((ROOT / "configs").glob("*/llava.yaml")), *sorted((ROOT / "configs" / "llava").glob("*.yaml"))]
CLIP_CHAINS = [ROOT / "configs" / place / "clip.yaml" for place in ("demo", "eval")]
LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
OPENAI_L14_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@pytest.fixture
def run_chain(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(ROOT)
    yield importlib.import_module("run_chain")
    sys.modules.pop("run_chain")
    unset_hf_deepspeed_config()  # which parsing a configuration with DeepSpeed leaves behind


def stage_of(path: Path):
    """finetune_llm_llama3_8b.yaml -> llm2clip.finetune_llm"""
    for name in ("finetune_llm", "extract_embeddings", "train_clip"):
        if path.name.startswith(name):
            return importlib.import_module(f"llm2clip.{name}")
    raise AssertionError(f"{path.name} does not begin with the name of a stage")


def test_no_config_is_forgotten():
    """A new folder of configs needs a test here."""
    assert {path.parent.name for path in (ROOT / "configs").rglob("*.*")} == {
        *("accelerate", "deepspeed", "demo", "eval", "llava", "llm2clip", "smoke", "study"),
        "suites",  # these and eval: tests/test_lmms.py
    }
    assert len(STAGE_CONFIGS) >= 3
    assert {path.parent.name for path in CHAINS} == {"demo", "smoke", "study"}
    assert {path.parent.name for path in LLAVA_CHAINS} == {"demo", "smoke", "llava"}


@pytest.mark.parametrize("path", STAGE_CONFIGS, ids=lambda path: path.name)
def test_paper_scale_config_parses(path):
    # bfloat16 on a machine without a GPU is refused by transformers, rightly
    argv = [] if path.name.startswith("extract") else ["--training.bf16", "false", "--training.use_cpu", "true"]
    call = stage_of(path).parse(["--config", str(path), *argv])
    assert call.resolved["output_dir"]
    assert path.read_text().startswith("#"), "the header says command, hardware and expected numbers"


@pytest.mark.parametrize(
    ("path", "least"), [(path, 10) for path in CHAINS] + list(zip(CLIP_CHAINS, (2, 14), strict=True))
)
def test_every_stage_of_a_chain_parses(path, least, run_chain, tmp_path):
    chain, _ = run_chain.read_chain([str(path), "--root", str(tmp_path)])
    steps = run_chain.plan(chain)
    assert len(run_chain.check(steps)) == len(steps) >= least


def llava_steps(run_chain, path, root, *argv):
    """Every stage, parsed; without what a machine without a GPU or the network refuses."""
    chain, _ = run_chain.read_chain([str(path), "--root", str(root), *argv])
    steps = run_chain.plan(chain)
    for step in steps:
        if "training" in step.settings:
            step.settings["training"] |= {"bf16": False, "tf32": None, "use_cpu": True}
    return steps, run_chain.check(steps)


@pytest.mark.parametrize("path", LLAVA_CHAINS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_stage_of_a_llava_chain_parses(path, run_chain, tmp_path):
    steps, calls = llava_steps(run_chain, path, tmp_path)
    arms = run_chain.read_chain([str(path)])[0]["arms"]
    assert len(calls) == len(steps) >= 3 * len(arms)
    assert path.read_text().startswith("#"), "the header says command, hardware and expected numbers"


def test_nothing_but_the_tower_differs_between_arms_of_the_demo(run_chain, tmp_path):
    steps, calls = llava_steps(run_chain, ROOT / "configs" / "demo" / "llava.yaml", tmp_path)
    for stage in ("pretrain", "finetune"):
        first, second = (calls[f"{stage}-{arm}/seed-0"].resolved for arm in ("continued", "llm2clip"))
        differing = {key for key in first if first[key] != second[key]}
        assert differing == {"tower", "output_dir"} | ({"pretrained"} if stage == "finetune" else set())


def test_full_scale_recipe_is_the_original(run_chain, tmp_path):
    """LLaVA v1.2.2 scripts/v1_5/pretrain.sh, finetune.sh and finetune_lora.sh."""
    _, calls = llava_steps(run_chain, ROOT / "configs" / "llava" / "vicuna_7b.yaml", tmp_path)
    found = {name: calls[f"{name}-openai/seed-42"] for name in ("pretrain", "finetune")}
    wanted = {"pretrain": (32, 1e-3, "plain", "square"), "finetune": (16, 2e-5, "vicuna_v1", "pad")}
    for name, (batch, rate, template, aspect) in wanted.items():
        config, training = found[name].config, found[name].training
        assert (training.per_device_train_batch_size, training.learning_rate) == (batch, rate)
        assert (config.template, config.data.image_aspect, config.data.max_length) == (template, aspect, 2048)
        assert (training.weight_decay, training.warmup_steps, training.num_train_epochs) == (0.0, 0.03, 1)
        assert training.lr_scheduler_type == "cosine" and config.feature_layer == -2
        assert training.max_grad_norm == 0, "compat llava clips nothing"
        settings = training.hf_deepspeed_config.config
        assert settings["gradient_clipping"] == 0 and settings["zero_optimization"]["stage"] in (2, 3)
    assert found["finetune"].config.data.group_by_modality_length
    assert not found["pretrain"].config.data.group_by_modality_length
    for name, batch in (("vicuna_7b_1x24gb", "qlora"), ("vicuna_7b_1x80gb", "lora")):
        _, calls = llava_steps(run_chain, ROOT / "configs" / "llava" / f"{name}.yaml", tmp_path)
        for stage, size in (("pretrain", 256), ("finetune", 128)):  # the same global batches on one GPU
            assert calls[f"{stage}-openai/seed-42"].training.global_batch_size == size
        config = calls["finetune-openai/seed-42"].config
        assert (config.tune.llm, config.lora.rank, config.lora.alpha) == (batch, 128, 256)
        assert calls["finetune-openai/seed-42"].training.learning_rate == 2e-4
        assert config.projector_learning_rate == 2e-5


def test_all_arms_parse_together(run_chain, tmp_path):
    path = ROOT / "configs" / "demo" / "llm2clip.yaml"
    arms = "vanilla,continued,llm2clip,untuned,equal_time,lit"
    chain, _ = run_chain.read_chain([str(path), "--root", str(tmp_path), "--arms", arms, "--seeds", "0,1"])
    steps = run_chain.plan(chain)
    calls = run_chain.check(steps)
    report = calls["report"].config
    assert list(report.arms) == arms.split(",")
    assert [str(p.relative_to(tmp_path)) for p in report.arms["lit"].results] == [
        "retrieval-lit/seed-0",
        "retrieval-lit/seed-1",
    ]
    for arm in ("continued", "llm2clip"):  # equal data, equal steps
        config = calls[f"clip-{arm}/seed-1"].config
        assert config.data == calls["clip-llm2clip/seed-0"].config.data
        assert calls[f"clip-{arm}/seed-1"].training.max_steps == calls["clip-llm2clip/seed-0"].training.max_steps
        assert calls[f"clip-{arm}/seed-1"].training.seed == 1


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--arms", "vanila"], "no arm"),
        (["--teachr.tune", "false"], "--teachr.tune"),
        (["--teacher.tune"], "a value is missing"),
    ],
)
def test_mistakes_on_the_command_line_of_a_chain(argv, named, run_chain):
    with pytest.raises(ValueError, match=named):
        run_chain.read_chain([str(ROOT / "configs" / "demo" / "llm2clip.yaml"), *argv])


def test_mistakes_of_several_stages_are_told_together(run_chain, tmp_path):
    path = ROOT / "configs" / "demo" / "llm2clip.yaml"
    argv = ["--teacher.lora.rnk", "3", "--embeddings.dtype", "int3", "--root", str(tmp_path)]
    chain, _ = run_chain.read_chain([str(path), *argv])
    with pytest.raises(ValueError, match=r"(?s)teacher: .*lora\.rnk.*embeddings: .*dtype"):
        run_chain.check(run_chain.plan(chain))
    assert {entry.name for entry in tmp_path.iterdir()} == {"configs"}, "nothing was started"


def test_paper_scale_student_builds_on_the_meta_device():
    """Parameter counts of reference 2.2 and 2.3: ViT-L/14-336 with projection, adapter for 4096 dimensions."""
    from llm2clip.modeling_clip import LLM2CLIPConfig, LLM2CLIPModel

    settings = yaml.safe_load((ROOT / "configs" / "llm2clip" / "train_clip_openai_l14_336.yaml").read_text())["model"]
    config = LLM2CLIPConfig(
        vision_config=OPENAI_L14_336,
        caption_embedding_dim=LLAMA3_8B["hidden_size"],
        projection_dim=settings["projection_dim"],
        adapter_num_blocks=settings["adapter_num_blocks"],
        adapter_expansion=settings["adapter_expansion"],
        caption_normalization=settings["caption_normalization"],
    )
    with torch.device("meta"):
        model = LLM2CLIPModel(config)
    assert sum(p.numel() for p in model.text_adapter.parameters()) == 273_769_728
    vision = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    assert sum(p.numel() for p in vision) == 304_818_176


def test_paper_scale_teacher_builds_on_the_meta_device():
    """Llama-3-8B without head is 7.5 B parameters; LoRA rank 16 on its seven linear layers 41.9 M."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaModel

    path = ROOT / "configs" / "llm2clip" / "finetune_llm_llama3_8b.yaml"
    call = stage_of(path).parse(["--config", str(path), "--training.bf16", "false", "--training.use_cpu", "true"])
    lora = call.config.lora
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**LLAMA3_8B, is_causal=False))
        assert sum(p.numel() for p in model.parameters()) == 7_504_924_672
        peft = get_peft_model(
            model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules)
        )
    assert sum(p.numel() for p in peft.parameters() if p.requires_grad) == 41_943_040


def test_deepspeed_takes_schedule_and_clipping_from_the_trainer():
    for path in (ROOT / "configs" / "deepspeed").glob("*.json"):
        settings = json.loads(path.read_text())
        assert "scheduler" not in settings and "optimizer" not in settings
        assert settings["gradient_clipping"] == "auto"
        assert settings["train_micro_batch_size_per_gpu"] == "auto"
