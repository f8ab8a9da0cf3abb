"""LLaVA's order of samples: the same one as the original's, and what it is good for."""

from __future__ import annotations

import random

import pytest
import torch

from llava_bridge.sampler import modality_length_order, similar_length_order

MIXED = [
    *(38, -9, 59, -31, -38, 39, 59, 17, -15, 46, 35, -31, 41, 15, -10),
    *(-25, -1, -50, 11, -3, 50, 53, 31, -47, 46, 26, -52, -29, 57, 7),
]
WITH_IMAGE = [3, 9, 32, 14, 17, 44, 28, 50, 41, 55, 20, 27, 33, 54, 25, 37, 23]
TEXT_ONLY = [-35, -38, -27, -38, -15, -58, -22, -44, -59, -60, -2, -55]
# What LLaVA v1.2.2 gives for these after torch.manual_seed(seed).
ORIGINAL = [
    (MIXED, 2, 3, 0, [6, 18, 24, 22, 5, 10, 2, 29, 20, 13, 9, 12, 26, 19, 17, 1, 23, 8, 4, 14, 3, 27, 11, 15, 0]
     + [7, 16, 21, 25, 28]),
    (WITH_IMAGE, 2, 4, 11, [7, 0, 8, 4, 2, 16, 6, 14, 9, 1, 13, 3, 5, 11, 15, 12, 10]),
    (TEXT_ONLY, 3, 2, 5, [10, 6, 0, 3, 11, 9, 4, 2, 1, 7, 5, 8]),
]  # fmt: skip


