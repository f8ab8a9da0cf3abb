"""Run the stages of one YAML file in order, each as its own process; skip what is complete, continue what was killed.

    python scripts/run_chain.py CONFIG [--root DIR] [--arms A,B] [--seeds 0,1] [--launcher "accelerate launch"]
                                [--STAGE.section.field VALUE ...]

The file holds `root` (where everything is written), `seeds`, `arms` (the ones run by default), `values` of each
arm (optional), `settings` common to the stages of one command, and `stages`, each with

    name        its output directory below root; also the prefix of its overrides
    command     such as `llm2clip train-clip`
    arm         run only if this arm is asked for (optional)
    per_arm     run once for every arm, in NAME-ARM (optional); `{arm}` and the arm's `values`, texts, are filled in
    per_seed    run once for every seed, in NAME/seed-N (optional)
    settings    the stage's configuration; `{root}` and `{seed}` are filled in, in a stage that is not per_seed
                a text with `{seed}` in a list becomes one item per seed (and is an error elsewhere), a mapping
                key or list item ending in `?ARM` is dropped unless that arm is run

A file may name another one as its `base` and hold what differs: top-level keys, and under `overrides` settings by
stage. Every stage's configuration is checked before the first one starts.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_bridge import cli as llava_cli
from llm2clip import cli, run_dir
from llm2clip.config import StageCall, merge, set_dotted
from llm2clip_eval import cli as eval_cli

COMMANDS = {
    **{f"llm2clip {name}": (module, "llm2clip.cli") for name, (module, _) in cli.COMMANDS.items()},
    **{f"llava-bridge {name}": (module, "llava_bridge.cli") for name, (module, _) in llava_cli.COMMANDS.items()},
    **{f"llm2clip-eval {name}": (module, "llm2clip_eval.cli") for name, (module, _) in eval_cli.COMMANDS.items()},
}

# Stages are forked from a server that has imported these once: 7 seconds less for each stage.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["llm2clip.trainer", "llm2clip.teacher", "llm2clip.caption_data"])


@dataclass(frozen=True)
class Step:
    """One stage with everything filled in."""

    name: str
    command: str
    settings: dict[str, Any]
    config_file: Path
    output_dir: Path

    @property
    def argv(self) -> list[str]:
        return ["--config", str(self.config_file)]

    @property
    def module(self) -> Any:
        return importlib.import_module(COMMANDS[self.command][0])

    def is_complete(self, call: StageCall) -> bool:
        """Whether its output is there, made from the inputs as they are now."""
        if not (self.output_dir / run_dir.MANIFEST).is_file():
            return False
        stage = self.command.partition(" ")[2]
        return run_dir.is_complete(
            self.output_dir, run_dir.identity(call, stage=stage, inputs=self.module.inputs(call))
        )


def load_chain(path: Path) -> dict[str, Any]:
    """One chain file, on top of its base if it names one."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; chains are YAML files with `stages`, such as configs/demo/llm2clip.yaml"
        )
    chain = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "base" not in chain:
        return chain
    parent = load_chain(path.parent / chain.pop("base"))
    overrides = chain.pop("overrides", {})
    stages = {stage["name"]: stage for stage in parent["stages"]}
    if unknown := overrides.keys() - stages.keys():
        raise ValueError(f"{path}: overrides for unknown stages {sorted(unknown)}; there are {sorted(stages)}")
    for name, settings in overrides.items():
        merge(stages[name].setdefault("settings", {}), settings)
    merge(parent, chain)
    return parent


