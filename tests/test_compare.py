"""Runs of lmms-eval tasks are read, paired or refused, and compared: tasks, categories, average, recipe."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lmms_results import item, matched, pope, record, write_run

from llm2clip.run_dir import RunDir, fingerprint
from llm2clip_eval import compare, comparison_page, task_differences
from llm2clip_eval.comparison import Comparison
from llm2clip_eval.task_differences import Settings

FEW = {"num_resamples": 400}


def answers(rng: np.random.Generator, level: float, num: int = 60) -> list[float]:
    return (rng.random(num) < level).astype(float).tolist()


def mme(rng: np.random.Generator, num_images: int = 20) -> list[dict[str, Any]]:
    items = []
    for image in range(num_images):
        perceives = image % 2 == 0
        category, name = ("count", "perception") if perceives else ("code_reasoning", "cognition")
        for score in answers(rng, 0.6, 2):
            scores = {f"mme_{name}_score": {"question_id": image, "category": category, "score": score}}
            items.append(item(len(items), scores, image=f"image {image}", category=category))
    return items


def suite(rng: np.random.Generator, level: float = 0.6) -> list[dict[str, Any]]:
    """One task of each kind of test, and one with a judge."""
    said = rng.random(90) < level
    of_pope = [("yes" if (n % 2) == right else "no", "yes" if n % 2 else "no") for n, right in enumerate(said)]
    soft = matched((rng.random(40) * level).tolist())
    shared = [
        item(n, {"exact_match": s}, image=f"image {n // 4}", category="ab"[n % 2])
        for n, s in enumerate(answers(rng, level))
    ]
    return [
        record("single", matched(answers(rng, level))),
        record("shared", shared),
        record("soft", soft),
        record("pope_adv", pope(of_pope), "pope_f1_score", others=["pope_accuracy"]),
        record("mme", mme(rng), "mme_perception_score", others=["mme_cognition_score"]),
        record("mmvet", matched(answers(rng, level)), judge="llm"),
    ]


def collect(tmp_path: Path, baseline: Sequence[Path], **candidates: Any) -> Comparison:
    return collected(tmp_path, baseline, **candidates)[0]


def collected(tmp_path: Path, baseline: Sequence[Path], settings: dict[str, Any] | None = None, **candidates: Any):
    found = {
        name: compare.CandidateConfig(results=[runs] if isinstance(runs, Path) else runs)
        for name, runs in candidates.items()
    }
    config = compare.CompareConfig(
        output_dir=tmp_path / "compared",
        baseline=list(baseline),
        candidates=found,
        baseline_label="CLIP",
        **{**FEW, **(settings or {})},
    )
    return compare.collect(config)


def by_task(comparison: Comparison) -> dict[tuple[str, str], Any]:
    return {(task.task, task.metric): task for task in comparison.candidates[0].tasks}


def test_a_model_against_itself_differs_by_exactly_zero_in_everything(tmp_path):
    run = write_run(tmp_path / "run", suite(np.random.default_rng(0)))
    comparison = collect(tmp_path, [run], same=run)
    for task in comparison.candidates[0].tasks:
        assert (task.difference, task.low, task.high, task.mde) == (0, 0, 0, 0)
        assert (task.p, task.p_holm) == (1, 1)
        assert (task.wins, task.losses, task.ties) == (0, 0, task.num_items)
        assert task.verdict == "equivalent" and task.baseline == task.candidate
        assert all((c.difference, c.low, c.high) == (0, 0, 0) for c in task.categories)
    macro = comparison.candidates[0].macro
    assert macro and (macro.difference, macro.low, macro.high, macro.p) == (0, 0, 0, 1)
    assert comparison.recipe_differences == {"same": ()}


def test_the_same_answers_of_another_model_are_no_proof_of_equivalence_in_a_small_task(tmp_path):
    runs = [write_run(tmp_path / arm, suite(np.random.default_rng(0)), arm=arm) for arm in ("clip", "llm2clip")]
    comparison, _ = collected(tmp_path, runs[:1], {"num_resamples": 4000}, llm2clip=runs[1])
    for task in comparison.candidates[0].tasks:
        assert (task.difference, task.low, task.high, task.p) == (0, 0, 0, 1)
        assert task.verdict == "undecided"
        assert task.equivalence_p == pytest.approx(0.99**task.num_clusters, abs=0.03)
        share = task.mde / (100 * task.margin)  # the margin is 1 % of the range
        assert (1 - share) ** task.num_clusters == pytest.approx(0.2)


def test_so_does_an_arm_of_several_seeds(tmp_path):
    runs = [write_run(tmp_path / f"run{seed}", suite(np.random.default_rng(seed)), seed=seed) for seed in range(3)]
    comparison = collect(tmp_path, runs, same=runs)
    assert not comparison.single_seed and comparison.num_seeds == comparison.candidates[0].num_seeds == 3
    for row in (*comparison.candidates[0].tasks, comparison.candidates[0].macro):
        assert row and (row.difference, row.low, row.high, row.p) == (0, 0, 0, 1)


def test_every_task_gets_the_test_that_fits_it(tmp_path):
    first = write_run(tmp_path / "first", suite(np.random.default_rng(0)))
    second = write_run(tmp_path / "second", suite(np.random.default_rng(1)), arm="llm2clip")
    tasks = by_task(collect(tmp_path, [first], llm2clip=second))
    assert {key[0]: task.test for key, task in tasks.items()} == {
        "single": "exact McNemar",
        "shared": "sign-flip permutation",
        "soft": "sign-flip permutation",
        "pope_adv": "sign-flip permutation",
        "mme": "sign-flip permutation",
        "mmvet": "exact McNemar",
    }
    assert {key[0]: task.num_clusters for key, task in tasks.items()} == {
        "single": 60,
        "shared": 15,
        "soft": 40,
        "pope_adv": 30,
        "mme": 10,
        "mmvet": 60,
    }
    assert [key for key in tasks if key[0] == "mme"] == [
        ("mme", "mme_perception_score"),
        ("mme", "mme_cognition_score"),
    ]
    perception = tasks["mme", "mme_perception_score"]
    assert (perception.scale, perception.margin, perception.num_items) == (1, 2, 20)  # one category: 200 points
    assert tasks["pope_adv", "pope_f1_score"].scale == 100
    again = write_run(tmp_path / "again", suite(np.random.default_rng(2)), arm="llm2clip", seed=1)
    seeds = by_task(collect(tmp_path, [first], llm2clip=[second, again]))
    assert {task.test for task in seeds.values()} == {"cluster bootstrap"}


def test_numbers_are_those_of_the_items(tmp_path):
    theirs, ours = [1.0] * 30 + [0.0] * 30, [0.0] * 5 + [1.0] * 45 + [0.0] * 10
    first = write_run(tmp_path / "first", [record("a", matched(theirs)), record("b", matched(ours))])
    second = write_run(tmp_path / "second", [record("a", matched(ours)), record("b", matched(ours))], arm="x")
    comparison, runs = collected(tmp_path, [first], x=second)
    task, other = comparison.candidates[0].tasks
    assert (task.baseline, task.candidate) == (50, 75) and task.difference == pytest.approx(25)
    assert (task.wins, task.losses, task.ties) == (20, 5, 35)
    assert task.p == pytest.approx(2 * 0.00204, abs=1e-4)  # binomial: 5 or fewer of 25
    assert task.p_holm == pytest.approx(2 * task.p) and other.p_holm == 1
    assert task.verdict == "better" and 0 < task.low < 25 < task.high
    assert task.mde == pytest.approx(2.8016 * 100 * np.sqrt((25 / 60 - 1 / 16) / 60), rel=0.1)
    assert [(run.arm, run.task) for run in runs] == [("baseline", "a"), ("baseline", "b"), ("x", "a"), ("x", "b")]
    macro = comparison.candidates[0].macro
    assert macro and (macro.num_tasks, macro.baseline, macro.candidate) == (2, 62.5, 75)


def test_categories_are_measured_by_themselves(tmp_path):
    theirs, ours = suite(np.random.default_rng(0)), suite(np.random.default_rng(3))
    first, second = write_run(tmp_path / "first", theirs), write_run(tmp_path / "second", ours, arm="x")
    tasks = by_task(collect(tmp_path, [first], x=second))
    found = tasks["shared", "exact_match"].categories
    expected = {
        name: [
            100 * np.mean([i["scores"]["exact_match"] for i in records[1]["items"] if i["category"] == name])
            for records in (theirs, ours)
        ]
        for name in "ab"
    }
    assert {c.name: [c.baseline, c.candidate] for c in found} == {k: pytest.approx(v) for k, v in expected.items()}
    assert [c.num_items for c in found] == [30, 30] and all(c.low <= c.difference <= c.high for c in found)
    (only,) = tasks["mme", "mme_perception_score"].categories
    assert only.name == "count" and only.candidate == tasks["mme", "mme_perception_score"].candidate
    assert tasks["single", "exact_match"].categories == ()


def test_judged_tasks_are_in_no_average_and_a_family_of_their_own(tmp_path):
    rng = np.random.default_rng(5)
    wins = [0.0] * 30 + [1.0] * 30
    base = [record(name, matched([0.0] * 60)) for name in ("a", "b")] + [
        record("vet", matched(answers(rng, 0.5)), judge="llm")
    ]
    better = [record(name, matched(wins)) for name in ("a", "b")] + [record("vet", matched(wins), judge="llm")]
    first, second = write_run(tmp_path / "first", base), write_run(tmp_path / "second", better, arm="x")
    comparison = collect(tmp_path, [first], x=second)
    a, b, vet = comparison.candidates[0].tasks
    assert vet.judge == "llm" and vet.p_holm == vet.p
    assert a.p_holm == b.p_holm == pytest.approx(2 * a.p)
    macro = comparison.candidates[0].macro
    assert macro and (macro.num_tasks, macro.difference) == (2, 50)


def test_tasks_about_the_same_images_are_drawn_together(tmp_path):
    """Copies of a task are no further evidence: the average is as unsure as one of them, and surer if they are not."""
    rng = np.random.default_rng(6)
    theirs, ours = answers(rng, 0.5, 200), answers(rng, 0.5, 200)
    widths = {}
    for name in ("same", "own"):
        records = [
            [
                record(
                    f"task{t}",
                    [
                        item(n, {"exact_match": s}, image=f"{t if name == 'own' else ''} {n}")
                        for n, s in enumerate(scores)
                    ],
                )
                for t in range(4)
            ]
            for scores in (theirs, ours)
        ]
        runs = [write_run(tmp_path / f"{name}{n}", of_arm, arm=f"arm{n}") for n, of_arm in enumerate(records)]
        found = collect(tmp_path, [runs[0]], x=runs[1]).candidates[0]
        assert found.macro
        widths[name] = found.macro.high - found.macro.low
        one = found.tasks[0].high - found.tasks[0].low
    assert widths["same"] == pytest.approx(one, rel=0.15)
    assert widths["own"] == pytest.approx(one / 2, rel=0.15)


def test_items_are_paired_by_content_and_not_by_place(tmp_path):
    rng = np.random.default_rng(7)
    scores = answers(rng, 0.5)
    items = matched(scores)
    order = rng.permutation(60)
    shuffled = [{**items[row], "doc_id": number} for number, row in enumerate(order)]
    twice = [*items, {**items[0], "doc_id": 60}]  # and a question that is there twice
    for number, both in enumerate([(items, shuffled), (twice, twice)]):
        runs = [write_run(tmp_path / f"{number}{n}", [record("a", of)], arm=f"arm{n}") for n, of in enumerate(both)]
        (task,) = collect(tmp_path, [runs[0]], x=runs[1]).candidates[0].tasks
        assert (task.difference, task.wins, task.losses) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": "9" * 64}, r"prompts: 333333333333 and 999999999999"),
        ({"generation": {"max_new_tokens": 32}}, r"generation: \{'max_new_tokens': 16\} and \{'max_new_tokens': 32\}"),
        ({"data": "9" * 64}, "data: "),
        ({"scorer": "9" * 64}, "scorer: "),
        ({"dtype": "bfloat16"}, "dtype: float32 and bfloat16"),
        ({"batch_size": 1}, "batch_size: 16 and 1"),
        ({"lmms_eval": "0.7.2"}, "lmms_eval: 0.7.3 and 0.7.2"),
        ({"torch": "2.0"}, "torch: 2.12.1 and 2.0"),
    ],
)
def test_runs_made_otherwise_are_refused_unless_that_is_allowed(tmp_path, changed, message):
    items = matched([1.0, 0.0] * 20)
    first = write_run(tmp_path / "first", [record("a", items)])
    second = write_run(tmp_path / "second", [record("a", items, identity=changed)], arm="x")
    with pytest.raises(ValueError, match=f"task a: .*first and .*second were not made in the same way .*{message}"):
        collect(tmp_path, [first], x=second)
    comparison, _ = collected(tmp_path, [first], {"allow_differences": list(changed)}, x=second)
    assert comparison.allowed_differences == tuple(changed)


def test_what_does_not_belong_together_is_refused(tmp_path):
    items = matched([1.0, 0.0] * 20)
    first = write_run(tmp_path / "first", [record("a", items), record("b", items)])

    def refuse(message: str, records: Sequence[dict[str, Any]], error=ValueError, **settings: Any) -> None:
        number = len(list(tmp_path.iterdir()))
        finish = settings.pop("finish", True)
        second = write_run(tmp_path / f"run{number}", records, arm="x", finish=finish)
        with pytest.raises(error, match=message):
            collected(tmp_path, [first], settings, x=second)

    both = [record("a", items), record("b", items)]
    refuse(
        "have not the same items: 1 are only in the one, 0 only in the other, such as 'What is number 39",
        [record("a", items[:-1]), both[1]],
    )
    refuse("task b was not asked of x; run llm2clip-eval lmms with the same suite", both[:1])
    refuse("'c' matches none of a, b", both, tasks=["c"])
    refuse("1 tasks to compare, expected at least 2", both, tasks=["a"], min_tasks=2)
    refuse("not complete", both, error=FileNotFoundError, finish=False)
    refuse(
        "the items come to a exact_match of 0.5, lmms-eval said 0.7",
        [{**both[0], "metrics": {"exact_match": 0.7}}, both[1]],
    )
    refuse("not whole: a score is not finite", [{**both[0], "metrics": {"exact_match": float("nan")}}, both[1]])
    refuse("not whole: holds 40 items, expected 41", [{**both[0], "num_items": 41}, both[1]])
    refuse(
        "not whole: document 3 is in it more than once",
        [{**both[0], "items": [*items[:4], items[3], *items[5:]]}, both[1]],
    )
    refuse("it has no identity", [{key: value for key, value in both[0].items() if key != "identity"}, both[1]])
    assert collect(tmp_path, [first], x=write_run(tmp_path / "good", both, arm="x")).candidates[0].tasks
    with pytest.raises(ValueError, match="are answers of the very same model to a; give one per trained model"):
        collect(tmp_path, [first, write_run(tmp_path / "copy", both, fingerprint=None)], x=first)
    alone = write_run(tmp_path / "alone", both[:1], arm="clip", seed=1)
    with pytest.raises(ValueError, match="task b was asked of 1 of 2 models"):
        collect(tmp_path, [first, alone], x=first)


def test_a_suite_may_be_spread_over_several_runs_of_one_model(tmp_path):
    items = matched([1.0, 0.0] * 20)
    parts = [write_run(tmp_path / name, [record(name, items)], fingerprint="f" * 64) for name in ("a", "b")]
    comparison = collect(tmp_path, parts, x=parts)
    assert comparison.num_seeds == 1 and [task.task for task in comparison.candidates[0].tasks] == ["a", "b"]


def test_settings_that_make_no_sense_are_refused_together():
    with pytest.raises(ValueError) as error:
        compare.CompareConfig(
            output_dir=Path("x"), baseline=[], candidates={}, confidence=95, margin=0, num_resamples=1
        )
    for part in ("baseline", "candidates", "confidence: 95", "margin: 0", "num_resamples: 1"):
        assert part in str(error.value)


def finished(directory: Path, stage: str, settings: dict[str, Any], inputs: dict[str, str]) -> Path:
    """A run of a stage of llava-bridge, without its outputs."""
    from llm2clip.config import StageCall, StageConfig

    call = StageCall(StageConfig(output_dir=directory), None, {"output_dir": str(directory), **settings})
    with RunDir(call, stage=stage, inputs=inputs) as run:
        (directory / "model").mkdir()
        (directory / "model" / "config.json").write_text(json.dumps(settings))
        run.finish(["model"])
    return directory


def llava(home: Path, name: str, rate: float = 1e-4, seed: int = 0) -> Path:
    """Answers of a model that llava-bridge's three stages have made below `home`."""
    parts = {"tower": f"towers/{name}", "llm": "llms/tiny"}
    digests = {"tower": name.ljust(64, "0"), "llm": "5" * 64, "data": "6" * 64}
    training = {"learning_rate": 1e-3, "seed": seed}
    pretrain = finished(home / "pretrain", "pretrain", {**parts, "training": training}, digests)
    finetune = finished(
        home / "finetune",
        "finetune",
        {**parts, "pretrained": str(pretrain), "training": {**training, "learning_rate": rate}},
        {**digests, "pretrained": fingerprint(pretrain)},
    )
    settings = {"trained": str(finetune), "dtype": "float32"}
    model = finished(home / "export", "export", settings, {"trained": fingerprint(finetune)}) / "model"
    answered = [record("a", matched([1.0, 0.0] * 10))]
    return write_run(home / "lmms", answered, arm=name, seed=seed, model=model, fingerprint=fingerprint(model))


