"""Typed stage configuration: dataclass defaults, then YAML, then dotted command line overrides.

The only module that knows jsonargparse. Defaults in a dataclass are the published recipe, a YAML file holds what
differs, the command line what is being varied. Every mistake is reported, with its key, before anything is loaded.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from io import StringIO
from pathlib import Path
from typing import Any, Generic, TypeVar

import jsonargparse
import yaml

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    from transformers import TrainingArguments

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StageConfig:
    """What every stage has."""

    output_dir: Path
    """Run directory that the stage writes; complete once its manifest.json is there."""
    overwrite: bool = False
    """Delete what another configuration or other inputs left in output_dir and start over."""


C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class StageCall(Generic[C]):
    """One parsed invocation of a stage."""

    config: C
    """The stage's own settings."""
    training: TrainingArguments | None
    """The `training.*` group, for stages that train."""
    resolved: dict[str, Any]
    """Every value in plain YAML types, as written to config.yaml."""


def parse_stage(
    config_class: type[C], argv: Sequence[str] | None = None, *, prog: str, training_class: str | None = None
) -> StageCall[C]:
    """Parse `--config FILE.yaml` and dotted overrides into a typed configuration.

    Args:
        config_class: dataclass of the stage's own settings.
        argv: arguments without the program name; None means `sys.argv[1:]`.
        prog: command shown in messages, such as `llm2clip train-clip`.
        training_class: `module:Class` of a `transformers.TrainingArguments` (sub)class offered as `training.*`. It is
            imported here and not by the caller, so that `--help` needs no torch.

    Raises:
        ValueError: for unknown keys, wrong types and missing or contradicting values, all of them in one message.
        SystemExit: 0, after `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        _parser(config_class, prog, None, training_class).print_help()
        raise SystemExit(0)
    parser = _parser(config_class, prog, training_class, training_class)
    try:
        namespace = parser.parse_args(argv)
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise ValueError(_all_problems(parser, argv, error, prog)) from None
    resolved = yaml.safe_load(parser.dump(namespace, skip_none=False))
    values = dict(vars(parser.instantiate(namespace)))
    values.pop("config", None)
    training_values = values.pop("training", None)
    config = config_class(**values)
    training = None
    if training_class is not None:
        try:
            training = _load(training_class)(
                output_dir=str(config.output_dir / "checkpoints"), **vars(training_values)
            )
        except PackageNotFoundError as error:  # of transformers, for training.deepspeed
            raise ValueError(f"{prog}: {error}; pip install -e '.[deepspeed]'") from error
    return StageCall(config=config, training=training, resolved=resolved)


def _load(dotted: str) -> Any:
    module, name = dotted.split(":")
    return getattr(importlib.import_module(module), name)


def _parser(
    config_class: type, prog: str, training_class: str | None, training_name: str | None
) -> jsonargparse.ArgumentParser:
    epilog = None
    if training_name:
        epilog = f"training.*: every field of {training_name.replace(':', '.')}, a transformers.TrainingArguments"
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=config_class.__doc__,
        epilog=epilog,
        usage="%(prog)s --config FILE.yaml [--section.field VALUE ...]",  # else each error prints pages of options
        allow_abbrev=False,  # else --training.learning_rat is silently completed
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win")
    parser.add_class_arguments(config_class)
    if training_class:
        parser.add_class_arguments(_load(training_class), "training", skip={"output_dir"}, instantiate=False)
    return parser


def _all_problems(parser: jsonargparse.ArgumentParser, argv: list[str], first: Exception, prog: str) -> str:
    """Name every bad key: jsonargparse stops at the first, so each leaf is tried alone."""
    try:
        given = list(leaves(_raw_values(argv)))
    except (OSError, yaml.YAMLError, ValueError) as error:
        return f"{prog}: {error}"
    problems = []
    for key, value in given:
        alone: Any = value
        for part in reversed(key.split(".")):
            alone = {part: alone}
        try:
            with redirect_stderr(StringIO()):
                parser.parse_object(alone)
        except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, KeyError) as error:
            if " required" not in str(error):  # the other keys are missing on purpose here
                problems.append(f"{key}: {' '.join(str(error).split())}")
    message = " ".join(str(first).split())
    if not problems or " required" in message:
        problems.insert(0, message)
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return f"{prog}: {len(problems)} problem(s) in the configuration; nothing was started:\n{listed}"


def _raw_values(argv: list[str]) -> dict[str, Any]:
    """The YAML files and overrides of a command line as one nested mapping, unchecked."""
    values: dict[str, Any] = {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--"):
            raise ValueError(f"unexpected argument {argument!r}; options look like --section.field VALUE")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            text = next(arguments, "")
        if key == "config":
            loaded = yaml.safe_load(Path(text).read_text(encoding="utf-8")) or {}
            if not isinstance(loaded, dict):
                raise ValueError(f"{text}: expected a mapping of settings, got {type(loaded).__name__}")
            merge(values, loaded)
        else:
            set_dotted(values, key, yaml.safe_load(text))
    return values


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping with its dotted key; an empty mapping counts as a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merge(base: dict[str, Any], update: dict[str, Any]) -> None:
    """Write `update` over `base` in place; nested mappings are merged, everything else is replaced."""
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in a nested mapping, in place."""
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {parent} is a value, not a section")
    values[last] = value
