"""The chain's file and its signals; and all of it through its real commands, on real data and LLM, in miniature."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_chain(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    handler = signal.getsignal(signal.SIGTERM)
    yield importlib.import_module("run_chain")
    signal.signal(signal.SIGTERM, handler)
    sys.modules.pop("run_chain")


def one_stage(stage: dict[str, Any], **chain: Any) -> dict[str, Any]:
    stage = {"name": "clip", "command": "llm2clip train-clip", **stage}
    return {"root": "runs/x", "seeds": [0, 1], "arms": ["a"], "stages": [stage], **chain}


def test_placeholders_are_filled_in(run_chain):
    stage = {"per_arm": True, "settings": {"tower": "{tower}", "baseline": ["{root}/b/seed-{seed}"], "name": "{arm}"}}
    (step,) = run_chain.plan(one_stage(stage, values={"a": {"tower": "{root}/tower"}}))
    baseline = ["runs/x/b/seed-0", "runs/x/b/seed-1"]
    expected = {"tower": "runs/x/tower", "baseline": baseline, "name": "a", "output_dir": "runs/x/clip-a"}
    assert (step.name, step.settings) == ("clip-a", expected)


@pytest.mark.parametrize(
    ("stage", "chain", "message"),
    [
        ({"per_arm": True}, {}, "clip-a: the stage is per_arm, but `values` has None for arm a; expected a mapping"),
        ({"per_arm": True}, {"values": {"a": {"lr": 1.0e-4}}}, "`values` has .'lr': 0.0001. for arm a; .* to texts"),
        ({"settings": {"tower": "{root}/seed-{seed}"}}, {}, "clip: runs/x/seed-{seed}: which {seed}. The stage"),
        ({"settings": {"training": {"seed": "{seed}"}}}, {}, "clip: {seed}: which {seed}. The stage is not per_seed"),
    ],
)
def test_placeholders_that_cannot_be_filled_in_are_named(run_chain, stage, chain, message):
    with pytest.raises(ValueError, match=message):
        run_chain.plan(one_stage(stage, **chain))


def test_sigterm_between_steps_ends_the_chain(run_chain, monkeypatch):
    monkeypatch.setattr(run_chain, "read_chain", lambda argv: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="nothing is lost, run the same command again"):
        run_chain.main([])


def stage_without_end(module: str, argv: list[str]) -> None:
    Path(argv[-1]).write_text(str(os.getpid()))
    time.sleep(60)


@pytest.mark.parametrize("launched", [True, False])
def test_sigterm_ends_the_step_with_the_chain(run_chain, monkeypatch, tmp_path, launched):
    code = "import os, sys, time; open(sys.argv[-1], 'w').write(str(os.getpid())); time.sleep(60)"
    pid_file = tmp_path / "pid"

    def terminate_when_it_runs() -> None:
        while not (pid_file.is_file() and pid_file.read_text()):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_chain, "_run_stage", stage_without_end)
    signal.signal(signal.SIGTERM, run_chain._stop)
    threading.Thread(target=terminate_when_it_runs, daemon=True).start()
    step = run_chain.Step("clip", "llm2clip train-clip", {}, pid_file, tmp_path)
    launcher = [sys.executable, "-c", code] if launched else []
    with pytest.raises(SystemExit, match="terminated; nothing is lost"):
        run_chain.run(step, launcher, SimpleNamespace(training=True))
    assert not psutil.pid_exists(int(pid_file.read_text()))


def command(root: Path, *argv: str) -> list[str]:
    return [sys.executable, "scripts/run_chain.py", "configs/smoke/llm2clip.yaml", "--root", str(root), *argv]


def chain(root: Path, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(root, *argv), cwd=ROOT, capture_output=True, text=True)


def results(root: Path) -> dict[str, str]:
    """Content digest of every stage's output; of the report, which tells how long things took, the headline."""
    return {
        str(path.parent.relative_to(root)): manifest["headline" if path.parent.name == "report" else "fingerprint"]
        for path in root.rglob("manifest.json")
        if (manifest := json.loads(path.read_text()))
    }


