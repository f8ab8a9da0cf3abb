"""Bad rows are named and the rest is used, and nothing outside the data's folder is read."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_files import png, records, tar_members, write_jsonl, write_tar

from llm2clip.caption_data import Caption, CaptionData, Sample

pytestmark = pytest.mark.usefixtures("datasets_cache")


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
