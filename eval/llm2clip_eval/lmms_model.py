"""lmms-eval's view of an exported LLaVA: batched greedy answers through transformers alone.

    lmms-eval --model llm2clip_llava --model_args pretrained=DIRECTORY --tasks pope_adv --device cuda --batch_size 16

Requests are answered in batches of consecutive documents. With a `ResponseStore` every response is on disk before the
next batch is asked, under a key of all that it depends on. In low precision that is its batch, too: of one that is not
all there every request is asked again, and what is there stays. So a killed run ends with the responses of one that
was not, unless a batch failed and was divided. A request that fails is recorded as such, and the call raises after
the others: lmms-eval never gets an empty string in the place of an error.

Where a task states no stop string lmms-eval's command line fills in a blank line, which is heeded; see
`lmms_tasks.load_task`.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image

from llm2clip.run_dir import atomic_path
from llm2clip_eval.answerer import LOG_SECONDS, load_llava
from llm2clip_eval.response_store import Response, ResponseStore, describe_document, digest, image_digest

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 1024
"""Of tasks that name no number, as lmms-eval's llava_hf has it."""
GENERATION = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
"""Settings of tasks that are passed on to `generate`."""
MAX_FAILURES = 8
"""After so many failed requests the rest is not tried."""
THUMBNAIL = 320
"""Longest side of a picture kept for reports, in pixels."""


@dataclass(frozen=True)
class Prompt:
    """One request as the model gets it."""

    doc_id: int
    question: str
    """Its text without the chat template."""
    text: str
    """All of it, with one placeholder for each image."""
    images: tuple[Image.Image, ...]
    digests: tuple[str, ...]
    """Of the images' pixels, 32 hex digits each."""
    key: str
    """Of all that the answer depends on but the rest of its batch."""


@dataclass(frozen=True)
class Asked:
    """A request that was dealt with, without its pictures."""

    question: str
    prompt: str
    """Digest of the templated text."""
    images: tuple[str, ...]
    response: Response


