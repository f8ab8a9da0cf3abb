from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from processes import TWO_PROCESSES, kill_when, start
from tiny import scene_captions, tiny_llm, write_captions
from transformers import AutoModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llm2clip import finetune_llm
from llm2clip.caption_data import CaptionData
from llm2clip.caption_pairs import PairExample
from llm2clip.caption_retrieval import caption_pool, caption_retrieval_accuracy
from llm2clip.caption_training import PairCollator, PairModel
from llm2clip.run_dir import read_manifest
from llm2clip.teacher import CaptionEncoder, TeacherSpec, encode_texts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stage")
    tiny_llm(root / "llm")
    write_captions(root / "data", scene_captions(60))
    rows = [{"query": f"{i} cat", "positive": f"the {i} feline", "negative": f"dog {i}"} for i in range(40)]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def settings(root: Path, output_dir: Path, **changes) -> dict:
    values = {
        "output_dir": str(output_dir),
        "model": {"name": str(root / "llm"), "dtype": "float32", "num_hidden_layers": 2},
        "captions": [{"path": str(root / "data"), "weight": 2}],
        "texts": [{"path": str(root / "texts.jsonl"), "weight": 1}],
        "evaluation": [{"path": str(root / "data"), "query": "raw", "positive": "long", "name": "train"}],
        "lora": {"dropout": 0.0},
        "training": {
            "max_steps": 20,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "bf16": False,
            "use_cpu": True,
            "logging_steps": 2,
            "save_steps": 4,
        },
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return values


def config_file(values: dict) -> str:
    path = Path(values["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return str(path)


def make(root: Path, output_dir: Path, **changes) -> Path:
    finetune_llm.main(["--config", config_file(settings(root, output_dir, **changes))])
    return output_dir


def content(run: Path) -> tuple[str, bytes, str]:
    return read_manifest(run)["fingerprint"], (run / "metrics.jsonl").read_bytes(), (run / "cra.json").read_text()


@pytest.fixture(scope="module")
def teacher(root: Path) -> Path:
    return make(root, root / "teacher")


def test_tuning_makes_captions_of_an_image_find_each_other(teacher: Path) -> None:
    manifest = read_manifest(teacher)
    before, after = manifest["cra"]["before"]["train"], manifest["cra"]["after"]["train"]
    assert manifest["cra"] == json.loads((teacher / "cra.json").read_text())
    assert before["num_images"] == after["num_images"] == 60
    for direction in ("query_to_positive", "positive_to_query"):
        assert after[direction] > before[direction] + 0.05
    lines = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, 21, 2))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert set(lines[0]) == {"step", "loss", "accuracy", "grad_norm", "learning_rate"}
    assert not (teacher / "checkpoints").exists()


def test_teacher_is_an_ordinary_directory_with_lora_merged(teacher: Path, root: Path) -> None:
    model = AutoModel.from_pretrained(teacher)
    assert model.config.is_causal is False
    assert model.config.num_hidden_layers == 2
    assert not any("lora" in name for name, _ in model.named_parameters())
    base = AutoModel.from_pretrained(root / "llm")
    for layer in range(2):
        assert not torch.equal(model.layers[layer].mlp.up_proj.weight, base.layers[layer].mlp.up_proj.weight)
        assert torch.equal(model.layers[layer].input_layernorm.weight, base.layers[layer].input_layernorm.weight)
    assert torch.equal(model.embed_tokens.weight, base.embed_tokens.weight)
    spec = TeacherSpec.load(teacher)
    assert (spec.num_hidden_layers, spec.chat_prefix, spec.chat_suffix) == (2, "<|start|>user\n", "<|end|>")
    assert [stage["stage"] for stage in spec.stages] == ["caption-contrastive"]


def test_merge_share_leaves_the_weights_between_old_and_new(teacher: Path, root: Path, tmp_path: Path) -> None:
    partly = AutoModel.from_pretrained(make(root, tmp_path / "partly", merge_share=0.25))
    new, old = AutoModel.from_pretrained(teacher), AutoModel.from_pretrained(root / "llm")
    for name, weight in partly.state_dict().items():
        expected = torch.lerp(old.state_dict()[name], new.state_dict()[name], 0.25)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6, msg=name)


def test_reported_accuracy_is_that_of_the_directory(teacher: Path, root: Path) -> None:
    queries, positives = caption_pool(CaptionData.open(root / "data"), "raw", "long")
    again = caption_retrieval_accuracy(CaptionEncoder.from_pretrained(teacher), queries, positives)
    assert again == read_manifest(teacher)["cra"]["after"]["train"]