def test_only_the_tower_differs_between_two_recipes_and_the_report_says_what_else_does(tmp_path):
    rates = {"clip": 1e-4, "llm2clip": 1e-4, "careless": 2e-4}
    runs = [llava(tmp_path / name, name, rate) for name, rate in rates.items()]
    found = collect(tmp_path, [runs[0]], llm2clip=runs[1], careless=runs[2]).recipe_differences
    assert found["llm2clip"] == (
        ("finetune: content of tower", "clip00000000", "llm2clip0000"),
        ("finetune: tower", "towers/clip", "towers/llm2clip"),
        ("pretrain: content of tower", "clip00000000", "llm2clip0000"),
        ("pretrain: tower", "towers/clip", "towers/llm2clip"),
    )
    assert ("finetune: training.learning_rate", "0.0001", "0.0002") in found["careless"]


def test_the_stage_writes_everything_once(tmp_path):
    first = write_run(tmp_path / "first", suite(np.random.default_rng(0)), images=True)
    second = write_run(tmp_path / "second", suite(np.random.default_rng(1)), arm="llm2clip", images=True)
    config = tmp_path / "compare.yaml"
    settings = {
        "baseline": [str(first)],
        "candidates": {"llm2clip": {"results": [str(second)], "label": "LLM2CLIP <b>"}},
        "output_dir": str(tmp_path / "out"),
        **FEW,
    }
    config.write_text(yaml.safe_dump(settings))
    compare.main(["--config", str(config)])
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written.keys() == {entry.name for entry in dataclasses.fields(Comparison)}
    assert [task["task"] for task in written["candidates"][0]["tasks"]] == [
        "mme",
        "mme",
        "mmvet",
        "pope_adv",
        "shared",
        "single",
        "soft",
    ]
    row = written["provenance"][0]
    assert (row["label"], row["directory"], row["minutes"], row["tasks"]) == ("baseline", "first", 6, 6)
    assert row["versions"]["lmms_eval"] == "0.7.3" and len(row["model_fingerprint"]) == 64
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"report.html", "report.md", "table.csv", "table.tex", "manifest.json"} <= {path.name for path in files}
    compare.main(["--config", str(config)])
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_planted_shift_moves_every_task_and_the_average(tmp_path):
    rng = np.random.default_rng(8)
    weak, strong = suite(rng, 0.35), suite(rng, 0.75)
    runs = [write_run(tmp_path / name, records, arm=name) for name, records in (("weak", weak), ("strong", strong))]
    up, down = (collect(tmp_path, [a], x=b).candidates[0] for a, b in (runs, runs[::-1]))
    assert up.macro and down.macro and up.macro.low > 0 > down.macro.high and up.macro.p < 0.02
    for better, worse in zip(up.tasks, down.tasks, strict=True):
        assert better.difference == pytest.approx(-worse.difference) and better.p == pytest.approx(worse.p, abs=0.02)
        assert (better.wins, better.losses) == (worse.losses, worse.wins)
    assert {task.task: task.verdict for task in up.tasks}["single"] == "better"
    assert {task.task: task.verdict for task in down.tasks}["single"] == "worse"


