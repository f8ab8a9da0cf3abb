"""Exported LLaVA models: stock files that every version of transformers reads, and a check that notices if not."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import old_transformers
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llava import IMAGE_TOKENS, TOWERS, llava_model, llava_tokenizer, tower_processor

from llava_bridge import export_check, export_files, export_verify, llava_original
from llava_bridge.dialogues import Turn
from llava_bridge.export_files import image_processor_for, write_llava
from llava_bridge.templates import export_chat_template, generation_prompt
from llm2clip import export as tower_export
from llm2clip import export_check as tower_check

TURNS = [Turn(message["role"], message["content"]) for message in export_verify.CONVERSATION]  # type: ignore[arg-type]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLMS: dict[str, dict[str, Any]] = {
    "llama3": {"llm": "llama", "rope_parameters": LLAMA3},
    "qwen2": {"llm": "qwen2", "rope_parameters": {"rope_theta": 1e6}, "tie_word_embeddings": True},
    "mistral": {"llm": "mistral"},
    "mixtral": {"llm": "mixtral", "num_local_experts": 4},
}


class Export:
    """An exported model, and the reference of the model it was exported from."""

    def __init__(
        self, directory: Path, kind: str = "clip", *, template: Any = "chat", aspect: Any = "pad", **llm: Any
    ):
        self.directory = directory / "llava"
        self.file = directory / "reference.safetensors"
        self.tokenizer = llm.pop("tokenizer", None) or llava_tokenizer()
        self.model = llava_model(kind, self.tokenizer, **llm)
        processor = tower_processor(kind)
        write_llava(
            self.directory,
            self.model,
            self.tokenizer,
            processor,
            image_aspect=aspect,
            chat_template=export_chat_template(template, self.tokenizer),
        )
        prompt = generation_prompt(template, TURNS, self.tokenizer).replace("<image>", "<image>" * IMAGE_TOKENS[kind])
        self.reference = export_verify.make_reference(
            self.model, self.tokenizer, image_processor_for(processor, aspect), self.tokenizer(prompt).input_ids
        )
        self.reference.save(self.file)

    def problems(self) -> list[str]:
        report = export_check.check(str(self.directory), str(self.file))
        return export_verify.find_problems(report)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


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


def test_verify_uses_a_process_of_its_own_and_names_what_differs(tmp_path, monkeypatch):
    export = Export(tmp_path)
    edit(export.directory / "config.json", vision_feature_layer=-1)
    with pytest.raises(RuntimeError, match="is not the model it was exported from: logits differ by") as error:
        export_verify.verify(export.directory, export.reference)
    assert "missing" not in str(error.value) and "prompt" not in str(error.value)
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
        "prompt of processor, typed parts",
        "prompt of processor, strings",
        "prompt of tokenizer, strings",
        "prompt of tokenizer, typed parts",
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


def llava_pixels(image: Image.Image, size: int, mean: list[float], std: list[float], resample: int) -> np.ndarray:
    """LLaVA's preprocessing: `expand2square` with the mean colour, then CLIPImageProcessor's steps in its order."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    pixels = np.array(square.resize((size, size), resample=resample))  # the crop takes all of a square
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    normalized = (scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return normalized.transpose(2, 0, 1)


SIZES = [(28, 28), (30, 41), (41, 30), (1, 50), (50, 1), (3, 50), (50, 3), (1, 1), (3, 3), (2, 3), (4, 1), (500, 333)]


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_padding_is_llavas_bit_by_bit(kind):
    rng = np.random.default_rng(0)
    processor = tower_processor(kind)
    settings = processor.to_dict()
    mean, std = list(settings["image_mean"]), list(settings["image_std"])
    sizes = SIZES + [(int(width), int(height)) for width, height in rng.integers(1, 120, (40, 2))]
    for width, height in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = image_processor_for(processor, "pad")(images=image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(found, llava_pixels(image, 32, mean, std, settings["resample"]))


@pytest.mark.parametrize(("width", "left", "right"), [(4, 2, 2), (5, 1, 2), (7, 0, 1)])
def test_of_an_odd_difference_the_larger_half_is_behind(width, left, right):
    """Counted in columns of the padded image, an 8 x 8 square that is not resized."""
    settings = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    white = Image.new("RGB", (width, 8), (255, 255, 255))
    pixels = image_processor_for(transformers.CLIPImageProcessor(**settings), "pad")(images=white)["pixel_values"][0]
    bright = [bool(column > 1) for column in np.asarray(pixels)[0, 0]]
    assert bright == [False] * left + [True] * width + [False] * right


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_square_is_the_towers_own_preprocessing(kind):
    own = tower_processor(kind)
    pil = getattr(transformers, f"{type(own).__name__.removesuffix('Pil')}Pil")(**own.to_dict())
    processor = image_processor_for(own, "square")
    assert processor.crop_size["height"] == processor.crop_size["width"] == 32  # LlavaProcessor counts tokens by it
    rng = np.random.default_rng(0)
    for width, height in [(40, 50), (90, 33), (31, 70), (32, 32), (7, 5)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = pil(images=image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(processor(images=image, return_tensors="np")["pixel_values"], expected)


def test_the_preprocessing_follows_the_towers_image_size():
    square = {"height": 224, "width": 224}
    dino = transformers.CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=square)
    image = Image.new("RGB", (600, 300))
    for aspect, edge in (("square", 592), ("pad", 518)):
        processor = image_processor_for(dino, aspect, image_size=518)
        assert processor.size["shortest_edge"] == edge
        assert processor(images=image, return_tensors="np")["pixel_values"].shape == (1, 3, 518, 518)
    assert image_processor_for(dino, "square").size["shortest_edge"] == 256


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 32, "width": 48}, "do_center_crop": False},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 48}},
        {"size": {"shortest_edge": 32}, "do_center_crop": False},
        {"do_normalize": False},
        {"do_resize": False},
    ],
)
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_other_preprocessing_is_bad_input(settings, aspect):
    with pytest.raises(ValueError, match="cannot be used; expected one that resizes, makes squares of one size"):
        image_processor_for(transformers.CLIPImageProcessor(**settings), aspect)


