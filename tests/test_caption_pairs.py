from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import scene_captions, write_captions

from llm2clip.caption_data import CaptionData
from llm2clip.caption_loss import PairFeatures, caption_loss
from llm2clip.caption_pairs import (
    CaptionPairs,
    CaptionSource,
    PairKind,
    PairStream,
    TextPairs,
    TextSource,
    source_weights,
    text_key,
)


def caption_pairs(directory: Path, rows: list[dict], **settings) -> CaptionPairs:
    path = write_captions(directory, rows)
    return CaptionPairs(CaptionData.open(path), CaptionSource(path=path, **settings))


def text_file(path: Path, rows: list) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def numbered_texts(path: Path, count: int) -> TextPairs:
    rows = [{"query": f"{path.stem} q{i}", "positive": f"{path.stem} p{i}"} for i in range(count)]
    return TextPairs(TextSource(path=text_file(path, rows)))


def stream(sources: list, weights: list[float], **settings) -> PairStream:
    return PairStream(
        sources, weights, **{"num_positions": 64, "batch_size": 8, "batches": "one_source", "seed": 0, **settings}
    )


# Which pairs


def test_pairs_are_of_the_asked_kinds_and_of_one_image(tmp_path: Path) -> None:
    kinds = [PairKind(query="raw", positive="long", instruction="find long"), PairKind(query="long", positive="long")]
    rows = scene_captions(12)
    pairs = caption_pairs(tmp_path, rows, pairs=kinds)
    captions = {
        text: (row["id"], kind) for row in rows for kind, t in row["captions"].items() for text in np.atleast_1d(t)
    }
    seen = Counter()
    for index in range(len(pairs)):
        for draw in range(20):
            example = pairs.example(index, np.random.default_rng((index, draw)))
            (query_id, query_kind), (positive_id, positive_kind) = captions[example.query], captions[example.positive]
            assert query_id == positive_id
            assert example.query != example.positive
            assert example.instruction == ("find long" if query_kind == "raw" else "")
            seen[query_kind, positive_kind] += 1
    assert set(seen) == {("raw", "long"), ("long", "long")}
    assert 0.35 < seen["raw", "long"] / sum(seen.values()) < 0.65


def test_kind_weights_are_shares(tmp_path: Path) -> None:
    kinds = [PairKind(query="raw", positive="long", weight=3), PairKind(query="long", positive="raw", weight=1)]
    pairs = caption_pairs(tmp_path, scene_captions(6), pairs=kinds)
    queries = [pairs.example(i % 6, np.random.default_rng(i)).query for i in range(800)]
    share = np.mean([not query.startswith(("the image", "in the top")) for query in queries])
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 800)


def test_any_draws_from_all_kinds_with_the_paper_instruction(tmp_path: Path) -> None:
    pairs = caption_pairs(tmp_path, scene_captions(6))
    examples = [pairs.example(0, np.random.default_rng(i)) for i in range(60)]
    assert len({(example.query, example.positive) for example in examples}) == 6  # 3 captions, ordered pairs
    assert {example.instruction for example in examples} == {"Given a caption, retrieve a similar relevant caption"}


def test_rows_without_two_different_captions_are_passed_over(tmp_path: Path) -> None:
    rows = [
        {"id": "one", "captions": {"raw": "a cat"}},
        {"id": "equal", "captions": {"raw": "a dog", "long": "a dog"}},
        {"id": "good", "captions": {"raw": "a cow", "long": ["a cow", "a brown cow"]}},
        {"id": "other kinds", "captions": {"raw": ["a hen", "one hen"]}},
    ]
    pairs = caption_pairs(tmp_path, rows, pairs=[PairKind(query="raw", positive="long")])
    assert len(pairs) == 1
    assert pairs.example(0, np.random.default_rng(0))[:2] == ("a cow", "a brown cow")
    assert len(caption_pairs(tmp_path, rows)) == 2  # any two different captions


def test_random_negatives_are_of_another_image_and_the_positive_kind(tmp_path: Path) -> None:
    rows = scene_captions(5)
    kinds = [PairKind(query="raw", positive="long"), PairKind(query="long", positive="raw")]
    pairs = caption_pairs(tmp_path, rows, pairs=kinds, negatives="random")
    raw = {row["captions"]["raw"] for row in rows}
    for draw in range(100):
        example = pairs.example(draw % 5, np.random.default_rng(draw))
        assert (example.negative in raw) == (example.positive in raw)
        assert example.negative_group != example.group


def test_images_with_the_same_captions_are_one_group(tmp_path: Path) -> None:
    rows = scene_captions(2)
    pairs = caption_pairs(tmp_path, [*rows, {**rows[0], "id": "another rendering"}])
    groups = [pairs.example(index, np.random.default_rng(0)).group for index in range(3)]
    assert groups[0] == groups[2] != groups[1]