def test_a_complete_run_is_left_alone_and_changed_inputs_are_refused(teacher: Path, root: Path) -> None:
    before = content(teacher), (teacher / "model.safetensors").stat().st_mtime_ns
    make(root, teacher)
    assert (content(teacher), (teacher / "model.safetensors").stat().st_mtime_ns) == before
    with pytest.raises(ValueError, match="loss.scale was 50.0, is now 20.0"):
        make(root, teacher, loss={"scale": 20.0})


def test_without_tuning_the_llm_is_written_as_it_is(root: Path, tmp_path: Path) -> None:
    run = make(root, tmp_path / "untuned", tune=False, captions=[], texts=[])
    written, base = AutoModel.from_pretrained(run), AutoModel.from_pretrained(root / "llm")
    assert torch.equal(written.layers[1].mlp.up_proj.weight, base.layers[1].mlp.up_proj.weight)
    assert CaptionEncoder.from_pretrained(run).spec.stages == []
    cra = json.loads((run / "cra.json").read_text())
    assert cra["before"] == cra["after"]


def test_mntp_and_adapters_come_before_and_are_recorded(teacher: Path, root: Path, tmp_path: Path) -> None:
    mntp = {"block_size": 32, "per_device_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2}
    run = make(root, tmp_path / "first", mntp=mntp)
    assert [stage["stage"] for stage in TeacherSpec.load(run).stages] == ["mntp", "caption-contrastive"]
    assert content(run)[0] != content(teacher)[0]
    adapter = str(run / "mntp" / "adapter")
    other = make(root, tmp_path / "second", model={"adapters": [adapter]}, tune=False)
    assert TeacherSpec.load(other).stages == [{"stage": "adapter", "name": adapter}]
    base = AutoModel.from_pretrained(root / "llm").layers[0].mlp.up_proj.weight
    assert not torch.equal(AutoModel.from_pretrained(other).layers[0].mlp.up_proj.weight, base)


def test_gradient_checkpointing_and_length_groups_change_nothing(teacher: Path, root: Path, tmp_path: Path) -> None:
    run = make(root, tmp_path / "run", length_groups=4, training={"gradient_checkpointing": True})
    losses = [[json.loads(line)["loss"] for line in (path / "metrics.jsonl").open()] for path in (teacher, run)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-4, rtol=1e-4)


def test_checkpointing_computes_no_gradient_below_the_adapters(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, inputs = LlamaDecoderLayer.forward, []

    def watched(layer, hidden_states, *args, **kwargs):
        if torch.is_grad_enabled():
            inputs.append((layer.self_attn.layer_idx, hidden_states.requires_grad))
        return forward(layer, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", watched)
    mntp = {"block_size": 32, "per_device_batch_size": 4, "max_steps": 1}
    training = {"gradient_checkpointing": True, "max_steps": 1}
    make(root, tmp_path / "run", mntp=mntp, lora={"num_layers": 1, "dropout": 0.0}, training=training)
    assert {layer for layer, _ in inputs} == {0, 1}
    assert not any(needs_gradient for _, needs_gradient in inputs)


def test_accumulation_does_not_widen_the_contrast(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make(root, tmp_path / "run", training={"gradient_accumulation_steps": 2, "max_steps": 1})
    stage = TeacherSpec.load(run).stages[0]
    assert (stage["global_batch_size"], stage["contrast_batch_size"]) == (16, 8)
    assert "contrasted with the 8 pairs of its micro-batch, not with the 16 of the step" in caplog.text


def test_collated_texts_come_back_in_order(root: Path) -> None:
    spec = TeacherSpec(base_model="", num_hidden_layers=3)
    encoder = CaptionEncoder.from_llm(str(root / "llm"), spec=spec)
    examples = [PairExample("a cat", "the cat is red " * 9, None, "find", f"g{i}", "") for i in range(2)]
    examples.append(PairExample("two taxis drive in the snow", "snow", "dog", "", "g2", "g3"))
    batch = PairCollator(encoder.tokenize, has_negatives=True, length_groups=3)(examples)
    assert len(batch["groups"]) == 3
    output = PairModel(encoder)(**batch)
    instructions = [example.instruction for example in examples]
    expected = encode_texts(encoder, [example.query for example in examples], instructions=instructions)
    torch.testing.assert_close(output.queries, expected, atol=1e-5, rtol=1e-5)
    expected = encode_texts(encoder, [example.positive for example in examples])
    torch.testing.assert_close(output.positives, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.negatives[2:], encode_texts(encoder, ["dog"]), atol=1e-5, rtol=1e-5)
    assert (output.negative_keys == 0).tolist() == [True, True, False]


# Recipes

INSTRUCTIONS = (
    "Given a sentence, retrieve a detailed relevant sentence",
    "Given a detailed sentence, retrieve a short relevant sentence",
)


def test_both_published_recipes_parse(tmp_path: Path) -> None:
    repository = {
        "output_dir": str(tmp_path / "repo"),
        "model": {"name": "meta-llama/Meta-Llama-3-8B-Instruct"},
        "captions": [
            {
                "path": "cc3m",
                "fields": {"short": "short_caption", "long": "long_caption"},
                "pairs": [
                    {"query": "short", "positive": "long", "instruction": INSTRUCTIONS[0]},
                    {"query": "long", "positive": "short", "instruction": INSTRUCTIONS[1]},
                ],
                "negatives": "random",
            }
        ],
        "texts": [{"path": "allnli.jsonl", "instructions": ["one", "two"]}, {"path": "nq.jsonl"}],
        "loss": {"mask_false_negatives": False},
        "training": {"max_steps": 10000, "use_cpu": True},
        "mntp": {"text_files": ["wikitext.txt"]},
    }
    call = finetune_llm.parse(["--config", config_file(repository)])
    assert call.config.captions[0].pairs[1].instruction == INSTRUCTIONS[1]
    assert call.config.mntp is not None and call.config.mntp.mask_probability == 0.2
    training = call.training
    assert (training.learning_rate, training.warmup_steps, training.seed) == (2e-4, 300, 42)
    assert (training.per_device_train_batch_size, training.lr_scheduler_type, training.bf16) == (64, "linear", True)
    lora = call.config.lora
    assert (lora.rank, lora.alpha, lora.dropout, len(lora.target_modules)) == (16, 32, 0.05, 7)
    assert (call.config.loss.scale, call.config.loss.symmetric, call.config.batches) == (50, False, "one_source")

    paper = {
        "output_dir": str(tmp_path / "paper"),
        "model": {"name": "meta-llama/Llama-3.1-8B", "chat": "none"},
        "captions": [{"path": "dreamlip", "fields": {"raw": "raw_caption", "long": "longSV_captions"}}],
        "texts": [{"path": "e5.jsonl"}],
        "training": {"per_device_train_batch_size": 256, "use_cpu": True},
    }
    call = finetune_llm.parse(["--config", config_file(paper)])
    assert call.config.mntp is None


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"captions": [], "texts": []}, ["captions and texts are both empty"]),
        ({"tune": False, "mntp": {}}, ["mntp trains, but tune is false"]),
        ({"captions": [{"path": "x"}]}, ["give one to every source or to none"]),
        ({"model": {"chat_prefix": "User: "}}, ["need model.chat custom, it is template"]),
        ({"lora": {"rank": 0}, "length_groups": 0}, ["lora.rank is 0", "length_groups is 0"]),
        ({"merge_share": 0.0}, ["merge_share is 0.0, expected more than 0 and at most 1"]),
        (
            {"captions": [{"path": "x", "weight": 1, "pairs": [{"weight": -1}]}]},
            ["weights .-1.0., expected one above 0"],
        ),
        ({"model": {"poling": "mean"}, "loss": {"scale": "hot"}}, ["poling", "loss.scale"]),
        ({"captions": [{"path": "x", "weight": 1, "negatives": "hard"}]}, ["negatives"]),
    ],
)
def test_mistakes_in_the_configuration_are_named(root: Path, tmp_path: Path, changes: dict, messages: list) -> None:
    with pytest.raises(ValueError) as error:
        make(root, tmp_path / "run", **changes)
    for message in messages:
        assert re.search(message, str(error.value)), error.value
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "runs/nothing"}}, "model.name: no LLM at runs/nothing"),
        ({"model": {"num_hidden_layers": 9}}, "model.num_hidden_layers is 9"),
        ({"captions": [{"path": "nothing", "weight": 1}]}, "caption data nothing does not exist"),
        ({"texts": [{"path": "nothing.jsonl", "weight": 1}]}, "texts.path: nothing.jsonl does not exist"),
        ({"evaluation": [{"path": "DATA", "query": "raw", "positive": "dense"}]}, "0 images with different captions"),
        ({"model": {"adapters": ["nothing"]}}, "no PEFT adapter at nothing"),
    ],
)
def test_missing_inputs_are_named(root: Path, tmp_path: Path, changes: dict, message: str) -> None:
    changes = json.loads(json.dumps(changes).replace("DATA", str(root / "data")))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(root, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_bad_rows_are_listed(root: Path, tmp_path: Path) -> None:
    rows = scene_captions(30)
    rows[4] = {"id": "bad", "captions": {"raw": "   "}}
    data = write_captions(tmp_path / "data", rows)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"query": "a", "positive": "b"}\n' * 9 + '{"query": "a"}\n')
    sources = {"captions": [{"path": str(data)}], "texts": [{"path": str(texts)}]}
    with pytest.raises(ValueError, match="max_bad_fraction"):
        make(root, tmp_path / "strict", **sources)
    run = make(root, tmp_path / "run", **sources, max_bad_fraction=0.2, training={"max_steps": 1})
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert {entry["data"] for entry in skipped} == {str(data), str(texts)}