def test_the_tokenizer_is_generic_and_its_state_of_training_is_not_exported(tmp_path):
    tokenizer = llava_tokenizer()
    texts = ["a red cat", "<image>\nthe image shows </s> a 'turkey'  below"]
    expected = tokenizer(texts).input_ids
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


def sentencepiece_tokenizer() -> transformers.LlamaTokenizer:
    """A tokenizer of Llama's class, whose 4.x form rebuilds it by other rules than 5.x's."""
    words = ["▁a", "▁red", "▁cat", "▁is", "▁in", "▁the", "▁image", "▁USER", "▁ASSISTANT"]
    pieces: dict[str, None] = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    pieces |= dict.fromkeys("▁.?:, ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'")
    merges = {(word[:end], word[end]): None for word in words for end in range(1, len(word))}
    pieces |= dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = transformers.LlamaTokenizer(vocab=vocabulary, merges=list(merges))
    tokenizer.add_tokens([transformers.AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def test_a_sentencepiece_tokenizer_keeps_its_ids(tmp_path):
    assert Export(tmp_path, template="vicuna_v1", tokenizer=sentencepiece_tokenizer()).problems() == []


def test_generation_is_greedy_and_ends_at_every_end_token(tmp_path):
    tokenizer = llava_tokenizer()
    model = llava_model("clip", tokenizer)
    ends = [tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id]
    model.generation_config.eos_token_id = ends
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    settings = export_files.generation_settings(model, tokenizer)
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


def original_tower(directory: Path, **settings: Any) -> tuple[torch.nn.Module, str]:
    tower = copy.deepcopy(llava_model("clip", llava_tokenizer()).model.vision_tower)
    processor = transformers.CLIPImageProcessor(
        **{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **settings}
    )
    return tower, llava_original.export_for_original(tower, processor, directory)


def test_the_original_llava_gets_a_tower_and_its_commands(tmp_path):
    tower, commands = original_tower(tmp_path / "my run" / "vision_tower")
    directory = tmp_path / "my run" / "vision_tower"
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert all(name.startswith("vision_model.") for name in file.keys())
        assert file.metadata() == {"format": "pt"}  # 4.37 refuses files without
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model" and config["torch_dtype"] == "float32"
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "CLIPImageProcessor" and "do_pad" not in settings
    assert settings["crop_size"] == {"height": 32, "width": 32} and settings["size"] == {"shortest_edge": 32}
    first, second = commands.split("# Stage 2")
    for stage, flags in (
        (first, "version plain|learning_rate 1e-3|per_device_train_batch_size 32|tune_mm_mlp_adapter True"),
        (second, "version v1|learning_rate 2e-5|per_device_train_batch_size 16|image_aspect_ratio pad"),
    ):
        shared = "mm_vision_select_layer -2|mm_projector_type mlp2x_gelu|mm_use_im_patch_token False"
        for flag in f"{flags}|{shared}|model_max_length 2048|warmup_ratio 0.03|vision_tower '{directory}'".split("|"):
            assert f"--{flag}" in stage
    assert "--deepspeed ./scripts/zero2.json" in first and "--deepspeed ./scripts/zero3.json" in second
    assert "image_aspect_ratio" not in first
    output = first.split("--output_dir ")[1].split("\n")[0].strip("'")
    assert f"--pretrain_mm_mlp_adapter '{output}/mm_projector.bin'" in second
    pixels = torch.randn(2, 3, 32, 32)
    loaded = transformers.CLIPVisionModel.from_pretrained(directory)
    torch.testing.assert_close(loaded(pixels).last_hidden_state, tower(pixels).last_hidden_state, rtol=0, atol=1e-6)


def test_the_original_llava_has_no_place_for_other_towers(tmp_path):
    tower = llava_model("siglip", llava_tokenizer()).model.vision_tower
    with pytest.raises(ValueError, match="loads every tower with CLIPVisionModel, and this one is of type 'siglip"):
        llava_original.export_for_original(tower, tower_processor("siglip"), tmp_path / "vision_tower")
    assert not (tmp_path / "vision_tower").exists()


@pytest.fixture(scope="module", params=["4.50", "4.57"])
def packages(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, old_transformers.install(request.param, tmp_path_factory.mktemp("transformers"))


def report_under(packages: tuple[str, Path], export: Export) -> dict[str, Any]:
    version, path = packages
    report = old_transformers.check_under(path, export_check.__file__, export.directory, export.file)
    assert report["transformers"].startswith(version)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOWERS)
def test_transformers_4_reads_the_same_towers(tmp_path, packages, kind):
    report = report_under(packages, Export(tmp_path, kind))
    assert export_verify.find_problems(report) == [] and report["logits"] < 1e-5
    assert report["image"] == 0.0  # there LlavaImageProcessor is Pillow's


@pytest.mark.slow
@pytest.mark.parametrize("llm", LLMS)
def test_transformers_4_reads_the_same_llms(tmp_path, packages, llm):
    report = report_under(packages, Export(tmp_path, aspect="square", **LLMS[llm]))
    assert export_verify.find_problems(report) == [] and report["logits"] < 1e-5


@pytest.mark.slow
def test_transformers_4_reads_a_sentencepiece_tokenizer(tmp_path, packages):
    export = Export(tmp_path, "siglip", template="vicuna_v1", tokenizer=sentencepiece_tokenizer())
    assert export_verify.find_problems(report_under(packages, export)) == []


@pytest.mark.slow
def test_transformers_4_shows_why_names_and_fields_are_written_by_hand(tmp_path, packages):
    """The negative controls: what 5.x saves by itself is a random tower there, and another rotary base."""
    export = Export(tmp_path, **LLMS["llama3"])
    good = {file.name: file.read_bytes() for file in export.directory.iterdir()}
    export.model.save_pretrained(tmp_path / "saved")
    (export.directory / "model.safetensors").write_bytes((tmp_path / "saved" / "model.safetensors").read_bytes())
    found = report_under(packages, export)
    assert len([key for key in found["missing_keys"] if "vision_tower" in key]) > 50
    (export.directory / "model.safetensors").write_bytes(good["model.safetensors"])
    text = json.loads(good["config.json"])["text_config"]
    del text["rope_theta"], text["rope_scaling"]
    edit(export.directory / "config.json", text_config=text)
    found = report_under(packages, export)
    assert found["missing_keys"] == [] and found["logits"] > 10 * export_verify.MAX_LOGIT_DIFFERENCE


@pytest.mark.slow
def test_the_transformers_of_the_original_llava_reads_its_tower(tmp_path):
    tower, _ = original_tower(tmp_path / "vision_tower")
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "vision_tower")
    save_file(tower_export.reference_outputs(tower, processor), tmp_path / "reference.safetensors")  # type: ignore[arg-type]
    path = old_transformers.install("4.37", tmp_path / "packages")
    arguments = (tower_check.__file__, tmp_path / "vision_tower", tmp_path / "reference.safetensors")
    report = old_transformers.check_under(path, *arguments)
    assert report["transformers"] == "4.37.2" and math.isfinite(report["image"])
    assert tower_export.find_problems(report) == []