def kill_during(root: Path, stage: str, seconds: float) -> None:
    """Start the chain, and kill -9 all of its processes some time after a stage has begun."""
    process = subprocess.Popen(
        command(root), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout
    assert any(f"] {stage} (" in line for line in process.stdout), "the chain ended before this stage"
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished smoke run. The demo's packages come from pip, or from the cache of an earlier run."""
    root = tmp_path_factory.mktemp("smoke")
    result = chain(root)
    if "[1/" in result.stdout and "assets failed" in result.stderr:
        pytest.skip(f"the demo's packages cannot be had here: {result.stderr[-300:]}")
    assert result.returncode == 0, result.stderr[-3000:]
    return root, result.stdout


@pytest.mark.slow
def test_chain_writes_what_the_readme_says(finished):
    root, printed = finished
    for name in ("teacher", "embeddings", "clip-llm2clip/seed-0", "tower-llm2clip/seed-0", "report"):
        assert (root / name / "manifest.json").is_file()
        assert str(root / name) in printed
    assert (root / "report" / "report.html").stat().st_size > 50_000
    summary = json.loads((root / "report" / "summary.json").read_text())
    assert summary
    cra = json.loads((root / "teacher" / "cra.json").read_text())
    assert cra


@pytest.mark.slow
def test_tower_loads_without_this_package(finished):
    root, _ = finished
    code = (
        "import sys, torch; sys.modules['llm2clip'] = None\n"
        "from transformers import AutoModel, CLIPVisionModel\n"
        "a, b = (c.from_pretrained(sys.argv[1]) for c in (CLIPVisionModel, AutoModel))\n"
        "x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))\n"
        "torch.testing.assert_close(a(x).last_hidden_state, b(x).last_hidden_state, atol=1e-6, rtol=0)\n"
    )
    tower = root / "tower-llm2clip" / "seed-0" / "vision_tower"
    result = subprocess.run([sys.executable, "-c", code, str(tower)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_rerun_does_nothing(finished):
    root, first = finished
    result = chain(root)
    assert result.returncode == 0, result.stderr[-3000:]
    steps = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert steps and all(line.endswith("done before") for line in steps)
    assert (
        result.stdout.split("Whole chain")[0].split("Written")[1] == first.split("Whole chain")[0].split("Written")[1]
    )


@pytest.mark.slow
def test_a_lost_stage_is_made_again_the_same(finished):
    root, _ = finished
    before = json.loads((root / "clip-llm2clip/seed-0/manifest.json").read_text())["fingerprint"]
    shutil.rmtree(root / "clip-llm2clip/seed-0")
    result = chain(root)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((root / "clip-llm2clip/seed-0/manifest.json").read_text())["fingerprint"] == before
    assert "tower-llm2clip/seed-0 (llm2clip export): done before" in result.stdout


@pytest.mark.slow
def test_changed_setting_is_refused_and_nothing_is_lost(finished):
    root, _ = finished
    result = chain(root, "--clip-llm2clip.training.max_steps", "7")
    assert result.returncode == 2
    assert "training.max_steps was 6, is now 7" in result.stderr
    assert (root / "clip-llm2clip/seed-0/manifest.json").is_file()


@pytest.mark.slow
def test_llava_goes_on_from_its_towers(finished):
    """pretrain, finetune, export, answers and report with SmolLM2; the model then answers in a process of its own."""
    root, _ = finished
    tower = str(root / "tower-llm2clip/seed-0/vision_tower")
    argv = [sys.executable, "scripts/run_chain.py", "configs/smoke/llava.yaml", "--root", str(root / "llava")]
    argv += ["--questions.data", str(root / "data"), "--pretrain.tower", tower, "--finetune.tower", tower]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (root / "llava" / "report" / "report.html").stat().st_size > 20_000
    again = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert again.stdout.count("done before") == 7, again.stdout + again.stderr[-2000:]
    model = root / "llava" / "export-llm2clip" / "seed-0" / "model"
    picture = next((root / "llava" / "questions" / "images").iterdir())
    chat = [sys.executable, "-m", "llava_bridge.cli", "chat", str(model), "--image", str(picture)]
    answer = subprocess.run(
        [*chat, "--question", "How many things are there?", "--max_new_tokens", "5"], capture_output=True, text=True
    )
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    shutil.rmtree(root / "llava")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_every_stage_it_ends_with_the_same_bytes(finished):
    """Last, because it runs the chain anew where the others look; at the same path, which some files name."""
    root, printed = finished
    wanted = results(root)
    durations = {name: int(seconds) for name, seconds in re.findall(r"\] (\S+) \(.*\): (\d+) s", printed)}
    assert len(durations) >= 13
    shutil.rmtree(root)
    rng = random.Random(0)
    arms_alike = re.compile(r"(tower|retrieval)-(continued|llm2clip)/")  # their commands are killed for vanilla
    for stage, duration in durations.items():
        if stage != "assets" and not arms_alike.match(stage):
            kill_during(root, stage, rng.uniform(0.1, 0.9) * duration)
    result = chain(root)
    assert result.returncode == 0, result.stderr[-3000:]
    assert results(root) == wanted