def test_a_loss_that_is_not_finite_stops_the_run(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        make(root, tmp_path / "run", training={"learning_rate": 1e30, "max_grad_norm": 0.0})


# Processes

COMMAND = "llm2clip finetune-llm"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "batches"), [("ddp", "mixed"), ("deepspeed", "one_source")])
def test_two_processes_equal_one(root: Path, tmp_path: Path, launcher: str, batches: str) -> None:
    captions = [{"path": str(root / "data"), "weight": 1, "negatives": "random"}]
    loss = {"symmetric": True, "scale": 20.0}
    runs = {}
    for processes in (1, 2):
        training: dict = {"per_device_train_batch_size": 8 // processes, "max_steps": 6}
        if processes == 2 and launcher == "deepspeed":
            training["deepspeed"] = "configs/deepspeed/zero2.json"
        run = runs[processes] = tmp_path / f"run-{processes}"
        values = settings(root, run, batches=batches, training=training, captions=captions, loss=loss)
        arguments = ["--config", config_file(values)]
        launch = TWO_PROCESSES if processes == 2 else ()
        assert start(COMMAND, arguments, *launch, DS_ACCELERATOR="cpu").wait() == 0
    one, two = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs.values())
    for name in ("loss", "grad_norm", "accuracy"):
        expected, found = (torch.tensor([line[name] for line in lines]) for lines in (one, two))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    first, second = (AutoModel.from_pretrained(run).state_dict() for run in runs.values())
    for name, weight in first.items():  # Adam turns rounding of tiny gradients into steps of some of the learning rate
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=1e-3)
    assert (runs[1] / "cra.json").read_text() == (runs[2] / "cra.json").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_deepspeed_in_bf16_trains_both_stages_and_writes_float32_weights(root: Path, tmp_path: Path) -> None:
    """Two trainers in one process; the change is that of a run without DeepSpeed, up to the rounding within steps."""
    mntp = {"block_size": 32, "per_device_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3}
    training = {"bf16": True, "max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 0}
    one = make(root, tmp_path / "one", mntp=mntp, training=training)
    training |= {"per_device_train_batch_size": 4, "deepspeed": "configs/deepspeed/zero2.json"}
    run = tmp_path / "two"
    values = settings(root, run, mntp=mntp | {"per_device_batch_size": 2}, training=training)
    arguments = ["--config", config_file(values)]
    assert start(COMMAND, arguments, *TWO_PROCESSES, DS_ACCELERATOR="cpu").wait() == 0
    assert [stage["stage"] for stage in TeacherSpec.load(run).stages] == ["mntp", "caption-contrastive"]
    base, single, double = (AutoModel.from_pretrained(path) for path in (root / "llm", one, run))
    assert double.dtype == torch.float32
    for name, weight in double.state_dict().items():
        before, expected = base.state_dict()[name], single.state_dict()[name]
        if "proj" in name:
            assert 0 < (weight - expected).norm() < 0.3 * (expected - before).norm(), name
        else:
            assert torch.equal(weight, before), name


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    mntp = {"block_size": 32, "per_device_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2}
    changes = {"mntp": mntp, "lora": {"dropout": 0.1}, "length_groups": 2, "training": {"save_steps": 2}}
    expected = content(make(root, tmp_path / "whole", **changes))
    run = tmp_path / "killed"
    arguments = ["--config", config_file(settings(root, run, **changes))]

    def has_steps(count: int) -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and len(path.read_bytes().splitlines()) >= count

    moments = (
        lambda: any((run / "mntp").glob("checkpoints/checkpoint-2/*")),  # while it is written
        lambda: (run / "mntp" / "adapter").exists(),
        lambda: any(run.glob("checkpoints/checkpoint-4/*")),
        lambda: has_steps(6),
        lambda: (run / "model.safetensors").exists(),  # before the manifest
    )
    kills = sum(kill_when(start(COMMAND, arguments), moment) for moment in moments)
    assert kills >= 4
    assert start(COMMAND, arguments).wait() == 0
    assert content(run) == expected
