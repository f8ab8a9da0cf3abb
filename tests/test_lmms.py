"""The stage `lmms`: real lmms-eval, real child processes, tiny exported models on made-up questions."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import transformers
import yaml
from llava_exports import Export, edit
from PIL import Image
from processes import ROOT, kill_when, start
from psutil import Process, wait_procs
from question_files import picture, question, write_questions

from llm2clip.run_dir import fingerprint
from llm2clip_eval import lmms, lmms_tasks
from llm2clip_eval.answerer import Answerer
from llm2clip_eval.lmms_model import LlavaAdapter, generation_settings
from llm2clip_eval.questions import QuestionFile, is_correct
from llm2clip_eval.response_store import image_digest
from llm2clip_eval.suites import load_suite

POOLS = ("seen", "concepts", "compositions")
DEMO_TASKS = ROOT / "eval" / "tasks"
SUITES = sorted((ROOT / "configs" / "eval" / "suites").glob("*.yaml"))
CHAINS = [ROOT / "configs" / place for place in ("demo/lmms.yaml", "smoke/lmms.yaml", "eval/paper.yaml")]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Children convert tables below the tests' folder; they read the environment."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(directory))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", directory)
        yield


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return Export(tmp_path_factory.mktemp("export")).directory


@pytest.fixture(scope="module")
def questions(tmp_path_factory, llava) -> Path:
    """The demo's three files of questions; half of them the model answers as expected."""
    directory = tmp_path_factory.mktemp("questions")
    for place, pool in enumerate(POOLS):
        rows = [
            question(
                number + 8 * place,
                id=f"test-{pool}-{number:05d}",
                type=("count", "yesno", "count", "name")[number % 4],
                language=("en", "de")[number == 6],
            )
            for number in range(8)
        ]
        write_questions(directory / f"{pool}.parquet", rows)
        for row, said in zip(rows, answers(llava, directory / f"{pool}.parquet"), strict=True):
            row["answer"] = said.upper() if int(row["id"][-1]) in (0, 1) and is_correct(said, said) else "nothing"
        write_questions(directory / f"{pool}.parquet", rows)
    return directory


def answers(model: Path, file: Path) -> list[str]:
    asked = QuestionFile(file)
    texts = [row.question for row in asked.questions]
    answerer = Answerer(str(model), dtype="float32", batch_size=5, max_new_tokens=12)
    return answerer.answer(texts, asked.image_digests(), asked.load_image, "test")


def arguments(output_dir: Path, model: Path, questions: Path, **settings: Any) -> list[str]:
    config = {
        "arm": "arm",
        "model": str(model),
        "suite": str(ROOT / "configs" / "eval" / "suites" / "demo.yaml"),
        "tasks": ["demo_count", "demo_yesno"],
        "data": {"demo_*": str(questions)},
        "include": [str(DEMO_TASKS)],
        "batch_size": 4,
        "device": "cpu",
        "output_dir": str(output_dir),
        **settings,
    }
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    file = output_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return ["--config", str(file)]