def test_holm_decides_and_not_the_single_test():
    row = task_differences.TaskDifference(
        task="a", metric="m", judge=None, scale=100, num_items=9, num_clusters=9, baseline=0, candidate=5,
        difference=5, low=1, high=9, p=0.03, test="exact McNemar", p_holm=0.03, mde=4, wins=5, losses=0,
        ties=4, margin=1, equivalence_p=0.9, verdict="undecided", categories=(),
    )  # fmt: skip
    assert [found.verdict for found in task_differences.corrected([row], 0.95)] == ["better"]
    assert [found.verdict for found in task_differences.corrected([row, row], 0.95)] == ["undecided"] * 2
    close = dataclasses.replace(row, p=0.4, low=-0.3, high=0.4, equivalence_p=0.01)
    assert task_differences.corrected([close], 0.95)[0].verdict == "equivalent"
    assert Settings().num_resamples >= 10_000 and compare.CompareConfig.num_resamples >= 10_000


def test_help_needs_neither_torch_nor_lmms_eval():
    code = (
        "import sys, llm2clip_eval.{} as stage\n"
        "try: stage.main(['--help'])\n"
        "except SystemExit: sys.exit(bool({{'torch', 'lmms_eval', 'numpy'}} & set(sys.modules)))"
    )
    for stage in ("compare", "gate"):
        assert subprocess.run([sys.executable, "-c", code.format(stage)], capture_output=True).returncode == 0


