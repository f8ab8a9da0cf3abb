"""The stage on a tiny teacher: right vectors, each text once, resumable to the byte, and loud about what is wrong."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from processes import TWO_PROCESSES, kill_when, start
from tiny import scene_captions, tiny_llm, write_captions

from llm2clip import embedding_writer, extract_embeddings
from llm2clip.caption_data import CaptionData
from llm2clip.cli import run_command
from llm2clip.embedding_store import EmbeddingStore, read_header, shard_name, write_shard
from llm2clip.run_dir import fingerprint
from llm2clip.teacher import CaptionEncoder, TeacherSpec, encode_texts

NUM_IMAGES = 30
ROWS_PER_SHARD = 16
ODD_TEXTS = ["  two\tspaces \n and a new line ", "猫が赤い帽子をかぶっている", "кот и собака", "🐈 قطة", "a\x00b", "a"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"), seed=0)


def make_teacher(directory: Path, seed: int) -> Path:
    llm = tiny_llm(directory / "llm", seed=seed)
    spec = TeacherSpec(base_model="tiny", num_hidden_layers=3, max_length=64, chat_suffix="<|end|>")
    CaptionEncoder.from_llm(str(llm), spec=spec).save_pretrained(directory / "teacher")
    return directory / "teacher"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("scenes"), scene_captions(NUM_IMAGES))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path, scenes: Path) -> Path:
    """A complete store in bfloat16, not to be changed."""
    extract(output := tmp_path_factory.mktemp("whole") / "out", teacher, scenes)
    return output


@pytest.fixture
def own(tmp_path: Path, whole: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "own")


def arguments(output: Path, teacher: Path, *data: Path, **settings: object) -> list[str]:
    sources = json.dumps([{"path": str(path)} for path in data])
    values = {"compute_dtype": "float32", "rows_per_shard": ROWS_PER_SHARD, "batch_tokens": 256, **settings}
    given = [f"--output_dir={output}", f"--teacher={teacher}", f"--data={sources}"]
    return given + [f"--{key}={value}" for key, value in values.items()]


def extract(output: Path, teacher: Path, *data: Path, **settings: object) -> EmbeddingStore:
    extract_embeddings.main(arguments(output, teacher, *data, **settings))
    return EmbeddingStore(output)


def contents(directory: Path) -> dict[str, bytes]:
    """The files that a store consists of."""
    names = {path.name for pattern in ("*.safetensors", "*.parquet") for path in directory.glob(pattern)}
    return {name: (directory / name).read_bytes() for name in names | {"manifest.json"}}


def in_a_child(function: Callable[[], object]) -> int | None:
    """Run in a forked process; returns its exit code, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join()
    return child.exitcode


def test_every_caption_gets_the_teachers_vector(tmp_path: Path, teacher: Path, scenes: Path):
    store = extract(tmp_path / "out", teacher, scenes, dtype="float32")
    data = CaptionData.open(scenes)
    rows = store.rows(data)
    encoder = CaptionEncoder.from_pretrained(teacher)
    for index in (0, 7, NUM_IMAGES - 1):
        for position, caption in enumerate(data[index].captions):
            alone = encode_texts(encoder, [caption.text])
            torch.testing.assert_close(store.gather([rows[index, position]]), alone, rtol=1e-4, atol=1e-5)
    assert store.teacher_fingerprint == fingerprint(teacher)
    assert (store.dim, store.normalized, len(store)) == (32, False, 3 * NUM_IMAGES)
    assert store.manifest["data"][0]["kinds"] == {"raw": NUM_IMAGES, "long": 2 * NUM_IMAGES}


def test_bfloat16_is_the_rounded_float32(tmp_path: Path, whole: Path, teacher: Path, scenes: Path):
    everything = np.arange(3 * NUM_IMAGES)
    exact = extract(tmp_path / "exact", teacher, scenes, dtype="float32").gather(everything)
    store = EmbeddingStore(whole)
    assert store.dtype == "bfloat16"
    assert torch.equal(store.gather(everything), exact.bfloat16().float())


