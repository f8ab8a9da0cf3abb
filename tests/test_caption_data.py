"""The four formats read the same, and so do files of another layout."""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_files import COLOURS, FORMATS, png, records, tar_members, write, write_jsonl, write_tar

from llm2clip.caption_data import Caption, CaptionData, Sample

pytestmark = pytest.mark.usefixtures("datasets_cache")


# What every format gives


@pytest.mark.parametrize("data_format", FORMATS)
def test_every_format_gives_the_same_data(tmp_path: Path, data_format: str) -> None:
    rows = records(17)
    data = CaptionData.open(write(tmp_path / "data", rows, data_format))
    assert len(data) == 17
    for i, (row, sample) in enumerate(zip(rows, data, strict=True)):
        captions = [Caption(kind, text) for kind, texts in row["captions"].items() for text in texts]
        assert sample == data[i] == Sample(row["id"], tuple(captions))
        image = data.load_image(i)
        assert (image.mode, image.size, image.getpixel((2, 2))) == ("RGB", (5, 4), COLOURS[i])
        assert data.image_bytes(i) == png(i)
    assert data.kinds == Counter(raw=17, long=sum(i % 4 for i in range(17)), ja=17)
    assert (data.problems, data.num_skipped) == ([], 0)
    assert data.fingerprint == CaptionData.open(write(tmp_path / "reference", rows, "jsonl")).fingerprint


@pytest.mark.parametrize("data_format", FORMATS)
def test_data_survives_pickling_without_carrying_the_images(tmp_path: Path, data_format: str) -> None:
    data = CaptionData.open(write(tmp_path / "data", records(12), data_format))
    blob = pickle.dumps(data)
    again = pickle.loads(blob)
    assert png(3) not in blob
    assert again.fingerprint == data.fingerprint
    assert again[5] == data[5]
    assert again.image_bytes(5) == data.image_bytes(5)


def test_arrow_view_of_the_captions(tmp_path: Path) -> None:
    data = CaptionData.open(write_jsonl(tmp_path, records(9)))
    for i, sample in enumerate(data):
        span = slice(data.offsets[i], data.offsets[i + 1])
        assert data.texts.to_pylist()[span] == [caption.text for caption in sample.captions]
        assert [data.kind_names[code] for code in data.kind_codes[span]] == [
            caption.kind for caption in sample.captions
        ]
    assert data.offsets.dtype == np.int64
    assert len(data.texts) == len(data.kind_codes) == data.offsets[-1]


def test_indexing(tmp_path: Path) -> None:
    data = CaptionData.open(write_jsonl(tmp_path, records(5)))
    assert data[-1] == data[4] == data[np.int64(4)]
    for index in (5, -6):
        with pytest.raises(IndexError, match="5 rows"):
            data[index]


def test_fingerprint_follows_ids_kinds_texts_and_order(tmp_path: Path) -> None:
    def fingerprint(*rows: tuple[str, dict[str, Any]]) -> str:
        path = tmp_path / "captions.jsonl"
        path.write_text("".join(json.dumps({"id": i, "captions": captions}) + "\n" for i, captions in rows))
        return CaptionData.open(path).fingerprint

    a, b = ("a", {"raw": ["x", "y"]}), ("b", {"raw": ["z"]})
    variants = [
        fingerprint(a, b),
        fingerprint(b, a),
        fingerprint(("A", a[1]), b),
        fingerprint(("a", {"long": ["x", "y"]}), b),
        fingerprint(("a", {"raw": ["xy"]}), b),
        fingerprint(("a", {"raw": ["x"]}), ("b", {"raw": ["y", "z"]})),
        fingerprint(("a", {"raw": ["x", "y"]}), ("b", {"long": ["z"]})),
        fingerprint(("a", {"raw": ["x"], "long": ["y"]}), ("b", {"raw": ["z"]})),
        fingerprint(("a", {"raw": ["x"], "long": ["y"]}), ("b", {"long": ["z"]})),
        fingerprint(a),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint(a, b) == variants[0]


def test_skipped_rows_leave_no_trace_in_the_fingerprint(tmp_path: Path) -> None:
    good = [{"id": "a", "captions": {"raw": "x"}}, {"id": "b", "captions": {"long": "y"}}]
    bad = {"id": "a", "captions": {"long": "z"}}  # a duplicate id
    clean = CaptionData.open(write_jsonl(tmp_path / "clean", good, 0))
    mixed = CaptionData(write_jsonl(tmp_path / "mixed", [good[0], bad, good[1], b"{"], 0))
    assert len(mixed.problems) == 2
    assert mixed.fingerprint == clean.fingerprint


def test_captions_may_be_text_lists_nulls_or_pairs(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "captions": {"raw": "one", "long": ["two", "three"], "de": None}},
        {"id": "2", "captions": [{"kind": "raw", "text": "one"}, {"kind": "raw", "text": "two"}]},
    ]
    data = CaptionData.open(write_jsonl(tmp_path, rows, 0))
    assert data[0] == Sample("1", (Caption("raw", "one"), Caption("long", "two"), Caption("long", "three")))
    assert data[1].captions == (Caption("raw", "one"), Caption("raw", "two"))


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    texts = [
        "word " * 9_999 + "end",
        "喵喵猫",
        "قطة",
        "🐈‍⬛",
        " spaces ",
        "line\nbreak\u2028",
        "e\u0301",
        "\0",
        "</s><image>",
    ]
    data = CaptionData.open(write_jsonl(tmp_path, [{"id": "x", "captions": {"raw": texts}}], 0))
    assert [caption.text for caption in data[0].captions] == texts


def test_rows_without_image_are_text_only(tmp_path: Path) -> None:
    data = CaptionData.open(write_jsonl(tmp_path, [{"id": "x", "captions": {"raw": "a"}}], 0))
    assert not data.has_image(0)
    with pytest.raises(ValueError, match="image of x in .* text only"):
        data.load_image(0)


# Foreign files


@pytest.mark.parametrize("data_format", ["jsonl", "tar", "parquet"])
def test_fields_read_foreign_files(tmp_path: Path, data_format: str) -> None:
    rows = [
        {"key": f"k{i}", "file": f"images/{i % 2}/{i}.png", "raw_caption": f"r{i}", "more": {"sv": [f"s{i}", f"t{i}"]}}
        for i in range(3)
    ]
    fields = {"id": "key", "raw": "raw_caption", "long": "more.sv", "image": "file"}
    root = tmp_path / "data"
    if data_format == "tar":
        write_tar(root / "0.tar", tar_members(rows))
    else:
        write_jsonl(root, rows)
        if data_format == "parquet":
            (root / "captions.jsonl").unlink()
            pq.write_table(pa.Table.from_pylist(rows), root / "data.parquet")
    data = CaptionData.open(root, fields)
    assert data[1] == Sample("k1", (Caption("raw", "r1"), Caption("long", "s1"), Caption("long", "t1")))
    assert data.image_bytes(1) == png(1)


def test_a_field_that_no_row_has_is_named(tmp_path: Path) -> None:
    rows = [{"id": "x", "raw_caption": "a"}]
    with pytest.raises(ValueError, match="no row has the field 'long_captoin'"):
        CaptionData.open(write_jsonl(tmp_path, rows, 0), {"raw": "raw_caption", "long": "long_captoin"})


def test_tar_captions_in_text_members(tmp_path: Path) -> None:
    members = [("a.PNG", png(0)), ("a.TXT", b"ein Bild"), ("b.png", png(1)), ("b.txt", b"two")]
    data = CaptionData.open(write_tar(tmp_path / "0.tar", members), {"raw": "txt"})
    assert [sample.captions[0].text for sample in data] == ["ein Bild", "two"]
    assert data.image_bytes(0) == png(0)


def test_rows_of_tables_without_id_are_numbered(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(0), png(1)], "text": ["a", "b"]}), tmp_path / "data.parquet")
    data = CaptionData.open(tmp_path / "data.parquet", {"raw": "text"})
    assert [sample.id for sample in data] == ["0", "1"]
    assert data.image_bytes(1) == png(1)


def test_changed_parquet_files_are_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    for text in ("before", "after!"):
        pq.write_table(pa.table({"text": [text]}), path)
        assert CaptionData.open(path, {"raw": "text"})[0].captions[0].text == text


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"several splits, \['test', 'train'\]"):
        CaptionData.open(tmp_path, {"raw": "text"})


def test_shards_written_by_webdataset_and_read_as_webdataset_does(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "00000.tar"
    long_key = "d" * 120 + "/" + "k" * 90  # needs an extended header
    with webdataset.TarWriter(str(path)) as writer:
        for i, key in enumerate(["000000", "dir/000001", long_key, "ünï"]):
            writer.write({"__key__": key, "png": png(i), "json": {"captions": {"raw": f"caption {i}"}}})
    data = CaptionData.open(path)
    dataset = webdataset.WebDataset(str(path), shardshuffle=False)
    for i, theirs in enumerate(dataset):
        assert data[i].id == theirs["__key__"]
        assert data.image_bytes(i) == theirs["png"]
        assert data[i].captions[0].text == json.loads(theirs["json"])["captions"]["raw"]
    assert len(data) == 4


# Speed and memory


def test_opening_and_indexing_are_fast(tmp_path: Path) -> None:
    """Targets: 12,000 rows in 0.5 s, 50 us per sample; the bounds leave room for a busy machine."""
    rows = [
        {
            "id": f"s{i}",
            "image": "images/0/0.png",
            "captions": {"raw": ["a cat"], "long": [f"{i} " + "words " * 40] * 4},
        }
        for i in range(12_000)
    ]
    write_jsonl(tmp_path, rows, 1)
    start = time.process_time()
    data = CaptionData.open(tmp_path)
    opened = time.process_time()
    for i in range(0, 12_000, 12):
        data[i]
    read = time.process_time()
    assert opened - start < 1.5
    assert (read - opened) / 1000 < 200e-6
