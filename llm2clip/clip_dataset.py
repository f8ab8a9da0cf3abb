"""The training stream of train-clip: position -> image, caption, augmentation.

A sample is a pure function of (seed, position), whatever the number of workers and processes and wherever a run was
interrupted. Reads caption data (and embeddings); writes `skipped.jsonl` when images cannot be read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import TrainerCallback

from llm2clip.caption_data import CaptionData
from llm2clip.caption_sources import Problem, skipped_line
from llm2clip.embedding_store import CaptionRows, EmbeddingStore
from llm2clip.images import ImageTransform

logger = logging.getLogger(__name__)

NUM_REPLACEMENTS = 100  # draws for a sample whose image is bad, before giving up


class CaptionSource:
    """Caption data with the rows that can be trained on and how to draw a caption of one.

    Args:
        data: images and captions.
        kind_probabilities: caption kind -> probability. For a row that lacks some of the kinds the others' are scaled
            up; a row with none of them, or without image, is left out.
        rows: where the captions are in an embedding store; None to draw texts.

    Raises:
        ValueError: if no row can be used.
    """

    def __init__(
        self, data: CaptionData, kind_probabilities: Mapping[str, float], rows: CaptionRows | None = None
    ) -> None:
        self.data = data
        self.rows = rows
        self.kind_weights = np.array([kind_probabilities.get(kind, 0.0) for kind in data.kind_names])
        starts = data.offsets[:-1]  # every row has a caption
        has_caption = np.logical_or.reduceat(self.kind_weights[data.kind_codes] > 0, starts)
        has_image = np.fromiter((data.has_image(i) for i in range(len(data))), bool, len(data))
        self.usable = np.flatnonzero(has_caption & has_image)
        if not len(self.usable):
            raise ValueError(
                f"{data.path}: none of {len(data)} rows has an image and a caption of kind "
                f"{', '.join(kind_probabilities)}; its kinds are {', '.join(data.kind_names)}"
            )
        if len(self.usable) < len(data):
            logger.info("%s: %d of %d rows can be trained on", data.path, len(self.usable), len(data))

    def __len__(self) -> int:
        return len(self.usable)

    def draw_caption(self, row: int, rng: np.random.Generator) -> int:
        """Draw a kind, then one of its captions, all alike: an index into `data.texts`."""
        start, end = self.data.offsets[row], self.data.offsets[row + 1]
        kinds = self.data.kind_codes[start:end]
        weights = self.kind_weights[kinds] / np.bincount(kinds)[kinds]  # (captions of the row,)
        cumulative = weights.cumsum()
        drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        return int(start) + min(int(drawn), len(kinds) - 1)

    def trained_captions(self) -> np.ndarray:
        """Indices into `data.texts` of all captions that may be drawn."""
        return np.flatnonzero(self.kind_weights[self.data.kind_codes] > 0)


def mixing_counts(weights: np.ndarray, final_weights: np.ndarray, num_steps: int, batch_size: int) -> np.ndarray:
    """How many samples of each source every global batch gets.

    The shares change linearly from `weights` to `final_weights` over training; a batch holds them as exactly as whole
    numbers can, and what rounding owes to a source in one batch it gets in the next.

    Args:
        weights: (num_sources,), not negative.
        final_weights: (num_sources,).
        num_steps: optimizer steps.
        batch_size: samples of a global batch.

    Returns:
        (num_steps, num_sources) int64; every row sums to `batch_size`.
    """
    shares = np.linspace(weights / weights.sum(), final_weights / final_weights.sum(), num_steps)
    counts = np.empty(shares.shape, np.int64)
    owed = np.zeros(len(weights))
    for step, share in enumerate(shares):
        owed += share * batch_size
        counts[step] = np.maximum(np.floor(owed + 1e-9), 0)
        remainder = owed - counts[step]
        missing = batch_size - int(counts[step].sum())
        if missing > 0:  # largest remainders first
            counts[step, np.argsort(-remainder, kind="stable")[:missing]] += 1
        elif missing < 0:
            counts[step, counts[step].argmax()] += missing
        owed -= counts[step]
    return counts


class ClipStream(Dataset):
    """Finite, map-style stream of `num_steps * batch_size` training samples.

    Every global batch mixes its sources in the shares of `mixing_counts`, in an order of its own. Each source is read
    in a random order, without replacement, again and again with a new order. The kind of caption, the caption
    and the augmentation are drawn from a generator keyed by (seed, position).

    The original draws one source for a whole batch (LLM2CLIP, `training/data.py`); mixing within a batch gives other,
    and more varied, negatives.

    Args:
        sources: what to draw from.
        weights: share of every source at the first step, in any unit.
        final_weights: the same at the last step.
        transform: image transform; its `train` is used.
        num_steps: optimizer steps.
        batch_size: global batch size.
        seed: everything drawn depends on it.
        cache_images: keep decoded images in memory (4 bytes a pixel, in every worker).
        skipped_file: where rows with unreadable images are listed.
        max_bad_fraction: share of a source's rows that may be unreadable.
    """

    def __init__(
        self,
        sources: Sequence[CaptionSource],
        *,
        weights: Sequence[float],
        final_weights: Sequence[float],
        transform: ImageTransform,
        num_steps: int,
        batch_size: int,
        seed: int,
        cache_images: bool = False,
        skipped_file: Path | None = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.sources = list(sources)
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.skipped_file = skipped_file
        self.max_bad_fraction = max_bad_fraction
        self._counts = mixing_counts(np.array(weights, float), np.array(final_weights, float), num_steps, batch_size)
        self._drawn_before = np.cumsum(self._counts, axis=0) - self._counts  # (num_steps, num_sources)
        self._cache: dict[tuple[int, int], Image.Image] | None = {} if cache_images else None
        self._bad: list[set[int]] = [set() for _ in self.sources]
        self._prepare()

    def _prepare(self) -> None:
        """What every process makes for itself."""
        self._batch = lru_cache(maxsize=8)(self._batch_order)
        self._permutation = lru_cache(maxsize=2 * len(self.sources))(self._epoch_order)
        self._philox = np.random.Philox(key=[self.seed, 0])
        self._philox_start = self._philox.state

    def __len__(self) -> int:
        return len(self._counts) * self.batch_size

    def __getitem__(self, position: int) -> dict[str, Any]:
        """One sample.

        Returns:
            `pixel_values` (3, size, size) float32 and `caption_row`, a row of the embedding store, or `text`.

        Raises:
            ValueError: if too many images cannot be read.
        """
        source, row = self.locate(position)
        rng = self._rng(position)
        for _ in range(NUM_REPLACEMENTS):
            image = self._load_image(source, row)
            if image is not None:
                break
            row = int(self.sources[source].usable[rng.integers(len(self.sources[source]))])
        else:
            raise ValueError(f"{self.sources[source].data.path}: {NUM_REPLACEMENTS} images in a row cannot be read")
        caption = self.sources[source].draw_caption(row, rng)
        sample: dict[str, Any] = {"pixel_values": self.transform.train(image, rng)}
        rows = self.sources[source].rows
        if rows is None:
            sample["text"] = self.sources[source].data.texts[caption].as_py()
        else:
            sample["caption_row"] = int(rows.rows[caption])
        return sample

    def locate(self, position: int) -> tuple[int, int]:
        """The source of a position and the row of its data."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        step, place = divmod(position, self.batch_size)
        labels, ordinals = self._batch(step)
        source = int(labels[place])
        epoch, place = divmod(int(ordinals[place]), len(self.sources[source]))
        return source, int(self.sources[source].usable[self._permutation(source, epoch)[place]])

    def _rng(self, position: int) -> np.random.Generator:
        """Generator keyed by (seed, position); a counter-based one is put there in 2 us, a new one would take 40."""
        self._philox_start["state"]["key"][1] = position
        self._philox.state = self._philox_start
        return np.random.Generator(self._philox)

    def _batch_order(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of every place of a global batch, and how often that source was drawn before in the whole run."""
        labels = np.repeat(np.arange(len(self.sources)), self._counts[step])
        np.random.default_rng([self.seed, 1, step]).shuffle(labels)
        ordinals = np.empty(self.batch_size, np.int64)
        for source, before in enumerate(self._drawn_before[step]):
            places = np.flatnonzero(labels == source)
            ordinals[places] = before + np.arange(len(places))
        return labels, ordinals

    def _epoch_order(self, source: int, epoch: int) -> np.ndarray:
        order = np.arange(len(self.sources[source]), dtype=np.uint32)
        np.random.default_rng([self.seed, 2, source, epoch]).shuffle(order)
        return order

    def _load_image(self, source: int, row: int) -> Image.Image | None:
        """The decoded image, or None if it is bad."""
        if row in self._bad[source]:
            return None
        if self._cache is not None and (source, row) in self._cache:
            return self._cache[source, row]
        data = self.sources[source].data
        try:
            image = data.load_image(row, min_edge=self.transform.min_edge)
        except ValueError as error:
            self._skip(source, row, str(error))
            return None
        if self._cache is not None:
            self._cache[source, row] = image
        return image

    def _skip(self, source: int, row: int, reason: str) -> None:
        data = self.sources[source].data
        self._bad[source].add(row)
        logger.warning("skipped: %s", reason)
        if self.skipped_file is not None:
            with open(self.skipped_file, "a", encoding="utf-8") as file:  # one write of one line: also with workers
                file.write(skipped_line(data.path, Problem(data[row].id, reason)))
        self._check(data, len(self._bad[source]))

    def check_skipped(self) -> None:
        """Count the images that all workers and processes have skipped; each of them knows its own only.

        Raises:
            ValueError: if they are too many.
        """
        if self.skipped_file is None or not self.skipped_file.is_file():
            return
        lines = set(self.skipped_file.read_text(encoding="utf-8").splitlines(keepends=True))
        for source in self.sources:
            data = source.data
            # a run that was killed at its very end has listed unusable rows as well
            rows = {skipped_line(data.path, problem) for problem in data.problems}
            images = [json.loads(line) for line in lines - rows]
            self._check(data, len({image["where"] for image in images if image["data"] == str(data.path)}))

    def _check(self, data: CaptionData, num_bad: int) -> None:
        if num_bad > max(1, self.max_bad_fraction * len(data)):
            raise ValueError(
                f"{data.path}: {num_bad} of {len(data)} images cannot be read, more than "
                f"data.max_bad_fraction {self.max_bad_fraction}; `llm2clip data check {data.path}` lists them all"
            )

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned
        return {name: value for name, value in vars(self).items() if name not in ("_batch", "_permutation", "_philox")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()


class CheckSkipped(TrainerCallback):
    """`ClipStream.check_skipped` at every checkpoint, which then does not count, and at the end.

    Args:
        stream: what is trained on.
    """

    def __init__(self, stream: ClipStream) -> None:
        self.stream = stream

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stream.check_skipped()

    on_train_end = on_save


class EmbeddingCollator:
    """Batch for `LLM2CLIPModel`: images and the LLM's embeddings of their captions."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "caption_embeddings": self.store.gather([sample["caption_row"] for sample in samples]),
        }


class TextCollator:
    """Batch for `CLIPModel`: images and tokenised captions, padded to the longest of the batch."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(
            [sample["text"] for sample in samples],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }
