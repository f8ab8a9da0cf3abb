"""`llm2clip data check`: every problem is printed, counted and written to the report."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from llm2clip.cli import COMMANDS, dispatch
from llm2clip.data_check import main


def write_data(root: Path, images: dict[str, bytes | Image.Image], lines: tuple[bytes, ...] = ()) -> Path:
    (root / "images").mkdir(parents=True)
    rows = list(lines)
    for name, image in images.items():
        path = root / "images" / name
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path)
        rows.append(
            json.dumps({"id": path.stem, "image": f"images/{name}", "captions": {"raw": "a", "de": "ein"}}).encode()
        )
    (root / "captions.jsonl").write_bytes(b"\n".join(rows))
    return root


def good_image() -> Image.Image:
    return Image.effect_noise((32, 32), 50).convert("RGB")


def truncated(folder: Path, name: str) -> bytes:
    good_image().save(folder / name)
    data = (folder / name).read_bytes()
    return data[: len(data) // 2]


@pytest.fixture
def bad_data(tmp_path: Path) -> Path:
    images = {
        "good.png": good_image(),
        "half.jpg": truncated(tmp_path, "half.jpg"),
        "part.png": truncated(tmp_path, "part.png"),
        "text.png": b"not an image",
        "empty.png": b"",
    }
    lines = (
        b'{"id": "nothing", "captions": {"raw": "  "}}',
        b'{"id": "gone", "image": "images/gone.png", "captions": {"raw": "a"}}',
        b"{",
    )
    return write_data(tmp_path / "data", images, lines)


EXPECTED = {
    "captions.jsonl:1 (nothing)": "empty caption",
    "captions.jsonl:1": "no caption",
    "captions.jsonl:2": "missing image",
    "captions.jsonl:3": "not JSON",
    "half (images/half.jpg)": "truncated image",
    "part (images/part.png)": "truncated image",
    "text (images/text.png)": "unreadable image",
    "empty (images/empty.png)": "zero-byte image",
}


def test_good_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_data(tmp_path / "data", {"a.png": good_image(), "b.jpg": good_image()})
    report = tmp_path / "report.jsonl"
    main([str(root), "--report", str(report)])
    assert "2 usable rows, 0 skipped; captions: 2 raw, 2 de" in capsys.readouterr().out
    assert report.read_text() == ""


@pytest.mark.parametrize("workers", ["1", "3"])
def test_every_problem_is_reported(
    bad_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    report = tmp_path / "report.jsonl"
    with pytest.raises(ValueError, match="8 problems"):
        main([str(bad_data), "--report", str(report), "--workers", workers])
    printed = capsys.readouterr().out
    problems = [json.loads(line) for line in report.read_text().splitlines()]
    assert {problem["where"]: problem["kind"] for problem in problems} == EXPECTED
    for problem in problems:
        assert f"{problem['where']}: {problem['reason']}\n" in printed
        assert problem["reason"].startswith(f"{problem['kind']}: ")
    for kind, count in Counter(EXPECTED.values()).items():
        assert f"       {count} {kind}\n" in printed


def test_data_without_a_usable_row_is_still_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_data(tmp_path / "data", {}, (b"[]", b'{"id": 1}'))
    with pytest.raises(ValueError, match="2 problems"):
        main([str(root)])
    assert capsys.readouterr().out.count("wrong shape: ") == 2
    (root / "captions.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="no rows"):
        main([str(root)])


def test_cut_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_data(tmp_path / "data", {f"{i}.png": good_image() for i in range(3)})
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(3):
            (tmp_path / "row.json").write_text('{"captions": {"raw": "a"}}')
            tar.add(tmp_path / "row.json", f"{i}.json")
            tar.add(root / f"images/{i}.png", f"{i}.png")
    with tarfile.open(path) as tar:
        third = tar.getmembers()[5].offset_data
    path.write_bytes(path.read_bytes()[: third + 100])
    with pytest.raises(ValueError, match="1 problems"):
        main([str(path)])
    printed = capsys.readouterr().out
    assert "shard.tar: truncated tar: " in printed
    assert "2 usable rows, 1 skipped" in printed


def test_foreign_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"key": "1", "alt": "a cat"}\n')
    main([str(tmp_path / "x.jsonl"), "--fields", "id=key", "raw=alt"])
    assert "1 usable rows, 0 skipped; captions: 1 raw" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path / "x.jsonl"), "--fields", "raw"])
    assert exit_info.value.code == 2
    assert "'raw' is not KIND=FIELD" in capsys.readouterr().err


def test_command_exit_codes(bad_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_data(tmp_path / "good", {"a.png": good_image()})
    for path, code in ((good, 0), (bad_data, 2), (tmp_path / "nowhere", 2)):
        assert dispatch("llm2clip", COMMANDS, ["data", "check", str(path)]) == code
    assert "nowhere does not exist" in capsys.readouterr().err
