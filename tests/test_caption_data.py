"""The four formats read the same, bad rows are named, and nothing outside the data's folder is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llm2clip.caption_data import Caption, CaptionData, Sample

COLOURS = [(10 * i, 255 - 10 * i, 7 * i) for i in range(24)]
FORMATS = ["jsonl", "tar", "parquet", "save_to_disk"]


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), COLOURS[index % len(COLOURS)]).save(buffer, "PNG")
    return buffer.getvalue()


def records(num_rows: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"s{i}",
            "image": f"images/{i % 2}/{i}.png",
            "captions": {
                "raw": [f"thing {i}"],
                "long": [f"a long caption {i}, part {j}" for j in range(i % 4)],
                "ja": ["絵文字"],
            },
        }
        for i in range(num_rows)
    ]


def write_jsonl(root: Path, rows: list[Any], num_images: int | None = None) -> Path:
    """Write rows (objects, or lines as bytes) and the images of `records`."""
    for i in range(len(rows) if num_images is None else num_images):
        image = root / f"images/{i % 2}/{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(png(i))
    root.mkdir(exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (root / "captions.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tar_members(rows: list[dict[str, Any]]) -> list[tuple[str, bytes]]:
    members = []
    for i, row in enumerate(rows):
        members += [(f"{i:04d}.json", json.dumps(row).encode()), (f"{i:04d}.png", png(i))]
    return members


def write(root: Path, rows: list[dict[str, Any]], data_format: str) -> Path:
    if data_format == "jsonl":
        return write_jsonl(root, rows)
    if data_format == "tar":
        members = tar_members(rows)
        for shard, start in enumerate(range(0, len(members), 10)):
            write_tar(root / f"{shard:05d}.tar", members[start : start + 10])
        return root
    columns = {name: [row[name] for row in rows] for name in ("id", "captions")}
    images = [{"bytes": png(i), "path": None} for i in range(len(rows))]
    data = datasets.Dataset.from_dict({**columns, "image": images}).cast_column("image", datasets.Image())
    if data_format == "save_to_disk":
        data.save_to_disk(root)
        return root
    root.mkdir()
    for shard in range(2):
        data.shard(2, shard, contiguous=True).to_parquet(root / f"train-{shard:05d}-of-00002.parquet")
    return root


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


# What is wrong is named, and the rest is used


def problem_of(tmp_path: Path, row: Any, **options: Any) -> str:
    """Open one bad row between two good ones; returns what is said about it."""
    good = records(2)
    data = CaptionData.open(write_jsonl(tmp_path, [good[0], row, good[1]], 2), max_bad_fraction=0.5, **options)
    assert [sample.id for sample in data] == ["s0", "s1"]
    assert [data.image_bytes(i) for i in range(2)] == [png(0), png(1)]
    (problem,) = data.problems
    assert problem.where.startswith("captions.jsonl:2")
    assert data.num_skipped == 1
    return problem.reason


CAPTIONS = {"raw": "a"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b"\xff\xfe{\x00}\x00", "not UTF-8: "),
        (b'{"id": "x", "captions": {"raw": "caf\xe9"}}', "not UTF-8: "),
        (b'{"id": "x", "captions": {"raw": "\\ud800"}}', "not UTF-8: "),
        (b'{"id": "\\ud800", "captions": {"raw": "a"}}', "not UTF-8: "),
        ([1, 2], "wrong shape: expected a JSON object, got list"),
        (None, "wrong shape: expected a JSON object, got NoneType"),
        ({"id": "x"}, 'wrong shape: "captions" must be'),
        ({"id": "x", "captions": "a"}, 'wrong shape: "captions" must be'),
        ({"id": "x", "captions": ["a"]}, 'wrong shape: "captions" must be'),
        ({"id": "x", "captions": [{"text": "a"}]}, 'wrong shape: "captions" must be'),
        ({"id": "x", "captions": {"raw": 3}}, "wrong shape: a caption must be text, got 3 for kind 'raw'"),
        ({"id": "x", "captions": {"raw": ["a", ["b"]]}}, "wrong shape: a caption must be text, got ['b']"),
        ({"id": "x", "captions": {"": "a"}}, "wrong shape: a caption must be text"),
        ({"id": "x", "captions": [{"kind": None, "text": "a"}]}, "wrong shape: a caption must be text"),
        ({"captions": CAPTIONS}, "wrong shape: 'id' must be text"),
        ({"id": "", "captions": CAPTIONS}, "wrong shape: 'id' must be text"),
        ({"id": True, "captions": CAPTIONS}, "wrong shape: 'id' must be text"),
        ({"id": 1.5, "captions": CAPTIONS}, "wrong shape: 'id' must be text"),
        ({"id": "x", "captions": {}}, "no caption: "),
        ({"id": "x", "captions": []}, "no caption: "),
        ({"id": "x", "captions": {"raw": []}}, "no caption: "),
        ({"id": "x", "captions": {"raw": None}}, "no caption: "),
        ({"id": "s0", "captions": CAPTIONS}, "duplicate id: 's0'"),
        ({"id": "x", "image": 7, "captions": CAPTIONS}, "wrong shape: image must be a path"),
        ({"id": "x", "image": "", "captions": CAPTIONS}, "wrong shape: image must be a path"),
        ({"id": "x", "image": "images/0/none.png", "captions": CAPTIONS}, "missing image: "),
        ({"id": "x", "image": "nowhere/none.png", "captions": CAPTIONS}, "missing image: "),
        ({"id": "x", "image": "captions.jsonl/a.png", "captions": CAPTIONS}, "missing image: "),
        ({"id": "x", "image": "images/0", "captions": CAPTIONS}, "missing image: "),
        ({"id": "x", "image": "../other.png", "captions": CAPTIONS}, "unsafe path: "),
        ({"id": "x", "image": "images/../../other.png", "captions": CAPTIONS}, "unsafe path: "),
        ({"id": "x", "image": "/etc/hostname", "captions": CAPTIONS}, "unsafe path: "),
        ({"id": "x", "image": "a\0b.png", "captions": CAPTIONS}, "unsafe path: "),
    ],
)
def test_bad_rows_are_skipped_and_named(tmp_path: Path, row: Any, reason: str) -> None:
    assert problem_of(tmp_path, row).startswith(reason)


@pytest.mark.parametrize("empty", ["", " ", "\n\t ", "\u3000\u00a0"])
def test_empty_captions_are_left_out(tmp_path: Path, empty: str) -> None:
    rows = [{"id": "x", "captions": {"raw": [empty, "a"], "long": empty}}, {"id": "y", "captions": {"raw": empty}}]
    data = CaptionData.open(write_jsonl(tmp_path, rows, 0), max_bad_fraction=0.5)
    assert list(data) == [Sample("x", (Caption("raw", "a"),))]
    assert [problem.kind for problem in data.problems] == ["empty caption"] * 3 + ["no caption"]
    assert data.problems[0].where == "captions.jsonl:1 (x)"
    assert data.num_skipped == 1


def test_blank_lines_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in records(3)]
    write_jsonl(tmp_path, records(3))
    (tmp_path / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["\r\n".join(lines), " ", ""]).encode())
    data = CaptionData.open(tmp_path)
    assert (len(data), data.problems) == (3, [])


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/9.png").write_bytes(png(9))
    root = write_jsonl(tmp_path / "data", records(2))
    os.symlink(tmp_path / "secret/9.png", root / "file.png")
    os.symlink(tmp_path / "secret", root / "folder")
    os.symlink(root / "images/0/0.png", root / "inside.png")
    paths = ["file.png", "folder/9.png", "inside.png"]
    write_jsonl(root, [{"id": path, "image": path, "captions": CAPTIONS} for path in paths], 2)
    data = CaptionData.open(root, max_bad_fraction=1)
    assert [sample.id for sample in data] == ["inside.png"]
    assert data.image_bytes(0) == png(0)
    assert [(problem.where, problem.kind) for problem in data.problems] == [
        ("captions.jsonl:1", "unsafe path"),
        ("captions.jsonl:2", "unsafe path"),
    ]


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data", records(2))
    os.symlink(tmp_path / "data", tmp_path / "link")
    assert CaptionData.open(tmp_path / "link").image_bytes(1) == png(1)


def test_bad_rows_of_tables(tmp_path: Path) -> None:
    texts = [b"good", b"caf\xe9", b"fine"]
    column = pa.array(texts, pa.binary()).view(pa.string())  # unchecked, as in files that others wrote
    images = pa.array(
        [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}, {"bytes": None, "path": "../x.png"}]
    )
    pq.write_table(pa.table({"text": column, "image": images}), tmp_path / "data.parquet")
    data = CaptionData.open(tmp_path, {"raw": "text"}, max_bad_fraction=0.7)
    assert list(data) == [Sample("0", (Caption("raw", "good"),))]
    assert [(problem.where, problem.kind) for problem in data.problems] == [
        ("row 1", "not UTF-8"),
        ("row 2", "unsafe path"),
    ]


def test_image_column_of_another_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "image": [3]}), tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="column 'image' has type int64"):
        CaptionData.open(tmp_path, {"raw": "text"})


# Tars


def test_a_tar_cut_anywhere_keeps_the_samples_before_the_cut(tmp_path: Path) -> None:
    rows = records(6)
    whole = write_tar(tmp_path / "whole.tar", tar_members(rows)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar][1::2]
    for cut in [*range(1, ends[-1] + 512, 256), ends[0] - 1, ends[0] + 1, ends[-1]]:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        data = CaptionData(path)
        assert [sample.id for sample in data] == [row["id"] for row in rows[: sum(end <= cut for end in ends)]]
        assert "truncated tar" in {problem.kind for problem in data.problems}, cut
        for i in range(len(data)):
            assert data.image_bytes(i) == png(i)


def test_a_damaged_tar_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", tar_members(records(4)))
    with tarfile.open(path) as tar:
        header = tar.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[header + 150] ^= 0xFF  # in the checksum
    path.write_bytes(content)
    data = CaptionData(path)
    assert len(data) == 2
    assert [(problem.where, problem.kind) for problem in data.problems] == [("0.tar", "truncated tar")]


def test_a_shard_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", tar_members(records(2)))
    data = CaptionData.open(path)
    os.truncate(path, 1600)
    with pytest.raises(ValueError, match="image of s1 .*truncated tar"):
        data.load_image(1)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ([("../x.png", png(0)), ("../x.json", b"{}")], "unsafe path"),
        ([("/x.png", png(0)), ("/x.json", b"{}")], "unsafe path"),
        ([("a/../x.png", png(0)), ("a/../x.json", b"{}")], "unsafe path"),
        ([link("x.png", "/etc/passwd"), ("x.json", b"{}")], "unsafe path"),
        ([link("x.png", "0000.png", tarfile.LNKTYPE), ("x.json", b"{}")], "unsafe path"),
        ([("x.json", b"{}")], "missing image"),
        ([("x.png", png(0)), ("x.jpg", png(0)), ("x.json", b"{}")], "several images"),
        ([("x.png", png(0)), ("x.png", png(1)), ("x.json", b"{}")], "several images"),
        ([("x.png", png(0))], "wrong shape"),
        ([("x.png", png(0)), ("x.json", b"[]")], "wrong shape"),
        ([("x.png", png(0)), ("x.json", b"\xff")], "not UTF-8"),
        ([("x.png", png(0)), ("x.json", b"")], "not JSON"),
    ],
)
def test_bad_samples_of_tars(tmp_path: Path, members: list[Any], kind: str) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for member in [*tar_members(records(1)), *members, *[(f"z/{n}", c) for n, c in tar_members(records(2))[2:]]]:
            name, content = (member.name, b"") if isinstance(member, tarfile.TarInfo) else member
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = CaptionData.open(path, max_bad_fraction=0.5)
    assert [sample.id for sample in data] == ["s0", "s1"]
    assert [problem.kind for problem in data.problems] == [kind]


def test_duplicate_keys_over_shards(tmp_path: Path) -> None:
    rows = [{"captions": CAPTIONS}]
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", tar_members(rows))
    data = CaptionData.open(tmp_path, max_bad_fraction=0.5)
    assert len(data) == 1
    assert data.problems[0] == ("1.tar/0000", "duplicate id: '0000'")


# When opening fails


def test_too_many_bad_rows(tmp_path: Path) -> None:
    rows: list[Any] = records(97) + [b"{"] * 3
    root = write_jsonl(tmp_path, rows)
    with pytest.raises(ValueError, match=r"3 of 100 rows skipped \(3 not JSON\).*captions.jsonl:98.*data check"):
        CaptionData.open(root)
    with pytest.raises(ValueError, match="3 of 100 rows"):
        CaptionData.open(root, max_bad_fraction=0.029)
    assert len(CaptionData.open(root, max_bad_fraction=0.03)) == 97


def test_skipped_rows_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CaptionData.open(write_jsonl(tmp_path, [*records(2), b"{"]), max_bad_fraction=0.5)
    assert "1 of 3 rows skipped (1 not JSON)" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{\n"])
def test_nothing_usable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "captions.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="rows"):
        CaptionData.open(tmp_path, max_bad_fraction=1)


def test_unknown_formats_and_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CaptionData.open(tmp_path / "nowhere")
    (tmp_path / "shard.tar.gz").write_bytes(b"")
    for path in (tmp_path, tmp_path / "shard.tar.gz"):
        with pytest.raises(ValueError, match="expected captions.jsonl"):
            CaptionData.open(path)


def test_undecodable_image_names_the_row(tmp_path: Path) -> None:
    root = write_jsonl(tmp_path, records(3))
    (root / "images/1/1.png").write_bytes(b"")
    (root / "images/0/2.png").unlink()
    data = CaptionData(root)
    with pytest.raises(ValueError, match="image of s1 .images/1/1.png. in .*: zero-byte image"):
        data.load_image(1)
    assert [problem.kind for problem in data.problems] == ["missing image"]


def test_image_deleted_after_opening(tmp_path: Path) -> None:
    data = CaptionData.open(write_jsonl(tmp_path, records(1)))
    (tmp_path / "images/0/0.png").unlink()
    with pytest.raises(ValueError, match="image of s0 .* in .*: missing image"):
        data.load_image(0)


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
