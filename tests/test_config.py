"""Configuration: defaults < YAML < command line, and every mistake named at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from llm2clip.config import StageConfig, merge, parse_stage, set_dotted


@dataclass(kw_only=True)
class Part:
    size: int = 3
    """How large."""
    mode: Literal["fast", "exact"] = "exact"
    """How."""


@dataclass(kw_only=True)
class Source:
    path: Path
    """Where."""
    weight: float = 1.0
    """Share."""


@dataclass(kw_only=True)
class Config(StageConfig):
    """A stage."""

    part: Part = field(default_factory=Part)
    """A group."""
    data: list[Source] = field(default_factory=list)
    """A list of groups."""
    kinds: dict[str, float] = field(default_factory=lambda: {"raw": 0.5, "long": 0.5})
    """A mapping."""


TRAINING = "transformers:TrainingArguments"


def parse(*argv: str, training_class: str | None = TRAINING):
    return parse_stage(Config, list(argv), prog="stage", training_class=training_class)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_command_line_beats_yaml_beats_defaults(yaml_file):
    path = yaml_file(
        "output_dir: out\npart: {size: 5, mode: fast}\ndata: [{path: a}, {path: b, weight: 2}]\n"
        "training: {learning_rate: 1e-5, max_steps: 4}\n"
    )
    call = parse("--config", path, "--part.size", "7", "--training.max_steps", "9")
    assert call.config.part == Part(size=7, mode="fast")
    assert call.config.data == [Source(path=Path("a")), Source(path=Path("b"), weight=2.0)]
    assert call.config.kinds == {"raw": 0.5, "long": 0.5}
    assert call.training is not None
    assert (call.training.learning_rate, call.training.max_steps) == (1e-5, 9)  # plain YAML 1.1 reads 1e-5 as a string
    assert call.training.output_dir == str(Path("out/checkpoints"))
    assert call.resolved["training"]["max_steps"] == 9


def test_a_mapping_in_yaml_replaces_the_default(yaml_file):
    assert parse("--config", yaml_file("output_dir: o\nkinds: {short: 1.0}"), training_class=None).config.kinds == {
        "short": 1.0
    }


def test_every_mistake_is_named_at_once(yaml_file):
    path = yaml_file(
        "prt: {size: 5}\npart: {size: large, mode: fastest}\ndata: [{pth: a}]\n"
        "training: {learning_rate: high, max_stepss: 3}\n"
    )
    with pytest.raises(ValueError) as caught:
        parse("--config", path)
    message = str(caught.value)
    for key in ("prt.size", "part.size", "part.mode", "data", "training.learning_rate", "training.max_stepss"):
        assert f"- {key}: " in message
    assert "nothing was started" in message


def test_missing_required_key_is_named():
    with pytest.raises(ValueError, match="output_dir"):
        parse("--part.size", "3", training_class=None)


def test_options_are_never_abbreviated():
    with pytest.raises(ValueError, match=r"training\.learning_rat"):
        parse("--output_dir", "o", "--training.learning_rat", "1")


@pytest.mark.parametrize("text", ["- a list", "{unclosed", "just text"])
def test_yaml_that_is_no_mapping_is_an_error(yaml_file, text):
    with pytest.raises(ValueError):
        parse("--config", yaml_file(text), training_class=None)


def test_missing_yaml_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml"):
        parse("--config", str(tmp_path / "nowhere.yaml"), training_class=None)


def test_nested_helpers():
    values = {"a": {"b": 1, "c": 2}}
    merge(values, {"a": {"b": 3}, "d": [1]})
    set_dotted(values, "a.e.f", 4)
    assert values == {"a": {"b": 3, "c": 2, "e": {"f": 4}}, "d": [1]}
    with pytest.raises(ValueError, match="b is a value"):
        set_dotted(values, "a.b.c", 1)