def expected_order(lengths: list[int], batch_size: int, window: int) -> list[int]:
    """The order by its description: draw, cut, sort, deal, shuffle, and the tail; from the global generator."""
    size = batch_size * window

    def grouped(indices: list[int]) -> list[int]:
        single = len(indices) == len(lengths)
        length = {i: lengths[i] if single else abs(lengths[i]) for i in indices}
        drawn = [indices[k] for k in torch.randperm(len(indices))]
        result = []
        while drawn:
            piece, drawn = drawn[:size], drawn[size:]
            piece.sort(key=lambda i: -length[i])
            hands: list[list[int]] = [[] for _ in range(window)]
            for turn, i in enumerate(piece):
                open_hands = [hand for hand in hands if len(hand) < len(piece) // window]
                if len(piece) % window:
                    hands[turn % window].append(i)
                else:
                    min(open_hands, key=lambda hand: sum(length[j] for j in hand)).append(i)
            result += sum(hands, [])
        return result

    images, texts = ([i for i, length in enumerate(lengths) if (length > 0) is flag] for flag in (True, False))
    if not images or not texts:
        return grouped(images + texts)
    images, texts = grouped(images), grouped(texts)
    pieces = [order[k : k + size] for order in (images, texts) for k in range(0, len(order) - size, size)]
    body = sum((pieces[k] for k in torch.randperm(len(pieces))), [])
    return body + sorted(set(range(len(lengths))) - set(body))


def draw_lengths(rng: random.Random, num_samples: int, text_share: float) -> list[int]:
    return [rng.randint(1, 60) * (-1 if rng.random() < text_share else 1) for _ in range(num_samples)]


@pytest.mark.parametrize(("lengths", "batch_size", "window", "seed", "order"), ORIGINAL)
def test_orders_of_the_original(lengths: list[int], batch_size: int, window: int, seed: int, order: list[int]) -> None:
    torch.manual_seed(seed)
    assert modality_length_order(lengths, batch_size=batch_size, window=window) == order


@pytest.mark.parametrize("text_share", [0.0, 0.03, 0.4, 1.0])
def test_equal_to_the_description(text_share: float) -> None:
    rng = random.Random(17)
    for seed in range(100):
        lengths = draw_lengths(rng, rng.choice([1, 2, 7, 64, 150]), text_share)
        batch_size, window = rng.randint(1, 6), rng.randint(1, 6)
        torch.manual_seed(seed)
        expected, state = expected_order(lengths, batch_size, window), torch.get_rng_state()
        torch.manual_seed(seed)
        assert modality_length_order(lengths, batch_size=batch_size, window=window) == expected
        assert torch.equal(torch.get_rng_state(), state)  # whatever is drawn next is the same too


def test_a_generator_gives_the_order_of_its_seed_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(5)
    expected = modality_length_order(MIXED, batch_size=2, window=3)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    assert modality_length_order(MIXED, batch_size=2, window=3, generator=generator) == expected
    assert modality_length_order(MIXED, batch_size=2, window=3, generator=generator) != expected  # the next epoch
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(10))
def test_global_batches(seed: int) -> None:
    lengths = draw_lengths(random.Random(seed), 500, 0.3)
    batch_size, window = 4, 6
    size = batch_size * window
    order = modality_length_order(
        lengths, batch_size=batch_size, window=window, generator=torch.Generator().manual_seed(seed)
    )
    assert sorted(order) == list(range(500))
    num_full = sum((count - 1) // size for count in (sum(v > 0 for v in lengths), sum(v < 0 for v in lengths)))
    for start in range(0, num_full * size, size):
        batch = [lengths[i] for i in order[start : start + size]]
        assert len({length > 0 for length in batch}) == 1
        micro_batches = [[abs(v) for v in batch[k : k + batch_size]] for k in range(0, size, batch_size)]
        assert all(lengths == sorted(lengths, reverse=True) for lengths in micro_batches)
        totals = [sum(lengths) for lengths in micro_batches]
        assert max(totals) - min(totals) <= max(map(abs, batch))
    assert order[num_full * size :] == sorted(order[num_full * size :])
    modalities = [lengths[order[start]] > 0 for start in range(0, num_full * size, size)]
    assert modalities != sorted(modalities, reverse=True)  # the modalities take turns


def test_dealing_by_hand() -> None:
    """8 | 7; 6 joins 7 (13), 5 joins 8 (13), 4 joins 8 (the first of equals, 17), then 3 and 2 join 13, 1 the rest."""
    lengths = [3, 8, 1, 6, 4, 7, 2, 5]
    order = modality_length_order(lengths, batch_size=4, window=2)
    assert [lengths[i] for i in order] == [8, 5, 4, 1, 7, 6, 3, 2]


def test_a_remainder_is_dealt_in_turn() -> None:
    lengths = [3, 1, 5, 2, 4]
    order = modality_length_order(lengths, batch_size=4, window=2)
    assert [lengths[i] for i in order] == [5, 3, 1, 4, 2]


def test_nothing_to_order() -> None:
    assert modality_length_order([], batch_size=2, window=2) == []


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="length of sample 2 is 0"):
        modality_length_order([1, -1, 0], batch_size=1, window=1)
    for batch_size, window in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            modality_length_order([1, 2], batch_size=batch_size, window=window)


@pytest.mark.parametrize(("num_image", "num_text", "step"), [(1000, 203, 8), (1000, 0, 32), (0, 50, 8), (5, 3, 8)])
def test_steps_of_similar_length(num_image, num_text, step):
    rng = random.Random(0)
    lengths = [rng.randint(1, 500) for _ in range(num_image)] + [-rng.randint(1, 500) for _ in range(num_text)]
    order = similar_length_order(lengths, step_size=step, generator=torch.Generator().manual_seed(1))
    assert sorted(order) == list(range(len(lengths)))
    assert order == similar_length_order(lengths, step_size=step, generator=torch.Generator().manual_seed(1))
    num_steps = num_image // step + num_text // step
    steps = [[lengths[i] for i in order[at * step : (at + 1) * step]] for at in range(num_steps)]
    assert all(len({length > 0 for length in lengths_of_step}) == 1 for lengths_of_step in steps)
    if num_image > 500:
        padding = [1 - sum(map(abs, s)) / (step * max(map(abs, s))) for s in steps]
        assert sum(padding) / len(padding) < 0.2  # at random: about a half
        first, second = (sum(map(abs, s)) for s in steps[:2])
        assert steps != sorted(steps, key=lambda s: sum(map(abs, s))) and first != second  # steps are shuffled
