"""Every task of the suites without a judge: our sums and formulas give what lmms-eval's own functions print.

Documents in each task's format go through lmms-eval's loading, filters, `process_results` and aggregation.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import lmms_results
import numpy as np
import pytest
import yaml
from PIL import Image

from llm2clip_eval.lmms_task import target_of
from llm2clip_eval.paired_statistics import Paired, clusters_of
from llm2clip_eval.task_metrics import items_with, measure

os.environ.setdefault("OPENAI_API_KEY", "none")  # some task modules want one when they are imported

ROOT = Path(__file__).parents[1]
NUM = 48
LETTERS = ["A", "B", "C", "D"]
JUNK = ["", "maybe", "I cannot say.", "42"]

Docs = list[dict[str, Any]]
Draw = Callable[[Sequence[Any]], Any]


def drawn(rng: np.random.Generator) -> Draw:
    return lambda options: options[int(rng.integers(len(options)))]


def open_docs(draw: Draw) -> tuple[Docs, list[str]]:
    """GQA: one short answer."""
    words = ["cat", "red car", "yes", "no"]
    docs = [{"id": str(n), "imageId": str(n // 2), "question": "What?", "answer": draw(words)} for n in range(NUM)]
    return docs, words + ["Red car.", "a cat", *JUNK]


def vqa_docs(wrap: bool) -> Callable[[Draw], tuple[Docs, list[str]]]:
    """VQAv2, TextVQA, VizWiz: ten people's answers, which agree more or less."""

    def docs(draw: Draw) -> tuple[Docs, list[str]]:
        words = ["cat", "a dog", "two", "don't know", "net"]
        rows = []
        for n in range(NUM):
            few = [draw(words) for _ in range(2)]
            answers = [draw(few + words) for _ in range(10)]
            people = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers)
            ]
            rows.append(
                {
                    "question_id": n if wrap else str(n),
                    "question": "what is it?",
                    "answers": people if wrap else answers,
                    "ocr_tokens": ["net"],
                }
            )
        return rows, words + ["2", "dog", "dont know", "The cat.", *JUNK]

    return docs


def scienceqa_docs(draw: Draw) -> tuple[Docs, list[str]]:
    choices = ["north", "south", "east"]
    docs = [{"question": "Where?", "choices": choices, "hint": "", "answer": draw([0, 1, 2])} for _ in range(NUM)]
    return docs, ["A", "b", "C. east", "B. south", "a. north", "D", *JUNK]


def pope_docs(draw: Draw) -> tuple[Docs, list[str]]:
    docs = [{"question_id": str(n), "question": "Is there?", "answer": draw(["yes", "no"])} for n in range(NUM)]
    return docs, ["yes", "Yes", "no", "No ", "Yes.", "there is", *JUNK]


