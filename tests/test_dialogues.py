"""LLaVA's instruction data: what is read, what is put right, and what is left out and why."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import tiny_tokenizer

from llava_bridge import dialogue_sources
from llava_bridge.dialogues import TURN_TOKENS, Dialogue, DialogueData, Turn


def turns(*texts: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def row(*texts: Any, **other: Any) -> dict[str, Any]:
    return {"id": "r", "conversations": turns(*texts), **other}


GOOD = [
    row("<image>\nWhat is it?", "A cat.", id="a", image="coco/1.jpg", model="gpt-4"),
    row("Hi", "Hello", "And?", "That is all.", id="b"),
    row("<image> or <image>?", "The first.", id="c", image=["coco/1.jpg", "2.png"]),
    row("Compare\n<image>", "With what?", "With <image>", "Larger.", id="d", images=["2.png", "coco/1.jpg"]),
]
READ = [
    Dialogue("a", ("coco/1.jpg",), (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat."))),
    Dialogue(
        "b",
        (),
        (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "And?"), Turn("assistant", "That is all.")),
    ),
    Dialogue("c", ("coco/1.jpg", "2.png"), (Turn("user", "<image> or <image>?"), Turn("assistant", "The first."))),
    Dialogue(
        "d",
        ("2.png", "coco/1.jpg"),
        (
            Turn("user", "Compare\n<image>"),
            Turn("assistant", "With what?"),
            Turn("user", "With <image>"),
            Turn("assistant", "Larger."),
        ),
    ),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    Image.new("RGB", (4, 3), (200, 0, 0)).save(folder / "coco/1.jpg")
    Image.new("RGB", (2, 2), (0, 0, 200)).save(folder / "2.png")
    return folder


def write(root: Path, rows: list[Any], suffix: str = ".json", name: str = "mix") -> Path:
    path = root / f"{name}{suffix}"
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
    path.write_bytes(b"\n".join(lines) if suffix == ".jsonl" else b"[" + b",\n".join(lines) + b"]\n")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_what_is_read(root: Path, suffix: str) -> None:
    data = DialogueData.open(write(root, GOOD, suffix))
    assert len(data) == data.num_rows == 4
    assert list(data) == READ
    assert data[-1] == READ[3]
    assert data.images_of(2) == ("coco/1.jpg", "2.png")
    assert data.image_paths() == ["2.png", "coco/1.jpg"]
    assert data.num_images.tolist() == [1, 0, 2, 2]
    assert data.describe(1) == ("mix.json[1] (b)" if suffix == ".json" else "mix.jsonl:2 (b)")
    assert (data.problems, dict(data.notes), data.resolved) == ([], {}, {})
    for index in (4, -5):
        with pytest.raises(IndexError):
            data[index]
    assert list(pickle.loads(pickle.dumps(data))) == READ  # what DataLoader workers get


def test_images_may_be_in_another_folder(root: Path, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert len(DialogueData.open(path, root)) == 4
    assert len(DialogueData(path)) == 1  # the text-only row: the file's own folder has no images
    with pytest.raises(FileNotFoundError, match="image_root .*nowhere is not a folder"):
        DialogueData.open(path, root / "nowhere")
    with pytest.raises(FileNotFoundError, match="none.json: no such file"):
        DialogueData.open(root / "none.json")


def test_pretty_printed_json_is_read_whatever_the_size_of_a_piece(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "mix.json"
    path.write_text("\ufeff " + json.dumps([*GOOD, row('ü\\"]', "絵文字 😀", id=12)], indent=2, ensure_ascii=False))
    expected = [*READ, Dialogue("12", (), (Turn("user", 'ü\\"]'), Turn("assistant", "絵文字 😀")))]
    for size in (2, 3, 7, 64, 1 << 22):
        monkeypatch.setattr(dialogue_sources, "_READ_CHARACTERS", size)
        assert list(DialogueData.open(path)) == expected


PUT_RIGHT = {
    "leading answer dropped": (
        {"image": "2.png", "conversations": turns("", "Hello <image>.", "Hi <image>", "Yes?")[1:]},
        ["Hi <image>", "Yes?"],
    ),
    "placeholders merged": (
        row("Is <image>this <image>", "No.", "Sure?", "Yes.", image="2.png"),
        ["<image>\nIs this", "No.", "Sure?", "Yes."],
    ),
    "placeholder added": (
        row(" What? ", "A cat.", "Sure?", "Yes.", image="2.png"),
        ["<image>\nWhat?", "A cat.", "Sure?", "Yes."],
    ),
}


@pytest.mark.parametrize("note", PUT_RIGHT)
def test_what_is_put_right(root: Path, note: str) -> None:
    record, texts = PUT_RIGHT[note]
    data = DialogueData.open(write(root, [GOOD[0], record]))
    assert [turn.text for turn in data[1].turns] == texts
    assert data[1].turns[0].role == "user"
    assert dict(data.notes) == {note: 1}


def test_placeholders_alone_in_a_turn(root: Path) -> None:
    data = DialogueData.open(
        write(root, [row("<image><image>", "A cat.", image="2.png"), row("", "B.", id=1, image="2.png")])
    )
    assert [dialogue.turns[0].text for dialogue in data] == ["<image>", "<image>"]


def test_ids(root: Path) -> None:
    """Official ids repeat; they name rows and nothing else."""
    rows = [row("a", "b", id=7), row("c", "d", id="7"), row("e", "f", id=None), row("g", "h", id="7")]
    data = DialogueData.open(write(root, rows))
    assert [dialogue.id for dialogue in data] == ["7", "7", "2", "7"]
    assert dict(data.notes) == {"repeated id": 2}


def test_null_is_no_image(root: Path) -> None:
    rows = [row("a", "b", id=i, **images) for i, images in enumerate([{"image": None}, {"images": []}])]
    assert DialogueData.open(write(root, rows)).num_images.tolist() == [0, 0]


BAD = {
    "a number": (3, "wrong shape: expected "),
    "a list": ([GOOD[0]], "wrong shape: expected "),
    "no conversations": ({"id": "r"}, 'wrong shape: "conversations"'),
    "empty conversations": (row(), 'wrong shape: "conversations"'),
    "conversations are text": ({"id": "r", "conversations": "Hi"}, 'wrong shape: "conversations"'),
    "turn is text": ({"id": "r", "conversations": ["Hi", "Hello"]}, "wrong shape: turn 0"),
    "value is a number": (row("a", 5), "wrong shape: turn 1"),
    "value is missing": ({"id": "r", "conversations": [{"from": "human"}]}, "wrong shape: turn 0"),
    "id is a list": (row("a", "b", id=[1]), 'wrong shape: "id"'),
    "id is true": (row("a", "b", id=True), 'wrong shape: "id"'),
    "image is a number": (row("<image>", "b", image=1), 'wrong shape: "image"'),
    "image is empty": (row("<image>", "b", image=""), 'wrong shape: "image"'),
    "image list holds null": (row("<image>", "b", image=[None]), 'wrong shape: "image"'),
    "image and images": (row("<image>", "b", image="2.png", images=["2.png"]), 'wrong shape: "image"'),
    "unknown role": ({"conversations": [{"from": "system", "value": "x"}, *turns("a", "b")]}, "unknown role: "),
    "two questions": ({"id": "r", "conversations": [*turns("a"), *turns("b", "c")]}, "wrong role order: "),
    "two answers": ({"id": "r", "conversations": [*turns("a", "b"), turns("a", "c")[1]]}, "wrong role order: "),
    "two leading answers": (
        {"id": "r", "conversations": [turns("", "a")[1], turns("", "b")[1], *turns("c", "d")]},
        "wrong role order: ",
    ),
    "no answer": (row("a"), "no answer: "),
    "no answer at the end": (row("a", "b", "c"), "no answer: "),
    "only an answer": ({"id": "r", "conversations": turns("", "b")[1:]}, "no answer: "),
    "blank answer": (row("a", "b", "c", " \n"), "no answer: "),
    "missing image": (row("<image>", "b", image="coco/3.jpg"), "missing image: 'coco/3.jpg'"),
    "missing folder": (row("<image>", "b", image="vg/3.jpg"), "missing image: 'vg/3.jpg'"),
    "folder": (row("<image>", "b", image="coco"), "missing image: 'coco'"),
    "image in the row": (row("<image>", "b", image="QUJD" * 100 + "/" + "QUJD" * 100), "missing image: "),
    "second image missing": (row("<image><image>", "b", image=["2.png", "3.png"]), "missing image: '3.png'"),
    "parent": (row("<image>", "b", image="../images/2.png"), "unsafe path: "),
    "parent below": (row("<image>", "b", image="coco/../2.png"), "unsafe path: "),
    "absolute": (row("<image>", "b", image="/etc/passwd"), "unsafe path: "),
    "linked file": (row("<image>", "b", image="link.png"), "unsafe path: "),
    "linked folder": (row("<image>", "b", image="linked/x.png"), "unsafe path: "),
    "placeholder without image": (row("<image> a", "b"), "placeholder mismatch: 1 <image> for 0 images"),
    "one image in two turns": (
        row("<image> a", "b", "<image>", "c", image="2.png"),
        "placeholder mismatch: 2 <image> for 1 images",
    ),
    "too few": (row("<image> a", "b", image=["2.png", "coco/1.jpg"]), "placeholder mismatch: 1 <image> for 2"),
    "none for two": (row("a", "b", image=["2.png", "coco/1.jpg"]), "placeholder mismatch: 0 <image> for 2"),
    "too many": (row("<image>" * 3, "b", image=["2.png", "coco/1.jpg"]), "placeholder mismatch: 3 <image> for 2"),
    "placeholder in an answer": (row("<image> a", "It is <image>", image="2.png"), "placeholder in answer: "),
    "placeholder in the answer only": (row("a", "It is <image>", image="2.png"), "placeholder in answer: "),
    "lone surrogate": (row("\ud800", "b"), "not UTF-8: "),
    "lone surrogate in the id": (row("a", "b", id="\ud800"), "not UTF-8: "),
    "bytes": (b'{"id": "r", "conversations": [{"from": "human", "value": "\xff"},'
              b'{"from": "gpt", "value": "b"}]}', "not UTF-8: "),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_left_out(root: Path, tmp_path: Path, case: str, suffix: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (2, 2)).save(outside / "x.png")
    (root / "link.png").symlink_to(outside / "x.png")
    (root / "linked").symlink_to(outside)
    record, reason = BAD[case]
    data = DialogueData(write(root, [GOOD[0], record, GOOD[1]], suffix))
    assert list(data) == READ[:2]
    assert data.num_rows == 3
    (problem,) = data.problems
    assert problem.reason.startswith(reason)
    assert problem.where.startswith("mix.json[1]" if suffix == ".json" else "mix.jsonl:2")
    f"{problem.where} {problem.reason}".encode()  # can be printed
    assert not data.notes
    assert data.describe(1).startswith("mix.json[2]" if suffix == ".json" else "mix.jsonl:3")


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "link.png").symlink_to(root / "2.png")
    assert len(DialogueData.open(write(root, [row("<image>", "b", image="link.png")]))) == 1


def test_a_line_that_is_no_json(root: Path) -> None:
    data = DialogueData(write(root, [b"{", GOOD[1], b"", b"\xff\xfe"], ".jsonl"))
    assert list(data) == READ[1:2]
    assert [(problem.where, problem.kind) for problem in data.problems] == [
        ("mix.jsonl:1", "not JSON"),
        ("mix.jsonl:4", "not UTF-8"),
    ]


WHOLE_FILE = {
    "cut off in a row": (lambda text: text[:150], "not JSON: element 0, .*cut off"),
    "cut off after a row": (lambda text: text[: text.rindex("]")], "not JSON: element 3, .*cut off"),
    "an object": (lambda text: json.dumps({"data": json.loads(text)}), "expected a JSON list"),
    "JSON lines": (lambda text: "\n".join(map(json.dumps, json.loads(text))), ".*JSON lines ends in .jsonl"),
    "empty": (lambda text: "", "expected a JSON list"),
    "more after the end": (lambda text: text + "[]", r"not JSON: after the end of the list there is '\[\]'"),
    "no comma": (lambda text: text.replace("},\n{", "}\n{", 1), "not JSON: element 0, .*expected , or ]"),
    "comma at the end": (lambda text: text.strip()[:-1] + ",]", "not JSON: element 4"),
    "too deep": (lambda text: "[" * 100_000, "not JSON: element 0"),
    "no rows": (lambda text: " [ ] ", "no rows"),
}


@pytest.mark.parametrize("case", WHOLE_FILE)
def test_files_that_are_no_list(root: Path, case: str) -> None:
    change, message = WHOLE_FILE[case]
    path = write(root, GOOD)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"mix.json: {message}"):
        DialogueData.open(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_too_much_is_bad(root: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*GOOD * 4, row("a", id="x"), row("b", id="y"), row("<image>", "c", id="z", image="gone.jpg"), 0]
    path = write(root, rows, suffix)
    with pytest.raises(ValueError, match="4 of 20 rows skipped: 2 no answer, 1 missing image, 1 wrong shape") as error:
        DialogueData.open(path)
    for part in ("(x): no answer", "(y): no answer", "(z): missing image: 'gone.jpg'", "At most 0.10%", "image_root"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="4 of 20"):
        DialogueData.open(path, max_bad_fraction=0.19)
    assert len(DialogueData.open(path, max_bad_fraction=0.2)) == 16
    assert "4 of 20 rows skipped" in caplog.text


def test_nothing_usable(root: Path) -> None:
    with pytest.raises(ValueError, match="1 of 1 rows skipped"):
        DialogueData.open(write(root, [row("a")]), max_bad_fraction=1.0)
    with pytest.raises(ValueError, match="no rows"):
        DialogueData.open(write(root, [], ".jsonl"))


def test_image_with_another_extension(root: Path) -> None:
    Image.new("RGB", (1, 1)).save(root / "coco/7.png")
    Image.new("RGB", (1, 1)).save(root / "v1.gif")
    Image.new("RGB", (1, 1)).save(root / "8.JPG", "JPEG")
    asked = ["coco/7.jpg", "v1.jpg", "8.jpg", "coco/7.jpg", "2.png"]
    data = DialogueData.open(write(root, [row("<image>", "a", id=i, image=path) for i, path in enumerate(asked)]))
    assert [dialogue.images[0] for dialogue in data] == ["coco/7.png", "v1.gif", "8.JPG", "coco/7.png", "2.png"]
    assert data.resolved == {"coco/7.jpg": "coco/7.png", "v1.jpg": "v1.gif", "8.jpg": "8.JPG"}
    assert dict(data.notes) == {"image with another extension": 4}
    assert data.read_image(data[0].images[0]).size == (1, 1)


def test_no_guess_among_several_extensions(root: Path) -> None:
    for name in ("9.png", "9.gif"):
        Image.new("RGB", (1, 1)).save(root / name)
    (root / "10.txt").write_text("no image")
    data = DialogueData(write(root, [row("<image>", "a", id=i, image=f"{i}.jpg") for i in (9, 10)]))
    several, none = data.problems
    assert several.reason.endswith("; there are 9.gif, 9.png")
    assert none.kind == "missing image"
    assert not data.resolved


def test_lengths(root: Path) -> None:
    """Words of all turns as in the file (LLaVA's `modality_lengths`); tokens of the turns that are used."""
    rows = [
        row("<image>\nWhat  is it?", "A cat.", id=0, image="2.png"),
        row("ü 😀", "b\nc", id=1),
        row("Is it <image> this <image>?", "No.", id=2, image="2.png"),
        {"id": 3, "conversations": [turns("", "Hello there")[1], *turns("a", "b c")]},
    ]
    data = DialogueData.open(write(root, rows))
    assert data.word_lengths() == [6, -4, 6, -5]
    tokenizer = tiny_tokenizer()
    lengths = data.token_lengths(tokenizer)
    expected = [
        sum(len(tokenizer(turn.text, add_special_tokens=False).input_ids) + TURN_TOKENS for turn in dialogue.turns)
        for dialogue in data
    ]
    assert [abs(n) for n in lengths] == expected
    assert [n > 0 for n in lengths] == [True, False, True, False]


def test_fingerprint(root: Path) -> None:
    def digest() -> str:
        return DialogueData.open(write(root, rows)).fingerprint

    rows = [GOOD[0], GOOD[1]]
    seen = [digest()]
    assert digest() == seen[0]
    rows = [GOOD[0], row("Hi", "Hello", "And?", "That was all.", id="b")]
    seen.append(digest())
    with (root / "coco/1.jpg").open("ab") as file:
        file.write(b"\0")
    seen.append(digest())
    (root / "coco/1.jpg").rename(root / "coco/1.png")
    seen.append(digest())
    assert len(set(seen)) == 4


def test_images(root: Path) -> None:
    data = DialogueData.open(write(root, GOOD))
    image = data.read_image("2.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (2, 2), (0, 0, 200))
    content = (root / "2.png").read_bytes()
    for broken, reason in (
        (b"", "zero-byte image: "),
        (b"text", "unreadable image: "),
        (content[:50], "truncated image: "),
    ):
        (root / "2.png").write_bytes(broken)
        with pytest.raises(ValueError, match=f"^{reason}"):
            data.read_image("2.png")
    (root / "2.png").unlink()
    with pytest.raises(ValueError, match="^missing image: .*2.png"):
        data.read_image("2.png")
