"""Greedy answers of any exported LLaVA, in batches, through transformers alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

logger = logging.getLogger(__name__)

LOG_SECONDS = 15
"""Between two lines of progress."""


def load_llava(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A LLaVA model and its processor, for answering.

    Args:
        model: directory or hub id.
        dtype: of the weights, such as float32.
        device: such as cpu or cuda:1.

    Returns:
        Processor and model.

    Raises:
        ValueError: if `model` is no LLaVA model, or its settings name no end token.
    """
    kind = AutoConfig.from_pretrained(model).model_type
    if kind != "llava":
        raise ValueError(f"{model} is a {kind} model; expected llava, as llava-bridge export writes it")
    llava: Any = LlavaForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype))
    if llava.generation_config.eos_token_id is None:
        raise ValueError(f"{model}/generation_config.json has no eos_token_id; answers would never end")
    return AutoProcessor.from_pretrained(model), llava.to(device).eval()


class Answerer:
    """A LLaVA model with its processor, answering greedily in batches.

    Args:
        model: directory or hub id.
        dtype: of the weights, such as float32.
        batch_size: questions answered at a time.
        max_new_tokens: where an answer that does not end by itself is cut off.

    Raises:
        ValueError: if `model` is no LLaVA model, or its settings name no end token.
    """

    def __init__(self, model: str, *, dtype: str, batch_size: int, max_new_tokens: int) -> None:
        self.processor, self.model = load_llava(model, dtype, "cuda" if torch.cuda.is_available() else "cpu")
        self.image_token: str = self.processor.image_token
        ends = self.model.generation_config.eos_token_id
        self.ends = torch.tensor(ends, device=self.model.device).reshape(-1)
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens

    def blank(self, size: tuple[int, int]) -> Image.Image:
        """An image of the processor's mean colour, (width, height); normalised, it is zero to within rounding."""
        red, green, blue = (round(255 * mean) for mean in self.processor.image_processor.image_mean)
        return Image.new("RGB", size, (red, green, blue))

    def answer(
        self, questions: Sequence[str], images: Sequence[Hashable], load_image: Callable[[int], Image.Image], name: str
    ) -> list[str]:
        """Answer questions, in their order, without special tokens and outer space.

        What is in front of a question, the image above all, goes through the model once per image and batch; its keys
        and values are shared by the questions about it.

        Args:
            questions: without image placeholder.
            images: for each question, what tells its image from others.
            load_image: the image of a question.
            name: of this work, for the log.

        Raises:
            ValueError: if the chat template does not put the image in front of the question.
        """
        head, tails = self._split_prompts(questions)
        first_use = {image: index for index, image in reversed(list(enumerate(images)))}
        order = sorted(range(len(tails)), key=lambda index: (first_use[images[index]], len(tails[index])))
        answers = [""] * len(tails)
        num_unfinished = 0
        began = logged = time.monotonic()
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            shown = list(dict.fromkeys(first_use[images[row]] for row in rows))
            places = [shown.index(first_use[images[row]]) for row in rows]
            texts, unfinished = self._generate(
                head, [load_image(index) for index in shown], places, [tails[row] for row in rows]
            )
            num_unfinished += unfinished
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
            done, now = start + len(rows), time.monotonic()
            if now - logged > LOG_SECONDS or done == len(order):
                rate, logged = done / (now - began), now
                left = f", {(len(order) - done) / rate:.0f} s left" if done < len(order) else ""
                logger.info("%s: %d of %d questions, %.1f/s%s", name, done, len(order), rate, left)
        if num_unfinished:
            text = "%s: %d of %d answers were cut off after %d tokens"
            logger.warning(text, name, num_unfinished, len(order), self.max_new_tokens)
        return answers

    def _split_prompts(self, questions: Sequence[str]) -> tuple[str, list[list[int]]]:
        """The text up to the image, which all prompts share, and the token ids behind it."""
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions
        ]
        heads = {prompt.partition(self.image_token)[0] for prompt in prompts}
        if len(heads) > 1 or any(prompt.count(self.image_token) != 1 for prompt in prompts):
            raise ValueError(
                f"the chat template does not put one image in front of the question: {prompts[0]!r}; expected one "
                f"{self.image_token}, and the same text before it for every question"
            )
        # The whole prompt is tokenized: a piece of it alone could begin with other tokens.
        ids = self.processor.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        return heads.pop() + self.image_token, [row[row.index(self.processor.image_token_id) + 1 :] for row in ids]

    def _generate(
        self, head: str, images: list[Image.Image], places: list[int], tails: list[list[int]]
    ) -> tuple[list[str], int]:
        """Answers of one batch, and how many of them did not end by themselves.

        Args:
            head: text up to the image, and its placeholder.
            images: the batch's, each once.
            places: for each question the place of its image.
            tails: for each question the token ids behind the image.
        """
        bos = self.processor.tokenizer.bos_token
        heads = self.processor(
            images=images,
            text=[head] * len(images),
            add_special_tokens=not (bos and head.startswith(bos)),  # as processors do it: no second BOS
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        width = max(len(tail) for tail in tails)
        pad = self.processor.tokenizer.pad_token_id
        padded = torch.tensor([[pad] * (width - len(tail)) + tail for tail in tails], device=self.model.device)
        real = torch.tensor([[0] * (width - len(tail)) + [1] * len(tail) for tail in tails], device=self.model.device)
        select = torch.tensor(places, device=self.model.device)
        with torch.inference_mode():
            cache = self.model(**heads, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_select_indices(select)
            input_ids = torch.cat([heads["input_ids"][select], padded], dim=1)
            ids = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.cat([heads["attention_mask"][select], real], dim=1),
                past_key_values=cache,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.max_new_tokens,
            )
        new = ids[:, input_ids.shape[1] :]
        finished = torch.isin(new, self.ends).any(dim=1)
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts], int((~finished).sum())
