"""The page of a comparison: every number is in every format, and no data becomes markup, a formula or a command."""

from __future__ import annotations

import base64
import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from comparison_data import MACRO, TASKS, categories, compared, task_difference, task_runs, two_candidates
from html_page import Page

from llm2clip_eval import comparison_figures, comparison_page
from llm2clip_eval.comparison import CandidateComparison, Comparison, MacroDifference
from llm2clip_eval.comparison_tables import latex

HOSTILE = (
    "=cmd|'/C calc'!A0 <script>alert(1)</script> \" onload=\"x & 100% _a_ **b** \\input{x} ~^$#{} `c`\u202e\x00\ud800"
)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return two_candidates()


@pytest.fixture(scope="module")
def written(comparison, tmp_path_factory) -> Path:
    """A report of everything."""
    directory = tmp_path_factory.mktemp("report")
    comparison_page.write(comparison, task_runs(directory / "run", comparison), directory)
    return directory


@pytest.fixture(scope="module")
def small() -> Comparison:
    """One candidate, one task, quickly drawn."""
    return compared(CandidateComparison("llm2clip", "LLM2CLIP", TASKS[2:3], None, 1))


def markdown_tables(markdown: str) -> list[list[str]]:
    """Cells of every line of a table, unescaped."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_number_is_in_every_format(written, comparison):
    page = Page((written / "report.html").read_text())
    markdown = [cell for row in markdown_tables((written / "report.md").read_text()) for cell in row]
    tex = (written / "table.tex").read_text()
    rounded = (
        "61.2",
        "63.6",
        "+2.4",
        "+0.4 to +4.4",
        "0.001",
        "<0.001",
        "1234",
        "2.8",
        "71 / 52 / 1111",
        "−3.1",
        "0.021",
    )
    for text in (*rounded, "1432.5", "+31.0", "+2.3", "+0.6 to +4.0", "0.008", "40.1"):
        assert text in page.text
        assert text in markdown
        assert latex(text) in tex
    for text in ("+3.2", "−1.7 to +8.1", "0123456789ab", "lmms-clip"):
        assert text in page.text and text in markdown
    for text in (
        "exact McNemar",
        "sign-flip permutation",
        "cluster bootstrap",
        "0123456789abcdef" * 4,
        "0.7.3",
        "5" * 64,
    ):
        assert text in page.text

    rows = list(csv.DictReader(io.StringIO((written / "table.csv").read_text())))
    assert len(rows) == 2 * (len(TASKS) + 1)
    for task, row in zip(TASKS, rows, strict=False):
        assert row["group"] == ("judged" if task.judge else "rule") and row["candidate"] == "LLM2CLIP"
        for name, value in asdict(task).items():
            if name in row and name not in ("baseline", "candidate") and isinstance(value, (int, float)):
                assert float(row[name]) == value, name
        assert (float(row["baseline_score"]), float(row["candidate_score"])) == (task.baseline, task.candidate)
    assert (rows[len(TASKS)]["task"], float(rows[len(TASKS)]["p"])) == ("macro average", MACRO.p)


def test_judged_tasks_are_apart_and_behind_the_average(written):
    html = (written / "report.html").read_text()
    first, second = re.findall(r"<table>.*?</table>", html, flags=re.S)[:2]
    assert "mmvet" not in first and "macro average" in first and "3 tasks" in first
    assert "mmvet" in second and "macro average" not in second and "a language model" in second
    tex = (written / "table.tex").read_text().split("\\begin{tabular}")[1:]
    assert ["mmvet" in table for table in tex] == [False, True] * 2
    assert ["macro average" in table for table in tex] == [True, False] * 2


def test_the_sentences_say_what_is_shown_and_what_is_not(written):
    text = Page((written / "report.html").read_text()).text
    assert "LLM2CLIP is better than CLIP in 2 of 4 tasks: gqa (+2.4), mme (+31.0)." in text
    assert "LLM2CLIP is worse than CLIP in 1 of 4 tasks: pope_adv (−3.1)." in text
    assert "is shown, nor that there is none, in 1 of 4 tasks: textvqa_val (+0.7; detectable from 2.8)." in text
    assert "On average over 3 tasks LLM2CLIP is better: 62.7 against 60.4" in text and "p = 0.008" in text
    assert "in no average: LLM2CLIP is better than CLIP in 1 task: mmvet (+9.9)." in text
    assert "Single seed: CLIP and LLM2CLIP and CLIP, continued trained once." in text
    markdown = (written / "report.md").read_text().replace("\\", "")
    for line in re.findall(r"^- (.*)$", markdown, flags=re.M) + re.findall("Single seed: .*", markdown):
        assert line in text
    assert len(re.findall("^- ", markdown, flags=re.M)) == 2 * 5


def test_a_model_against_itself_is_said_to_be_the_same(tmp_path):
    same = task_difference("gqa", 0.0, low=0.0, high=0.0, p=1.0, p_holm=1.0, wins=0, losses=0, ties=1234)
    macro = MacroDifference(2, 61.25, 61.25, 0.0, 0.0, 0.0, 1.0)
    twins = compared(CandidateComparison("twin", "Twin", (same, replace(same, task="pope")), macro, 1))
    comparison_page.write(twins, task_runs(tmp_path / "run", twins), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    text = "".join(re.findall("^- .*", markdown, flags=re.M))
    assert "Twin and CLIP score exactly the same in all 2 tasks." in text
    assert "no difference is shown" in text and "better" not in text and "worse" not in text
    row = markdown_tables(markdown)[2]
    assert row[4:6] == ["0.0", "0.0 to 0.0"]


def test_only_what_was_trained_once_is_called_single_seed(small):
    several = replace(small, num_seeds=3)
    assert comparison_page.single_seed_note(small).startswith("Single seed: CLIP and LLM2CLIP trained once.")
    assert comparison_page.single_seed_note(several).startswith("Single seed: LLM2CLIP trained once.")
    candidates = tuple(replace(candidate, num_seeds=3) for candidate in several.candidates)
    assert comparison_page.single_seed_note(replace(several, candidates=candidates)) == ""


def test_nothing_from_data_becomes_markup(tmp_path):
    task = task_difference(HOSTILE, metric=HOSTILE, categories=categories(HOSTILE, f"x{HOSTILE}"))
    hostile = compared(
        CandidateComparison(
            "a", HOSTILE, (task, replace(task, task="b"), replace(task, task="c", judge="server")), None, 1
        ),
        title=HOSTILE,
        baseline_label=f"-1+{HOSTILE}",
        recipe_differences={"a": ((HOSTILE, HOSTILE, HOSTILE),)},
    )
    hostile = replace(
        hostile, provenance=({**hostile.provenance[0], "label": HOSTILE, "versions": {HOSTILE: HOSTILE}},)
    )
    runs = [
        replace(run, items=[{**item, "scores": {HOSTILE: item["scores"]["exact_match"]}} for item in run.items])
        for run in task_runs(tmp_path / "run", hostile, HOSTILE)
    ]
    comparison_page.write(hostile, runs, tmp_path)

    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]
    assert "\x00" not in html
    assert page.text.count('<script>alert(1)</script> " onload="x & 100% _a_ **b**') > 30  # as text it is all there

    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<script", markdown)

    rows = list(csv.reader(io.StringIO((tmp_path / "table.csv").read_text(encoding="utf-8"))))
    assert len({len(row) for row in rows}) == 1 and len(rows) == 4
    numbers = re.compile(r"-?[\d.]+(e-?\d+)?")
    cells = [cell for row in rows[1:] for cell in row]
    assert any("cmd" in cell for cell in cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@")) and not numbers.fullmatch(cell)]

    tex = (tmp_path / "table.tex").read_text(encoding="utf-8")
    assert "\\input" not in tex
    for figure in (tmp_path / "figures").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(figure).iter()}
        assert "text" in tags and not tags & {"script", "a", "image", "foreignObject"}


def test_the_page_is_one_file_whose_links_lead_somewhere(written):
    html = (written / "report.html").read_text()
    page = Page(html)
    assert "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"data:[^\"]*", "", html))
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert all(image["alt"] for image in page.images) and len(page.images) > 20
    for figure in (written / "figures").glob("*.svg"):
        assert base64.b64encode(figure.read_bytes()).decode() in html
    assert ("name", "viewport") in page.attributes


def test_tables_are_rectangular(written):
    page = Page((written / "report.html").read_text())
    assert len(page.tables) > 8 and all(len(set(rows)) == 1 for rows in page.tables)
    blocks = re.findall(r"(?:^\|.*\n)+", (written / "report.md").read_text(), flags=re.M)
    assert len(blocks) >= 7
    for block in blocks:
        header, rule, *rows = markdown_tables(block)
        assert rows and {len(row) for row in (header, *rows)} == {len(rule)} and set("".join(rule)) == {"-"}


def test_latex_is_balanced_and_escaped(written):
    tex = (written / "table.tex").read_text()
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") == 4
    assert "pope\\_adv" in tex and "95 \\% interval" in tex and "$-$3.1" in tex
    for block in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end", tex, flags=re.S):
        rows = [line for line in block[1].splitlines() if line.endswith("\\\\")]
        assert rows and {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(block[0])}
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", tex):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0 and re.sub(r"\\\$", "", tex).count("$") % 2 == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 5 % {x} #1 $y$", r"a\_b \& 5 \% \{x\} \#1 \$y\$"),
        ("\\input{x}\n~^", r"\textbackslash{}input\{x\} \textasciitilde{}\textasciicircum{}"),
        ("[2pt] *", "{[}2pt{]} {*}"),
        ("<b>|", r"\textless{}b\textgreater{}\textbar{}"),
    ],
)
def test_latex_specials(text, expected):
    assert latex(text) == expected


def test_pictures_that_are_not_there_or_elsewhere_are_refused(small, tmp_path):
    runs = task_runs(tmp_path / "run", small)
    (tmp_path / "secret.jpg").write_bytes(b"")
    elsewhere = [replace(run, items=[{**item, "images": ["../../secret"]} for item in run.items]) for run in runs]
    with pytest.raises(ValueError, match="'../../secret'.*expected 32 hexadecimal digits"):
        comparison_page.write(small, elsewhere, tmp_path)
    for picture in (tmp_path / "run" / "images").iterdir():
        picture.unlink()
    with pytest.raises(FileNotFoundError, match="jpg is missing; run llm2clip-eval lmms again"):
        comparison_page.write(small, runs, tmp_path)
    comparison_page.write(small, runs, tmp_path, flips_per_task=0)
    assert not re.findall('<details class="flip"', (tmp_path / "report.html").read_text())


def test_more_than_another_tower_is_warned_of(small, tmp_path):
    runs = task_runs(tmp_path / "run", small)
    comparison_page.write(small, runs, tmp_path)
    assert "Warning" not in Page((tmp_path / "report.html").read_text()).text
    changed = (("tower", "a", "b"), ("training.learning_rate", "0.001", "0.002"))
    other = replace(small, recipe_differences={"llm2clip": changed}, allowed_differences=("dtype",))
    comparison_page.write(other, runs, tmp_path)
    for name in ("report.html", "report.md"):
        text = re.sub("<wbr>|\\\\", "", (tmp_path / name).read_text())
        assert text.count("Warning.") == 2
        assert "LLM2CLIP and CLIP differ in more than the vision tower (training.learning_rate)" in text
        assert "may differ in dtype" in text
    unknown = replace(small, recipe_differences={"llm2clip": (("lmms: model (not recorded)", "a", "b"),)})
    assert "not recorded" in comparison_page.recipe_warnings(unknown)[0]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("tower", True),
        ("fingerprint of tower", True),
        ("finetune.tower", True),
        ("model.vision_tower.path", True),
        ("tune.tower_learning_rate", False),
        ("llm", False),
        ("feature_layer", False),
    ],
)
def test_which_settings_are_the_tower(setting, expected):
    assert comparison_page.is_tower(setting) is expected


def test_runs_that_scored_differently_are_shown(small, tmp_path):
    runs = task_runs(tmp_path / "run", small)
    comparison_page.write(small, runs, tmp_path)
    assert "not the same for all" not in (tmp_path / "report.html").read_text()
    runs[0] = replace(runs[0], identity={**runs[0].identity, "dtype": "float16"})
    comparison_page.write(small, runs, tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert text.count("not the same for all") == 1 and "float16" in text


def test_the_radar_does_not_blow_noise_up():
    """What is below the minimum detectable difference stays outside of 40 % of the radius."""
    near, far = task_difference("near", 0.1), task_difference("far", 10.0)
    for task, inner in ((near, 1 - 0.6 * 0.1 / near.mde), (far, 0.4)):
        centre, rim = comparison_figures.radar_span([task])
        assert rim == task.candidate
        assert (task.baseline - centre) / (rim - centre) == pytest.approx(inner)


def test_few_tasks_and_no_categories_leave_out_radar_and_categories(tmp_path):
    single = compared(CandidateComparison("a", "A", (task_difference("gqa"),), None, 1))
    comparison_page.write(single, task_runs(tmp_path / "run", single), tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["differences-0.svg"]
    page = Page((tmp_path / "report.html").read_text())
    assert "radar" not in page.ids and "categories" not in page.ids and "macro average" not in page.text.lower()[:2000]


def test_a_task_with_two_metrics_is_two_rows_with_names_of_their_own(tmp_path):
    mme = task_difference("mme", 31.0, metric="mme_perception_score", categories=categories("a", "b"))
    other = replace(mme, metric="exact_match", difference=5.0, low=1.0)
    both = compared(CandidateComparison("a", "A", (mme, other), None, 1))
    server = [replace(run, task="vqav2_test", metric=None) for run in task_runs(tmp_path / "run", both)]
    comparison_page.write(both, [*task_runs(tmp_path / "run", both), *server], tmp_path)
    rows = markdown_tables((tmp_path / "report.md").read_text())
    assert [row[0] for row in rows[2:4]] == ["mme_perception_score", "mme exact_match"]
    with (tmp_path / "table.csv").open() as file:
        names = [(row["task"], row["metric"]) for row in csv.DictReader(file)]
    assert names == [("mme", "mme_perception_score"), ("mme", "exact_match")]
    assert len(list((tmp_path / "figures").glob("categories-*.svg"))) == 2
    page = Page((tmp_path / "report.html").read_text())
    assert "scored only by a submission server, and so not compared: vqav2_test." in page.text


def test_the_same_input_gives_the_same_files(small, tmp_path):
    runs = task_runs(tmp_path / "run", small)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        comparison_page.write(small, runs, tmp_path / name)
    for path in (p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
