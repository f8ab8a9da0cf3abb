"""Exported towers are stock models: every key, same features, in a process that does not know this package."""

from __future__ import annotations

import json
from pathlib import Path

import old_transformers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm2clip import export, export_check
from llm2clip.model_card import provenance
from llm2clip.modeling_clip import LLM2CLIPConfig, LLM2CLIPModel

VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
TOWERS = {
    "clip": transformers.CLIPVisionConfig(**VISION, intermediate_size=64, hidden_act="gelu"),
    "siglip": transformers.SiglipVisionConfig(**VISION, intermediate_size=64),
    "vit": transformers.ViTConfig(**VISION, intermediate_size=64),
    "dinov2": transformers.Dinov2Config(**VISION, mlp_ratio=2),
}


def save_processor(directory: Path, kind: str) -> None:
    size = {"height": 32, "width": 32}
    if kind == "siglip":
        processor = transformers.SiglipImageProcessor(size=size)
    else:
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    processor.save_pretrained(directory)


def randomize(model: torch.nn.Module) -> None:
    """Move every parameter away from its start, so that a tensor that is not loaded shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def save_tower(directory: Path, kind: str) -> torch.nn.Module:
    model = transformers.AutoModel.from_config(TOWERS[kind])
    randomize(model)
    model.save_pretrained(directory)
    save_processor(directory, kind)
    return model.eval()


def run_export(clip: Path, output_dir: Path) -> Path:
    export.main(["--clip", str(clip), "--output_dir", str(output_dir)])
    return output_dir / "vision_tower"


@pytest.mark.parametrize("kind", TOWERS)
def test_a_stock_tower_survives_the_round_trip(tmp_path, kind):
    model = save_tower(tmp_path / "source", kind)
    tower = run_export(tmp_path / "source", tmp_path / "export")
    report = json.loads((tmp_path / "export" / "verification.json").read_text())
    assert set(report["classes"]) == {type(model).__name__, "AutoModel"}
    assert export.find_problems(report) == []
    pixels = torch.randn(2, 3, 32, 32)
    found = type(model).from_pretrained(tower).eval()(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, model(pixel_values=pixels).last_hidden_state, rtol=0, atol=1e-6)
    assert json.loads((tower / "config.json").read_text())["hidden_act"] == TOWERS[kind].hidden_act
    with safe_open(tower / "model.safetensors", "pt") as file:
        names = list(file.keys())
    prefixed = {"clip", "siglip"}  # the level that 4.x needs there, and nowhere else
    assert all(name.startswith("vision_model.") == (kind in prefixed) for name in names)


def clip_model() -> transformers.CLIPModel:
    config = transformers.CLIPConfig(
        vision_config={**VISION, "intermediate_size": 64}, text_config={**TEXT, "bos_token_id": 0, "eos_token_id": 1}
    )
    return transformers.CLIPModel(config)


def llm2clip_model() -> LLM2CLIPModel:
    tower = transformers.CLIPVisionConfig(**VISION, intermediate_size=64)
    return LLM2CLIPModel(LLM2CLIPConfig(vision_config=tower, caption_embedding_dim=12, projection_dim=16))


@pytest.mark.parametrize("build", [clip_model, llm2clip_model])
def test_a_whole_model_gives_its_vision_half(tmp_path, build):
    model = build()
    randomize(model)
    model.save_pretrained(tmp_path / "source")
    save_processor(tmp_path / "source", "clip")
    tower = run_export(tmp_path / "source", tmp_path / "export")
    pixels = torch.randn(2, 3, 32, 32)
    found = transformers.CLIPVisionModel.from_pretrained(tower)(pixel_values=pixels).pooler_output
    expected = model.eval().vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert json.loads((tower / "config.json").read_text())["architectures"] == ["CLIPVisionModel"]
    settings = json.loads((tower / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "CLIPImageProcessor"
    assert settings["size"] == {"shortest_edge": 32} and settings["do_center_crop"] is True
    card = (tower / "README.md").read_text()
    assert "CLIPVisionModel.from_pretrained" in card and "## Licence" in card
    assert str(tmp_path) not in card

    written = (tower / "model.safetensors").stat().st_mtime_ns
    run_export(tmp_path / "source", tmp_path / "export")  # complete: left alone
    assert (tower / "model.safetensors").stat().st_mtime_ns == written


def drop(weights: Path, ending: str) -> None:
    """Take one tensor out of a file of weights."""
    tensors = load_file(weights)
    (name,) = (name for name in tensors if name.endswith(ending))
    tensors.pop(name)
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("build", [None, clip_model, llm2clip_model])
def test_a_tensor_that_the_source_lacks_is_not_made_up(tmp_path, build):
    source = tmp_path / "source"
    if build is None:
        save_tower(source, "clip")
    else:
        build().save_pretrained(source)
        save_processor(source, "clip")
    drop(source / "model.safetensors", "layers.1.mlp.fc1.weight")  # the text tower has a single layer
    with pytest.raises(ValueError, match=r"1 missing keys for \w+, such as .*layers\.1\.mlp\.fc1\.weight"):
        run_export(source, tmp_path / "export")
    assert not (tmp_path / "export" / "vision_tower").exists()


def test_a_tensor_of_the_text_side_is_not_missed(tmp_path):
    clip_model().save_pretrained(tmp_path / "source")
    save_processor(tmp_path / "source", "clip")
    drop(tmp_path / "source" / "model.safetensors", "text_model.final_layer_norm.weight")
    assert run_export(tmp_path / "source", tmp_path / "export").is_dir()


def test_a_pooler_is_needed_where_it_is_read(tmp_path):
    """Checkpoints of classifiers have none; LLaVA reads patches only."""
    save_tower(tmp_path / "source", "vit")
    drop(tmp_path / "source" / "model.safetensors", "pooler.dense.weight")
    assert export.load_vision_model(str(tmp_path / "source"))[0].config.model_type == "vit"
    with pytest.raises(ValueError, match="1 missing keys for ViTModel, such as pooler.dense.weight"):
        run_export(tmp_path / "source", tmp_path / "export")


def test_an_unfaithful_tower_is_an_error_and_not_called_done(tmp_path, monkeypatch):
    save_tower(tmp_path / "source", "clip")
    write = export.write_tower

    def write_with_another_activation(vision_model, processor, tower):
        write(vision_model, processor, tower)
        config = json.loads((tower / "config.json").read_text())
        (tower / "config.json").write_text(json.dumps({**config, "hidden_act": "quick_gelu"}))

    monkeypatch.setattr(export, "write_tower", write_with_another_activation)
    with pytest.raises(RuntimeError, match="last_hidden_state differs"):
        run_export(tmp_path / "source", tmp_path / "export")
    assert not (tmp_path / "export" / "manifest.json").exists()


def test_a_lost_tensor_is_found(tmp_path):
    save_tower(tmp_path / "source", "clip")
    vision_model, processor = export.load_vision_model(str(tmp_path / "source"))
    export.write_tower(vision_model, processor, tmp_path / "tower")
    save_file(export.reference_outputs(vision_model, processor), tmp_path / "reference.safetensors")
    weights = tmp_path / "tower" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("vision_model.post_layernorm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    report = export_check.check(str(tmp_path / "tower"), str(tmp_path / "reference.safetensors"))
    assert "1 missing keys, first " in export.find_problems(report)[0]


def test_provenance_follows_settings_to_the_runs_they_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "clip": {
            "embeddings": "runs/embeddings",
            "data": [{"path": "runs/data/train/scenes"}],
            "lr_scheduler": "cosine",
        },
        "embeddings": {"teacher": "runs/teacher", "data": [{"path": "runs/data/train/scenes"}]},
        "teacher": {"model": "runs/deleted"},
        "data": {"output": "."},
    }
    for name, values in settings.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        manifest = {"stage": name, "fingerprint": name, "inputs": {}, "settings": values}
        (tmp_path / "runs" / name / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "runs" / "data" / "train" / "scenes").mkdir(parents=True)
    found = [manifest["stage"] for _, manifest in provenance(Path("runs/clip"))]
    assert found == ["clip", "embeddings", "teacher", "data"]


def test_a_directory_without_a_model_or_processor_is_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model with its image processor"):
        run_export(tmp_path / "empty", tmp_path / "export")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOWERS)
def test_transformers_4_57_loads_every_key(tmp_path, kind, packages):
    save_tower(tmp_path / "source", kind)
    tower = run_export(tmp_path / "source", tmp_path / "export")
    vision_model, processor = export.load_vision_model(str(tmp_path / "source"))
    save_file(export.reference_outputs(vision_model, processor), tmp_path / "reference.safetensors")
    report = old_transformers.check_under(packages, export_check.__file__, tower, tmp_path / "reference.safetensors")
    assert report["transformers"].startswith("4.57")
    assert export.find_problems(report) == []


@pytest.mark.slow
def test_transformers_4_57_shows_why_the_prefix_is_needed(tmp_path, packages):
    """The negative control: what 5.x saves by itself arrives in 4.57 as a random tower."""
    save_tower(tmp_path / "source", "clip")
    vision_model, processor = export.load_vision_model(str(tmp_path / "source"))
    save_file(export.reference_outputs(vision_model, processor), tmp_path / "reference.safetensors")
    report = old_transformers.check_under(
        packages, export_check.__file__, tmp_path / "source", tmp_path / "reference.safetensors"
    )
    assert any("missing keys" in problem for problem in export.find_problems(report))


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return old_transformers.install("4.57", tmp_path_factory.mktemp("transformers_4_57"))