def test_unknown_kind_and_impossible_pairs_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no caption kind \['dense'\], only \['raw', 'long'\]"):
        caption_pairs(tmp_path, scene_captions(3), pairs=[PairKind(query="raw", positive="dense")])
    with pytest.raises(ValueError, match="no image of .* has two different captions for raw -> raw"):
        caption_pairs(tmp_path, scene_captions(3), pairs=[PairKind(query="raw", positive="raw")])
    with pytest.raises(ValueError, match="random needs two images"):
        caption_pairs(tmp_path, scene_captions(1), negatives="random")


# Text pairs


def test_text_pairs_take_turns_with_instructions_and_keep_negatives(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "positive": f"p{i}", **({"negative": f"n{i}"} if i else {})} for i in range(3)]
    pairs = TextPairs(TextSource(path=text_file(tmp_path / "t.jsonl", rows), instructions=["one", "two"]))
    examples = [pairs.example(i, np.random.default_rng(0)) for i in range(3)]
    assert [example.instruction for example in examples] == ["one", "two", "one"]
    assert [example.negative for example in examples] == [None, "n1", "n2"]
    assert pairs.has_negatives


def test_bad_text_rows_are_skipped_and_counted_up_to_a_share(tmp_path: Path) -> None:
    good = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(20)]
    bad = [
        "{not json",
        '["a list"]',
        {"query": "no positive"},
        {"query": "  ", "positive": "x"},
        '{"query": "\\ud800", "positive": "x"}',
    ]
    path = text_file(tmp_path / "t.jsonl", [*bad, *good])
    pairs = TextPairs(TextSource(path=path), max_bad_fraction=0.5)
    assert len(pairs) == 20
    assert [problem.where for problem in pairs.problems] == [f"t.jsonl:{line}" for line in range(1, 6)]
    with pytest.raises(ValueError, match=r"5 of 25 rows .* at most 1.0% may be bad .* t.jsonl:1: not JSON"):
        TextPairs(TextSource(path=path))
    (tmp_path / "latin.jsonl").write_bytes(b'{"query": "caf\xe9", "positive": "x"}\n')
    with pytest.raises(ValueError, match="1 of 1 rows"):
        TextPairs(TextSource(path=tmp_path / "latin.jsonl"))
    with pytest.raises(FileNotFoundError, match="expected a JSONL file of text pairs"):
        TextPairs(TextSource(path=tmp_path / "nothing.jsonl"))


# The stream


def test_a_batch_is_of_one_source_or_mixed(tmp_path: Path) -> None:
    sources = [numbered_texts(tmp_path / "a.jsonl", 30), numbered_texts(tmp_path / "b.jsonl", 30)]

    def names(batches: str) -> list[list[str]]:
        examples = [example.query[0] for example in stream(sources, [3, 1], num_positions=160, batches=batches)]
        return [examples[start : start + 8] for start in range(0, 160, 8)]

    assert all(len(set(batch)) == 1 for batch in names("one_source"))
    assert sum(batch[0] == "b" for batch in names("one_source")) == 5
    assert all(1 <= batch.count("b") <= 3 for batch in names("mixed"))


def test_every_row_comes_once_in_a_pass_in_another_order(tmp_path: Path) -> None:
    rows = list(stream([numbered_texts(tmp_path / "a.jsonl", 16)], [1], num_positions=48))
    passes = [[example.query for example in rows[start : start + 16]] for start in (0, 16, 32)]
    assert all(len(set(order)) == 16 for order in passes)
    assert passes[0] != passes[1] != passes[2]


def test_examples_depend_on_seed_and_position_only(tmp_path: Path) -> None:
    pairs = caption_pairs(tmp_path, scene_captions(30), negatives="random")
    texts = numbered_texts(tmp_path / "t.jsonl", 7)
    forwards = list(stream([pairs, texts], [1, 1]))
    again = stream([pairs, texts], [1, 1])
    assert [again[position] for position in reversed(range(64))] == forwards[::-1]
    assert list(stream([pairs, texts], [1, 1], seed=1)) != forwards
    longer = stream([pairs, texts], [1, 1], num_positions=128)
    assert [longer[position] for position in range(64)] == forwards


def test_default_weights_are_sizes_and_must_be_given_to_all_or_none(tmp_path: Path) -> None:
    sources = [CaptionSource(path=tmp_path), TextSource(path=tmp_path)]
    assert source_weights(sources, [10, 30]) == [10, 30]
    assert source_weights([CaptionSource(path=tmp_path, weight=2)], [10]) == [2]
    with pytest.raises(ValueError, match="to every source or to none"):
        source_weights([*sources, TextSource(path=tmp_path, weight=1)], [1, 1, 1])


# The loss


