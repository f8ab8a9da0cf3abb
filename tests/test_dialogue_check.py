"""`llava-bridge check`: everything that is wrong with instruction data is counted and shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_bridge.check import decode_images, main, rows_with
from llava_bridge.dialogues import DialogueData
from llm2clip.cli import run_command

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def row(name: str, *images: str, words: int = 3) -> dict[str, Any]:
    question = {"from": "human", "value": "<image>" * len(images)}
    return {"id": name, "image": list(images), "conversations": [question, {"from": "gpt", "value": "w " * words}]}


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "mix.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        Image.effect_noise((32, 32), 50).save(tmp_path / f"{i}.jpg")
    return tmp_path


@pytest.fixture
def bad_images(root: Path) -> Path:
    (root / "empty.jpg").write_bytes(b"")
    (root / "half.jpg").write_bytes((root / "0.jpg").read_bytes()[:400])
    (root / "text.jpg").write_bytes(b"no image at all")
    Image.new("1", (9500, 9500)).save(root / "huge.png")
    Image.new("RGB", (2, 2)).save(root / "gif.jpg", "GIF")
    Image.new("RGB", (2, 2)).save(root / "other.png")
    images = ["0.jpg", "empty.jpg", "half.jpg", "text.jpg", "huge.png", "gif.jpg", "other.jpg", "gone.jpg", "half.jpg"]
    rows = [row(f"r{i}", image) for i, image in enumerate(images)]
    return write(root, [*rows, row("two", "0.jpg", "empty.jpg"), {"id": "none"}, row("text", words=100)])


EXPECTED = {
    "mix.json[1] (r1)": "zero-byte image",
    "mix.json[2] (r2)": "truncated image",
    "mix.json[3] (r3)": "unreadable image",
    "mix.json[4] (r4)": "image too large",
    "mix.json[7] (r7)": "missing image",
    "mix.json[8] (r8)": "truncated image",
    "mix.json[9] (two)": "zero-byte image",
    "mix.json[10] (none)": "wrong shape",
}


def listed(path: Path) -> dict[str, str]:
    problems = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({problem["where"] for problem in problems}) == len(problems)
    return {problem["where"]: problem["reason"].partition(":")[0] for problem in problems}


@pytest.mark.parametrize("workers", ["1", "3"])
def test_every_problem_is_reported(bad_images: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    report = bad_images.with_name("problems.jsonl")
    with pytest.raises(ValueError, match=r"8 of 12 rows are bad; at most 0\.10% may be"):
        main(["--data", str(bad_images), "--problems", str(report), "--workers", workers])
    assert listed(report) == EXPECTED
    printed = capsys.readouterr().out
    assert "12 rows, 4 of them usable; 7 images below" in printed
    assert "\n8 bad rows" in printed
    for kind, count in (("truncated image", 2), ("zero-byte image", 2), ("missing image", 1), ("wrong shape", 1)):
        assert f"\n       {count} {kind}\n" in printed
    assert "mix.json[1] (r1): zero-byte image: the file is empty, in empty.jpg\n" in printed
    assert "gif.jpg is GIF\n" in printed
    assert "other.jpg -> other.png\n" in printed


def test_good_data(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [["0.jpg"], ["1.jpg"], ["2.jpg", "0.jpg"], []]
    rows = [row(f"r{i}", *images[i % 4], words=i + 1) for i in range(40)]
    report = root / "problems.jsonl"
    report.write_text("of an earlier check\n")
    main(["--data", str(write(root, rows)), "--problems", str(report)])
    assert report.read_text() == ""
    printed = capsys.readouterr().out
    assert "40 rows, 40 of them usable; 3 images below" in printed
    assert "\n0 bad rows\n" in printed
    assert "Used all the same" not in printed
    table = {name.strip(): numbers.split() for name, numbers in re.findall(r"^([a-z ]{16})([\d ]+)$", printed, re.M)}
    # Words are those of the answers, and one for the placeholders of an image row: they hang together.
    assert table["one image"] == ["20", "2", "19", "35", "39", "39"]
    assert table["several images"] == ["10", "4", "20", "36", "40", "40"]
    assert table["text only"] == ["10", "4", "20", "36", "40", "40"]
    histogram = [(int(a), int(b), int(n)) for a, b, n in re.findall(r"^ *(\d+) - *(\d+) +(\d+)", printed, re.M)]
    words = [i + 1 + (i % 4 != 3) for i in range(40)]
    assert histogram == [(2**e, 2 ** (e + 1) - 1, sum(2**e <= n < 2 ** (e + 1) for n in words)) for e in range(1, 6)]


def test_images_are_only_looked_for(bad_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bad_images.with_name("problems.jsonl")
    main(["--data", str(bad_images), "--problems", str(report), "--decode", "false", "--max_bad_fraction", "0.2"])
    assert set(listed(report).values()) == {"missing image", "wrong shape"}
    assert "Images were not decoded" in capsys.readouterr().out


def test_images_in_another_folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("json"), [row("a", "0.jpg")])
    main(["--data", str(path), "--image_root", str(root)])
    with pytest.raises(ValueError, match="1 of 1 rows are bad"):
        main(["--data", str(path)])


def test_no_row_is_usable(root: Path) -> None:
    with pytest.raises(ValueError, match="1 of 1 rows are bad"):
        main(["--data", str(write(root, [0])), "--max_bad_fraction", "1"])
    with pytest.raises(ValueError, match="no rows"):
        main(["--data", str(write(root, []))])


def test_a_jpeg_with_more_pictures_is_a_jpeg(root: Path) -> None:
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    pictures[0].save(root / "camera.jpg", "MPO", save_all=True, append_images=pictures[1:])
    data = DialogueData(write(root, [row("a", "camera.jpg")]))
    report = decode_images(data)
    assert (report.bad, report.misnamed) == ({}, {})


def test_one_problem_for_a_row(root: Path) -> None:
    data = DialogueData(write(root, [row("a", "0.jpg", "1.jpg"), row("b", "2.jpg")]))
    assert [tuple(problem) for problem in rows_with(data, {"0.jpg": "bad: x", "1.jpg": "bad: y"})] == [
        ("mix.json[0] (a)", "bad: x, in 0.jpg")
    ]


def test_exit_codes(bad_images: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = root / "good.json"
    good.write_text(json.dumps([row("a", "0.jpg")]))
    for path, code in ((good, 0), (bad_images, 2), (root / "nowhere.json", 2)):
        assert run_command("llava_bridge.check", ["--data", str(path)]) == code
    assert "nowhere.json: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