def test_batching_changes_nothing_but_rounding(tmp_path: Path, teacher: Path, scenes: Path):
    everything = np.arange(3 * NUM_IMAGES)
    one, two = (
        extract(tmp_path / str(size), teacher, scenes, dtype="float32", batch_tokens=size).gather(everything)
        for size in (1, 5000)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_each_text_is_encoded_once(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        {"id": "a", "captions": {"raw": ["a cat", "a dog"], "long": "a cat"}},
        {"id": "b", "captions": {"raw": "a dog"}},
    ]
    first = write_captions(tmp_path / "first", rows)
    second = write_captions(tmp_path / "second", [{"id": "a", "captions": {"raw": ["a tree", "a cat"]}}])
    encoded = []
    original = CaptionEncoder.forward
    monkeypatch.setattr(
        CaptionEncoder,
        "forward",
        lambda self, **batch: encoded.append(len(batch["input_ids"])) or original(self, **batch),
    )
    store = extract(tmp_path / "out", teacher, first, second)
    assert sum(encoded) == len(store) == 3
    assert store.rows(CaptionData.open(first)).rows.tolist() == [0, 1, 0, 1]
    assert store.rows(CaptionData.open(second)).rows.tolist() == [2, 0]
    table = pq.read_table(tmp_path / "out" / "index-0.parquet").to_pylist()
    assert table[0] == {"id": "a", "kind": ["raw", "raw", "long"], "row": [0, 1, 0]}


def test_odd_and_long_texts_are_encoded_and_cut_ones_counted(tmp_path: Path, teacher: Path):
    tokenize = CaptionEncoder.from_pretrained(teacher).tokenize
    exact = "a" + " b" * 61
    assert len(tokenize.encode([exact])[0][0]) == 64 == tokenize.spec.max_length
    texts = [*ODD_TEXTS, exact, exact + " b", " ".join(["word"] * 10_000), "\N{CAT}" * 300]
    data = write_captions(tmp_path / "data", [{"id": str(i), "captions": {"raw": t}} for i, t in enumerate(texts)])
    store = extract(tmp_path / "out", teacher, data)
    assert store.gather(np.arange(len(texts))).isfinite().all()
    assert (len(store), store.manifest["num_truncated"], store.manifest["max_length"]) == (len(texts), 3, 64)


def test_a_complete_store_is_left_alone(own: Path, teacher: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
    monkeypatch.setattr(CaptionEncoder, "from_pretrained", None)
    extract(own, teacher, scenes)
    assert {path.name: path.stat().st_mtime_ns for path in own.iterdir()} == before


@pytest.mark.parametrize(
    ("function", "call"),
    [("forward", 1), ("forward", 9), ("fsync", 4), ("fsync", 7), ("replace", 6), ("replace", 9), ("replace", 12)],
)
def test_killed_anywhere_and_run_again_gives_the_same_bytes(
    tmp_path: Path, whole: Path, teacher: Path, scenes: Path, function: str, call: int
):
    """The n-th call of: a batch of the teacher; the sync of a half-written file; the rename of a finished one."""
    module = {"forward": CaptionEncoder, "fsync": os, "replace": os}[function]

    def die_at_call() -> None:
        original, count = getattr(module, function), 0

        def counting(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, function, counting)
        extract(tmp_path / "killed", teacher, scenes)

    assert in_a_child(die_at_call) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    extract(tmp_path / "killed", teacher, scenes)
    assert contents(tmp_path / "killed") == contents(whole)
    assert not list((tmp_path / "killed").glob("*tmp")) + list((tmp_path / "killed").glob(".*tmp"))


def test_finished_shards_are_not_made_again(own: Path, teacher: Path, scenes: Path):
    (own / "manifest.json").unlink()
    (own / shard_name(2)).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in own.glob("shard-*")}
    extract(own, teacher, scenes)
    after = {path.name: path.stat().st_mtime_ns for path in own.glob("shard-*")}
    assert {name for name in after if after[name] != before.get(name)} == {shard_name(2)}


@pytest.mark.parametrize("damage", ["cut", "flipped", "other teacher", "other texts", "other dtype", "not a shard"])
def test_a_shard_that_is_not_the_right_one_is_made_again(
    own: Path, teacher: Path, scenes: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    store = EmbeddingStore(own)
    good = contents(own)
    (own / "manifest.json").unlink()
    shard = own / shard_name(1)
    metadata, vectors = read_header(shard).metadata, store.gather(range(ROWS_PER_SHARD)).bfloat16()
    if damage == "cut":
        shard.write_bytes(good[shard.name][:-7])
    elif damage == "flipped":
        shard.write_bytes(good[shard.name][:-1] + bytes([good[shard.name][-1] ^ 1]))
    elif damage == "other teacher":
        write_shard(shard, vectors, {**metadata, "teacher_fingerprint": "another"})
    elif damage == "other texts":
        shutil.copy(own / shard_name(0), shard)
    elif damage == "other dtype":
        write_shard(shard, vectors.float(), metadata)
    else:
        shard.write_text("not a shard")
    with caplog.at_level(logging.WARNING):
        extract(own, teacher, scenes)
    assert "making it again" in caplog.text and shard.name in caplog.text
    assert contents(own) == good


def test_verify_passes_on_a_good_store(own: Path, teacher: Path, scenes: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        extract(own, teacher, scenes, verify="true")
        extract(own, teacher, scenes, verify="true")
    assert caplog.text.count("verified: digests of 7 files, 64 texts encoded again") == 2


@pytest.mark.parametrize("damage", ["flipped", "missing", "index"])
def test_verify_names_a_damaged_file(own: Path, teacher: Path, scenes: Path, damage: str):
    file = own / ("index-0.parquet" if damage == "index" else shard_name(3))
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name} missing or changed .*run the same extract-embeddings"):
        extract(own, teacher, scenes, verify="true")


def test_verify_finds_vectors_of_other_texts(own: Path, teacher: Path, scenes: Path):
    store = EmbeddingStore(own)
    shard = own / shard_name(0)
    metadata = read_header(shard).metadata
    write_shard(shard, store.gather(np.roll(np.arange(ROWS_PER_SHARD), 1)).bfloat16(), metadata)
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["outputs"][shard.name] = fingerprint(shard)
    (own / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"row \d+ differs by .*% from the vector .* gives now for"):
        extract(own, teacher, scenes, verify="true")


def test_another_teacher_or_other_captions_in_the_same_directory_are_refused(
    tmp_path: Path, teacher: Path, scenes: Path, capsys: pytest.CaptureFixture
):
    current = shutil.copytree(teacher, tmp_path / "teacher")
    data = shutil.copytree(scenes, tmp_path / "data")
    extract(tmp_path / "out", current, data)
    good = contents(tmp_path / "out")
    shutil.copytree(make_teacher(tmp_path / "new", seed=1), current, dirs_exist_ok=True)
    command = arguments(tmp_path / "out", current, data)
    assert run_command("llm2clip.extract_embeddings", command) == 2
    assert "inputs: teacher was" in capsys.readouterr().err
    shutil.copytree(teacher, current, dirs_exist_ok=True)
    write_captions(data, scene_captions(NUM_IMAGES - 1))
    assert run_command("llm2clip.extract_embeddings", command) == 2
    assert "inputs: data.0 was" in capsys.readouterr().err
    assert contents(tmp_path / "out") == good
    with pytest.raises(ValueError, match="has no embeddings of these captions"):
        EmbeddingStore(tmp_path / "out").rows(CaptionData.open(data))


def test_missing_inputs_are_named(tmp_path: Path, teacher: Path, scenes: Path):
    with pytest.raises(FileNotFoundError, match=r"no teacher\.json; make one with `llm2clip finetune-llm`"):
        extract(tmp_path / "out", tmp_path, scenes)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        extract(tmp_path / "out", teacher, tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_all_configuration_mistakes_are_named_at_once(tmp_path: Path, teacher: Path):
    with pytest.raises(ValueError, match=r"batch_tokens is 0.*rows_per_shard is -1.*data is empty.*max_bad_fraction"):
        extract(tmp_path, teacher, batch_tokens=0, rows_per_shard=-1, max_bad_fraction=2)


def test_left_out_rows_are_listed(tmp_path: Path, teacher: Path):
    rows = [*scene_captions(3), {"id": "bad", "captions": {"raw": 5}}, {"id": "blank", "captions": {"raw": " "}}]
    data = write_captions(tmp_path / "data", rows)
    store = extract(tmp_path / "out", teacher, data, max_bad_fraction=0.5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert store.manifest["data"][0]["num_skipped"] == 2
    assert lines[0]["data"] == str(data) and "captions.jsonl:4" in lines[0]["where"] and lines[0]["reason"]


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bfloat16"), (float("inf"), "float32"), (1e5, "float16")])
def test_a_vector_that_is_not_finite_fails_and_names_the_text(
    tmp_path: Path, teacher: Path, scenes: Path, value: float, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    victim = "1 blue taxi"
    tokens = CaptionEncoder.from_pretrained(teacher).tokenize.encode([victim])[0][0]
    original = CaptionEncoder.forward

    def poisoned(self: CaptionEncoder, input_ids: torch.Tensor, **masks: torch.Tensor) -> torch.Tensor:
        vectors = original(self, input_ids=input_ids, **masks)
        wanted = torch.tensor(tokens)
        if input_ids.shape[1] >= len(wanted):
            vectors[(input_ids[:, : len(wanted)] == wanted).all(dim=1), 3] = value
        return vectors

    monkeypatch.setattr(CaptionEncoder, "forward", poisoned)
    with pytest.raises(RuntimeError, match=f"NaN or infinite in torch.{dtype}: '{victim}'"):
        extract(tmp_path, teacher, scenes, dtype=dtype)
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, teacher: Path, scenes: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))  # smaller than a float32 shard, larger than the rest
    try:
        with pytest.raises(OSError):
            extract(tmp_path, teacher, scenes, dtype="float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("shard-*")) + list(tmp_path.glob(".*.tmp"))
    assert len(extract(tmp_path, teacher, scenes, dtype="float32")) == 3 * NUM_IMAGES


def test_an_output_that_cannot_be_written_is_an_oserror(tmp_path: Path, teacher: Path, scenes: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        extract(tmp_path / "file" / "out", teacher, scenes)


def test_progress_tells_rate_time_left_and_memory(
    tmp_path: Path, teacher: Path, scenes: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(embedding_writer, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        extract(tmp_path, teacher, scenes)
    assert f"{3 * NUM_IMAGES} of {3 * NUM_IMAGES} captions" in caplog.text
    assert all(word in caplog.text for word in ("captions/s", "0:00:00 left", "GiB RAM"))


COMMAND = "llm2clip extract-embeddings"


@pytest.mark.distributed
def test_two_processes_give_the_bytes_of_one(tmp_path: Path, whole: Path, teacher: Path, scenes: Path):
    given = arguments(tmp_path / "two", teacher, scenes, verify="true")
    assert start(COMMAND, given, *TWO_PROCESSES).wait() == 0
    assert contents(tmp_path / "two") == contents(whole)


@pytest.mark.distributed
def test_a_process_that_dies_does_not_keep_the_others_waiting(
    tmp_path: Path, teacher: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))

    def process(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        if rank == 1:
            embedding_writer.EmbeddingWriter.write_shards = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        extract(tmp_path, teacher, scenes)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [1, -signal.SIGKILL]
    assert sorted(tmp_path.glob("shard-*")) == [tmp_path / shard_name(number) for number in (0, 2, 4)]
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.slow
def test_killed_from_outside_again_and_again(tmp_path: Path, teacher: Path):
    data = write_captions(tmp_path / "data", scene_captions(1500))
    settings = {"rows_per_shard": 500, "batch_tokens": 1024}
    killed = tmp_path / "killed"
    run = partial(start, COMMAND, arguments(killed, teacher, data, **settings))
    for num_shards in (1, 5):
        assert kill_when(run(), lambda count=num_shards: len(list(killed.glob("shard-*"))) >= count)
    assert run().wait() == 0
    extract(tmp_path / "whole", teacher, data, **settings)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
