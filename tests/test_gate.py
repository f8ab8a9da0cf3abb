"""The gate passes what is shown to be no worse, fails what is shown to be, and says when neither is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from lmms_results import matched, pope, record, write_run

from llm2clip_eval import gate
from llm2clip_eval.paired_statistics import Paired, interval, resampled_differences, unseen_share, with_unseen


def shares(num_right: int, num: int = 1000) -> list[float]:
    """The first questions right, the others wrong: models are as paired as can be."""
    return [1.0] * num_right + [0.0] * (num - num_right)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Baseline with 60 % in two tasks; others by what they lose in the first: nothing, 0.5, 2 and 10 points."""
    found = {}
    for name, right in {"base": 600, "equal": 601, "close": 595, "near": 580, "far": 500}.items():
        records = [record("vqa", matched(shares(right))), record("other", matched(shares(600)))]
        records.append(record("judged", matched(shares(right)), judge="llm"))
        found[name] = write_run(tmp_path_factory.mktemp("runs") / name, records, arm=name)
    return found


def passed(runs: dict[str, Path], candidate: str, max_drop: float, *more: str) -> int:
    argv = ["--baseline", str(runs["base"]), "--candidate", str(runs[candidate]), "--max-drop", str(max_drop)]
    try:
        gate.main([*argv, "--num-resamples", "2000", *more])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_exit_codes_say_pass_fail_and_inconclusive(runs, capsys):
    assert passed(runs, "equal", 1) == 0
    assert passed(runs, "close", 2) == 0
    assert passed(runs, "far", 2) == 1
    assert passed(runs, "near", 2) == 3  # lost just 2: cannot be known
    printed = capsys.readouterr().out
    assert "shown to lose more than 2" in printed and printed.endswith("inconclusive\n")
    assert "judged" not in printed


def test_a_model_passes_against_itself_however_strict_the_gate(runs):
    assert passed(runs, "base", 1e-6) == 0


def test_tasks_are_chosen_by_name_and_then_also_judged_ones(runs, capsys):
    assert passed(runs, "far", 2, "--tasks", "oth*") == 0
    assert passed(runs, "far", 2, "--tasks", "judged") == 1
    printed = capsys.readouterr().out
    assert "vqa" not in printed and "macro average" not in printed


