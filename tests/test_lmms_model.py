"""The adapter for lmms-eval: batches, several images and none, failures, and what is asked again."""

from __future__ import annotations

import copy
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llava_exports import Export
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image
from question_files import picture
from tiny_llava import chat_inputs
from transformers.image_utils import load_image

from llm2clip_eval import lmms_model
from llm2clip_eval.lmms_model import LlavaAdapter, Prompt, cut, generation_settings
from llm2clip_eval.response_store import ResponseStore, image_digest

QUESTIONS = ("How many cats?", "What is above the big red tree near the house?", "Is it red?", "Which is larger?")
NUM_IMAGES = (1, 0, 2, 1, 0, 2, 1)
SETTINGS = {"max_new_tokens": 6, "until": ["\n\n"], "temperature": 0.0, "top_p": 1.0, "image_aspect_ratio": "original"}


def image(seed: int) -> Image.Image:
    import io

    return load_image(Image.open(io.BytesIO(picture(seed, (40 + seed, 32)))))


DOCUMENTS = [
    {"question": QUESTIONS[number % 4], "images": [image(number + place) for place in range(num)]}
    for number, num in enumerate(NUM_IMAGES)
]


def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    shown = [{"type": "image", "url": picture} for picture in document["images"]]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": document["question"]}]}]