def results(output_dir: Path) -> dict[str, dict[str, Any]]:
    """What was written about every task, but for the time it took."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted((output_dir / "tasks").glob("*.json"))}
    return {name: {key: value for key, value in record.items() if key != "seconds"} for name, record in found.items()}


def responses(output_dir: Path, task: str = "demo_count") -> list[dict[str, Any]]:
    file = output_dir / "responses" / f"{task}.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llava, questions) -> Path:
    output_dir = tmp_path_factory.mktemp("finished") / "out"
    lmms.main(arguments(output_dir, llava, questions, seed=3))
    return output_dir


def test_scores_are_the_shares_of_right_answers_and_responses_those_of_our_answerer(finished, llava, questions):
    found = results(finished)
    assert list(found) == ["demo_count", "demo_yesno"]
    for task, kind in (("demo_count", "count"), ("demo_yesno", "yesno")):
        expected = []
        for pool in POOLS:
            rows = QuestionFile(questions / f"{pool}.parquet")
            said = answers(llava, rows.path)
            expected += [
                (row, text, image_digest(rows.load_image(number)), pool)
                for number, (row, text) in enumerate(zip(rows.questions, said, strict=True))
                if (row.type, row.language) == (kind, "en")
            ]
        record = found[task]
        right = [is_correct(text, row.answer) for row, text, _, _ in expected]
        assert 0 < sum(right) < len(right) == record["num_items"] == len(record["items"])
        assert record["metrics"] == {"exact_match": sum(right) / len(right)}
        for number, (item, (row, text, digest, pool)) in enumerate(zip(record["items"], expected, strict=True)):
            assert item["scores"] == {"exact_match": float(right[number])} and item["doc_id"] == number
            assert (item["question"], item["target"], item["response"]) == (row.question, row.answer, text)
            assert (item["images"], item["category"]) == ([digest], pool)
            assert Image.open(finished / "images" / f"{digest}.jpg").size == (40, 32)
    same = {key: found["demo_count"][key] for key in ("arm", "seed", "model_fingerprint", "judge", "metric")}
    assert same == {
        "arm": "arm",
        "seed": 3,
        "model_fingerprint": fingerprint(llava),
        "judge": None,
        "metric": "exact_match",
    }
    first, second = (record["identity"] for record in found.values())
    assert first["scorer"] == second["scorer"] and first["generation"]["max_new_tokens"] == 12
    assert all(first[key] != second[key] for key in ("task_config", "prompts", "data"))
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["metrics"]["demo_yesno"] == found["demo_yesno"]["metrics"]


def test_the_same_question_is_the_same_item_for_every_model(finished, tmp_path, questions):
    other = Export(tmp_path / "export", kind="siglip").directory
    lmms.main(arguments(tmp_path / "out", other, questions, tasks=["demo_count"]))
    first, second = results(finished)["demo_count"], results(tmp_path / "out")["demo_count"]
    assert [item["item"] for item in first["items"]] == [item["item"] for item in second["items"]]
    differing = {key for key in first["identity"] if first["identity"][key] != second["identity"][key]}
    assert not differing
    assert [item["response"] for item in first["items"]] != [item["response"] for item in second["items"]]


def test_a_failing_task_loses_no_other_and_is_named(tmp_path, finished, llava, questions):
    suite = tmp_path / "suite.yaml"
    rows = [
        {"task": "demo_easy_vqa", "metric": "exact_match"},
        {"task": "demo_count", "metric": "exact_match", "category": "pool"},
        {"task": "demo_yesno", "metric": "pope_f1_score"},
    ]
    suite.write_text(yaml.safe_dump({"tasks": rows}))
    told = {"suite": str(suite), "tasks": [], "seed": 3, "cache_dir": str(tmp_path / "kept")}
    with pytest.raises(RuntimeError) as error:
        lmms.main(arguments(tmp_path / "out", llava, questions, **told))
    message = str(error.value)
    assert "2 of 3 tasks failed for arm" in message
    assert f"demo_easy_vqa: FileNotFoundError: {questions / 'easy_vqa.parquet'} does not exist" in message
    assert "demo_yesno: ValueError: has no metric pope_f1_score" in message
    assert results(tmp_path / "out") == {"demo_count": results(finished)["demo_count"]}
    assert not (tmp_path / "out" / "manifest.json").exists()
    mended = shutil.copytree(questions, tmp_path / "mended")
    shutil.copy(questions / "seen.parquet", mended / "easy_vqa.parquet")
    rows[2]["metric"] = "exact_match"
    suite.write_text(yaml.safe_dump({"tasks": rows}))
    (kept,) = (tmp_path / "kept").glob("*/demo_count.jsonl")
    before = kept.read_bytes()
    lmms.main(arguments(tmp_path / "again", llava, mended, **told))
    assert results(tmp_path / "again").keys() == {row["task"] for row in rows}
    assert kept.read_bytes() == before and before.count(b"\n") == 9, "other settings, the same responses"


def test_broken_models_have_no_score(tmp_path, llava, questions):
    raising, silent = (Path(shutil.copytree(llava, tmp_path / name)) for name in ("raising", "silent"))
    edit(raising / "processor_config.json", patch_size=16)
    weights = safetensors.torch.load_file(silent / "model.safetensors")
    (head,) = (name for name in weights if name.endswith("lm_head.weight"))
    weights[head].zero_()
    safetensors.torch.save_file(weights, silent / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RuntimeError, match=r"demo_count: RuntimeError: 8 of 8 requests failed \(9 in all\), .* document 0"
    ):
        lmms.main(arguments(tmp_path / "a", raising, questions, tasks=["demo_count"]))
    assert all(row["text"] is None and row["error"] for row in responses(tmp_path / "a"))
    with pytest.raises(RuntimeError, match=r"demo_count: ValueError: 9 of 9 responses are empty, .* 'How many"):
        lmms.main(arguments(tmp_path / "b", silent, questions, tasks=["demo_count"]))
    for name in ("a", "b"):
        assert not results(tmp_path / name) and not (tmp_path / name / "manifest.json").exists()


def test_new_weights_at_the_same_path_are_asked_again(tmp_path, llava, questions):
    model = Path(shutil.copytree(llava, tmp_path / "model"))
    settings = {"tasks": ["demo_count"], "cache_dir": str(tmp_path / "kept")}
    lmms.main(arguments(tmp_path / "first", model, questions, **settings))
    weights = safetensors.torch.load_file(model / "model.safetensors")
    (head,) = (name for name in weights if name.endswith("lm_head.weight"))
    weights[head] = weights[head].flip(0).contiguous()
    safetensors.torch.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="inputs: model was"):
        lmms.main(arguments(tmp_path / "first", model, questions, **settings))
    first = results(tmp_path / "first")["demo_count"]
    lmms.main(arguments(tmp_path / "first", model, questions, overwrite=True, **settings))
    second = results(tmp_path / "first")["demo_count"]
    assert first["model_fingerprint"] != second["model_fingerprint"]
    pairs = zip(first["items"], second["items"], strict=True)
    assert all(one["response"] != other["response"] for one, other in pairs)


def test_every_file_of_our_tasks_counts_wherever_it_lies(tmp_path, llava, questions):
    first, second = (Path(shutil.copytree(DEMO_TASKS, tmp_path / name / "tasks")) for name in ("a", "b"))
    call = lmms.parse(arguments(tmp_path / "out", llava, questions, include=[str(first), str(second)]))

    def digests() -> tuple[str, str]:
        found = lmms.inputs(call)
        return found["include.0"], found["include.1"]

    same = digests()
    assert same[0] == same[1]
    template = second / "demo" / "_demo_yaml"
    template.write_text(template.read_text().replace("max_new_tokens: 12", "max_new_tokens: 13"))
    changed = digests()
    assert changed[0] == same[0] != changed[1]
    (second / "demo" / "demo_count.yaml").rename(second / "demo_count.yaml")
    moved = digests()
    assert moved[1] not in (same[1], changed[1])
    (second / "__pycache__").mkdir(exist_ok=True)
    (second / "__pycache__" / "demo.pyc").write_bytes(b"1")
    assert digests() == moved


JUDGE = """
import json
from pathlib import Path