class LlavaAdapter(lmms):
    """A stock LLaVA model for lmms-eval's chat tasks: text only, one image or several, mixed as they come.

    Args:
        pretrained: directory or hub id.
        batch_size: requests answered at a time.
        device: such as cuda:1; None takes this process's GPU, or the CPU.
        dtype: of the weights, such as bfloat16.
        store: where responses are kept and looked for; None keeps none.
        identity: what a response depends on beside its batch and what is said here, above all the model's fingerprint.
        thumbnails: directory for small copies of the pictures; None writes none.
        name: of this work, for the log.

    Raises:
        ValueError: if `pretrained` is no LLaVA model, or its settings name no end token.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        store: ResponseStore | None = None,
        identity: Mapping[str, Any] | None = None,
        thumbnails: Path | None = None,
        name: str = "lmms-eval",
    ) -> None:
        super().__init__()
        if device in (None, "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        self.processor, self.model = load_llava(pretrained, dtype, device)
        self.processor.tokenizer.padding_side = "left"
        self.device = torch.device(device)
        self.batch_size = int(batch_size)
        self.asked: dict[int, Asked] = {}
        self._store = store
        self._identity = {
            **(identity or {}),
            "dtype": dtype,
            "device": self.device.type,
            "image_processor": type(self.processor.image_processor).__name__,
            **{name: version(name) for name in ("torch", "transformers")},
        }
        self._thumbnails = thumbnails
        self._name = name

    def clean(self) -> None:
        """Keep the model, which lmms-eval's own would delete: `simple_evaluate` can be called again."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lmms-eval 0.7.3 cannot score loglikelihood tasks; choose a generate_until task")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("llm2clip_llava answers one turn; choose a generate_until task")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer every request.

        Args:
            requests: of chat tasks; neither they nor their arguments are changed.

        Returns:
            One text per request, in their order, without special tokens, outer space, and what follows a stop string.

        Raises:
            ValueError: if a task asks for sampling.
            RuntimeError: if a request failed; names how many and the first.
        """
        responses: list[Response] = []
        begun = logged = time.monotonic()
        num_new = 0
        for settings, batch in self._batches(requests):
            found, new = self._batch(batch, settings)
            responses += found
            num_new += new
            if sum(response.error is not None for response in responses) >= MAX_FAILURES:
                break
            if (now := time.monotonic()) - logged > LOG_SECONDS:
                logged, rate = now, num_new / (now - begun)
                left = f", {(len(requests) - len(responses)) / rate:.0f} s left" if rate else ""
                text = "%s: %d of %d requests, %.1f/s%s"
                logger.info(text, self._name, len(responses), len(requests), rate, left)
        if failures := [response for response in responses if response.error is not None]:
            raise RuntimeError(
                f"{len(failures)} of {len(responses)} requests failed ({len(requests)} in all), first that of "
                f"document {failures[0].doc_id}: {failures[0].error}"
            )
        return [str(response.text) for response in responses]

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], list[Instance]]]:
        """Consecutive requests with the same generation settings."""
        wanted: list[Any] = [request.args for request in requests]
        for settings, numbers in itertools.groupby(
            range(len(requests)), lambda row: generation_settings(wanted[row][2])
        ):
            group = [requests[number] for number in numbers]
            for start in range(0, len(group), self.batch_size):
                yield settings, group[start : start + self.batch_size]

    def _batch(self, requests: Sequence[Instance], settings: Mapping[str, Any]) -> tuple[list[Response], int]:
        """Responses to a batch, and how many requests were asked for them: all, or none."""
        found: dict[int, Response] = {}
        prompts: dict[int, Prompt] = {}
        for place, request in enumerate(requests):
            try:
                prompts[place] = self._prompt(request, settings)
            except Exception as error:  # recorded; the call raises in the end
                arguments: Any = request.args
                key = digest([self._identity, arguments[3], "no prompt"])
                found[place] = self._keep(Response(key, arguments[3], None, _message(error), 0.0))
        batch = [prompt.key for prompt in prompts.values()]
        keys = {place: digest([prompt.key, batch]) for place, prompt in prompts.items()}
        if self._store is not None:
            found |= {place: known for place, key in keys.items() if (known := self._store.find(key)) is not None}
        missing = [place for place in prompts if place not in found]
        if missing:
            begun = time.monotonic()
            answers = dict(zip(prompts, self._answer([*prompts.values()], settings), strict=True))
            seconds = round((time.monotonic() - begun) / len(prompts), 4)
            for place in missing:
                response = Response(keys[place], prompts[place].doc_id, *answers[place], seconds)
                found[place] = self._keep(response)
        for place, prompt in prompts.items():
            self._save_thumbnails(prompt)
            self.asked[prompt.doc_id] = Asked(prompt.question, digest(prompt.text), prompt.digests, found[place])
        return [found[place] for place in range(len(requests))], len(prompts) if missing else 0

    def _keep(self, response: Response) -> Response:
        if self._store is not None:
            self._store.append(response)
        return response

    def _prompt(self, request: Instance, settings: Mapping[str, Any]) -> Prompt:
        arguments: Any = request.args
        _, doc_to_messages, _, doc_id, task, split = arguments
        document = self.task_dict[task][split][doc_id]
        messages = ChatMessages(messages=doc_to_messages(document)).messages
        contents = [content for message in messages for content in message.content]
        texts = [content.text for content in contents if content.type == "text"]
        images = tuple(_rgb(content.url) for content in contents if content.type == "image")
        if others := {content.type for content in contents} - {"text", "image"}:
            raise ValueError(f"the task shows {', '.join(sorted(others))}; a LLaVA model reads images and text")
        if any(self.processor.image_token in text for text in texts):
            raise ValueError(f"the text holds {self.processor.image_token}, which marks where an image goes: {texts}")
        turns = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": content.text} if content.type == "text" else {"type": "image"}
                    for content in message.content
                ],
            }
            for message in messages
        ]
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        if text.count(self.processor.image_token) != len(images):
            raise ValueError(
                f"the model's chat template shows {text.count(self.processor.image_token)} of {len(images)} images: "
                f"{text!r}"
            )
        digests = tuple(image_digest(image) for image in images)
        parts = {"identity": self._identity, "generation": settings}
        key = digest({**parts, "document": describe_document(document), "prompt": text, "images": digests})
        return Prompt(doc_id, "".join(texts), text, images, digests, key)

    def _answer(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any]
    ) -> list[tuple[str, None] | tuple[None, str]]:
        """A text or what went wrong for each; a batch that fails is asked in halves, down to one by one."""
        try:
            return [(text, None) for text in self._generate(prompts, settings)]
        except Exception as error:  # recorded; generate_until raises in the end
            message = _message(error)
        # Out here, for the exception held the batch's tensors, and memory may be what was wanting.
        torch.cuda.empty_cache()
        if len(prompts) == 1:
            return [(None, message)]
        logger.warning("%s: %d requests failed, now in halves: %s", self._name, len(prompts), message)
        half = len(prompts) // 2
        return [*self._answer(prompts[:half], settings), *self._answer(prompts[half:], settings)]

    def _generate(self, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> list[str]:
        bos = self.processor.tokenizer.bos_token
        images = [image for prompt in prompts for image in prompt.images]
        inputs = self.processor(
            images=images or None,
            text=[prompt.text for prompt in prompts],
            padding=True,
            add_special_tokens=not (bos and prompts[0].text.startswith(bos)),  # as processors do it: no second BOS
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        until = settings["until"]
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs, do_sample=False, **{name: settings[name] for name in GENERATION if name in settings}
            )
        texts = self.processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [cut(text.strip(), until) for text in texts]

    def _save_thumbnails(self, prompt: Prompt) -> None:
        if self._thumbnails is None:
            return
        for name, image in zip(prompt.digests, prompt.images, strict=True):
            file = self._thumbnails / f"{name}.jpg"
            if not file.is_file():
                small = image.copy()
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                with atomic_path(file) as temporary:
                    small.save(temporary, "JPEG", quality=85)


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What of a task's `generation_kwargs` this model heeds: `until` and `GENERATION`.

    Raises:
        ValueError: if the task wants answers drawn at random: a resumed run would draw others.
    """
    if given.get("do_sample", (given.get("temperature") or 0) > 0):
        raise ValueError(f"the task asks for sampling ({dict(given)}); llm2clip_llava answers greedily")
    until = given.get("until") or []
    settings = {name: given[name] for name in GENERATION if given.get(name) is not None}
    return {
        "max_new_tokens": DEFAULT_MAX_NEW_TOKENS,
        "num_beams": 1,
        **settings,
        "until": [until] if isinstance(until, str) else list(until),
    }


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of some stop strings."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)].rstrip() if ends else text


def _rgb(picture: Any) -> Image.Image:
    if isinstance(picture, str):
        picture = Image.open(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"expected a picture or the path of one, got {type(picture).__name__}")
    return picture.convert("RGB")


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
