"""LLaVA-1.5's order of training samples: batches of one modality and of like lengths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

POOLED_STEPS = 50
"""Steps whose samples are sorted together, as in transformers' LengthGroupedSampler."""


def modality_length_order(
    lengths: Sequence[int], *, batch_size: int, window: int, generator: torch.Generator | None = None
) -> list[int]:
    """Order one epoch so that every global batch has one modality and little padding.

    A global batch is `window * batch_size` samples in a row: one optimizer step of all processes. Within it the
    samples are sorted by length and dealt out to `window` micro-batches of about the same total. What is left over of
    each modality comes last, mixed, by index.

    Equal to LLaVA's `get_modality_length_grouped_indices` (llava/train/llava_trainer.py at v1.2.2), whose quirk is
    kept: if all samples are text only, their negative lengths are sorted as they are, shortest first.

    Args:
        lengths: Words of each sample, > 0 with image and < 0 text only.
        batch_size: Samples of one micro-batch on one process.
        window: Number of processes times gradient accumulation steps.
        generator: None draws from torch's global generator, as LLaVA does; every process must have the same state.

    Returns:
        A permutation of `range(len(lengths))`.

    Raises:
        ValueError: A length is 0, or `batch_size` or `window` is not positive.
    """
    if batch_size < 1 or window < 1:
        raise ValueError(f"batch_size and window must be at least 1, got {batch_size} and {window}")
    if 0 in lengths:
        raise ValueError(
            f"length of sample {list(lengths).index(0)} is 0; expected > 0 (with image) or < 0 (text only): leave "
            "samples without words out"
        )
    with_image = [i for i, length in enumerate(lengths) if length > 0]
    text_only = [i for i, length in enumerate(lengths) if length < 0]
    if not with_image or not text_only:
        grouped = _group_by_length(range(len(lengths)), lengths, batch_size, window, generator)
        return [i for batch in grouped for i in batch]

    num_words = [abs(length) for length in lengths]
    modalities = [_group_by_length(part, num_words, batch_size, window, generator) for part in (with_image, text_only)]
    full = [batch for batches in modalities for batch in batches[:-1]]
    shuffled = torch.randperm(len(full), generator=generator).tolist()
    tail = sorted(i for batches in modalities for i in batches[-1])
    return [i for position in shuffled for i in full[position]] + tail


def _group_by_length(
    members: Sequence[int], lengths: Sequence[int], batch_size: int, window: int, generator: torch.Generator | None
) -> list[list[int]]:
    """Cut a random order of `members` into global batches; each is a row of micro-batches of like totals."""
    order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
    batches = []
    for start in range(0, len(order), window * batch_size):
        descending = sorted(order[start : start + window * batch_size], key=lambda i: lengths[i], reverse=True)
        batches.append([i for micro_batch in _deal(descending, lengths, window) for i in micro_batch])
    return batches


def _deal(descending: Sequence[int], lengths: Sequence[int], window: int) -> list[list[int]]:
    """Deal samples, longest first, each to the micro-batch with the smallest total that is not full yet."""
    if len(descending) % window:
        return [list(descending[start::window]) for start in range(window)]
    micro_batches: list[list[int]] = [[] for _ in range(window)]
    not_full = [(0, number) for number in range(window)]  # a heap of (total length, micro-batch)
    for i in descending:
        total, number = heapq.heappop(not_full)
        micro_batches[number].append(i)
        if len(micro_batches[number]) < len(descending) // window:
            heapq.heappush(not_full, (total + lengths[i], number))
    return micro_batches


def similar_length_order(lengths: Sequence[int], *, step_size: int, generator: torch.Generator) -> list[int]:
    """Order one epoch so that every step has one modality and samples of similar length.

    LLaVA sorts within a single step, which does nothing for one process without accumulation. Here many steps' worth
    of random samples is sorted at a time and cut into steps, which are then shuffled. What is left over of each
    modality comes last.

    Args:
        lengths: Length of each sample in any unit, > 0 with image and < 0 text only.
        step_size: Samples of one optimizer step, over all processes and micro-batches.
        generator: Source of all randomness.

    Returns:
        A permutation of `range(len(lengths))`.
    """
    steps: list[list[int]] = []
    rest: list[int] = []
    for sign in (1, -1):
        members = [i for i, length in enumerate(lengths) if length * sign > 0]
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        num_full = len(order) // step_size * step_size
        pool_size = step_size * max(1, min(POOLED_STEPS, num_full // (4 * step_size)))
        for start in range(0, num_full, pool_size):
            pool = sorted(order[start : min(start + pool_size, num_full)], key=lambda i: abs(lengths[i]))
            steps += [pool[at : at + step_size] for at in range(0, len(pool), step_size)]
        rest += order[num_full:]
    shuffled = torch.randperm(len(steps), generator=generator).tolist()
    return [i for position in shuffled for i in steps[position]] + rest
