"""Reports of made-up answers: what was planted is said, what does not fit is refused, no data becomes markup."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from html_page import Page
from question_files import TEXTS, question, write_questions

from llm2clip.run_dir import fingerprint
from llm2clip_eval import answers_report
from llm2clip_eval.questions import is_correct

pytestmark = pytest.mark.usefixtures("datasets_cache")

HOSTILE = "<script>alert('q')</script> \" onload=\"x | **bold** & `code`"
NUM_PER_GROUP = 120
GROUPS = (("count", "en"), ("yesno", "en"), ("relation", "de"))
WRONG = "nothing of the kind"


def pool_rows(pool: str) -> list[dict[str, Any]]:
    """Questions in turn of every group: counts among three answers, yes or no, and German relations; hostile texts."""
    rows = []
    for number in range(NUM_PER_GROUP):
        for kind, language in GROUPS:
            choices = {"count": ["0", "1", "2"], "yesno": ["yes", "no"], "relation": ["links", "rechts"]}[kind]
            changes = {
                "id": f"{pool}-{kind}-{number}<img src=x>",
                "question": f"{kind} {number}? {HOSTILE if number % 2 else ''}",
                "answer": choices[number % len(choices)],
                "type": kind,
                "subtype": f"some {kind}",
                "language": language,
                "chance": 1 / len(choices),
                "image_id": f"image-{number // 2}",
            }
            rows.append(question(0, **changes))
    return rows


def write_answers(
    directory: Path,
    pools: Mapping[str, Path],
    seen: Mapping[str, float],
    blind: Mapping[str, float] | None,
    seed: int = 0,
) -> Path:
    """A run of `answers` in which every type is answered rightly with these probabilities."""
    rng = np.random.default_rng([seed, sum(directory.name.encode())])
    manifest: dict[str, Any] = {
        "stage": "answers",
        "fingerprint": directory.name,
        "model_fingerprint": directory.name,
        "inputs": {"model": directory.name} | {f"questions.{pool}": fingerprint(path) for pool, path in pools.items()},
        "settings": {},
        "outputs": {},
        "arm": directory.name,
        "seed": seed,
        "questions": {pool: str(path) for pool, path in pools.items()},
    }
    machine = {"processor": "a processor", "accelerator": None, "num_cpus": 2}
    environment = {"packages": {"torch": "2"}, **machine, "git_commit": "0" * 40}
    (directory / "answers").mkdir(parents=True)
    for pool in pools:
        records = []
        for row in pool_rows(pool):
            record = {name: row[name] for name in (*TEXTS, "chance")}
            for level, name in ((seen, ""), (blind, "blind_")):
                if level is not None:
                    right = bool(rng.random() < level[row["type"]])
                    text = row["answer"] if right else f"{WRONG} {HOSTILE}"
                    record |= {f"{name}prediction": text, f"{name}correct": is_correct(text, row["answer"])}
            records.append(json.dumps(record) + "\n")
        (directory / "answers" / f"{pool}.jsonl").write_text("".join(records))
    files = {
        "identity.json": {},
        "environment.json": environment,
        "manifest.json": manifest,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "config.yaml").write_text(yaml.safe_dump({"note": HOSTILE}))
    return directory


@pytest.fixture
def pools(tmp_path) -> dict[str, Path]:
    return {pool: write_questions(tmp_path / f"{pool}.parquet", pool_rows(pool)) for pool in ("concepts", "seen")}


@pytest.fixture
def settings(tmp_path, pools) -> dict[str, Any]:
    """A strong arm and a weak one; both know yes and no blind, and the strong one alone knows its relations."""
    blind = {"count": 0.3, "yesno": 0.95, "relation": 0.5}
    strong = write_answers(tmp_path / "strong", pools, {"count": 0.8, "yesno": 0.95, "relation": 0.9}, blind)
    weak = write_answers(tmp_path / "weak", pools, {"count": 0.5, "yesno": 0.95, "relation": 0.5}, blind)
    return {
        "title": f"Answers {HOSTILE}",
        "arms": {
            "weak": {"results": [str(weak)], "label": f"vanilla {HOSTILE}"},
            "strong": {"results": [str(strong)], "label": "LLM2CLIP $x$"},
        },
        "comparisons": {f"The same recipe {HOSTILE}": {"target": "strong", "baselines": ["weak"]}},
        "pools": {"seen": f"What was trained on {HOSTILE}"},
        "num_resamples": 500,
        "output_dir": str(tmp_path / "report"),
    }


def make_report(settings: Mapping[str, Any]) -> Path:
    output_dir = Path(settings["output_dir"])
    config = output_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    answers_report.main(["--config", str(config)])
    return output_dir


def read_groups(output_dir: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads((output_dir / "results.json").read_text())["groups"]
    return {(group["pool"], group["type"]): group for group in found}


def test_what_was_planted_is_found(settings, tmp_path):
    output_dir = make_report(settings)
    groups = read_groups(output_dir)
    assert list(groups) == [(pool, kind) for pool in ("seen", "concepts") for kind, _ in GROUPS]
    count, yesno, relation = (groups["seen", kind] for kind, _ in GROUPS)
    assert (count["num_questions"], count["language"], relation["language"]) == (NUM_PER_GROUP, "en", "de")
    assert count["num_images"] == NUM_PER_GROUP // 2
    assert count["chance"] == pytest.approx(1 / 3) and count["majority"] == pytest.approx(1 / 3)
    assert count["majority_answer"] in ("0", "1", "2")
    records = [json.loads(line) for line in (tmp_path / "strong" / "answers" / "seen.jsonl").read_text().splitlines()]
    right = [record["correct"] for record in records if record["type"] == "count"]
    strong = count["arms"]["strong"]
    assert strong["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert strong["accuracy"]["low"] < 0.8 < strong["accuracy"]["high"]
    assert strong["over_blind"]["value"] == pytest.approx(strong["accuracy"]["value"] - strong["blind"]["value"])
    assert strong["verdict"] == "above chance and above the blind baseline"
    knows_blind = "above chance but not shown to be above the blind baseline"
    assert yesno["arms"]["strong"]["verdict"] == yesno["arms"]["weak"]["verdict"] == knows_blind
    assert relation["arms"]["weak"]["verdict"].startswith("not shown to be above chance")


def test_arms_are_compared_on_every_group(settings):
    found = json.loads((make_report(settings) / "results.json").read_text())["comparisons"]
    verdicts = {(c["pool"], c["type"]): c["verdict"] for c in found}
    assert verdicts["seen", "count"] == verdicts["concepts", "relation"] == "better"
    assert verdicts["seen", "yesno"] == "undecided"
    for c in found:
        assert c["difference"]["value"] == pytest.approx(c["target_accuracy"] - c["baseline_accuracy"])
    settings["comparisons"] = {"The other way round": {"target": "weak", "baselines": ["strong"]}}
    reverse = make_report({**settings, "output_dir": settings["output_dir"] + "-reverse"})
    again = json.loads((reverse / "results.json").read_text())["comparisons"]
    assert [c["difference"]["value"] for c in again] == pytest.approx([-c["difference"]["value"] for c in found])
    assert [c["verdict"] for c in again if c["type"] == "count"] == ["worse", "worse"]


def test_an_arm_against_itself_is_exactly_zero(settings, tmp_path, pools):
    twin = write_answers(tmp_path / "twin", pools, {"count": 0, "yesno": 0, "relation": 0}, None)
    for pool in pools:
        (twin / "answers" / f"{pool}.jsonl").write_text((tmp_path / "weak" / "answers" / f"{pool}.jsonl").read_text())
    settings["arms"]["twin"] = {"results": [str(twin)]}
    settings["comparisons"] = {"The same": {"target": "twin", "baselines": ["weak"]}}
    found = json.loads((make_report(settings) / "results.json").read_text())["comparisons"]
    assert {tuple(c["difference"].values()) for c in found} == {(0.0, 0.0, 0.0)}


def test_the_bar_is_the_best_constant_answer_where_that_beats_chance(settings, tmp_path):
    rows = [row | {"answer": "yes" if number % 10 else "no"} for number, row in enumerate(pool_rows("seen"))]
    uneven = write_questions(tmp_path / "uneven.parquet", rows)
    always = write_answers(tmp_path / "always", {"seen": uneven}, {kind: 0 for kind, _ in GROUPS}, None)
    records = [{**{name: row[name] for name in (*TEXTS, "chance")}, "prediction": "yes"} for row in rows]
    for record in records:
        record["correct"] = record["answer"] == "yes"
    (always / "answers" / "seen.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings |= {"arms": {"always": {"results": [str(always)]}}, "comparisons": {}}
    found = read_groups(make_report(settings))["seen", "yesno"]
    assert found["majority_answer"] == "yes" and found["chance"] == 0.5
    assert found["majority"] == found["arms"]["always"]["accuracy"]["value"] == pytest.approx(0.9, abs=0.02)
    assert found["arms"]["always"]["verdict"] == "not shown to be above chance; no blind baseline"


def test_the_headline_is_what_was_chosen_for_every_arm(settings):
    output_dir = make_report(settings)
    headline = json.loads((output_dir / "manifest.json").read_text())["headline"]
    lines = headline.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")][:2] == ["seen/count", "seen/yesno"]
    assert sum("LLM2CLIP $x$: " in line and "above the blind baseline" in line for line in lines) == 2
    assert "LLM2CLIP $x$ is better than vanilla" in headline and "One training seed per arm" in headline
    text = Page((output_dir / "report.html").read_text()).text
    assert "LLM2CLIP $x$ is better than vanilla" in text and "One training seed per arm" in text
    assert "LLM2CLIP $x$ is better than vanilla" in (output_dir / "report.md").read_text().replace("\\", "")
    settings |= {"headline": ["concepts/relation/de"], "output_dir": settings["output_dir"] + "-de"}
    again = json.loads((make_report(settings) / "manifest.json").read_text())["headline"]
    assert again.startswith("concepts/relation/de: 120 questions, chance 50.0 %")


def test_nothing_from_data_or_configuration_becomes_markup(settings):
    output_dir = make_report(settings)
    html = (output_dir / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) > 10  # as text it is all there: questions, answers, labels, notes
    outside = [value for name, value in page.attributes if name in ("src", "href") and value]
    assert all(value.startswith(("data:image/", "#")) for value in outside)  # one file, nothing loaded
    figure = (output_dir / "figures" / "accuracy.svg").read_bytes()
    assert base64.b64encode(figure).decode() in html and b"<script" not in figure
    markdown = (output_dir / "report.md").read_text()
    assert "<script>" not in markdown.replace("\\<", "")
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(tables) > 40 and all(len(re.findall(r"(?<!\\)\|", line)) in (6, 7, 11) for line in tables)


def test_examples_are_right_and_wrong_ones_with_their_pictures(settings):
    html = (make_report({**settings, "examples_per_type": 2}) / "report.html").read_text()
    cards = re.findall(r'<section class="card asked">(.*?)</section>', html, flags=re.S)
    assert len(cards) == 2 * len(GROUPS) * 4
    assert all(card.count("data:image/jpeg;base64,") == 1 for card in cards)
    lead = [re.search(r'LLM2CLIP \$x\$</td><td>.*?title="(right|wrong)"', card, flags=re.S) for card in cards]
    assert [found and found[1] for found in lead] == ["right", "right", "wrong", "wrong"] * 6
    assert all(card.count('title="') == 4 for card in cards)  # two arms, seeing and blind
    none = make_report({**settings, "examples_per_type": 0, "output_dir": settings["output_dir"] + "-none"})
    assert "What they say" not in (none / "report.html").read_text()


def test_the_same_input_gives_the_same_report_and_another_seed_other_examples(settings):
    first = make_report(settings)
    again, other = (
        make_report({**settings, "seed": seed, "output_dir": f"{settings['output_dir']}-{seed}"}) for seed in (0, 1)
    )
    names = ("report.html", "report.md", "results.json", "figures/accuracy.svg")
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert questions_shown(first) != questions_shown(other)


def questions_shown(output_dir: Path) -> Sequence[str]:
    return re.findall(r"picture of question ([^\"]*)", (output_dir / "report.html").read_text())


def test_several_seeds_are_averaged_and_said(settings, tmp_path, pools):
    levels = {"count": 0.4, "yesno": 0.9, "relation": 0.5}
    more = [str(write_answers(tmp_path / f"strong-{seed}", pools, levels, levels, seed)) for seed in (1, 2)]
    settings["arms"]["strong"]["results"] += more
    output_dir = make_report(settings)
    means = []
    for run in settings["arms"]["strong"]["results"]:
        records = [json.loads(line) for line in (Path(run) / "answers" / "seen.jsonl").read_text().splitlines()]
        means.append(np.mean([record["correct"] for record in records if record["type"] == "count"]))
    found = read_groups(output_dir)["seen", "count"]["arms"]
    assert found["strong"]["accuracy"]["value"] == pytest.approx(np.mean(means))
    width = {name: arm["accuracy"]["high"] - arm["accuracy"]["low"] for name, arm in found.items()}
    assert width["strong"] > 1.5 * width["weak"]
    again = write_answers(tmp_path / "weak-1", pools, {**levels, "count": 0.5}, levels, 1)
    settings["arms"]["weak"]["results"].append(str(again))
    output_dir = make_report({**settings, "output_dir": str(tmp_path / "several")})
    text = Page((output_dir / "report.html").read_text()).text
    assert "One training seed" not in text and "several training seeds" in text


def test_answers_that_do_not_belong_together_are_refused(settings, tmp_path, pools):
    def refuse(match: str, *results: Path, error: type[Exception] = ValueError) -> None:
        settings["arms"]["weak"]["results"] = [str(path) for path in results]
        with pytest.raises(error, match=match):
            make_report({**settings, "output_dir": str(tmp_path / "refused")})

    levels, weak = {"count": 0.5, "yesno": 0.5, "relation": 0.5}, tmp_path / "weak"
    fewer = write_answers(tmp_path / "fewer", {"seen": pools["seen"]}, levels, levels)
    refuse("pool concepts was not asked of (weak|strong)", fewer)
    refuse("pool concepts was not asked in every seed", weak, fewer)
    refuse("the very same model", weak, weak)
    refuse("nothing", tmp_path / "nothing", error=FileNotFoundError)
    manifest = json.loads((fewer / "manifest.json").read_text())
    (fewer / "manifest.json").write_text(json.dumps({**manifest, "stage": "retrieval"}))
    refuse("written by retrieval, expected answers", fewer)
    changed = write_answers(tmp_path / "changed", pools, levels, levels)
    lines = (changed / "answers" / "seen.jsonl").read_text().splitlines(keepends=True)
    (changed / "answers" / "seen.jsonl").write_text("".join(lines[1:]))
    refuse("pool seen: .* were not asked the same questions", changed)


def test_pictures_of_a_file_that_changed_are_refused(settings, pools):
    write_questions(pools["seen"], pool_rows("seen")[1:])
    with pytest.raises(ValueError, match="has changed since it was asked"):
        make_report(settings)


def test_mistakes_in_the_configuration_are_told_all_at_once(settings):
    settings["comparisons"] = {"x": {"target": "nobody", "baselines": ["weak"]}}
    settings["arms"]["weak"]["results"] = []
    with pytest.raises(ValueError) as error:
        make_report({**settings, "confidence": 95})
    for part in ("no arm 'nobody'", "arms.weak.results: at least one", "confidence: 95"):
        assert part in str(error.value)
    settings |= {"comparisons": {}, "arms": {"strong": settings["arms"]["strong"]}, "headline": ["seen/names"]}
    with pytest.raises(
        ValueError, match="no results for seen/names; there are seen/count, seen/yesno, seen/relation/de"
    ):
        make_report(settings)
