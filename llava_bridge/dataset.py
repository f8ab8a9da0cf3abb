"""Dialogues as a finite stream of training samples, and the batches made of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from llava_bridge.dialogues import Dialogue, DialogueData
from llava_bridge.labels import IGNORE, Encoded, encode
from llava_bridge.sampler import modality_length_order, similar_length_order
from llava_bridge.templates import IMAGE_TOKEN, TemplateName, render
from llm2clip.caption_sources import Problem, skipped_line

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

NUM_REPLACEMENTS = 20
"""Samples in a row that may be bad before the run fails."""


@dataclass(frozen=True)
class DialogueEncoder:
    """A dialogue and its images as tensors."""

    template: TemplateName
    system: str | None
    tokenizer: Any
    """The LLM's, with `<image>` and a pad token."""
    image_processor: BaseImageProcessor
    num_image_tokens: int
    max_length: int

    def tokens(self, dialogue: Dialogue) -> Encoded:
        """Ids and labels. Raises ValueError if the images alone do not fit."""
        return encode(
            render(self.template, dialogue.turns, self.tokenizer, system=self.system),
            self.tokenizer,
            image_token_id=self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            num_image_tokens=self.num_image_tokens,
            max_length=self.max_length,
        )

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(images, 3, size, size) float32."""
        return torch.cat([self.image_processor(images=i, return_tensors="pt")["pixel_values"] for i in images])


class DialogueStream(Dataset):
    """One sample for every position of a run; a sample depends on nothing but its position.

    Args:
        data: the dialogues.
        encoder: what makes tensors of them.
        order: dialogue of every position.
        skipped_file: where dialogues that turn out to be bad are listed; the next one takes their place.
        max_bad_fraction: the run fails if more than this share of the dialogues is bad.
    """

    def __init__(
        self,
        data: DialogueData,
        encoder: DialogueEncoder,
        order: Sequence[int],
        *,
        skipped_file: Path,
        max_bad_fraction: float,
    ) -> None:
        self.data = data
        self.encoder = encoder
        self.order = order
        self.skipped_file = skipped_file
        self.max_bad_fraction = max_bad_fraction
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """`input_ids` and `labels`, lists; `pixel_values` (images, 3, size, size), or None without images.

        Raises:
            ValueError: if too many dialogues are bad.
        """
        for attempt in range(NUM_REPLACEMENTS):
            index = self.order[(position + attempt) % len(self.order)]
            if index in self._bad:
                continue
            dialogue = self.data[index]
            try:
                tokens = self.encoder.tokens(dialogue)
                images = [self.data.read_image(image) for image in dialogue.images]
            except ValueError as error:
                self._skip(index, str(error))
                continue
            pixel_values = self.encoder.pixels(images) if images else None
            return {"input_ids": tokens.input_ids, "labels": tokens.labels, "pixel_values": pixel_values}
        raise ValueError(f"{self.data.path}: {NUM_REPLACEMENTS} dialogues in a row cannot be used; see skipped.jsonl")

    def _skip(self, index: int, reason: str) -> None:
        self._bad.add(index)
        where = self.data.describe(index)
        logger.warning("skipped %s: %s", where, reason)
        with open(self.skipped_file, "a", encoding="utf-8") as file:  # one write of one line: also with workers
            file.write(skipped_line(self.data.path, Problem(where, reason)))
        if len(self._bad) > max(1, self.max_bad_fraction * len(self.data)):
            raise ValueError(
                f"{self.data.path}: {len(self._bad)} of {len(self.data)} dialogues cannot be used, more than "
                f"data.max_bad_fraction {self.max_bad_fraction}; {self.skipped_file} lists them"
            )


def training_order(
    data: DialogueData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_steps: int,
    batch_size: int,
    window: int,
    seed: int,
    grouped: bool,
    compat: bool,
) -> list[int]:
    """Dialogue of every position of a run.

    Each epoch is a permutation of its own, filled up from its front to whole steps, as a new data loader would do.

    Args:
        data: the dialogues.
        tokenizer: what lengths are counted with.
        num_steps: optimizer steps of the run.
        batch_size: samples of one process's micro-batch.
        window: processes times accumulated micro-batches; `batch_size * window` samples are one step.
        seed: of the permutations.
        grouped: every step of one modality and similar lengths; else at random.
        compat: LLaVA's own grouping, by numbers of words; else a closer one, by tokens.
    """
    step_size = batch_size * window
    lengths: list[int] = []
    if grouped:
        lengths = data.word_lengths() if compat else data.token_lengths(tokenizer)
    order: list[int] = []
    epoch = 0
    while len(order) < num_steps * step_size:
        generator = torch.Generator().manual_seed(seed + epoch)
        if grouped and compat:
            of_epoch = modality_length_order(lengths, batch_size=batch_size, window=window, generator=generator)
        elif grouped:
            of_epoch = similar_length_order(lengths, step_size=step_size, generator=generator)
        else:
            of_epoch = torch.randperm(len(data), generator=generator).tolist()
        missing = -len(of_epoch) % step_size
        order += of_epoch + list(islice(cycle(of_epoch), missing))
        epoch += 1
    return order[: num_steps * step_size]


class DialogueCollator:
    """Pad on the right; images of all samples in order.

    Args:
        pad_token_id: what padding is made of.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `labels` (batch, length); `pixel_values` unless there is no image."""
        length = max(len(sample["input_ids"]) for sample in samples)
        input_ids = torch.full((len(samples), length), self.pad_token_id)
        labels = torch.full((len(samples), length), IGNORE)
        attention_mask = torch.zeros((len(samples), length), dtype=torch.long)
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            input_ids[row, :size] = torch.tensor(sample["input_ids"])
            labels[row, :size] = torch.tensor(sample["labels"])
            attention_mask[row, :size] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        if images:
            batch["pixel_values"] = torch.cat(images)
        return batch