def requests(num: int = len(DOCUMENTS), to_messages: Callable = messages, **settings: Any) -> list[Instance]:
    return [
        Instance(
            request_type="generate_until",
            arguments=("unused", to_messages, {**copy.deepcopy(SETTINGS), **settings}, number, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": number, "repeats": 1},
        )
        for number in range(num)
    ]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return Export(tmp_path_factory.mktemp("export")).directory


@pytest.fixture(scope="module")
def build(llava) -> Callable[..., LlavaAdapter]:
    def make(**arguments: Any) -> LlavaAdapter:
        adapter = LlavaAdapter(str(llava), **{"device": "cpu", **arguments})
        adapter.task_dict["task"] = {"test": DOCUMENTS}
        return adapter

    return make


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Sizes of the batches that were generated."""
    sizes: list[int] = []
    generate = LlavaAdapter._generate

    def count(self, prompts, settings):
        sizes.append(len(prompts))
        return generate(self, prompts, settings)

    monkeypatch.setattr(LlavaAdapter, "_generate", count)
    return sizes


def test_lmms_eval_knows_the_model():
    assert get_model("llm2clip_llava") is LlavaAdapter


def test_mixed_batches_answer_as_plain_transformers_does_one_by_one(llava, build):
    processor: Any = transformers.AutoProcessor.from_pretrained(llava)
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    expected = []
    for document in DOCUMENTS:
        shown = [{"type": "image", "image": image} for image in document["images"]]
        batch = chat_inputs(processor, *shown, {"type": "text", "text": document["question"]})
        ids = model.generate(**batch, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert len(set(expected)) > 3
    for batch_size in (1, 3, "7"):
        assert build(batch_size=batch_size).generate_until(requests()) == expected


def test_settings_are_heeded_and_arguments_left_alone(build):
    adapter = build(batch_size=4)
    given: Any = requests()
    arguments = [copy.deepcopy(request.args[2]) for request in given]
    long = adapter.generate_until(given)
    assert [request.args[2] for request in given] == arguments and all(not request.resps for request in given)
    assert adapter.generate_until(given) == long
    adapter.clean()
    short = adapter.generate_until([*requests(3, max_new_tokens=2), *given[3:]])  # two kinds in one call
    assert short[3:] == long[3:] and short[:3] != long[:3]
    stop = long[0][2]
    assert adapter.generate_until(requests(1, until=[stop])) == [long[0].partition(stop)[0].rstrip()]


def test_cut_and_settings():
    assert cut("yes\n\nno ASSISTANT: x", ["ASSISTANT:", "\n\n"]) == "yes"
    assert cut("yes", ["", "no"]) == cut("yes  ", ["  "]) == "yes"
    expected = {"max_new_tokens": 1024, "num_beams": 1, "until": ["x"]}
    assert generation_settings({"until": "x", "temperature": None, "top_p": 0, "do_sample": False}) == expected
    assert generation_settings({"temperature": 0.2, "do_sample": False, "max_new_tokens": 5})["max_new_tokens"] == 5
    for settings in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(ValueError, match="answers greedily"):
            generation_settings(settings)


def test_what_is_stored_is_not_asked_again_unless_anything_differs(tmp_path, build, counted, monkeypatch):
    def ask(identity: str = "weights", dtype: str = "float32", num: int = 7, **settings: Any) -> list[str]:
        with ResponseStore(tmp_path / "task.jsonl") as store:
            adapter = build(batch_size=2, store=store, identity={"model": identity}, dtype=dtype)
            return adapter.generate_until(requests(num, **settings))

    assert len(ask(num=3)) == 3 and counted == [2, 1]
    first = ask()
    assert counted[2:] == [2, 2, 1]  # document 2 was answered without 3
    assert ask() == first and len(counted) == 5
    ask(identity="other weights at the same path", num=2)
    ask(max_new_tokens=2, num=2)
    ask(dtype="bfloat16", num=2)
    assert counted[5:] == [2, 2, 2]
    changed = lambda document: messages({**document, "question": document["question"] + "!"})  # noqa: E731
    ask(to_messages=changed, num=2)
    monkeypatch.setattr(lmms_model, "version", lambda name: "0.1")
    ask(num=2)
    assert counted[8:] == [2, 2]
    rows = [json.loads(line) for line in (tmp_path / "task.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 18


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_forms_the_same_batches_and_ends_with_the_same_responses(tmp_path, build, counted, dtype):
    def ask(file: Path) -> list[str]:
        with ResponseStore(file) as store:
            return build(batch_size=3, store=store, dtype=dtype).generate_until(requests())

    def rows(file: Path) -> list[dict[str, Any]]:
        return [{**json.loads(line), "seconds": None} for line in file.read_text().splitlines()]

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    texts = ask(whole)
    killed.write_text("".join(whole.read_text().splitlines(keepends=True)[:4]))  # one of the second batch
    assert ask(killed) == texts and counted == [3, 3, 1, 3, 1]
    assert rows(killed) == rows(whole) and len(texts) == 7


def test_a_failure_is_recorded_told_and_asked_again(tmp_path, build, monkeypatch, counted):
    process = transformers.LlavaProcessor.__call__

    def fails(self, images=None, text=(), **kwargs):
        if any("big red tree" in prompt for prompt in text):
            raise ValueError("no such token")
        return process(self, images=images, text=text, **kwargs)

    with monkeypatch.context() as patch, ResponseStore(tmp_path / "task.jsonl") as store:
        patch.setattr(transformers.LlavaProcessor, "__call__", fails)
        adapter = build(batch_size=4, store=store)
        with pytest.raises(RuntimeError, match=r"2 of 7 requests failed .* document 1: ValueError: no such token"):
            adapter.generate_until(requests())
    assert counted == [4, 2, 1, 1, 2, 3, 1, 2, 1, 1]
    rows = [json.loads(line) for line in (tmp_path / "task.jsonl").read_text().splitlines()]
    assert [row["doc_id"] for row in rows if row["text"] is None] == [1, 5]
    with ResponseStore(tmp_path / "task.jsonl") as store:
        texts = build(batch_size=4, store=store).generate_until(requests())
    assert counted[10:] == [4, 3] and len(texts) == 7


def test_a_batch_too_large_is_asked_in_halves_when_its_memory_is_free(build, monkeypatch):
    sizes, held, emptied = [], [], []

    class Tensors:
        pass

    def generate(self: LlavaAdapter, prompts: Sequence[Prompt], settings: Any) -> list[str]:
        assert sys.exc_info() == (None, None, None) and not any(tensors() for tensors in held)
        batch = Tensors()
        held.append(weakref.ref(batch))
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("too many")
        return [f"answer {prompt.doc_id}" for prompt in prompts]

    monkeypatch.setattr(LlavaAdapter, "_generate", generate)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(sizes)))
    assert build(batch_size=7).generate_until(requests()) == [f"answer {number}" for number in range(7)]
    assert sizes == [7, 3, 1, 2, 4, 2, 2] and emptied == [1, 2, 5]


def test_a_model_that_always_fails_is_not_tried_for_ever(build, monkeypatch, counted):
    monkeypatch.setattr(lmms_model, "MAX_FAILURES", 3)
    adapter = build(batch_size=1)
    adapter.model.generate = None
    with pytest.raises(
        RuntimeError, match=r"3 of 3 requests failed \(7 in all\), first that of document 0: TypeError"
    ):
        adapter.generate_until(requests())


def test_prompts_that_cannot_be_meant_are_failures(build):
    def told(to_messages: Callable) -> str:
        with pytest.raises(RuntimeError) as error:
            build().generate_until(requests(1, to_messages))
        return str(error.value)

    assert "holds <image>" in told(lambda document: messages({**document, "question": "<image> What?"}))
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    assert "the task shows video" in told(lambda document: video)
    assert "expected a picture" in told(lambda document: messages({**document, "images": [7]}))
    adapter = build()
    adapter.processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(RuntimeError, match="shows 0 of 1 images"):
        adapter.generate_until(requests(1))


def test_small_copies_of_the_pictures_are_kept_by_content(tmp_path, build):
    large = Image.new("RGB", (900, 30), "red")
    adapter = build(thumbnails=tmp_path)
    adapter.generate_until(
        requests(3, lambda document: messages({**document, "images": [large, *document["images"]]}))
    )
    digests = {image_digest(picture.convert("RGB")) for document in DOCUMENTS[:3] for picture in document["images"]}
    assert {file.stem for file in tmp_path.iterdir()} == digests | {image_digest(large)}
    assert Image.open(tmp_path / f"{image_digest(large)}.jpg").size == (320, 11)
    assert adapter.asked[1].images == (image_digest(large),) and adapter.asked[1].question == QUESTIONS[1]
    assert image_digest(Image.new("RGB", (30, 900), "red")) != image_digest(large)
