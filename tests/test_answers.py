"""Question files are read or refused, answers scored, and tiny random LLaVA models asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from question_files import picture, question, write_questions
from tiny_llava import chat_inputs, llava_model, llava_tokenizer

from llm2clip.cli import dispatch
from llm2clip_eval import answers
from llm2clip_eval.answerer import Answerer
from llm2clip_eval.cli import COMMANDS
from llm2clip_eval.questions import QuestionFile, is_correct

pytestmark = pytest.mark.usefixtures("datasets_cache")

FREQUENT = 330
"""A token that the random model says often."""
CHAT = (
    "{% for message in messages %}{{ message['role'] + ':' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def write_llava(directory: Path, *, chat_template: str = CHAT, silent: bool = False) -> Path:
    """A random LLaVA with its processor; a silent one says nothing but special tokens."""
    tokenizer = llava_tokenizer()
    model: Any = llava_model("clip", tokenizer)
    if silent:
        model.lm_head.weight.data.zero_()  # every logit is equal, and <s> comes first
    # Two tokens that end an answer, one of them frequent: answers of different lengths.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, FREQUENT], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    transformers.LlavaProcessor(
        image_processor=transformers.LlavaImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_pad=True
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture
def questions(tmp_path) -> Path:
    """Twelve questions of three lengths about six images of two shapes."""
    rows = [question(number) for number in range(12)]
    rows[4]["image"] = rows[5]["image"] = {"bytes": picture(7, (24, 60)), "path": None}
    return write_questions(tmp_path / "seen.parquet", rows)


def ask(output_dir: Path, model: Path, questions: dict[str, Path], **settings: object) -> dict[str, list[dict]]:
    paths = {pool: str(path) for pool, path in questions.items()}
    config = {"arm": "arm", "model": str(model), "questions": paths, "max_empty_fraction": 1.0, **settings}
    output_dir.parent.mkdir(exist_ok=True)
    file = output_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**config, "output_dir": str(output_dir)}, sort_keys=False))
    answers.main(["--config", str(file)])
    return {file.stem: answers.read_answers(file) for file in (output_dir / "answers").glob("*.jsonl")}


def naive_model(directory: Path) -> Callable[[Image.Image, str], str]:
    """Answers one question at a time, by the processor's own way from messages to ids."""
    processor: Any = transformers.AutoProcessor.from_pretrained(directory)
    llava: Any = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)

    def answer(image: Image.Image, text: str) -> str:
        batch = chat_inputs(processor, {"type": "image", "image": image}, {"type": "text", "text": text})
        ids = llava.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
        return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    return answer


@pytest.mark.parametrize("chat_template", [CHAT, "{{ bos_token }}" + CHAT], ids=["plain", "with bos"])
def test_every_question_is_answered_as_if_it_were_asked_alone(tmp_path, questions, chat_template):
    model = write_llava(tmp_path / "model", chat_template=chat_template)
    records = ask(tmp_path / "out", model, {"seen": questions}, batch_size=5)["seen"]
    file, answer_alone = QuestionFile(questions), naive_model(model)
    assert [record["id"] for record in records] == [f"q-{number}" for number in range(12)]
    for index, record in enumerate(records):
        image = file.load_image(index)
        assert record["prediction"] == answer_alone(image, record["question"])
        mean = np.round(255 * np.array(transformers.LlavaImageProcessorPil.image_mean))
        blank = Image.fromarray(np.broadcast_to(mean, (image.height, image.width, 3)).astype(np.uint8))
        assert record["blind_prediction"] == answer_alone(blank, record["question"])
    assert len({record["prediction"] for record in records}) > 3  # it does look
    assert len({len(record["prediction"]) for record in records}) > 2  # and ends where it likes


def test_batches_do_not_change_answers(tmp_path, llava, questions):
    one, eight = (ask(tmp_path / f"{size}" / "out", llava, {"seen": questions}, batch_size=size) for size in (1, 8))
    assert one == eight


def test_a_record_tells_all_about_a_question(tmp_path, llava, questions):
    found = ask(tmp_path / "a" / "out", llava, {"seen": questions})["seen"]
    row = {name: value for name, value in question(0).items() if name not in ("image", "choices")}
    extra = {"prediction", "correct", "blind_prediction", "blind_correct"}
    assert found[0].keys() == row.keys() | extra
    assert {name: found[0][name] for name in row} == row
    told = [question(number, answer=found[number]["prediction"] or "nothing") for number in range(12)]
    told[4]["image"] = told[5]["image"] = {"bytes": picture(7, (24, 60)), "path": None}
    path = write_questions(tmp_path / "told.parquet", told)
    records = ask(tmp_path / "b" / "out", llava, {"told": path}, blind=False, seed=3)["told"]
    expected = [is_correct(record["prediction"], record["answer"]) for record in records]
    assert sum(expected) > 6 and [record["correct"] for record in records] == expected
    assert "blind_prediction" not in records[0]
    manifest = json.loads((tmp_path / "b" / "out" / "manifest.json").read_text())
    assert (manifest["arm"], manifest["seed"], manifest["questions"]) == ("arm", 3, {"told": str(path)})
    assert manifest["accuracy"]["told"]["count"]["num_questions"] == 12
    assert manifest["accuracy"]["told"]["count"]["correct"] == pytest.approx(100 * np.mean(expected), abs=0.01)


