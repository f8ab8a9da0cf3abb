"""Caption retrieval accuracy as a stage: the figures of finetune-llm, with every rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny import scene_captions, write_captions
from tiny_dual import write_teacher

from llm2clip.caption_data import CaptionData
from llm2clip.caption_retrieval import caption_pool, caption_retrieval_accuracy
from llm2clip.teacher import CaptionEncoder
from llm2clip_eval import cra


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def pool(tmp_path) -> Path:
    return write_captions(tmp_path / "pool", scene_captions(30))


def measure(output_dir: Path, pool: Path, query: str = "raw", positive: str = "long", **settings: object) -> dict:
    config = {"arm": "arm", "output_dir": str(output_dir), **settings}
    config["pools"] = {"scenes": {"data": str(pool), "query": query, "positive": positive}}
    file = output_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    cra.main(["--config", str(file)])
    return json.loads((output_dir / "results" / "scenes.json").read_text())


def test_the_figures_are_those_of_finetune_llm(tmp_path, teacher, pool):
    result = measure(tmp_path / "out", pool, teacher=str(teacher))
    texts = caption_pool(CaptionData.open(pool), "raw", "long")
    expected = caption_retrieval_accuracy(CaptionEncoder.from_pretrained(teacher), *texts)
    assert result["num_images"] == expected["num_images"] == 30
    for direction in ("query_to_positive", "positive_to_query"):
        assert result["accuracy"][direction] == pytest.approx(100 * expected[direction])
        assert np.mean(np.array(result[f"{direction}_ranks"]) == 0) == pytest.approx(expected[direction])
    assert result["accuracy"]["mean"] == pytest.approx(50 * sum(expected[name] for name in result_directions(result)))


def result_directions(result: dict) -> list[str]:
    return [name for name in result["accuracy"] if name != "mean"]


def test_an_llm_as_it_comes_is_an_untuned_teacher(tmp_path, teacher, pool):
    as_llm = measure(tmp_path / "llm", pool, llm=str(teacher.with_name("teacher-llm")), dtype="float32")
    as_teacher = measure(tmp_path / "teacher", pool, teacher=str(teacher), dtype="float32")
    assert as_llm["query_to_positive_ranks"] == as_teacher["query_to_positive_ranks"]
    causal = measure(
        tmp_path / "causal", pool, llm=str(teacher.with_name("teacher-llm")), bidirectional=False, pooling="last"
    )
    assert causal["query_to_positive_ranks"] != as_llm["query_to_positive_ranks"]


def test_ranks_by_hand_with_a_repeated_text_and_a_tie():
    embeddings = F.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0]]), dim=1)
    # texts 0 and 3 are different texts with the same vector: finding the other one of them is a miss
    assert cra.text_ranks(embeddings, torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0])) == [1, 0, 2]
    # images 0 and 1 share their positive text, so either is right
    assert cra.text_ranks(embeddings, torch.tensor([0, 2]), torch.tensor([2, 2])) == [0, 0]


def test_queries_and_positives_of_one_kind_are_different_captions(tmp_path, teacher, pool):
    assert measure(tmp_path / "out", pool, query="long", positive="long", teacher=str(teacher))["num_images"] == 30


def test_contradicting_settings_are_refused(tmp_path, teacher, pool):
    with pytest.raises(ValueError, match="give one of the two"):
        measure(tmp_path / "a", pool)
    with pytest.raises(ValueError, match="a teacher says these itself"):
        measure(tmp_path / "b", pool, teacher=str(teacher), pooling="last")
    with pytest.raises(ValueError, match="0 images with different captions 'raw' and 'de'"):
        measure(tmp_path / "c", pool, positive="de", teacher=str(teacher))
