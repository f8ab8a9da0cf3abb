"""Exported LLaVA models: stock files that transformers reads, and a check that notices if not."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from typing import Any

import pytest
import torch
import transformers
from llava_exports import LLAMA3, LLMS, Export, edit, sentencepiece_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llava import IMAGE_TOKENS, TOWERS, llava_model, llava_tokenizer, tower_processor

from llava_bridge import export_check, export_files, export_verify
from llava_bridge.export_files import image_processor_for, write_llava


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("kind", TOWERS)
def test_stock_classes_read_the_same_model(tmp_path, kind, aspect):
    export = Export(tmp_path, kind, template="vicuna_v1" if aspect == "square" else "chat", aspect=aspect)
    report = export_check.check(str(export.directory), str(export.file))
    assert export_verify.find_problems(report) == []
    assert report["logits"] < 1e-6 and report["image"] <= 1.01
    assert report["num_image_tokens"] == [IMAGE_TOKENS[kind]] * 2
    processor = transformers.AutoProcessor.from_pretrained(export.directory)
    assert type(processor).__name__ == "LlavaProcessor"
    assert json.loads((export.directory / "preprocessor_config.json").read_text())["do_pad"] is (aspect == "pad")


@pytest.mark.parametrize("llm", LLMS)
def test_stock_classes_read_the_same_llm(tmp_path, llm):
    assert Export(tmp_path, **LLMS[llm]).problems() == []


@pytest.mark.slow
def test_verify_uses_a_process_of_its_own_and_names_what_differs(tmp_path):
    export = Export(tmp_path)
    report = export_verify.verify(export.directory, export.reference)
    assert report["transformers"] == transformers.__version__
    edit(export.directory / "config.json", vision_feature_layer=-1)
    with pytest.raises(RuntimeError, match="is not the model it was exported from: logits differ by") as error:
        export_verify.verify(export.directory, export.reference)
    assert "missing" not in str(error.value) and "prompt" not in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"llava", "reference.safetensors"}


def test_verify_says_if_nothing_loads_at_all(tmp_path, monkeypatch):
    export = Export(tmp_path)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="does not load in a fresh process"):
        export_verify.verify(export.directory, export.reference)
    assert {file.name for file in tmp_path.iterdir()} == {"llava", "reference.safetensors"}


def test_every_kind_of_fault_is_found(tmp_path):
    export = Export(tmp_path, **LLMS["llama3"])
    directory = export.directory
    good = {file.name: file.read_bytes() for file in directory.iterdir()}

    def problems_of(file: str, **fields: Any) -> list[str]:
        edit(directory / file, **fields)
        found = export.problems()
        (directory / file).write_bytes(good[file])
        return found

    config = json.loads(good["config.json"])
    text = {**config["text_config"], "rope_parameters": {**LLAMA3, "rope_theta": 10000.0}, "rope_theta": 10000.0}
    assert problems_of("config.json", text_config=text)[0].startswith("logits differ")
    vision = {**config["vision_config"], "hidden_act": "gelu"}
    assert problems_of("config.json", vision_config=vision)[0].startswith("logits differ")
    assert problems_of("preprocessor_config.json", do_pad=False)[0].startswith("pixel values differ")
    assert problems_of("preprocessor_config.json", image_mean=[0.5] * 3)[0].startswith("pixel values differ")
    crop = {"height": 16, "width": 16}
    assert "the processor counts 4 tokens per image, there are 16" in " ".join(
        problems_of("preprocessor_config.json", crop_size=crop, do_center_crop=False)
    )
    jinja = directory / "chat_template.jinja"
    jinja.write_text(good["chat_template.jinja"].decode().replace("<|end|>", ""))
    assert [problem.split(":")[0] for problem in export.problems()] == [
        f"prompt of {writer}, {form}{end}"
        for writer, form in (
            ("processor", "typed parts"),
            ("processor", "strings"),
            ("tokenizer", "strings"),
            ("tokenizer", "typed parts"),
        )
        for end in ("", ", nothing added")
    ]
    jinja.write_bytes(good["chat_template.jinja"])
    tensors = load_file(directory / "model.safetensors")
    lost = tensors.pop("vision_tower.vision_model.embeddings.class_embedding")
    tensors["vision_tower.embeddings.class"] = lost
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    found = " ".join(export.problems())
    assert "1 missing keys, first model.vision_tower" in found and "1 unexpected keys" in found
    (directory / "model.safetensors").write_bytes(good["model.safetensors"])
    assert export.problems() == []


def test_a_model_whose_rotary_frequencies_were_rounded_is_refused():
    tokenizer = llava_tokenizer()
    model = llava_model("clip", tokenizer).bfloat16()
    processor = image_processor_for(tower_processor("clip"), "pad")
    with pytest.raises(ValueError, match=r"inv_freq has been rounded .* Cast parameters alone"):
        export_verify.make_reference(model, tokenizer, processor, [0, 1])
    for parameter in (model := llava_model("clip", tokenizer)).parameters():
        parameter.data = parameter.data.bfloat16()
    ids = [0, *[model.config.image_token_index] * IMAGE_TOKENS["clip"], 9]
    assert export_verify.make_reference(model, tokenizer, processor, ids).tensors["logits"].dtype == torch.float32


def test_the_tokenizer_is_generic_and_its_state_of_training_is_not_exported(tmp_path):
    tokenizer = llava_tokenizer()
    texts = ["a red cat", "<image>\nthe image shows </s> a 'turkey'  below"]
    expected = tokenizer(texts, add_special_tokens=False).input_ids
    tokenizer(texts, padding=True, truncation=True, max_length=3)  # leaves truncation and padding in tokenizer.json
    export = Export(tmp_path, tokenizer=tokenizer)
    settings = json.loads((export.directory / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # 4.x does not know TokenizersBackend
    assert "<image>" in settings["additional_special_tokens"] and "extra_special_tokens" not in settings
    assert settings["chat_template"] == (export.directory / "chat_template.jinja").read_text()
    rules = json.loads((export.directory / "tokenizer.json").read_text())
    assert rules["truncation"] is None and rules["padding"] is None
    loaded = transformers.AutoTokenizer.from_pretrained(export.directory)
    assert loaded(texts).input_ids == expected and set(loaded(texts)) == {"input_ids", "attention_mask"}
    assert loaded(texts, padding=True).input_ids[0][0] == loaded.pad_token_id == tokenizer.pad_token_id
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")
    assert loaded.convert_tokens_to_ids("<image>") == export.model.config.image_token_index


def test_a_sentencepiece_tokenizer_keeps_its_ids(tmp_path):
    assert Export(tmp_path, template="vicuna_v1", tokenizer=sentencepiece_tokenizer()).problems() == []


def test_generation_is_greedy_and_ends_at_every_end_token(tmp_path):
    tokenizer = llava_tokenizer()
    model = llava_model("clip", tokenizer)
    ends = [tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id]
    model.generation_config.eos_token_id = ends
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    settings = export_files.generation_settings(model, tokenizer)
    model.generation_config.repetition_penalty = 5.0  # Qwen2.5 has one; neither exported nor used to verify
    processor = image_processor_for(tower_processor("clip"), "pad")
    ids = [0, *[model.config.image_token_index] * IMAGE_TOKENS["clip"], 9]
    found = export_verify.make_reference(model, tokenizer, processor, ids).tensors["generated_ids"]
    model.generation_config = transformers.GenerationConfig(**settings)
    again = export_verify.make_reference(model, tokenizer, processor, ids).tensors["generated_ids"]
    assert found.tolist() == again.tolist()
    pad = tokenizer.pad_token_id
    assert settings == {"do_sample": False, "pad_token_id": pad, "bos_token_id": 0, "eos_token_id": ends[::-1]}
    export = Export(tmp_path)
    read = transformers.GenerationConfig.from_pretrained(export.directory)
    assert (read.do_sample, read.eos_token_id, read.pad_token_id) == (False, 1, tokenizer.pad_token_id)


def test_big_models_are_written_in_shards(tmp_path):
    tokenizer = llava_tokenizer()
    model = llava_model("clip", tokenizer)
    write = {"image_aspect": "pad", "chat_template": "", "max_shard_bytes": 40_000}
    write_llava(tmp_path / "llava", model, tokenizer, tower_processor("clip"), **write)
    index = json.loads((tmp_path / "llava" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and not (tmp_path / "llava" / "model.safetensors").exists()
    for file in files:
        with safe_open(tmp_path / "llava" / file, "pt") as shard:
            names = set(shard.keys())
        assert names == {name for name, place in index["weight_map"].items() if place == file}
    loaded, loading = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "llava", output_loading_info=True
    )
    assert not any(loading[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    tokenizer = llava_tokenizer()
    model = llava_model("clip", tokenizer)
    arguments = (tokenizer, tower_processor("clip"))
    write_llava(tmp_path / "llava", model, *arguments, image_aspect="pad", chat_template="first")
    broken = copy.deepcopy(model)
    del broken.model.vision_tower.encoder.layers[-1]
    with pytest.raises(ValueError, match="not those of a stock"):
        write_llava(tmp_path / "llava", broken, *arguments, image_aspect="pad", chat_template="second")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export_files, "write_weights", full)
        with pytest.raises(OSError, match="No space left"):
            write_llava(tmp_path / "llava", model, *arguments, image_aspect="pad", chat_template="second")
    assert [file.name for file in tmp_path.iterdir()] == ["llava"]
    assert (tmp_path / "llava" / "chat_template.jinja").read_text() == "first"
    write_llava(tmp_path / "llava", model, *arguments, image_aspect="pad", chat_template="second")
    assert (tmp_path / "llava" / "chat_template.jinja").read_text() == "second"

    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("rain")
    with pytest.raises(ValueError, match="holds no model"):
        write_llava(tmp_path / "diary", model, *arguments, image_aspect="pad", chat_template="")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        write_llava(tmp_path / "other", model, *arguments, image_aspect="pad", chat_template="")
    assert {file.name for file in tmp_path.iterdir()} == {"llava", "diary"}