def score(doc, results):
    return {"gpt_eval_score": json.loads(Path("VERDICT").read_text())}


def mean(records):
    return sum(record["score"] for record in records) / len(records)
"""


def test_a_judge_that_failed_fails_the_task_and_the_next_run_only_judges(tmp_path, llava):
    rows = {
        "question": ["What colour is it?"] * 2,
        "answers": [["red", "dark red"], ["blue", "blue"]],
        "image": [{"bytes": picture(1), "path": None}] * 2,
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data, verdict, suite = (tmp_path / name for name in ("data.parquet", "verdict.json", "suite.yaml"))
    table.to_parquet(str(data))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "judge.py").write_text(JUDGE.replace("VERDICT", str(verdict)))
    (tasks / "judged.yaml").write_text(
        f"include: {DEMO_TASKS / 'demo' / '_demo_yaml'}\n"
        "task: judged\n"
        "process_results: !function judge.score\n"
        "metric_list: [{metric: gpt_eval_score, aggregation: !function judge.mean, higher_is_better: true}]\n"
    )
    suite.write_text(yaml.safe_dump({"tasks": [{"task": "judged", "metric": "gpt_eval_score", "judge": "llm"}]}))
    settings = {"suite": str(suite), "tasks": [], "include": [str(tasks)], "data": {"judged": str(data)}}
    command = arguments(tmp_path / "out", llava, tmp_path, **settings)
    for record in (
        {"score": 0.0, "eval_model": ""},  # MM-Vet
        {"score": 0.0, "eval_model": "gpt-4o", "scores": [-1, -1]},  # LLaVA-Bench
        {"score": 0.0, "eval_model": "Failed Request", "scores": [-1, -1]},
    ):
        verdict.write_text(json.dumps(record))
        with pytest.raises(RuntimeError, match="RuntimeError: the judge failed on 2 of 2 answers, .* document 0"):
            lmms.main(command)
        assert not results(tmp_path / "out")
    asked = responses(tmp_path / "out", "judged")
    assert len(asked) == 2
    verdict.write_text(json.dumps({"score": 0.5, "eval_model": "gpt-4o", "scores": [8, 4]}))
    lmms.main(command)
    assert responses(tmp_path / "out", "judged") == asked
    record = results(tmp_path / "out")["judged"]
    assert record["metrics"] == {"gpt_eval_score": 0.5}
    # `doc_to_target: answer`, and no such column, as VQAv2, TextVQA and VizWiz have it
    first, second = record["items"]
    assert [json.loads(item["target"]) for item in (first, second)] == rows["answers"]
    assert first["images"] == second["images"] and first["item"] != second["item"]


@pytest.mark.slow
def test_killed_in_the_middle_no_item_is_asked_twice_and_the_end_is_the_same(tmp_path, llava, questions):
    rows = [question(number, id=f"test-seen-{number:05d}") for number in range(120)]
    for place, pool in enumerate(POOLS):
        write_questions(tmp_path / "questions" / f"{pool}.parquet", rows[40 * place : 40 * place + 40])
    command = arguments(tmp_path / "out", llava, tmp_path / "questions", tasks=["demo_count"], batch_size=2)
    assert kill_when(start("llm2clip-eval lmms", command), lambda: len(responses(tmp_path / "out")) >= 5), (
        "it ended before"
    )
    num = len(responses(tmp_path / "out"))
    assert 5 <= num < 120
    # A power cut in the middle of a line.
    with open(tmp_path / "out" / "responses" / "demo_count.jsonl", "a") as file:
        file.write('{"key": "5a')
    process = start("llm2clip-eval lmms", command)
    while len(responses(tmp_path / "out")) < num + 5:
        assert process.poll() is None, "it ended before"
        time.sleep(0.001)
    children = Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not wait_procs(children, timeout=30)[1], "children end when their parent is killed"
    assert num + 5 <= len(responses(tmp_path / "out")) < 120
    lmms.main(command)
    keys = [row["key"] for row in responses(tmp_path / "out")]
    assert len(keys) == len(set(keys)) == 120
    lmms.main(arguments(tmp_path / "whole", llava, tmp_path / "questions", tasks=["demo_count"], batch_size=2))
    assert results(tmp_path / "out") == results(tmp_path / "whole")


@pytest.mark.slow
def test_llava_hf_of_lmms_eval_says_the_same(finished, llava, questions):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    task = lmms_tasks.load_task("demo_count", [DEMO_TASKS], questions)
    found: Any = simple_evaluate(
        model="llava_hf",
        model_args=f"pretrained={llava},device_map=cpu",
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
    )
    record = results(finished)["demo_count"]
    assert [sample["filtered_resps"][0].strip() for sample in found["samples"]["demo_count"]] == [
        item["response"] for item in record["items"]
    ]
    assert found["results"]["demo_count"]["exact_match,none"] == record["metrics"]["exact_match"]


def with_generation(directory: Path, **settings: str) -> None:
    """`demo_count` asked in other ways: a task for each of the settings, which are YAML."""
    for name, text in settings.items():
        lines = [f"include: {DEMO_TASKS / 'demo' / 'demo_count.yaml'}", f"task: {name}", f"generation_kwargs: {text}"]
        (directory / f"{name}.yaml").write_text("\n".join(lines))


def test_stop_strings_are_those_that_a_task_states(tmp_path, questions):
    stated = r'{until: ["\n\n"]}'
    with_generation(tmp_path, none="null", some="{max_new_tokens: 5}", stated=stated, empty="{until: null}")
    for name, expected in (("none", []), ("some", []), ("empty", []), ("stated", ["\n\n"])):
        task = lmms_tasks.load_task(name, [tmp_path], questions)
        assert generation_settings(task.config.generation_kwargs)["until"] == expected, name


@pytest.mark.slow
def test_paragraphs_end_no_answer_as_in_llava_hf_of_lmms_eval(tmp_path, llava, questions, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    with_generation(tmp_path, unstated="{max_new_tokens: 5}", stated=r'{max_new_tokens: 5, until: ["\n\n"]}')
    long = "First.\n\nSecond."
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerBase, "batch_decode", lambda self, ids, **settings: [long] * len(ids)
    )

    def said(name: str, model: Any, **settings: Any) -> set[str]:
        task = lmms_tasks.load_task(name, [tmp_path], questions)
        manager = TaskManager(include_defaults=False)
        settings = {"tasks": [task], "task_manager": manager, "limit": 2, "bootstrap_iters": 0, **settings}
        found: Any = simple_evaluate(model=model, batch_size=1, device="cpu", **settings)
        return {sample["filtered_resps"][0] for sample in found["samples"][name]}

    ours = LlavaAdapter(str(llava), device="cpu")
    assert said("unstated", ours) == said("unstated", "llava_hf", model_args=f"pretrained={llava},device_map=cpu")
    assert said("unstated", ours) == {long} and said("stated", ours) == {"First."}


@pytest.mark.slow
def test_the_command_line_of_lmms_eval_runs_our_tasks_and_model(finished, llava, questions, tmp_path):
    tasks = shutil.copytree(DEMO_TASKS, tmp_path / "eval" / "tasks")
    shutil.copytree(questions, tmp_path / "runs" / "demo" / "llava" / "questions" / "eval" / "test")
    command = [sys.executable, "-m", "lmms_eval", "--model", "llm2clip_llava", "--model_args", f"pretrained={llava}"]
    command += ["--tasks", "demo_count", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "4"]
    subprocess.run(
        [*command, "--output_path", str(tmp_path / "out"), "--verbosity", "DEBUG"], cwd=tmp_path, check=True
    )
    (file,) = (tmp_path / "out").rglob("*results.json")
    found = json.loads(file.read_text())["results"]["demo_count"]["exact_match,none"]
    assert found == results(finished)["demo_count"]["metrics"]["exact_match"]


def test_bad_settings_are_told_together(tmp_path, llava, questions):
    def refuse(match: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=match):
            lmms.parse(arguments(tmp_path / "out", llava, questions, **settings))

    refuse("(?s)a/b.*batch_size: 0.*limit: 0", arm="a/b", batch_size=0, limit=0)
    refuse("demo.yaml has no task demo_chinese", tasks=["demo_chinese"])
    refuse("data: 'pope' is no task of the suite", tasks=[], data={"pope": str(questions)})
    refuse("nowhere.yaml does not exist", suite=str(tmp_path / "nowhere.yaml"))
    nowhere = Path("nowhere")
    for model, data, include in (
        (nowhere, questions, DEMO_TASKS),
        (llava, nowhere, DEMO_TASKS),
        (llava, questions, nowhere),
    ):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            lmms.main(arguments(tmp_path / "out", model, data, include=[str(include)]))
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    code = (
        "import sys, llm2clip_eval.lmms as stage\n"
        "try: stage.main(['--help'])\n"
        "except SystemExit: sys.exit(bool({'torch', 'numpy', 'lmms_eval'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_every_task_of_every_suite_is_there_with_its_metric(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # MM-Vet's scorer cannot be imported without one
    rows = [row for suite in SUITES for row in load_suite(suite)]
    assert {suite.stem for suite in SUITES} == {"llm2clip_table", "clips_table", "no_judge", "quick", "demo"}
    for name in dict.fromkeys(row.task for row in rows):
        config = lmms_tasks.task_config(name, [DEMO_TASKS])
        metrics = {metric["metric"] for metric in config["metric_list"]}
        asked = {row.metric for row in rows if row.task == name and row.metric is not None}
        assert {metric.partition(",")[0] for metric in asked} <= metrics  # behind the comma a filter
        assert config["output_type"] == "generate_until"
        if any(row.judge is None for row in rows if row.task == name):
            assert name not in ("mmvet", "llava_in_the_wild", "mmbench_en_dev", "mmbench_cn_dev")
    assert all(row.judge is None for suite in SUITES if suite.stem == "no_judge" for row in load_suite(suite))


def test_bad_suites_are_refused(tmp_path):
    file = tmp_path / "suite.yaml"
    for rows, match in (
        ([], "is no suite"),
        ([{"metric": "exact_match"}], "expected a task with"),
        ([{"task": "a", "metric": "m", "jugde": "llm"}], "expected a task with"),
        ([{"task": "a", "metric": "m", "judge": "me"}], "expected llm, server or nothing"),
        ([{"task": "a"}], "every task has a metric"),
        ([{"task": "a", "metric": "m"}] * 2, "a is there more than once"),
    ):
        file.write_text(yaml.safe_dump({"tasks": rows}))
        with pytest.raises(ValueError, match=match):
            load_suite(file)


def pope(num: int = 4) -> datasets.Dataset:
    rows = {
        "question_id": [str(number) for number in range(num)],
        "question": ["Is there a dog?"] * num,
        "answer": ["yes", "no"] * (num // 2),
        "image": [{"bytes": picture(number), "path": None} for number in range(num)],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_local_copies_of_data_stand_for_the_hub(tmp_path):
    pope().to_parquet(str(tmp_path / "file.parquet"))
    (tmp_path / "files").mkdir()
    pope().to_parquet(str(tmp_path / "files" / "adversarial-0.parquet"))
    datasets.DatasetDict({"adversarial": pope()}).save_to_disk(tmp_path / "saved")
    hub = tmp_path / "hub" / "Full"
    hub.mkdir(parents=True)
    pope().to_parquet(str(hub / "adversarial-00000-of-00001.parquet"))
    split = {"split": "adversarial", "path": "Full/adversarial-*"}
    header = yaml.safe_dump({"configs": [{"config_name": "Full", "data_files": [split]}]})
    (tmp_path / "hub" / "README.md").write_text(f"---\n{header}---\n")
    for name in ("file.parquet", "files", "saved", "hub"):
        task: Any = lmms_tasks.load_task("pope_adv", [DEMO_TASKS], tmp_path / name)
        assert [row["answer"] for row in task.eval_docs] == ["yes", "no"] * 2, name
        messages: Any = task.doc_to_messages(task.eval_docs[0])
        assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
        assert messages[0]["content"][1]["text"].endswith("single word or phrase.")
    gqa = lmms_tasks.with_local_data(
        lmms_tasks.task_config("gqa", [DEMO_TASKS]), tmp_path / "files" / "adversarial-0.parquet"
    )
    assert gqa["process_docs"] is None, "which fetches the images from the hub"
    digests = {
        name: lmms_tasks.describe(lmms_tasks.load_task("pope_adv", [DEMO_TASKS], tmp_path / name))
        for name in ("files", "hub")
    }
    assert digests["files"] == digests["hub"], "where data come from is no part of a task"
    (tmp_path / "odd").mkdir()
    for path, error in (("nowhere", FileNotFoundError), ("odd", ValueError), ("suite.txt", FileNotFoundError)):
        with pytest.raises(error, match=path):
            lmms_tasks.load_task("pope_adv", [DEMO_TASKS], tmp_path / path)
    with pytest.raises(ValueError, match="no task demo_chinese"):
        lmms_tasks.task_config("demo_chinese", [DEMO_TASKS])
    with pytest.raises(ValueError, match="pope_full is a group of tasks"):
        lmms_tasks.task_config("pope_full", [DEMO_TASKS])


def test_local_files_are_of_one_split_and_one_configuration(tmp_path):
    shards = [f"test-{number:05d}-of-00002.parquet" for number in range(2)]
    for name in (*shards, "testdev-00000-of-00001.parquet", "test_balanced.parquet"):
        (tmp_path / "data" / "DocVQA").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "DocVQA" / name).touch()

    def files(name: str | None) -> list[str]:
        local = lmms_tasks.with_local_data({"test_split": "test", "dataset_name": name}, tmp_path / "data")
        found = local["dataset_kwargs"]["data_files"]["test"]
        return [Path(file).relative_to(tmp_path / "data").as_posix() for file in found]

    assert files("DocVQA") == files(None) == files("elsewhere") == [f"DocVQA/{name}" for name in shards]
    (tmp_path / "data" / "InfographicVQA").mkdir()
    (tmp_path / "data" / "InfographicVQA" / "test.parquet").touch()
    assert files("InfographicVQA") == ["InfographicVQA/test.parquet"]
    for name in (None, "elsewhere"):
        with pytest.raises(ValueError, match="several directories, .*/DocVQA, .*/InfographicVQA; name the"):
            files(name)


def test_our_variants_differ_from_the_originals_only_in_what_they_are_for():
    for ours, original, what in (
        ("textvqa_val_ocr", "textvqa_val", {"lmms_eval_specific_kwargs", "metric_list", "metadata"}),
        ("mmbench_cn_dev_static_local", "mmbench_cn_dev", {"metric_list", "metadata", "dataset_kwargs"}),
    ):
        first, second = (lmms_tasks.task_config(name, [DEMO_TASKS]) for name in (ours, original))
        named = [{key: getattr(value, "__qualname__", value) for key, value in c.items()} for c in (first, second)]
        differing = {key for key in named[0].keys() | named[1].keys() if named[0].get(key) != named[1].get(key)}
        assert differing - {"model_specific_generation_kwargs"} == what | {"task"}
    config = lmms_tasks.task_config("textvqa_val_ocr", [DEMO_TASKS])
    document = {"question": "what is it?", "ocr_tokens": ["A", "b c"]}
    prompt = config["doc_to_text"](document, config["lmms_eval_specific_kwargs"]["default"])
    tokens = "Reference OCR token: A, b c"
    assert prompt == f"What is it?\n{tokens}\nAnswer the question using a single word or phrase."  # LLaVA's eval.md
    score = lmms_tasks.task_config("mmbench_cn_dev_static_local", [DEMO_TASKS])["metric_list"][0]["aggregation"]
    rows = [
        {"index": index, "question": "q", "answer": answer, "prediction": said, "category": "c", "L2-category": "l"}
        | {"hint": "nan", "source": "s", "split": "dev", "A": "cat", "B": "dog", "C": "nan", "D": "nan", "E": "nan"}
        for index, answer, said in (
            (1, "A", "A"),
            (1_000_001, "B", "B."),
            (2, "A", "A"),
            (1_000_002, "B", "A"),
            (3, "B", "x"),
        )
    ]
    assert score(rows) == pytest.approx(100 / 3)


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_stage_of_an_evaluation_chain_parses(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(ROOT)
    run_chain = importlib.import_module("run_chain")
    chain, _ = run_chain.read_chain([str(path), "--root", str(tmp_path)])
    steps = run_chain.plan(chain)
    calls = run_chain.check(steps)
    assert len(calls) == len(chain["arms"]) + 1
    first, second = (call.resolved for call in list(calls.values())[:2])
    differing = {key for key in first if first[key] != second[key]}
    assert differing == {"arm", "model", "output_dir"}
    assert path.read_text().startswith("#"), "the header says command, hardware and expected numbers"