def read_chain(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The chain's YAML with the overrides of the command line written in; and the launcher."""
    parser = argparse.ArgumentParser(prog="run_chain.py", allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--root")
    parser.add_argument("--arms", help="comma-separated")
    parser.add_argument("--seeds", help="comma-separated")
    parser.add_argument("--launcher", default="", help="what starts a stage that trains, such as 'accelerate launch'")
    known, rest = parser.parse_known_args(argv)
    chain = load_chain(known.config)
    chain["root"] = known.root or chain["root"]
    if known.arms:
        chain["arms"] = known.arms.split(",")
    if known.seeds:
        chain["seeds"] = [int(seed) for seed in known.seeds.split(",")]
    all_arms = {stage["arm"] for stage in chain["stages"] if "arm" in stage} | chain.get("values", {}).keys()
    if unknown := set(chain["arms"]) - all_arms:
        raise ValueError(f"--arms: no arm {sorted(unknown)} in {known.config}; it has {sorted(all_arms)}")
    stages = {stage["name"]: stage for stage in chain["stages"]}
    while rest:
        option = rest.pop(0)
        key, equals, value = option.removeprefix("--").partition("=")
        name, _, field = key.partition(".")
        if not option.startswith("--") or not field or name not in stages:
            raise ValueError(f"{option}: expected --STAGE.field VALUE with STAGE one of {', '.join(stages)}")
        if not equals:
            if not rest:
                raise ValueError(f"{option}: a value is missing")
            value = rest.pop(0)
        set_dotted(stages[name].setdefault("settings", {}), field, yaml.safe_load(value))
    return chain, shlex.split(known.launcher)


def plan(chain: dict[str, Any]) -> list[Step]:
    """Every step of the chosen arms and seeds, in order."""
    arms, seeds = chain["arms"], chain["seeds"]
    steps = []
    for stage in chain["stages"]:
        if stage.get("arm", arms[0]) not in arms:
            continue
        for arm in arms if stage.get("per_arm") else [None]:
            for seed in seeds if stage.get("per_seed") else [None]:
                steps.append(_step(chain, stage, arm, seed))
    return steps


def _step(chain: dict[str, Any], stage: dict[str, Any], arm: str | None, seed: int | None) -> Step:
    """One stage for one arm and seed, where it has any."""
    name = stage["name"] + (f"-{arm}" if arm else "") + ("" if seed is None else f"/seed-{seed}")
    values = {"root": chain["root"]}
    if arm:
        given = chain.get("values", {}).get(arm)
        if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
            raise ValueError(
                f"{name}: the stage is per_arm, but `values` has {given!r} for arm {arm}; expected a mapping to "
                'texts, such as {rate: "1e-4"}, or {} for none'
            )
        values |= {"arm": arm, **given}
    settings: dict[str, Any] = {}
    for part in (chain.get("settings", {}).get(stage["command"], {}), stage.get("settings", {})):
        try:
            merge(settings, _fill(part, values, chain["arms"], chain["seeds"], seed))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    settings.setdefault("output_dir", f"{chain['root']}/{name}")
    config_file = Path(chain["root"]) / "configs" / f"{name.replace('/', '-')}.yaml"
    return Step(name, stage["command"], settings, config_file, Path(settings["output_dir"]))


def _fill(value: Any, values: dict[str, str], arms: list[str], seeds: list[int], seed: int | None) -> Any:
    """Fill the placeholders of one settings value."""
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            name, arm = _split_arm(str(key))
            if not arm or arm in arms:
                kept[name] = _fill(item, values, arms, seeds, seed)
        return kept
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            if isinstance(item, str):
                item, arm = _split_arm(item)
                if arm and arm not in arms:
                    continue
            each_seed = seed is None and isinstance(item, str) and "{seed}" in item
            items += [_fill(item, values, arms, seeds, s) for s in (seeds if each_seed else [seed])]
        return items
    if isinstance(value, str):
        if value == "{seed}" and seed is not None:
            return seed
        for _ in range(2):  # the value of an arm may hold {root} and {seed}
            for name, text in values.items():
                value = value.replace(f"{{{name}}}", text)
        if "{seed}" in value and seed is None:
            raise ValueError(
                f"{value}: which {{seed}}? The stage is not per_seed; make it so, or a list of this, for all seeds"
            )
        value = value.replace("{seed}", str(seed))
    return value


def _split_arm(text: str) -> tuple[str, str]:
    """`NAME?ARM` -> (NAME, ARM); any other text, a question too, is left whole."""
    found = re.fullmatch(r"(.+)\?(\w+)", text)
    return (found[1], found[2]) if found else (text, "")


def check(steps: list[Step]) -> dict[str, StageCall]:
    """Parse every step's configuration; all mistakes of all steps in one error."""
    calls, problems = {}, []
    environment = dict(os.environ)
    for step in steps:
        step.config_file.parent.mkdir(parents=True, exist_ok=True)
        run_dir.atomic_write(step.config_file, yaml.safe_dump(step.settings, sort_keys=False))
        try:
            calls[step.name] = step.module.parse(step.argv)
        except ValueError as error:
            problems.append(f"{step.name}: {error}")
    os.environ.clear()
    os.environ.update(environment)  # DeepSpeed's settings of one stage are not for the others
    if problems:
        raise ValueError("\n".join(problems))
    return calls


def run(step: Step, launcher: list[str], call: StageCall) -> None:
    """Run one step as a process of its own; what ends the chain ends the step too."""
    process: Any
    if launcher and call.training is not None:
        process = subprocess.Popen([*launcher, "-m", COMMANDS[step.command][1], *step.command.split()[1:], *step.argv])
        wait = process.wait
    else:
        process = PROCESSES.Process(target=_run_stage, args=(COMMANDS[step.command][0], step.argv))
        process.start()
        wait = process.join
    try:
        wait()
    finally:
        process.terminate()  # does nothing to a process that has ended
        wait()
    code = process.returncode if isinstance(process, subprocess.Popen) else process.exitcode
    if code:
        print(
            f"{step.name} failed with exit code {code}; nothing is lost, run the same command again", file=sys.stderr
        )
        raise SystemExit(code if code in (1, 2) else 1)


def _run_stage(module: str, argv: list[str]) -> None:
    raise SystemExit(cli.run_command(module, argv))


def _stop(*_: Any) -> None:
    raise SystemExit("terminated; nothing is lost, run the same command again")


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, _stop)
    began = time.monotonic()
    chain, launcher = read_chain(argv)
    steps = plan(chain)
    calls = check(steps)
    headlines = []
    for number, step in enumerate(steps, 1):
        call, start = calls[step.name], time.monotonic()
        title = f"[{number}/{len(steps)}] {step.name} ({step.command})"
        if step.is_complete(call):
            print(f"{title}: done before", flush=True)
        else:
            print(title, flush=True)
            run(step, launcher, call)
            print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)
        manifest = run_dir.read_manifest(step.output_dir)
        headlines += [manifest["headline"]] if "headline" in manifest else []
    print("\nWritten:")
    for step in steps:
        print(f"  {step.output_dir}")
    print("\n" + "\n".join(headlines))
    print(f"\nWhole chain: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
