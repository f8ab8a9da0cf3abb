"""The store against plain arrays: what was written is what is gathered, and what does not belong is refused."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm2clip import embedding_store
from llm2clip.embedding_store import DTYPES, EmbeddingStore, read_header, shard_name, write_index, write_shard

ROWS_PER_SHARD = 7
OFFSETS = np.array([0, 2, 2, 5])  # sample 1 has no caption
ROWS = np.array([3, 0, 19, 3, 8])


def write_store(path: Path, vectors: torch.Tensor, dtype: str = "bfloat16", rows_per_shard: int = ROWS_PER_SHARD):
    path.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(vectors), rows_per_shard)):
        rows = vectors[start : start + rows_per_shard].to(DTYPES[dtype])
        write_shard(path / shard_name(number), rows, {"texts": f"texts of {number}"})
        shards.append({"file": shard_name(number), "num_rows": len(rows), "texts": f"texts of {number}"})
    write_index(path / "index-0.parquet", ["a", "b", "c"], ["raw", "long", "raw", "raw", "de"], OFFSETS, ROWS)
    manifest = {
        "stage": "extract-embeddings",
        "dim": vectors.shape[1],
        "dtype": dtype,
        "normalized": False,
        "teacher_fingerprint": "teacher-a",
        "num_rows": len(vectors),
        "rows_per_shard": rows_per_shard,
        "shards": shards,
        "data": [{"path": "captions", "fingerprint": "data-a", "index": "index-0.parquet"}],
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.fixture
def directory(tmp_path: Path, vectors: torch.Tensor) -> Path:
    return write_store(tmp_path / "embeddings", vectors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gather_returns_the_stored_rows_across_shards(tmp_path: Path, vectors: torch.Tensor, dtype: str):
    store = EmbeddingStore(write_store(tmp_path / dtype, vectors, dtype))
    rows = [19, 0, 6, 7, 7, 13, 14]
    gathered = store.gather(rows)
    assert gathered.dtype == torch.float32
    assert torch.equal(gathered, vectors.to(DTYPES[dtype]).float()[rows])
    assert store.gather([]).shape == (0, 6)
    assert (store.dim, store.dtype, len(store), store.normalized) == (6, dtype, 20, False)


def test_shards_are_ordinary_safetensors(directory: Path, vectors: torch.Tensor):
    loaded = load_file(directory / shard_name(1))["caption_embeddings"]
    assert torch.equal(loaded, vectors[7:14].bfloat16())


def test_same_vectors_give_the_same_bytes(tmp_path: Path, vectors: torch.Tensor):
    metadata = {f"key{i}": i for i in range(8)}
    contents = set()
    for attempt in range(5):
        write_shard(tmp_path / f"{attempt}", vectors, dict(reversed(metadata.items())) if attempt % 2 else metadata)
        contents.add((tmp_path / f"{attempt}").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("row", [-1, 20])
def test_rows_outside_the_store_are_an_error(directory: Path, row: int):
    with pytest.raises(IndexError, match="has 20"):
        EmbeddingStore(directory).gather([0, row])


def test_captions_find_their_rows(directory: Path):
    rows = EmbeddingStore(directory).rows(SimpleNamespace(fingerprint="data-a"))
    assert len(rows) == 3
    assert [rows[0, 0], rows[0, 1], rows[2, 0], rows[2, 1], rows[2, 2]] == [3, 0, 19, 3, 8]
    assert rows.offsets.tolist() == OFFSETS.tolist() and rows.rows.tolist() == ROWS.tolist()
    for position in [(1, 0), (0, 2), (0, -1), (3, 0), (-1, 0)]:
        with pytest.raises(IndexError):
            rows[position]


def test_moments_are_those_of_normalised_vectors(directory: Path, vectors: torch.Tensor):
    rows = [0, 0, 5, 19, 12]
    unit = torch.nn.functional.normalize(vectors.bfloat16().double()[rows], dim=-1)
    mean, rms = EmbeddingStore(directory).moments(rows)
    torch.testing.assert_close(mean, unit.mean(0).float())
    assert rms == pytest.approx((unit - unit.mean(0)).square().mean().sqrt().item(), rel=1e-9)
    with pytest.raises(ValueError, match="no rows"):
        EmbeddingStore(directory).moments([])


def test_a_pickled_store_carries_no_vectors(tmp_path: Path):
    store = EmbeddingStore(write_store(tmp_path / "large", torch.randn(2000, 64), rows_per_shard=1000))
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled).gather([1999, 3]), store.gather([1999, 3]))


def test_a_batch_is_gathered_well_under_a_millisecond(tmp_path: Path):
    store = EmbeddingStore(write_store(tmp_path / "large", torch.randn(16384, 576), rows_per_shard=1024))
    generator = np.random.default_rng(0)
    seconds = []
    for _ in range(50):
        rows = generator.integers(0, len(store), 128)
        start = time.perf_counter()
        store.gather(rows)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 1e-3


def test_other_captions_are_refused(directory: Path):
    with pytest.raises(ValueError, match=r"fingerprint is data-b, the store\s+holds captions \(data-a\); run extract"):
        EmbeddingStore(directory).rows(SimpleNamespace(fingerprint="data-b"))


def test_other_teacher_or_dim_is_refused(directory: Path):
    store = EmbeddingStore(directory)
    store.require(needed_by="runs/clip", teacher_fingerprint="teacher-a", dim=6)
    with pytest.raises(ValueError, match="teacher-a, but runs/clip belongs to teacher teacher-b; run extract"):
        store.require(needed_by="runs/clip", teacher_fingerprint="teacher-b")
    with pytest.raises(ValueError, match="dim 6 in .* != 4096 expected by runs/clip"):
        store.require(needed_by="runs/clip", dim=4096)


def test_an_incomplete_store_is_refused(directory: Path):
    (directory / "manifest.json").unlink()
    (directory / "identity.json").write_text(json.dumps({"stage": "extract-embeddings"}))
    with pytest.raises(FileNotFoundError, match="not complete .*run extract-embeddings"):
        EmbeddingStore(directory)


def test_a_directory_of_another_stage_is_refused(tmp_path: Path):
    (tmp_path / "manifest.json").write_text('{"stage": "train-clip"}')
    with pytest.raises(ValueError, match="written by train-clip, expected .*extract-embeddings"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 8, 40, -1, -100])
def test_a_shard_that_is_cut_off_is_refused(directory: Path, size: int):
    shard = directory / shard_name(1)
    content = shard.read_bytes()
    shard.write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"shard-00001.*cut off.*run the same extract-embeddings"):
        EmbeddingStore(directory)


def test_missing_and_foreign_shards_are_refused(directory: Path):
    shard = directory / shard_name(2)
    shutil.copy(directory / shard_name(1), shard)
    with pytest.raises(ValueError, match="not the shard of the manifest"):
        EmbeddingStore(directory)
    shard.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not json " * 10)
    with pytest.raises(ValueError, match="no shard of caption embeddings"):
        EmbeddingStore(directory)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="shard-00002.* is missing"):
        EmbeddingStore(directory)


def test_a_changed_byte_is_noticed_by_its_digest(directory: Path):
    shard = directory / shard_name(0)
    assert embedding_store.vectors_are_intact(shard, read_header(shard))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert not embedding_store.vectors_are_intact(shard, read_header(shard))


def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path: Path, vectors: torch.Tensor, monkeypatch):
    def full(self: Path, content: bytes) -> int:
        with open(self, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / shard_name(0), vectors, {})
    assert not list(tmp_path.iterdir())