def test_few_images_and_few_flips_prove_nothing(tmp_path, capsys):
    def both(name: str, num: int) -> dict[str, Path]:
        first, second = ([record("a", matched(shares(num // 2, num)))] for _ in range(2))
        return {arm: write_run(tmp_path / name / arm, r, arm=arm) for arm, r in (("base", first), ("x", second))}

    assert passed(both("ten", 10), "x", 20) == 3
    assert "10 images are too few, at least 30" in capsys.readouterr().out
    # no answer changed among 100: the true loss may still be 3 %
    assert passed(both("hundred", 100), "x", 2) == 3
    assert passed(both("again", 100), "x", 4) == 0


def test_one_lost_answer_proves_no_more_than_an_exact_test(tmp_path, capsys):
    runs = {
        name: write_run(tmp_path / name, [record("a", matched(shares(right, 400)))], arm=name)
        for name, right in (("base", 200), ("x", 199))
    }
    assert passed(runs, "x", 1) == 3  # Clopper and Pearson: up to 1.18 % may be lost; quantiles alone: 0.75
    assert "-0.25 points (95 % bounds -1.1" in capsys.readouterr().out
    assert passed(runs, "x", 1.3) == 0


def test_a_measured_drop_does_not_pass_though_every_answer_is_worth_the_same(tmp_path):
    """Neither "no" nor "maybe" is right, but only "no" counts for POPE's recall."""
    runs = {}
    for name, said in (("base", "maybe"), ("x", "no")):
        answers = [("yes", "yes"), ("no", "no"), (said, "yes")] * 60
        runs[name] = write_run(tmp_path / name, [record("pope", pope(answers, 1), "pope_f1_score")], arm=name)
    assert passed(runs, "x", 5) == 1


def test_points_are_in_percent_of_the_metrics_range(tmp_path, capsys):
    right = [("yes", "yes"), ("no", "no")] * 100
    wrong = [("no", "yes"), *right[1:]]
    for name, answers in (("base", right), ("x", wrong)):
        write_run(tmp_path / name, [record("pope", pope(answers, 1), "pope_f1_score")], arm=name)
    assert passed({name: tmp_path / name for name in ("base", "x")}, "x", 5) == 0
    assert "pope_f1_score 99.50 against 100.00: -0.50 points" in capsys.readouterr().out


def test_junit_lists_every_check(runs, tmp_path):
    file = tmp_path / "gate.xml"
    assert passed(runs, "near", 2, "--junit", str(file)) == 3
    suite = ElementTree.parse(file).getroot()
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {"other": ["system-out"], "vqa": ["skipped"], "macro average": ["system-out"]}
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "0", "1")
    assert passed(runs, "far", 2, "--junit", str(file)) == 1
    suite = ElementTree.parse(file).getroot()
    failure = suite.find("testcase[@name='vqa']/failure")
    assert failure is not None and "50.00 against 60.00" in str(failure.get("message"))


def test_a_gate_errs_no_more_often_than_it_says():
    """True loss exactly as large as is tolerable: passing is wrong one time in twenty, and so is failing."""
    rng = np.random.default_rng(0)
    outcomes = []
    for seed in range(500):
        ease = rng.random(300)
        theirs, ours = np.where(rng.random(300) < 0.7, ease, rng.random(300)) < 0.6, ease < 0.55
        sums = [np.stack([arm, np.ones(300)], axis=1)[:, None] for arm in (theirs, ours)]
        task = Paired(*sums, lambda sums: 100 * sums[..., 0] / sums[..., 1])
        found = resampled_differences(task, num_resamples=199, seed=seed)
        outcomes.append(gate.decide(*interval(found, 0.9), 5))
    assert 8 <= outcomes.count("pass") <= 45 and 8 <= outcomes.count("fail") <= 45


@pytest.mark.parametrize(("won", "lost"), [(0.0, 0.01), (0.005, 0.015), (0.0, 0.02), (0.01, 0.03)])
def test_a_gate_errs_no_more_often_than_it_says_where_few_answers_flip(won, lost):
    rng = np.random.default_rng(1)
    ones = np.ones((400, 1, 1))
    outcomes, ignored = [], []
    for seed in range(500):
        luck = rng.random((400, 1, 1))
        sums = [np.concatenate([arm, ones], axis=2) for arm in (luck < lost, luck > 1 - won)]
        task = Paired(*sums, lambda sums: 100 * sums[..., 0] / sums[..., 1])
        found = resampled_differences(task, num_resamples=399, seed=seed)
        share = unseen_share([[task]], size=399, seed=seed)
        low, high = (interval(drawn, 0.9)[end] for end, drawn in enumerate(with_unseen(found, 100, share)))
        outcomes.append(gate.decide(low, high, 100 * (lost - won)))
        ignored.append(gate.decide(*interval(found, 0.9), 100 * (lost - won)))
    assert outcomes.count("pass") <= 41 and outcomes.count("fail") <= 41  # 25 expected; binomial at one in a thousand
    if (won, lost) == (0.0, 0.01):
        assert ignored.count("pass") > 41  # what not caring for the unseen would give


def test_bad_input_is_exit_code_2(runs, tmp_path):
    def code(*argv: str) -> tuple[int, str]:
        call = "sys.exit(run_command('llm2clip_eval.gate', sys.argv[1:]))"
        run = [sys.executable, "-c", f"import sys; from llm2clip.cli import run_command; {call}", *argv]
        done = subprocess.run(run, capture_output=True, text=True)
        return done.returncode, done.stderr

    base = ["--baseline", str(runs["base"]), "--candidate"]
    assert code(*base, str(runs["far"]), "--max-drop", "2")[0] == 1
    for argv, message in (
        ([*base, str(tmp_path / "nothing"), "--max-drop", "2"], "is no run directory"),
        ([*base, str(runs["far"]), "--max-drop", "0"], "--max-drop: 0.0 is not positive"),
        ([*base, str(runs["far"])], "--max-drop"),
    ):
        status, stderr = code(*argv)
        assert status == 2 and message in stderr
