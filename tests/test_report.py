"""Reports of synthetic results: what was planted is said, what does not fit is refused, no data becomes markup."""

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
from PIL import Image
from tiny import write_captions

from llm2clip.caption_data import CaptionData
from llm2clip.metrics import recall_at_k
from llm2clip_eval import report

HOSTILE = "<script>alert('caption')</script> \" onload=\"x | **bold** & `code`"
NUM_IMAGES = 60


def write_pool(directory: Path, kinds: tuple[str, ...] = ("raw", "long")) -> Path:
    """Coloured squares with captions, one in two of them hostile."""
    rng = np.random.default_rng(0)
    (directory / "images").mkdir(parents=True)
    rows = []
    for index in range(NUM_IMAGES):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        Image.new("RGB", (40, 30), colour).save(directory / "images" / f"{index}.png")
        texts = {kind: f"{kind} caption {index} {HOSTILE if index % 2 else ''}" for kind in kinds}
        rows.append({"id": f"{index}<img src=x>", "image": f"images/{index}.png", "captions": texts})
    return write_captions(directory, rows)


def write_run(directory: Path, stage: str, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    manifest = {"stage": stage, "inputs": {}, "settings": dict(settings), "outputs": {}, **facts}
    environment = {
        "packages": {"torch": "2.12.1", "deepspeed": None},
        "processor": "a processor",
        "accelerator": None,
        "num_cpus": 2,
        "git_commit": "0" * 40,
    }
    for name, content in (("identity.json", {}), ("environment.json", environment), ("manifest.json", manifest)):
        (directory / name).write_text(json.dumps(content))
    (directory / "config.yaml").write_text(yaml.safe_dump(dict(settings)))
    return directory


def write_retrieval(
    directory: Path,
    pools: Mapping[str, Path],
    strength: Mapping[str, float] | float,
    seed: int = 0,
    split: str = "test",
    ks: Sequence[int] = (1, 5, 10),
) -> Path:
    """Retrieval results in which each query of a pool is answered at rank 0 with probability `strength`."""
    rng = np.random.default_rng([seed, sum(directory.name.encode())])
    write_run(directory, "retrieval", {"fingerprint": directory.name, "clip_fingerprint": f"{directory.name}"}, {})
    (directory / "results").mkdir(exist_ok=True)
    for pool, path in pools.items():
        data = CaptionData.open(path)
        for kind in data.kind_names:
            level = strength if isinstance(strength, float) else strength[f"{pool}/{kind}"]
            size = len(data)
            ranks = [np.where(rng.random(size) < level, 0, rng.integers(1, size, size)).tolist() for _ in range(2)]
            recall = {way: recall_at_k(found, ks) for way, found in zip(("i2t", "t2i"), ranks, strict=True)}
            recall["mean"] = {k: (recall["i2t"][k] + recall["t2i"][k]) / 2 for k in recall["i2t"]}
            record = {
                "arm": directory.name,
                "pool": pool,
                "kind": kind,
                "split": split,
                "seed": seed,
                "data": str(path),
                "fields": None,
                "clip_fingerprint": directory.name,
                "data_fingerprint": data.fingerprint,
                "num_images": size,
                "num_captions": size,
                "num_distinct_captions": size,
                "num_truncated_captions": 3 if kind == "long" else None,
                "num_images_without_caption": 0,
                "recall": recall,
                "image_ids": data.ids.to_pylist(),
                "caption_image": list(range(size)),
                "i2t_ranks": ranks[0],
                "t2i_ranks": ranks[1],
                "top5": {"t2i": [_top5(image, rank, size) for image, rank in enumerate(ranks[1])]},
            }
            (directory / "results" / f"{pool}__{kind}.json").write_text(json.dumps(record))
    return directory


def _top5(image: int, rank: int, size: int) -> list[int]:
    others = [(image + step) % size for step in range(1, 6)]
    return (others[:rank] + [image] + others[rank:])[:5] if rank < 5 else others


def write_training(directory: Path, learning_rate: float) -> Path:
    settings = {"training.learning_rate": learning_rate, "training.max_steps": 40, "note": HOSTILE}
    facts = {"fingerprint": f"{directory.name}-weights", "num_steps": 40, "global_batch_size": 8}
    write_run(directory, "train-clip", facts, settings)
    lines = [json.dumps({"step": step, "loss": 2.0 + 3.0 / (step + 1)}) for step in range(1, 41)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def pools(tmp_path) -> dict[str, Path]:
    return {
        "concepts": write_pool(tmp_path / "concepts"),
        "seen": write_pool(tmp_path / "seen"),
        "lang_de": write_pool(tmp_path / "lang_de", kinds=("raw",)),
    }


@pytest.fixture
def settings(tmp_path, pools) -> dict[str, Any]:
    planted = {"concepts/raw": 0.5, "concepts/long": 0.9, "seen/raw": 0.5, "seen/long": 0.1, "lang_de/raw": 0.3}
    return {
        "title": f"Demo {HOSTILE}",
        "arms": {
            "vanilla": {"results": [str(write_retrieval(tmp_path / "r-vanilla", pools, 0.4))]},
            "llm2clip": {
                "results": [str(write_retrieval(tmp_path / "r-llm2clip", pools, planted))],
                "clip": [str(write_training(tmp_path / "c-llm2clip", 1e-3))],
                "label": "LLM2CLIP $x$",
                "note": f"a note {HOSTILE}",
            },
            "continued": {
                "results": [str(write_retrieval(tmp_path / "r-continued", pools, 0.5))],
                "clip": [str(write_training(tmp_path / "c-continued", 2e-3))],
            },
        },
        "comparisons": {"Equal data, equal steps": {"target": "llm2clip", "baselines": ["continued", "vanilla"]}},
        "headline": ["concepts/long"],
        "headline_rule": "Written down before the run.",
        "pools": {"seen": "what was seen", "concepts": HOSTILE},
        "cross_lingual_pools": ["lang_*"],
        "remarks": [HOSTILE],
        "num_resamples": 500,
        "output_dir": str(tmp_path / "report"),
    }


def make_report(settings: Mapping[str, Any]) -> Path:
    output_dir = Path(settings["output_dir"])
    config = output_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    report.main(["--config", str(config)])
    return output_dir


def test_planted_differences_are_reported_on_the_right_side(settings):
    output_dir = make_report(settings)
    summary = json.loads((output_dir / "summary.json").read_text())
    verdicts = {(c["baseline"], c["result"]): c["verdict"] for c in summary["comparisons"]}
    assert verdicts["continued", "concepts/long"] == "better"
    assert verdicts["continued", "seen/long"] == "worse"
    assert [c["result"] for c in summary["comparisons"] if c["is_headline"]] == ["concepts/long"] * 2
    assert summary["num_seeds"] == {"vanilla": 1, "llm2clip": 1, "continued": 1}
    headline = json.loads((output_dir / "manifest.json").read_text())["headline"]
    assert "concepts/long: R@1 vanilla " in headline and "LLM2CLIP $x$ is better than continued" in headline
    assert "One training seed per arm" in headline
    written = (output_dir / "report.md").read_text()
    for text in (Page((output_dir / "report.html").read_text()).text, written.replace("\\", "")):
        assert "LLM2CLIP $x$ is better than continued" in text
        assert "One training seed per arm" in text


def test_an_arm_against_itself_is_exactly_zero(settings, tmp_path, pools):
    twin = write_retrieval(tmp_path / "r-twin", pools, 0.5)
    for file in (twin / "results").iterdir():
        record = json.loads((tmp_path / "r-continued" / "results" / file.name).read_text())
        file.write_text(json.dumps(record))
    settings["arms"]["twin"] = {"results": [str(twin)]}
    settings["comparisons"] = {"The same": {"target": "twin", "baselines": ["continued"]}}
    found = json.loads((make_report(settings) / "summary.json").read_text())["comparisons"]
    assert {(c["difference"], c["low"], c["high"]) for c in found} == {(0.0, 0.0, 0.0)}


def test_nothing_from_data_or_configuration_becomes_markup(settings):
    output_dir = make_report(settings)
    html = (output_dir / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text  # as text it is all there
    outside = [value for name, value in page.attributes if name in ("src", "href") and value]
    assert all(value.startswith(("data:image/", "#")) for value in outside)  # one file, nothing loaded
    for uri in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html):
        assert b"<script" not in base64.b64decode(uri)
    markdown = (output_dir / "report.md").read_text()
    assert "<script>" not in markdown.replace("\\<", "")
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert tables and all(len(re.findall(r"(?<!\\)\|", line)) in (7, 10, 11) for line in tables)


def test_every_pool_is_shown_in_the_given_order_and_languages_apart(settings):
    page = Page((make_report(settings) / "report.html").read_text())
    pools = page.text[page.text.rindex("All pools") :]
    assert pools.index("seen") < pools.index("concepts") < pools.index("Other languages") < pools.index("lang_de")
    assert "cut off by LLM2CLIP" in pools


def test_columns_are_those_that_were_evaluated(settings, tmp_path, pools):
    ks = (5, 20, 1, 2, 10)
    for name, arm in settings["arms"].items():
        arm["results"] = [str(write_retrieval(tmp_path / f"ks-{name}", pools, 0.4, ks=ks))]
    output_dir = make_report(settings)
    lines = (output_dir / "report.md").read_text().splitlines()
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    names = ["R@1", "R@2", "R@5", "R@10", "R@20"]
    header = next(place for place, row in enumerate(rows) if row[2] == "arm")
    assert rows[header][3:] == ["I→T R@1", *names[1:], "T→I R@1", *names[1:], "mean R@1"]
    assert rows[header + 1] == ["---"] * 14
    recall = json.loads((tmp_path / "ks-vanilla" / "results" / "seen__raw.json").read_text())["recall"]
    expected = [recall[way][name] for way in ("i2t", "t2i") for name in names] + [recall["mean"]["R@1"]]
    assert next(row[3:] for row in rows if row[:3] == ["seen", "raw", "vanilla"]) == [f"{x:.1f}" for x in expected]
    html = (output_dir / "report.html").read_text()
    rows = [re.findall(r">([\d.]+)<", row) for row in re.findall(r"vanilla</td>(.*)</tr>", html)]
    assert [f"{x:.1f}" for x in expected] in rows
    assert html.count("<th>R@20</th>") == 3 * 2
    wide = [cells for cells in Page(html).tables if cells[0] == 2 * len(ks) + 2]
    assert len(wide) == 3 and all(len(set(cells)) == 1 for cells in wide)  # one for each pool, each rectangular


def test_neighbours_show_the_right_image_framed_where_the_arm_found_it(settings):
    html = (make_report(settings) / "report.html").read_text()
    rows = re.findall(r"right image at rank (\d+)</span></div>\n<div class=\"thumbs\">(.*?)</div>", html)
    assert len(rows) == 3 * 3
    for rank, thumbs in rows:
        classes = re.findall(r'<span class="(right|)">', thumbs)
        assert len(classes) == 5
        assert [place for place, name in enumerate(classes, 1) if name] == ([int(rank)] if int(rank) <= 5 else [])


def test_several_seeds_are_averaged_and_said(settings, tmp_path, pools):
    more = [str(write_retrieval(tmp_path / f"r-llm2clip-{seed}", pools, 0.6, seed=seed)) for seed in (1, 2)]
    arm = settings["arms"]["llm2clip"]
    arm["results"] += more
    arm["clip"] = []
    output_dir = make_report(settings)
    summary = json.loads((output_dir / "summary.json").read_text())
    assert summary["num_seeds"]["llm2clip"] == 3
    singles = [
        json.loads((Path(directory) / "results" / "concepts__long.json").read_text())["recall"]["mean"]["R@1"]
        for directory in arm["results"]
    ]
    assert summary["recall_at_1"]["concepts/long"]["llm2clip"] == pytest.approx(np.mean(singles))
    text = Page((output_dir / "report.html").read_text()).text
    assert "±" in text and "One training seed" not in text and "several training seeds" in text
    headline = json.loads((output_dir / "manifest.json").read_text())["headline"]
    for said in (text, (output_dir / "report.md").read_text(), headline):
        assert "Trained once: vanilla and continued. The intervals do not cover the noise of that training." in said


def test_validation_numbers_are_labelled(settings, tmp_path, pools):
    for name, arm in settings["arms"].items():
        arm["results"] = [str(write_retrieval(tmp_path / f"val-{name}", pools, 0.5, split="val"))]
    assert "they are not results" in Page((make_report(settings) / "report.html").read_text()).text


def test_the_teacher_is_shown_before_and_after(settings, tmp_path):
    teacher = write_run(tmp_path / "teacher", "finetune-llm", {"fingerprint": "t"}, {})
    accuracy = {"query_to_positive": 0.25, "positive_to_query": 0.5, "num_images": 500}
    after = {**accuracy, "query_to_positive": 0.875}
    (teacher / "cra.json").write_text(json.dumps({"before": {"raw/long": accuracy}, "after": {"raw/long": after}}))
    settings |= {"teacher": str(teacher), "stages": {"teacher tuning": str(teacher)}}
    output_dir = make_report(settings)
    assert "25.0 → 87.5" in (output_dir / "report.md").read_text()
    assert "87.5" in Page((output_dir / "report.html").read_text()).text


def test_what_the_runs_did_differently_is_listed(settings):
    text = Page((make_report(settings) / "report.html").read_text()).text
    assert "Settings and inputs in which the two training runs differ (1)" in text
    assert "training.learning_rate" in text and "0.002" in text


def test_results_that_do_not_belong_together_are_refused(settings, tmp_path, pools):
    fewer = {name: path for name, path in pools.items() if name != "seen"}
    vanilla = settings["arms"]["vanilla"]
    vanilla["results"] = [str(write_retrieval(tmp_path / "r-fewer", fewer, 0.4))]
    with pytest.raises(ValueError, match="pool seen/(raw|long) is missing in a result of vanilla"):
        make_report({**settings, "output_dir": str(tmp_path / "a")})

    changed = write_retrieval(tmp_path / "r-changed", pools, 0.4)
    file = changed / "results" / "seen__raw.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "data_fingerprint": "other"}))
    vanilla["results"] = [str(changed)]
    with pytest.raises(ValueError, match="seen/raw: data_fingerprint of (vanilla|llm2clip)"):
        make_report({**settings, "output_dir": str(tmp_path / "b")})

    vanilla["results"] = [str(write_retrieval(tmp_path / "r-ks", pools, 0.4, ks=(1, 5)))]
    message = r"llm2clip \(seed 0\) has R@1, R@5, R@10, vanilla R@1, R@5; run .* with the same ks"
    with pytest.raises(ValueError, match=message):
        make_report({**settings, "output_dir": str(tmp_path / "ks")})

    same = settings["arms"]["continued"]["results"][0]
    vanilla["results"] = [same, same]
    with pytest.raises(ValueError, match="the very same model"):
        make_report({**settings, "output_dir": str(tmp_path / "c")})

    vanilla["results"] = [str(tmp_path / "nothing")]
    with pytest.raises(FileNotFoundError, match="nothing"):
        make_report({**settings, "output_dir": str(tmp_path / "d")})


def test_pictures_of_a_pool_that_changed_are_refused(settings, pools):
    rows = (pools["concepts"] / "captions.jsonl").read_text().replace("caption 3", "another caption")
    (pools["concepts"] / "captions.jsonl").write_text(rows)
    with pytest.raises(ValueError, match="has changed since it was evaluated"):
        make_report(settings)


def test_mistakes_in_the_configuration_are_told_all_at_once(settings):
    settings["comparisons"]["Equal data, equal steps"]["target"] = "nobody"
    settings["headline"] = ["concepts"]
    settings["arms"]["continued"]["clip"] *= 2
    with pytest.raises(ValueError) as error:
        make_report(settings)
    for part in ("no arm 'nobody'", "not of the form pool/kind", "2 clip runs for 1 results"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="headline: no results for concepts/missing; there are .*concepts/long"):
        settings["comparisons"]["Equal data, equal steps"]["target"] = "llm2clip"
        settings["arms"]["continued"]["clip"].pop()
        make_report({**settings, "headline": ["concepts/missing"]})


def test_the_same_input_gives_the_same_report(settings, tmp_path):
    first = make_report(settings)
    second = make_report({**settings, "output_dir": str(tmp_path / "again")})
    for name in ("report.html", "report.md", "summary.json", "figures/headline.svg"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