def features(batch: int = 6, *, negatives: bool = True, seed: int = 0, **keys: list[int]) -> PairFeatures:
    generator = torch.Generator().manual_seed(seed)

    def vectors() -> torch.Tensor:
        return torch.randn(batch, 8, generator=generator).requires_grad_()

    numbers = {
        "query_keys": list(range(1, batch + 1)),
        "positive_keys": list(range(101, 101 + batch)),
        "negative_keys": list(range(201, 201 + batch)),
        "groups": list(range(301, 301 + batch)),
        "negative_groups": list(range(401, 401 + batch)),
        **keys,
    }
    return PairFeatures(
        queries=vectors(),
        positives=vectors(),
        negatives=vectors() if negatives else None,
        **{name: torch.tensor(values) for name, values in numbers.items()},
    )


SETTINGS = {"scale": 50.0, "symmetric": False, "mask_false_negatives": True}


def leaves(example: PairFeatures) -> list[torch.Tensor]:
    return [vectors for vectors in (example.queries, example.positives, example.negatives) if vectors is not None]


def test_loss_is_the_closed_form() -> None:
    example = features(3)
    candidates = torch.cat([example.positives, example.negatives])
    total = 0.0
    for i in range(3):
        logits = [50 * F.cosine_similarity(example.queries[i], candidate, dim=0).item() for candidate in candidates]
        total += math.log(sum(math.exp(logit - logits[i]) for logit in logits))
    assert caption_loss(example, **SETTINGS)["loss"].item() == pytest.approx(total / 3, rel=1e-5)


def test_symmetric_loss_is_the_mean_of_both_directions() -> None:
    forth = features(negatives=False)
    back = PairFeatures(**{**vars(forth), "queries": forth.positives, "positives": forth.queries})
    both = caption_loss(forth, **{**SETTINGS, "symmetric": True})["loss"]
    expected = (caption_loss(forth, **SETTINGS)["loss"] + caption_loss(back, **SETTINGS)["loss"]) / 2
    torch.testing.assert_close(both, expected)


@pytest.mark.parametrize("negatives", [False, True])
def test_loss_and_gradients_equal_sentence_transformers(negatives: bool) -> None:
    losses = pytest.importorskip("sentence_transformers.losses")

    class Lookup(torch.nn.Module):
        def forward(self, column: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"sentence_embedding": column["vectors"]}

    ours, theirs = features(negatives=negatives), features(negatives=negatives)
    loss = caption_loss(ours, **SETTINGS)["loss"]
    reference = losses.MultipleNegativesRankingLoss(Lookup(), scale=50.0)(
        [{"vectors": vectors} for vectors in leaves(theirs)], torch.empty(0)
    )
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    for mine, other in zip(leaves(ours), leaves(theirs), strict=True):
        assert other.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize(
    ("keys", "removed"),
    [
        ({"positive_keys": [101, 102, 101, 104, 105, 106]}, [(0, 2), (2, 0)]),  # equal positives
        ({"positive_keys": [101, 1, 103, 104, 105, 106]}, [(0, 1)]),  # a candidate equals the query's own text
        ({"groups": [301, 302, 303, 301, 305, 306]}, [(0, 3), (3, 0)]),  # other captions of the same image
        ({"negative_keys": [201, 101, 203, 204, 205, 206]}, [(0, 7)]),  # a hard negative equals a positive
        ({"negative_groups": [401, 402, 301, 404, 405, 406]}, [(0, 8)]),  # a negative of the same image
        ({"negative_keys": [0, 202, 203, 204, 0, 206]}, [(i, j) for i in range(6) for j in (6, 10)]),  # none there
    ],
)
def test_false_negatives_are_left_out(keys: dict[str, list[int]], removed: list[tuple[int, int]]) -> None:
    example = features(**keys)
    candidates = F.normalize(torch.cat([example.positives, example.negatives]), dim=1)
    settings = {**SETTINGS, "scale": 5.0}
    logits = 5 * F.normalize(example.queries, dim=1) @ candidates.T
    for i, j in removed:
        logits[i, j] = -torch.inf
    expected = F.cross_entropy(logits, torch.arange(6))
    torch.testing.assert_close(caption_loss(example, **settings)["loss"], expected)
    if 0 not in keys.get("negative_keys", [1]):
        kept = caption_loss(example, **{**settings, "mask_false_negatives": False})["loss"]
        torch.testing.assert_close(kept, caption_loss(features(), **settings)["loss"])
        assert not torch.isclose(kept, expected)


def test_all_captions_equal_is_a_loss_of_zero_not_nan() -> None:
    example = features(query_keys=[1] * 6, positive_keys=[2] * 6, groups=[3] * 6, negative_keys=[2] * 6)
    for symmetric in (False, True):
        loss = caption_loss(example, **{**SETTINGS, "symmetric": symmetric})["loss"]
        assert loss.item() == 0
        loss.backward(retain_graph=True)
        assert all(vectors.grad is None or vectors.grad.isfinite().all() for vectors in leaves(example))


def test_text_keys_are_stable_and_never_the_key_of_nothing() -> None:
    assert text_key("a cat") == text_key("a cat") != text_key("a cat ")
    assert 0 < text_key("") < 2**63
