"""Ranks and recall against matrices worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval

from llm2clip.metrics import recall_at_k, relevant_ranks, retrieval_ranks


def unit(*rows: list[float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_ranks_of_a_hand_computed_matrix():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.4], [0.3, 0.6, 0.1]])
    # row 0: own is best; row 1: two are ahead of 0.2; row 2: own candidates 0.3 and 0.1, only 0.6 is ahead of 0.3
    relevant = torch.tensor([[True, False, False], [False, True, False], [True, False, True]])
    assert relevant_ranks(similarity, relevant).tolist() == [0, 2, 1]


def test_ties_count_against_the_query():
    similarity = torch.tensor([[0.5, 0.5, 0.5, 0.1]])
    assert relevant_ranks(similarity, torch.tensor([[True, False, False, False]])).tolist() == [2]
    # a tie among own captions costs nothing
    assert relevant_ranks(similarity, torch.tensor([[True, True, True, False]])).tolist() == [0]


def test_a_constant_model_is_last():
    features = torch.ones(7, 33) / 33**0.5
    ranks = retrieval_ranks(features, features, torch.arange(7))
    assert ranks.i2t_ranks.tolist() == [6] * 7
    assert ranks.t2i_ranks.tolist() == [6] * 7
    assert recall_at_k(ranks.t2i_ranks, ks=(1, 5)) == {"R@1": 0.0, "R@5": 0.0}


def test_float_rounding_is_a_tie_but_a_real_difference_is_not():
    relevant = torch.tensor([[True, False]])
    assert relevant_ranks(torch.tensor([[0.5, 0.5 - 1e-7]]), relevant).tolist() == [1]
    assert relevant_ranks(torch.tensor([[0.5, 0.5 - 1e-4]]), relevant).tolist() == [0]


def test_uneven_captions_and_more_captions_than_images():
    images = unit([1, 0, 0], [0, 1, 0], [0, 0, 1])
    texts = unit(
        [1, 0.1, 0],  # image 0, found
        [0, 1, 0.2],  # image 1, found
        [0.9, 0.5, 0],  # image 1, finds image 0 first
        [0, 0.9, 0.5],  # image 2, finds image 1 first
        [0.8, 0.7, 0.1],  # image 2, finds image 0, then 1
    )
    ranks = retrieval_ranks(images, texts, torch.tensor([0, 1, 1, 2, 2]))
    assert ranks.t2i_ranks.tolist() == [0, 0, 1, 1, 2]
    # image 2 scores its own captions .486 and .094; the only other caption above .486 is none (1's first has .196)
    assert ranks.i2t_ranks.tolist() == [0, 0, 0]
    assert ranks.t2i_top[4].tolist() == [0, 1, 2]


def test_one_caption_in_the_top_is_enough_for_image_to_text():
    images = unit([1, 0], [0, 1])
    texts = unit([0, 1], [1, 0.05], [0.3, 1])  # image 0 owns a hopeless and a perfect caption
    assert retrieval_ranks(images, texts, torch.tensor([0, 0, 1])).i2t_ranks.tolist() == [0, 1]


@pytest.mark.parametrize(("num_images", "dim"), [(40, 6), (7, 3)])
def test_recall_is_clip_benchmarks_on_random_features(num_images, dim):
    generator = torch.Generator().manual_seed(1)
    owner = torch.tensor([index for index in range(num_images) for _ in range(1 + (5 * index) % 7)])
    owner = owner[torch.randperm(len(owner), generator=generator)]  # the captions of an image need not lie together
    images = torch.nn.functional.normalize(torch.randn(num_images, dim, generator=generator), dim=1)
    noise = torch.randn(len(owner), dim, generator=generator)
    texts = torch.nn.functional.normalize(images[owner] + noise, dim=1)
    ranks = retrieval_ranks(images, texts, owner, chunk_size=16)
    scores = texts @ images.T
    positive = owner[:, None] == torch.arange(num_images)[None]
    ks = (1, 5) if num_images < 10 else (1, 5, 10, 25)
    t2i, i2t = recall_at_k(ranks.t2i_ranks, ks), recall_at_k(ranks.i2t_ranks, ks)
    for k in ks:
        # Shares of the positives; its `evaluate` counts a query as found where that is above 0.
        theirs = [zeroshot_retrieval.recall_at_k(scores, positive, k)]
        theirs.append(zeroshot_retrieval.recall_at_k(scores.T, positive.T.contiguous(), k))
        assert [t2i[f"R@{k}"], i2t[f"R@{k}"]] == pytest.approx([100 * (r > 0).float().mean().item() for r in theirs])


def test_tiles_are_bounded_and_make_no_difference(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    images = torch.nn.functional.normalize(torch.randn(50, 4, generator=generator), dim=1)
    images[30:] = images[:20]  # ties across tiles
    owner = torch.arange(130) % 50
    texts = images[owner] + 0.3 * torch.nn.functional.normalize(torch.randn(130, 4, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(texts, dim=1)
    whole = retrieval_ranks(images, texts, owner, chunk_size=1000)
    sizes = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda one, other: sizes.append((len(one), other.shape[1])) or matmul(one, other)
    )
    tiled = retrieval_ranks(images, texts, owner, chunk_size=7)
    assert max(max(size) for size in sizes) == 7
    assert np.array_equal(whole.i2t_ranks, tiled.i2t_ranks) and np.array_equal(whole.t2i_ranks, tiled.t2i_ranks)
    similarity = (texts @ images.T).numpy()
    best = [np.take_along_axis(similarity, found.t2i_top, axis=1) for found in (whole, tiled)]
    assert np.allclose(*best, atol=1e-6) and (np.diff(best[1], axis=1) <= 1e-6).all()


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunks_and_a_naive_loop_agree(chunk_size):
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    owner = torch.tensor([index for index in range(12) for _ in range(1 + index % 3)])
    texts = torch.nn.functional.normalize(images[owner] + torch.randn(len(owner), 8, generator=generator), dim=1)
    ranks = retrieval_ranks(images, texts, owner, chunk_size=chunk_size)
    scores = (texts.double() @ images.double().T).numpy()
    for caption, image in enumerate(owner.tolist()):
        order = np.argsort(-scores[caption]).tolist()
        assert ranks.t2i_ranks[caption] == order.index(image)
        assert ranks.t2i_top[caption].tolist() == order[:5]
    for image in range(12):
        order = [owner[caption].item() for caption in np.argsort(-scores[:, image])]
        assert ranks.i2t_ranks[image] == order.index(image)


def test_recall():
    assert recall_at_k([0, 1, 4, 5, 9, 10]) == pytest.approx({"R@1": 100 / 6, "R@5": 50.0, "R@10": 500 / 6})


def test_non_finite_and_orphans_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        relevant_ranks(torch.tensor([[float("nan"), 1.0]]), torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="no relevant candidate"):
        retrieval_ranks(unit([1, 0], [0, 1]), unit([1, 0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="1 captions of images that are not there"):
        retrieval_ranks(unit([1, 0], [0, 1]), unit([1, 0], [0, 1], [1, 1]), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="not finite"):
        retrieval_ranks(unit([1, 0]), torch.tensor([[float("inf"), 1.0]]), torch.tensor([0]))
