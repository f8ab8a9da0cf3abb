"""Read sets of captions and wrong captions: SugarCrepe's files, Winoground's, and the demo's pools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.caption_sources import check_relative
from llm2clip.images import decode_image
from llm2clip_eval.dual_encoder import Images

IMAGE_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")
"""Tried in this order: Winoground names its images without one."""


@dataclass(frozen=True)
class NegativeCaptions:
    """Images with a caption and a wrong one each; all lists but the images are one entry per item."""

    images: Images
    image_rows: list[int]
    captions: list[str]
    negatives: list[str]
    categories: list[str]
    ids: list[str]


@dataclass(frozen=True)
class ImagePairs:
    """Two images and two captions, caption n of image n; all lists but the images are one entry per item."""

    images: Images
    image_rows: list[tuple[int, int]]
    captions: list[tuple[str, str]]
    tags: list[str]
    ids: list[str]


class ImageList:
    """Images of one folder, by name."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def image_bytes(self, index: int) -> bytes:
        """Read the undecoded image."""
        return (self.root / self.names[index]).read_bytes()

    def load_image(self, index: int) -> Image.Image:
        """Decode an image to RGB; raises ValueError naming it if that cannot be done."""
        try:
            return decode_image(self.image_bytes(index))
        except ValueError as error:
            raise ValueError(f"image {self.names[index]} in {self.root}: {error}") from error


def read_sugarcrepe(path: Path, images: Path) -> NegativeCaptions:
    """Read SugarCrepe's JSON files (add_att.json, ..., swap_obj.json); a file's name is its category.

    Args:
        path: the folder, or one file.
        images: COCO's val2017.

    Raises:
        FileNotFoundError: there is no JSON file.
        ValueError: an item is not as it should be, or its image is not there; names file and item.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path} has no JSON file, such as SugarCrepe's swap_obj.json")
    folder = _Folder(images)
    found = NegativeCaptions(folder.list, [], [], [], [], [])
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, item in items:
            where = f"{file.name}, item {key}"
            name, caption, negative = _texts(where, item, ("filename", "caption", "negative_caption"))
            found.image_rows.append(folder.row(name, where))
            found.captions.append(caption)
            found.negatives.append(negative)
            found.categories.append(file.stem)
            found.ids.append(f"{file.stem}-{key}")
    if not found.ids:
        raise ValueError(f"{path}: no items")
    return found


def read_winoground(path: Path, images: Path) -> ImagePairs:
    """Read Winoground's examples.jsonl, or any lines with image_0, image_1, caption_0, caption_1.

    Args:
        path: the file.
        images: folder of the images, whose names may lack their extension.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not as it should be, or its image is not there; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected Winoground's examples.jsonl")
    folder = _Folder(images)
    found = ImagePairs(folder.list, [], [], [], [])
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        first, second, one, other = _texts(where, item, ("image_0", "image_1", "caption_0", "caption_1"))
        found.image_rows.append((folder.row(first, where), folder.row(second, where)))
        found.captions.append((one, other))
        found.tags.append(str(item.get("collapsed_tag") or item.get("tag") or ""))
        found.ids.append(str(item.get("id", number - 1)))
    if not found.ids:
        raise ValueError(f"{path}: no items")
    return found


def read_demo(pool: Path) -> NegativeCaptions:
    """Make wrong captions for a pool of the demo; see `demo_negatives`."""
    from llm2clip.caption_data import CaptionData
    from llm2clip_eval.demo_negatives import demo_negatives

    items = demo_negatives(pool)
    data = CaptionData.open(pool)
    row_of = {name: row for row, name in enumerate(data.ids.to_pylist())}
    return NegativeCaptions(
        images=data,
        image_rows=[row_of[item.id] for item in items],
        captions=[item.caption for item in items],
        negatives=[item.negative_caption for item in items],
        categories=[item.kind for item in items],
        ids=[f"{item.id}-{item.kind}" for item in items],
    )


class _Folder:
    """Numbers the images of a folder as they are named."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"images: {root} does not exist or is no folder")
        self.list = ImageList(root, [])
        self._rows: dict[str, int] = {}

    def row(self, name: str, where: str) -> int:
        """The image's number. Raises ValueError naming `where` if it is not there."""
        if name not in self._rows:
            try:
                check_relative(name)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            file = next((name + end for end in IMAGE_SUFFIXES if (self.list.root / (name + end)).is_file()), None)
            if file is None:
                raise ValueError(f"{where}: missing image: {name!r} is not in {self.list.root}")
            self._rows[name] = len(self.list.names)
            self.list.names.append(file)
        return self._rows[name]


def _texts(where: str, item: Any, keys: Sequence[str]) -> list[str]:
    values = [item.get(key) if isinstance(item, dict) else None for key in keys]
    bad = [key for key, value in zip(keys, values, strict=True) if not isinstance(value, str) or not value.strip()]
    if bad:
        raise ValueError(f"{where}: expected text in {', '.join(keys)}, but there is none in {', '.join(bad)}")
    return [str(value) for value in values]