def test_every_training_seed_of_a_recipe_counts_and_seeds_are_no_part_of_it(tmp_path):
    clip = [llava(tmp_path / f"clip{seed}", "clip", seed=seed) for seed in (0, 1)]
    llm2clip = [llava(tmp_path / f"llm2clip{seed}", "llm2clip", rate, seed) for seed, rate in ((0, 1e-4), (2, 2e-4))]
    found = collect(tmp_path, clip, llm2clip=llm2clip).recipe_differences["llm2clip"]
    assert [row for row in found if not comparison_page.is_tower(row[0])] == [
        ("finetune: training.learning_rate", "0.0001", "0.0001; 0.0002")
    ]


@pytest.mark.parametrize(
    ("setting", "path", "reason"),
    [
        ("finetune: pretrained", "pretrain", "not found"),
        ("export: trained", "finetune", "changed since"),
        ("lmms: model", "export/model", "of no complete run"),
    ],
)
def test_a_recipe_that_cannot_be_followed_to_its_start_is_said_to_be_unknown(tmp_path, setting, path, reason):
    runs = {name: llava(tmp_path / name, name) for name in ("clip", "llm2clip")}
    home = tmp_path / "llm2clip"
    read = fingerprint(home / path)
    if reason == "not found":
        shutil.rmtree(home / "pretrain")
    elif reason == "changed since":  # trained again in place
        shutil.rmtree(home / "finetune")
        finished(home / "finetune", "finetune", {"training": {"learning_rate": 5e-4}}, {})
    else:
        (home / "export" / "manifest.json").unlink()
    comparison = collect(tmp_path, [runs["clip"]], llm2clip=runs["llm2clip"])
    rows = {name: (theirs, ours) for name, theirs, ours in comparison.recipe_differences["llm2clip"]}
    assert rows[f"{setting} (not recorded)"] == ("–", f"{home / path}: {reason} ({read[:12]})")
    assert "0.0005" not in json.dumps(rows)
    (warning,) = comparison_page.recipe_warnings(comparison)
    assert warning.startswith("How llm2clip or CLIP was made is not recorded in full")


def test_two_models_of_unknown_origin_are_not_said_to_be_alike(tmp_path):
    items = [record("a", matched([1.0, 0.0] * 10))]
    runs = [write_run(tmp_path / name, items, arm=name, model="lab/model") for name in ("clip", "llm2clip")]
    comparison = collect(tmp_path, [runs[0]], llm2clip=runs[1])
    ((setting, theirs, ours),) = comparison.recipe_differences["llm2clip"]
    assert setting == "lmms: model (not recorded)" and theirs != ours
    assert theirs.startswith("lab/model: not found") and comparison_page.recipe_warnings(comparison)
