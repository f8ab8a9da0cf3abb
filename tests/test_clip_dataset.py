"""The training stream: a pure function of (seed, position) that mixes, shuffles and draws as it says."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_data import text_vector, write_clip_tokenizer, write_embeddings, write_scenes
from tiny import write_captions
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from llm2clip.caption_data import CaptionData
from llm2clip.clip_dataset import CaptionSource, ClipStream, EmbeddingCollator, TextCollator, mixing_counts
from llm2clip.embedding_store import EmbeddingStore
from llm2clip.images import ImageTransform

HALF = {"raw": 0.5, "long": 0.5}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", 24, size=40)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "others", 10, seed=5)


def source(path: Path, kinds: dict[str, float] | None = None) -> CaptionSource:
    return CaptionSource(CaptionData.open(path), kinds or HALF)


def make_stream(*paths: Path, num_steps: int = 9, batch_size: int = 8, seed: int = 0, **settings: Any) -> ClipStream:
    weights = settings.pop("weights", [1.0] * len(paths))
    return ClipStream(
        [source(path, settings.pop("kinds", None)) for path in paths],
        weights=weights,
        final_weights=settings.pop("final_weights", weights),
        transform=ImageTransform(size=32, scale=settings.pop("scale", (0.5, 1.0))),
        num_steps=num_steps,
        batch_size=batch_size,
        seed=seed,
        **settings,
    )


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["text"] == second["text"]
    assert torch.equal(first["pixel_values"], second["pixel_values"])


# Order


def test_sample_is_a_function_of_seed_and_position(scenes: Path, others: Path):
    forward = make_stream(scenes, others)
    samples = [forward[position] for position in range(len(forward))]
    backward = make_stream(scenes, others)
    for position in reversed(range(len(backward))):
        assert_same(backward[position], samples[position])
    other_seed = make_stream(scenes, others, seed=1)
    same = [other_seed[p]["text"] == samples[p]["text"] for p in range(len(samples))]
    assert sum(same) < len(same) / 2


def test_stream_in_another_process_is_the_same(scenes: Path):
    stream = make_stream(scenes)
    expected = [stream[position] for position in range(16)]
    again = pickle.loads(pickle.dumps(stream))
    for position in range(16):
        assert_same(again[position], expected[position])
    loaded = [s for batch in DataLoader(make_stream(scenes), 4, num_workers=2, collate_fn=list) for s in batch]
    for position in range(16):
        assert_same(loaded[position], expected[position])


def test_every_row_is_seen_once_before_any_is_seen_again(scenes: Path):
    stream = make_stream(scenes, num_steps=9, batch_size=8)  # 72 = 3 epochs of 24
    rows = [stream.locate(position)[1] for position in range(len(stream))]
    epochs = [rows[0:24], rows[24:48], rows[48:72]]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(24))


def test_every_source_is_walked_without_replacement(scenes: Path, others: Path):
    stream = make_stream(scenes, others, weights=[3.0, 1.0], num_steps=10)
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for position in range(len(stream)):
        number, row = stream.locate(position)
        drawn[number].append(row)
    assert (len(drawn[0]), len(drawn[1])) == (60, 20)
    assert sorted(drawn[0][:24]) == list(range(24))
    assert sorted(drawn[1]) == sorted([*range(10), *range(10)])


def test_sources_are_mixed_within_a_batch(scenes: Path, others: Path):
    stream = make_stream(scenes, others)
    orders = [[stream.locate(8 * step + i)[0] for i in range(8)] for step in range(9)]
    assert all(sorted(order) == [0, 0, 0, 0, 1, 1, 1, 1] for order in orders)
    assert len({tuple(order) for order in orders}) > 5


# Mixing


def test_mixing_counts_hold_the_shares_exactly_over_time():
    counts = mixing_counts(np.array([0.45, 0.35, 0.2]), np.array([0.45, 0.35, 0.2]), 100, 8)
    assert (counts.sum(axis=1) == 8).all()
    assert counts.sum(axis=0).tolist() == [360, 280, 160]
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()


def test_mixing_counts_change_linearly():
    counts = mixing_counts(np.array([1.0, 0.0]), np.array([0.25, 0.75]), 101, 64)
    assert counts[0].tolist() == [64, 0]
    assert counts[-1].tolist() == [16, 48]
    expected = 64 * np.linspace(1, 0.25, 101)
    assert np.abs(counts[:, 0] - expected).max() <= 1
    assert abs(counts[:, 0].sum() - expected.sum()) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_mixing_counts_for_any_shares(seed: int):
    rng = np.random.default_rng(seed)
    first, last = rng.dirichlet([0.3] * 6), rng.dirichlet([0.3] * 6)
    last[0] = first[1] = 0.0
    counts = mixing_counts(first, last, 200, 7)
    assert (counts >= 0).all() and (counts.sum(axis=1) == 7).all()
    shares = np.linspace(first / first.sum(), last / last.sum(), 200)
    assert np.abs(counts.cumsum(axis=0) - 7 * shares.cumsum(axis=0)).max() < 2


# Captions


def kinds_drawn(path: Path, kinds: dict[str, float], row: int, draws: int = 2000) -> Counter[str]:
    drawer = source(path, kinds)
    data, rng = drawer.data, np.random.default_rng(0)
    texts = {text: kind for kind, text in data[row].captions}
    return Counter(texts[data.texts[drawer.draw_caption(row, rng)].as_py()] for _ in range(draws))


def test_kinds_are_drawn_by_probability_then_captions_alike(scenes: Path):
    counts = kinds_drawn(scenes, {"raw": 0.2, "long": 0.8}, row=3)
    assert counts["raw"] / 2000 == pytest.approx(0.2, abs=0.03)  # not by number of captions: 1 raw, 2 long
    drawer, rng = source(scenes, {"long": 1.0}), np.random.default_rng(0)
    drawn = Counter(drawer.draw_caption(3, rng) for _ in range(2000))
    assert len(drawn) == 2 and min(drawn.values()) > 900


def test_kind_that_a_row_lacks_is_shared_out_and_unwanted_kinds_are_never_drawn(tmp_path: Path):
    path = write_scenes(tmp_path / "data", 24)
    rows = [json.loads(line) for line in (path / "captions.jsonl").read_text().splitlines()]
    rows[0]["captions"] = {"raw": "only raw", "de": "nur roh"}
    rows[1]["captions"] = {"de": "ein Bild"}
    rows[2].pop("image")
    write_captions(path, rows)
    assert kinds_drawn(path, HALF, row=0) == {"raw": 2000}
    assert sorted(source(path).usable) == [0, *range(3, 24)]  # no wanted caption in 1, no image in 2
    assert sorted(source(path, {"de": 1.0}).usable) == [0, 1]
    with pytest.raises(ValueError, match=r"none of 24 rows .* kind fr; its kinds are raw, de, long"):
        source(path, {"fr": 1.0})


# Images


def test_cached_images_change_nothing(scenes: Path, monkeypatch: pytest.MonkeyPatch):
    plain, cached = make_stream(scenes), make_stream(scenes, cache_images=True)
    for position in range(48):
        assert_same(cached[position], plain[position])
    monkeypatch.setattr(CaptionData, "load_image", None)  # all 24 are in memory now
    for position in range(48, 72):
        cached[position]


def test_augmentation_differs_from_visit_to_visit(scenes: Path):
    stream = make_stream(scenes, num_steps=6)
    first = {stream.locate(p)[1]: p for p in range(24)}
    second = {stream.locate(p)[1]: p for p in range(24, 48)}
    for row in range(24):
        assert not torch.equal(stream[first[row]]["pixel_values"], stream[second[row]]["pixel_values"])


def test_bad_image_is_replaced_counted_and_listed(tmp_path: Path):
    path = write_scenes(tmp_path / "data")
    (path / "images" / "scene-5.png").write_bytes(b"")
    settings = {"skipped_file": tmp_path / "skipped.jsonl", "max_bad_fraction": 0.05}
    stream = make_stream(path, **settings)
    samples = [stream[position] for position in range(len(stream))]
    assert all(sample["pixel_values"].shape == (3, 32, 32) for sample in samples)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == ["scene-5"]  # once, though it came up three times
    assert "zero-byte" in lines[0]["reason"]
    bad = [position for position in range(len(stream)) if stream.locate(position)[1] == 5]
    fresh = make_stream(path, **settings)
    for position in bad:
        assert_same(fresh[position], samples[position])  # also the replacement is a function of the position


def test_too_many_bad_images_stop_the_run(tmp_path: Path):
    path = write_scenes(tmp_path / "data")
    for number in (3, 5, 7):
        (path / "images" / f"scene-{number}.png").write_bytes(b"not an image")
    stream = make_stream(path, max_bad_fraction=0.05)
    with pytest.raises(ValueError, match=r"2 of 24 images cannot be read, more than data.max_bad_fraction 0.05"):
        for position in range(len(stream)):
            stream[position]


# Batches


def test_embeddings_in_a_batch_are_those_of_the_drawn_captions(tmp_path: Path, scenes: Path):
    """The text stream and the embedding stream draw the same captions."""
    store = EmbeddingStore(write_embeddings(tmp_path / "embeddings", [scenes]))
    data = CaptionData.open(scenes)
    texts = make_stream(scenes)
    rows = make_stream(scenes)
    rows.sources = [CaptionSource(data, HALF, store.rows(data))]
    batch = EmbeddingCollator(store)([rows[position] for position in range(8)])
    expected = torch.stack([text_vector(texts[position]["text"], store.dim) for position in range(8)])
    assert torch.equal(batch["caption_embeddings"], expected)
    assert torch.equal(batch["pixel_values"], torch.stack([texts[p]["pixel_values"] for p in range(8)]))


def test_texts_are_padded_to_the_longest_of_the_batch(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(write_clip_tokenizer(tmp_path))
    pixels = torch.zeros(3, 2, 2)
    samples = [{"text": "a cat", "pixel_values": pixels}, {"text": "a red cat near a tree", "pixel_values": pixels}]
    batch = TextCollator(tokenizer, max_length=64)(samples)
    lengths = batch["attention_mask"].sum(dim=1)
    assert batch["input_ids"].shape[1] == lengths.max() > lengths.min()
    assert batch["input_ids"][1, -1] == tokenizer.eos_token_id
    cut = TextCollator(tokenizer, max_length=4)(samples)
    assert cut["input_ids"].shape == (2, 4)
    assert (cut["input_ids"][:, -1] == tokenizer.eos_token_id).all()  # where CLIP's text tower pools