def test_a_killed_run_keeps_its_pools_and_ends_the_same(tmp_path, llava, questions, monkeypatch):
    pools = {"seen": questions, "other": write_questions(tmp_path / "other.parquet", [question(20), question(22)])}
    asked, answer = [], Answerer.answer

    def counted(self, texts, *args):
        asked.append(len(texts))
        return answer(self, texts, *args)

    monkeypatch.setattr(Answerer, "answer", counted)
    first = ask(tmp_path / "out", llava, pools)
    assert asked == [12, 5, 2, 2]  # blind, three texts on one canvas and two on another
    digests = json.loads((tmp_path / "out" / "manifest.json").read_text())["outputs"]
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "answers" / "other.jsonl").unlink()
    assert ask(tmp_path / "out", llava, pools) == first
    assert asked[4:] == [2, 2]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["outputs"] == digests
    ask(tmp_path / "out", llava, pools)
    assert len(asked) == 6


def test_a_model_that_says_nothing_is_refused(tmp_path, questions):
    silent = write_llava(tmp_path / "silent", silent=True)
    with pytest.raises(ValueError, match=r"no answer to 12 of 12 questions of seen, such as q-0: 'How many cats\?'"):
        ask(tmp_path / "out", silent, {"seen": questions}, max_empty_fraction=0.05)
    records = ask(tmp_path / "allowed" / "out", silent, {"seen": questions})["seen"]
    assert [(record["prediction"], record["correct"]) for record in records] == [("", False)] * 12


def test_what_cannot_be_asked_is_refused(tmp_path, llava, questions):
    def refuse(
        match: str, path: Path, error: type[Exception] = ValueError, pool: str = "seen", **settings: object
    ) -> None:
        with pytest.raises(error, match=match):
            ask(tmp_path / "refused", llava, {pool: path}, **settings)

    def changed(**values: object) -> Path:
        return write_questions(tmp_path / "bad.parquet", [question(0), question(1, **values)])

    refuse("nowhere.parquet", tmp_path / "nowhere.parquet", FileNotFoundError)
    refuse("q-1: holds <image>", changed(question="What is in <image>?"))
    refuse("q-1: zero-byte image", changed(image={"bytes": b"", "path": None}))
    refuse("q-1: unreadable image", changed(image={"bytes": b"no picture", "path": None}))
    refuse("q-1: no image", changed(image=None))
    refuse("row 1: answer is ' '", changed(answer=" "))
    refuse("row 1: chance is 1.5", changed(chance=1.5))
    refuse("1 id.* more than once, first 'q-0'", changed(id="q-0"))
    refuse("holds no questions", write_questions(tmp_path / "empty.parquet", []))
    datasets.Dataset.from_dict({"question": ["What?"]}).to_parquet(str(tmp_path / "foreign.parquet"))
    (tmp_path / "text.parquet").write_text("no parquet")
    refuse("text.parquet is no parquet file", tmp_path / "text.parquet")
    refuse("no column answer, chance, id", tmp_path / "foreign.parquet")
    refuse("cannot hold /", questions, pool="a/b")
    refuse("batch_size: 0 is not positive", questions, batch_size=0)
    assert not (tmp_path / "refused" / "answers").exists()


def test_a_template_with_the_image_behind_the_question_is_refused(tmp_path, questions):
    parts = "{% for part in message['content'] %}"
    assert parts in CHAT
    behind = write_llava(tmp_path / "model", chat_template=CHAT.replace(parts, parts.replace("] %", "][::-1] %")))
    with pytest.raises(ValueError, match="does not put one image in front of the question"):
        ask(tmp_path / "out", behind, {"seen": questions})


def test_a_model_of_another_kind_is_refused(tmp_path, questions):
    llava_model("clip", llava_tokenizer()).model.language_model.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="llama model; expected llava"):
        ask(tmp_path / "out", tmp_path / "llama", {"seen": questions})


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Two", "2"),
        ("2.", "two"),
        ("The red cat.", "red cat"),
        ("  a  Red   CAT!", "red cat"),
        ("“yes”", "Yes"),
        ("Äpfel", "a\u0308pfel"),
        ("¿tres?", "tres"),
        ("３", "three"),
        ("A.", "a"),
        ("3.5", "3.5"),
        ("zero", "0"),
    ],
)
def test_an_answer_is_right_however_it_is_written(prediction, answer):
    assert is_correct(prediction, answer) and is_correct(answer, prediction)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("", "cat"),
        (".", "."),
        ("two cats", "two"),
        ("no", "not"),
        ("yes, no", "yes"),
        ("12", "1 2"),
        ("35", "3.5"),
        ("A", "B"),
        ("a", "the"),
        ("the", "cat"),
        ("eleven", "10"),
    ],
)
def test_an_answer_is_wrong_when_it_says_anything_else(prediction, answer):
    assert not is_correct(prediction, answer)


def test_mistakes_are_exit_code_2_and_help_needs_no_torch(capsys):
    assert dispatch("llm2clip-eval", COMMANDS, ["answers", "--arm", "x", "--bach_size", "4"]) == 2
    assert "bach_size" in capsys.readouterr().err
    code = (
        "import sys, llm2clip_eval.{} as stage\n"
        "try: stage.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    for stage in ("answers", "answers_report"):
        assert subprocess.run([sys.executable, "-c", code.format(stage)], capture_output=True).returncode == 0
