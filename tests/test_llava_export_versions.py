"""Exported LLaVA models under transformers 4.50 and 4.57, in throw-away environments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import old_transformers
import pytest
from llava_exports import LLMS, Export, edit, sentencepiece_tokenizer
from tiny_llava import TOWERS

from llava_bridge import export_check, export_verify


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
