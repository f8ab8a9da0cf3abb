"""Retrieval benchmarks in their makers' formats become caption data that every stage reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_dual import picture

from llm2clip.caption_data import CaptionData
from llm2clip_eval import benchmark


@pytest.fixture
def images(tmp_path) -> Path:
    return tmp_path / "images"


def write_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    return folder


def convert(output_dir: Path, data_format: str, annotations: Path, images: Path, **settings: object) -> CaptionData:
    file = output_dir.with_suffix(".yaml")
    config = {"format": data_format, "annotations": str(annotations), "images": str(images), **settings}
    file.write_text(yaml.safe_dump({**config, "output_dir": str(output_dir)}))
    benchmark.main(["--config", str(file)])
    data = CaptionData.open(output_dir)
    assert not data.problems and all(data.has_image(row) for row in range(len(data)))
    return data


def texts(data: CaptionData) -> dict[str, list[str]]:
    return {sample.id: [caption.text for caption in sample.captions] for sample in data}


def karpathy(path: Path, *, coco: bool) -> Path:
    rows = [("1.jpg", "test", ["a", "b", "c"]), ("2.jpg", "train", ["d"]), ("3.jpg", "test", ["e", "f"])]
    listed = [
        {"filename": name, "split": split, "sentences": [{"raw": text, "tokens": []} for text in raw]}
        | ({"filepath": "val2014"} if coco else {})
        for name, split, raw in rows
    ]
    path.write_text(json.dumps({"images": listed, "dataset": "x"}))
    return path


def test_karpathy_splits_keep_uneven_captions(tmp_path, images):
    write_images(images, "1.jpg", "2.jpg", "3.jpg")
    data = convert(tmp_path / "out", "karpathy", karpathy(tmp_path / "f.json", coco=False), images, num_images=2)
    assert texts(data) == {"1": ["a", "b", "c"], "3": ["e", "f"]} and data.kinds == {"raw": 5}
    assert data.image_bytes(1) == (images / "3.jpg").read_bytes()
    first = convert(tmp_path / "first", "karpathy", karpathy(tmp_path / "f.json", coco=False), images, max_captions=2)
    assert texts(first) == {"1": ["a", "b"], "3": ["e", "f"]}


def test_coco_images_lie_in_the_folder_that_their_row_names(tmp_path, images):
    write_images(images, "val2014/1.jpg", "val2014/3.jpg")
    data = convert(tmp_path / "out", "karpathy", karpathy(tmp_path / "c.json", coco=True), images)
    assert data.image_bytes(0) == (images / "val2014" / "1.jpg").read_bytes()


def test_sharegpt4v_takes_the_first_thousand_and_the_second_turn(tmp_path, images):
    write_images(images, "sam/0.jpg")
    row = {"image": "sam/0.jpg", "conversations": [{"value": "describe"}, {"value": "a long\ncaption"}]}
    rows = [{**row, "id": f"s{number}"} for number in range(1003)]
    (tmp_path / "share.json").write_text(json.dumps(rows))
    data = convert(tmp_path / "out", "sharegpt4v", tmp_path / "share.json", images, num_images=1000)
    assert len(data) == 1000 and data[0].captions[0] == ("long", "a long caption")


def test_urban1k_pairs_by_name_and_takes_the_first_line(tmp_path, images):
    write_images(images, "1.jpg", "2.jpg", "10.jpg")
    (tmp_path / "caption").mkdir()
    for number in (1, 2, 10):
        (tmp_path / "caption" / f"{number}.txt").write_text(f"caption {number}\nmore\n")
    data = convert(tmp_path / "out", "urban1k", tmp_path, images)
    assert list(texts(data).items()) == [(str(n), [f"caption {n}"]) for n in (1, 2, 10)]
    assert data.image_bytes(2) == (images / "10.jpg").read_bytes()


def test_docci_takes_its_split(tmp_path, images):
    write_images(images, "test_0.jpg")
    rows = [
        {"split": split, "image_file": f"{split}_0.jpg", "description": f"of {split}"}
        for split in ("test", "qual_dev")
    ]
    (tmp_path / "d.jsonlines").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(convert(tmp_path / "out", "docci", tmp_path / "d.jsonlines", images)) == {"test_0": ["of test"]}


def test_chinese_sets_are_tabbed_and_may_be_limited_to_a_split(tmp_path, images):
    write_images(images, "10.jpg", "11.jpg", "val2014/COCO_val2014_000000000042.jpg")
    (tmp_path / "flickr.txt").write_text("10#zhm#0\t一只猫\n11#zhm#0\t狗\n10#zhm#1\t猫\n")
    data = convert(tmp_path / "flickr", "flickr_cn", tmp_path / "flickr.txt", images)
    assert texts(data) == {"10": ["一只猫", "猫"], "11": ["狗"]} and data.kinds == {"zh": 3}
    key = "COCO_val2014_000000000042"
    (tmp_path / "coco.txt").write_text(f"{key}#0\t一只猫\nCOCO_train2014_000000000007#0\t树\n")
    (tmp_path / "test.txt").write_text(f"{key}\n")
    coco = convert(tmp_path / "coco", "coco_cn", tmp_path / "coco.txt", images, split=str(tmp_path / "test.txt"))
    assert texts(coco) == {key: ["一只猫"]}
    (tmp_path / "test.txt").write_text(f"{key}\nCOCO_val2014_1\n")
    with pytest.raises(ValueError, match=r"no caption of COCO_val2014_1.*1 such"):
        convert(tmp_path / "x", "coco_cn", tmp_path / "coco.txt", images, split=str(tmp_path / "test.txt"))


def test_xm3600_has_a_kind_for_each_language(tmp_path, images):
    write_images(images, "k0.jpg", "k1.jpg")
    rows = [
        {
            "image/key": f"k{number}",
            "image/locale": "de",
            "de": {"caption": [f"Bild {number}", "Foto"], "caption/tokenized": ["x", "y"]},
            "ja": {"caption": ["写真"]},
        }
        for number in range(2)
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = convert(tmp_path / "out", "xm3600", tmp_path / "captions.jsonl", images)
    assert data.kinds == {"de": 4, "ja": 2} and texts(data)["k1"] == ["Bild 1", "Foto", "写真"]
    german = convert(tmp_path / "de", "xm3600", tmp_path / "captions.jsonl", images, kinds=["de"])
    assert german.kinds == {"de": 4}


@pytest.mark.parametrize(
    ("data_format", "content", "message"),
    [
        ("karpathy", '{"images": [{"filename": "1.jpg"}]}', "b.txt, image 0: .* none in split"),
        ("karpathy", '{"images": [{"filename": "1.jpg", "split": "test"}]}', r"image 0 \(1\.jpg\): .*sentences"),
        ("karpathy", "[1]", "an object with a list of images"),
        ("karpathy", "{", "not JSON"),
        ("sharegpt4v", '[{"image": "1.jpg", "conversations": []}]', "row 0: .*a question and a caption"),
        ("docci", '{"split": "test", "image_file": "1.jpg"}\n', "b.txt:1: .* none in description"),
        ("docci", '{"split": "train", "image_file": "1.jpg", "description": "x"}\n', "no image of split 'test'"),
        ("flickr_cn", "1#zhm#0\t猫\n2#zhm#0 狗\n", "b.txt:2: expected .*tab"),
        ("flickr_cn", "9#zhm#0\t猫\n", r"b.txt:1 \(9\): missing image: '9\.jpg'"),
        ("flickr_cn", "../1#zhm#0\t猫\n", "unsafe path"),
        ("xm3600", '{"image/key": "1"}\n', r"b.txt:1 \(1\): no language"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_written(tmp_path, images, data_format, content, message):
    write_images(images, "1.jpg")
    (tmp_path / "b.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "out", data_format, tmp_path / "b.txt", images)
    assert not (tmp_path / "out" / "captions.jsonl").exists()


def test_another_number_of_images_is_another_benchmark(tmp_path, images):
    write_images(images, "1.jpg", "3.jpg")
    with pytest.raises(ValueError, match="2 images, expected num_images = 1000"):
        convert(tmp_path / "out", "karpathy", karpathy(tmp_path / "f.json", coco=False), images, num_images=1000)