def mme_docs(draw: Draw) -> tuple[Docs, list[str]]:
    docs = []
    for n in range(NUM // 2):
        category = draw(["count", "color", "OCR", "code_reasoning", "text_translation"])
        docs += [
            {"question_id": f"{category}/{n}.jpg", "question": "Is it?", "answer": answer, "category": category}
            for answer in ("Yes", "No")
        ]
    return docs, ["yes", "No.", "Y", "n", "Yes, it is", "not at all", *JUNK]


def mmbench_docs(draw: Draw) -> tuple[Docs, list[str]]:
    """Some questions come in several rotations of their options."""
    docs = []
    for n in range(NUM // 2):
        for rotation in range(draw([1, 1, 2, 4])):
            options = [["apple", "pear", "plum", "fig"][(i + rotation) % 4] for i in range(4)]
            docs.append(
                {
                    "index": n + rotation * 1_000_000,
                    "question": "Which?",
                    "hint": "nan",
                    "answer": LETTERS[options.index("pear")],
                    **dict(zip(LETTERS, options, strict=True)),
                    "category": draw(["logic", "attribute"]),
                    "L2-category": "perception",
                    "source": "web",
                    "split": "dev",
                }
            )
    right = [doc["answer"] for doc in docs]
    return docs, ["pear", "pear", "pear", "The pear.", "B", "(A)", "C.", "apple or pear", right[0], *JUNK]


def seed_docs(draw: Draw) -> tuple[Docs, list[str]]:
    docs = [
        {
            "question_id": str(n),
            "question": "Which?",
            "answer": draw(LETTERS),
            "data_type": draw(["image", "image", "video"]),
            **{f"choice_{letter.lower()}": f"choice {letter}" for letter in LETTERS},
        }
        for n in range(NUM)
    ]
    return docs, ["A", "b", "C. choice C", "Dog", *JUNK]


def mmmu_docs(draw: Draw) -> tuple[Docs, list[str]]:
    docs = []
    for n in range(NUM):
        subject = draw(["Art", "Math", "Physics", "Sociology"])
        is_choice = draw([True, True, False])
        docs.append(
            {
                "id": f"validation_{subject}_{n}",
                "question": "<image 1> Which?",
                "question_type": "multiple-choice" if is_choice else "open",
                "options": "['north', 'south', 'east', 'west']" if is_choice else "[]",
                "answer": draw(LETTERS) if is_choice else draw(["42", "8.5"]),
            }
        )
    return docs, ["A", "(B)", "The answer is C.", "D", "west", "It is 42", "x = 8.50", *JUNK]


def mmstar_docs(draw: Draw) -> tuple[Docs, list[str]]:
    kinds = [("math", "geometry"), ("math", "statistical reasoning"), ("logical reasoning", "diagram reasoning")]
    kinds += [("coarse perception", "image emotion")]
    docs = []
    for n in range(NUM):
        category, finer = draw(kinds)
        docs.append(
            {"index": n, "question": "Which?", "answer": draw(LETTERS), "category": category, "l2_category": finer}
        )
    return docs, ["A", "B.", "(C)", "The answer is D", *JUNK]


def ai2d_docs(draw: Draw) -> tuple[Docs, list[str]]:
    options = ["root", "leaf", "stem", "bud"]
    docs = [{"question": "Which?", "options": options, "answer": draw(["0", "1", "2", "3"])} for _ in range(NUM)]
    return docs, ["A", "b", "C. stem", "D.", *JUNK]


def chartqa_docs(draw: Draw) -> tuple[Docs, list[str]]:
    docs = [
        {
            "question": "How many?",
            "answer": draw(["40", "12.5%", "Yes", "0"]),
            "type": draw(["human_test", "augmented"]),
        }
        for _ in range(NUM)
    ]
    return docs, ["41", "40.0", "12%", "yes", "0", "39", *JUNK]


def docvqa_docs(draw: Draw) -> tuple[Docs, list[str]]:
    docs = [
        {"questionId": str(n), "question": "Who?", "answers": draw([["ITC Limited", "ITC"], ["0.28"], ["May 1998"]])}
        for n in range(NUM)
    ]
    return docs, ["itc limited", "ITC Ltd", "0.23", "may  1999", "June", *JUNK]


def ocrbench_docs(draw: Draw) -> tuple[Docs, list[str]]:
    kinds = ["Regular Text Recognition", "Doc-oriented VQA", "Handwritten Mathematical Expression Recognition"]
    docs = [
        {
            "dataset": draw(["IIIT5K", "HME100k"]),
            "question": "Which word?",
            "question_type": draw(kinds),
            "answer": draw([["EXIT"], ["a + b"], ["１２"]]),
        }
        for _ in range(NUM)
    ]
    return docs, ["exit", "It says EXIT.", "a+b", "12", *JUNK]


def mmvp_docs(draw: Draw) -> tuple[Docs, list[str]]:
    docs = [
        {
            "Index": n + 1,
            "Question": "Open or shut?",
            "Options": "(a) Open (b) Shut",
            "Correct Answer": "(a)" if n % 2 else "(b)",
        }
        for n in range(NUM - 1)
    ]  # the last pair is broken
    return docs, ["A", "(b)", "Answer is b", *JUNK]


def cv_bench_docs(draw: Draw) -> tuple[Docs, list[str]]:
    docs = [
        {
            "idx": n,
            "prompt": "How many?",
            "choices": ["one", "two", "three"],
            "answer": draw(["(A)", "(B)", "(C)"]),
            "type": "2D",
            "task": "Count",
            "source": draw(["ADE20K", "COCO", "Omni3D"]),
        }
        for n in range(NUM)
    ]
    return docs, ["A", "(B) two", "c", *JUNK]


def realworldqa_docs(draw: Draw) -> tuple[Docs, list[str]]:
    docs = [{"question": "Which?", "answer": draw(["A", "C", "Yes", "3"])} for _ in range(NUM)]
    return docs, ["A", "C.", "The answer is C", "yes.", "3", *JUNK]


TASKS: dict[str, tuple[str, str, Callable[[Draw], tuple[Docs, list[str]]]]] = {
    "vqav2_val": ("vqav2/vqav2_val", "validation", vqa_docs(True)),
    "gqa": ("gqa/gqa", "testdev", open_docs),
    "vizwiz_vqa_val": ("vizwiz_vqa/vizwiz_vqa_val", "val", vqa_docs(False)),
    "scienceqa_img": ("scienceqa/scienceqa_img", "test", scienceqa_docs),
    "textvqa_val": ("textvqa/textvqa_val", "validation", vqa_docs(False)),
    "textvqa_val_ocr": ("textvqa/textvqa_val_ocr", "validation", vqa_docs(False)),
    "pope_random": ("pope/pope_random", "random", pope_docs),
    "pope_pop": ("pope/pope_pop", "popular", pope_docs),
    "pope_adv": ("pope/pope_adv", "adversarial", pope_docs),
    "mme": ("mme/mme", "test", mme_docs),
    "mmbench_en_dev_static": ("mmbench/mmbench_en_dev_static", "dev", mmbench_docs),
    "mmbench_cn_dev_static_local": ("mmbench/mmbench_cn_dev_static_local", "dev", mmbench_docs),
    "seedbench": ("seedbench/seedbench", "test", seed_docs),
    "mmmu_val": ("mmmu/mmmu_val", "validation", mmmu_docs),
    "mmstar": ("mmstar/mmstar", "val", mmstar_docs),
    "ai2d": ("ai2d/ai2d", "test", ai2d_docs),
    "chartqa": ("chartqa/chartqa", "test", chartqa_docs),
    "docvqa_val": ("docvqa/docvqa_val", "validation", docvqa_docs),
    "infovqa_val": ("infovqa/infovqa_val", "validation", docvqa_docs),
    "ocrbench": ("ocrbench/ocrbench", "test", ocrbench_docs),
    "mmvp": ("mmvp/mmvp", "train", mmvp_docs),
    "cv_bench": ("cv_bench/cv_bench", "test", cv_bench_docs),
    "realworldqa": ("realworldqa/realworldqa", "test", realworldqa_docs),
}


def lmms_task(name: str, docs: Docs, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lmms-eval's own task, pointed at our documents."""
    import lmms_eval
    from lmms_eval.tasks import TaskManager, get_task_dict

    monkeypatch.chdir(directory)  # some aggregations write files
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", directory / "cache")
    source, split, _ = TASKS[name]
    theirs, ours = Path(lmms_eval.__file__).parent / "tasks", ROOT / "eval" / "tasks"
    file = next(path for root in (ours, theirs) if (path := root / f"{source}.yaml").is_file())
    image = Image.new("RGB", (4, 4))
    table = datasets.Dataset.from_list([{**doc, "image": image, "image_1": image} for doc in docs])
    table.to_parquet(str(directory / "docs.parquet"))
    config = {
        "include": str(file),
        "task": f"ours_{name}",
        "dataset_path": "parquet",
        "dataset_name": None,
        "process_docs": None,
        "dataset_kwargs": {"data_files": {split: str(directory / "docs.parquet")}},
    }
    (directory / "task.yaml").write_text(yaml.safe_dump(config))
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    return get_task_dict([config["task"]], manager, task_type="simple")[config["task"]]


def asked(task: Any, split: str, answers: Sequence[str]) -> list[dict[str, Any]]:
    """Items as a run writes them: after the filters and `process_results`, through JSON."""
    docs = [task.dataset_no_image[split][number] for number in range(len(answers))]
    responses: Any = [[answer] for answer in answers]
    for ensemble in task._filters:
        for filtered in ensemble.filters:
            responses = filtered.apply(responses, docs)
    items = []
    for number, (doc, response) in enumerate(zip(docs, responses, strict=True)):
        scores = task.process_results(doc, [response])
        items.append(lmms_results.item(number, json.loads(json.dumps(scores)), image=f"image {number // 3}"))
    return items


def printed(task: Any, items: Sequence[dict[str, Any]], metric: str) -> float:
    """What lmms-eval's aggregation makes of the scores."""
    aggregate = task.aggregation()[metric]
    values = [item["scores"][metric] for item in items if metric in item["scores"]]
    if metric == "ocrbench_accuracy":  # counts on where the last aggregation of this process stopped
        counts = aggregate.__globals__["OCRBench_score"]
        counts |= dict.fromkeys(counts, 0)
    return aggregate(values, args=None) if "args" in inspect.signature(aggregate).parameters else aggregate(values)


def metrics_of(task: Any) -> list[str]:
    return [entry["metric"] for entry in task.config.metric_list if entry["metric"] != "submission"]


@pytest.mark.parametrize("name", TASKS)
def test_the_sums_of_a_task_come_to_what_lmms_eval_prints(name, tmp_path, monkeypatch):
    rng = np.random.default_rng(sum(map(ord, name)))
    docs, answers = TASKS[name][2](drawn(rng))
    task = lmms_task(name, docs, tmp_path, monkeypatch)
    seen = set()
    for _ in range(5):
        items = asked(task, TASKS[name][1], [drawn(rng)(answers) for _ in docs])
        for metric in metrics_of(task):
            if not items_with(items, metric):  # a category of MMStar that is not among the documents
                continue
            found, expected = measure(items, metric), printed(task, items, metric)
            assert found.value == pytest.approx(expected, rel=1e-13, abs=1e-15)
            assert found.scores.min() >= 0 and found.scores.max() <= 1
            assert found.value * found.scale <= found.best * (1 + 1e-12)
            seen.add(expected)
            # and so do sums over clusters
            clusters = clusters_of([[item["images"][0]] for item in items_with(items, metric)])
            paired = Paired.of([found], [found], clusters)
            assert paired.metrics() == pytest.approx((expected, expected), rel=1e-13, abs=1e-15)
    assert len(seen) > 1  # not all 0, not all alike


def test_every_task_of_the_suite_without_a_judge_is_among_these():
    suite = yaml.safe_load((ROOT / "configs/eval/suites/no_judge.yaml").read_text(encoding="utf-8"))
    assert {row["task"] for row in suite["tasks"]} <= TASKS.keys()


@pytest.mark.parametrize("name", ["vqav2_val", "textvqa_val", "textvqa_val_ocr", "vizwiz_vqa_val"])
def test_targets_are_what_people_answered_where_lmms_eval_has_a_missing_columns_name(name, tmp_path, monkeypatch):
    docs, _ = TASKS[name][2](drawn(np.random.default_rng(0)))
    task = lmms_task(name, docs, tmp_path, monkeypatch)
    targets = set()
    for number, doc in enumerate(docs):
        found = task.dataset_no_image[TASKS[name][1]][number]
        sample = {"doc_id": number, "doc": found, "target": task.doc_to_target(found)}
        assert sample["target"] == "answer"
        targets.add(target := target_of(sample, task.config.doc_to_target))
        assert json.loads(target) == [said["answer"] if name == "vqav2_val" else said for said in doc["answers"]]
    assert len(targets) > 1


def test_an_answer_that_is_neither_yes_nor_no_costs_accuracy_but_not_f1():
    answers = [("yes", "yes"), ("no", "no"), ("perhaps", "yes"), ("yes.", "no")]
    items = lmms_results.pope(answers)
    assert measure(items, "pope_accuracy").value == 0.5
    assert measure(items, "pope_f1_score").value == 1.0
    silent = lmms_results.pope([("", "yes"), ("", "no")])
    assert [measure(silent, f"pope_{name}").value for name in ("precision", "recall", "f1_score")] == [0, 0, 0]


def test_mme_gives_a_pair_200_points_when_both_are_right_and_50_when_one_is():
    rights = {("count", 0): (1, 1), ("count", 1): (1, 0), ("color", 0): (0, 0), ("color", 1): (1, 1)}
    items = []
    for (category, image), scores in rights.items():
        for score in scores:
            value = {"question_id": image, "category": category, "score": float(score)}
            items.append(lmms_results.item(len(items), {"mme_perception_score": value}, image=f"{category} {image}"))
    found = measure(items, "mme_perception_score")
    assert found.value == (200 + 50) / 2 + (0 + 200) / 2
    assert (found.scale, found.best) == (1, 400)
    with pytest.raises(ValueError, match="pairs of questions .* has 1: choose a limit that keeps pairs together"):
        measure(items[:-1], "mme_perception_score")


def test_a_judges_points_are_shown_as_lmms_eval_shows_them():
    vet = [lmms_results.item(n, {"gpt_eval_score": {"question_id": n, "score": s}}) for n, s in enumerate((0.2, 0.9))]
    assert measure(vet, "gpt_eval_score").value == pytest.approx(55)
    bench = [lmms_results.item(n, {"gpt_eval_llava_all": {"scores": s}}) for n, s in enumerate(([9, 6], [8, 5]))]
    assert measure(bench, "gpt_eval_llava_all").value == 64.7  # 100 * 5.5 / 8.5
    bench[0]["scores"]["gpt_eval_llava_all"]["scores"] = [-1, -1]
    with pytest.raises(ValueError, match="the judge failed on 1 answers"):
        measure(bench, "gpt_eval_llava_all")


def test_a_filters_name_behind_the_metric_does_not_hide_it():
    items = lmms_results.pope([("yes", "yes"), ("no", "yes")])
    renamed = [{**entry, "scores": {"pope_recall,strict": entry["scores"]["pope_recall"]}} for entry in items]
    assert measure(renamed, "pope_recall,strict").value == 0.5


def test_what_is_not_known_to_be_made_of_sums_is_refused():
    captions = [lmms_results.item(0, {"nocaps_CIDEr": {"answer": ["a cat"], "pred": "a dog", "image_id": 1}})]
    with pytest.raises(
        ValueError, match="nocaps_CIDEr is made of its items .*answer, pred, image_id.* cannot be resam"
    ):
        measure(captions, "nocaps_CIDEr")
    with pytest.raises(ValueError, match="scores from 0 to 7; only means of scores in 0 to 1"):
        measure([lmms_results.item(n, {"points": 7.0 * n}) for n in range(2)], "points")
    with pytest.raises(ValueError, match="no item has a score for anls"):
        measure(captions, "anls")
