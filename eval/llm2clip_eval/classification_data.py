"""Labelled images: class folders, ImageNet-V2's numbered folders, and CLIP_benchmark's WebDataset layout.

class folders   ROOT/<class>/*.jpg; a class is called as its folder is, or as `class_names` says
numbered        ROOT/<n>/*.jpg: class n of `class_names` (ImageNet-V2; "10" comes after "9", not after "1")
WebDataset      ROOT/classnames.txt, zeroshot_classification_templates.txt, <split>/nshards.txt, <split>/<i>.tar with
                an image and a `.cls` for each key
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llm2clip.caption_sources import IMAGE_EXTENSIONS, Problem, read_tar
from llm2clip.images import decode_image

CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
SIMPLE_TEMPLATES = ("a photo of a {c}.",)
"""What CLIP_benchmark and open_clip fall back to."""


@dataclass(frozen=True)
class ImageFile:
    """Where the bytes of an image are."""

    path: Path
    offset: int = 0
    size: int = -1
    """-1: to the end of the file."""

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class LabelledImages:
    """Images with a class each; `images[i]`'s class is `class_names[labels[i]]`.

    Args:
        path: the data, for messages.
        ids: one per image.
        files: one per image.
        labels: (images,) indices into `class_names`.
        class_names: what the classes are called.

    Raises:
        ValueError: if there are no images, or a label has no name.
    """

    def __init__(
        self,
        path: Path,
        ids: Sequence[str],
        files: Sequence[ImageFile],
        labels: Sequence[int],
        class_names: Sequence[str],
    ) -> None:
        if not ids:
            raise ValueError(f"{path}: no images")
        self.path = path
        self.ids = list(ids)
        self.files = list(files)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = list(class_names)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(outside):
            raise ValueError(
                f"{path}: image {self.ids[outside[0]]} is of class {self.labels[outside[0]]}, but there are "
                f"{len(self.class_names)} class names ({len(outside)} such images)"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def image_bytes(self, index: int) -> bytes:
        """Read the undecoded image."""
        return self.files[index].read()

    def load_image(self, index: int) -> Image.Image:
        """Decode an image to RGB.

        Raises:
            ValueError: it cannot be decoded; names it and the reason.
        """
        try:
            return decode_image(self.image_bytes(index))
        except ValueError as error:
            raise ValueError(f"image {self.ids[index]} in {self.path}: {error}") from error


def open_labelled(path: Path, *, split: str = "test", class_names: str | None = None) -> LabelledImages:
    """Open labelled images in whichever of the three layouts they are.

    Args:
        path: the folder.
        split: of the WebDataset layout.
        class_names: a file of names, one a line or a JSON list in the order of the classes, or a JSON object from
            folder to name; or `imagenet` for open_clip's thousand. None: the folders' names, or classnames.txt.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it has none of the layouts, or names and images do not fit; names the file.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist or is no folder")
    if (path / CLASS_NAMES_FILE).is_file() or (path / split / "nshards.txt").is_file():
        return _open_webdataset(path, split, class_names)
    return _open_folders(path, class_names)


def read_class_names(source: str) -> list[str] | dict[str, str]:
    """Names of classes: in order, or by folder; see `open_labelled`."""
    if source == "imagenet":
        return list(_open_clip_list("IMAGENET_CLASSNAMES"))
    return _read_names(Path(source))


def read_templates(source: str | None, data: Path) -> list[str]:
    """Templates with `{c}` (or `{}`) where the class name goes.

    Args:
        source: a file, one a line or a JSON list; `imagenet` for open_clip's eighty; None for the data's own, or "a
            photo of a {c}." where it has none.
        data: the folder of the data.

    Raises:
        ValueError: a template without a place for the name.
    """
    own = data / TEMPLATES_FILE
    if source == "imagenet":
        return [template("{c}") for template in _open_clip_list("OPENAI_IMAGENET_TEMPLATES")]
    if source is None and not own.is_file():
        return list(SIMPLE_TEMPLATES)
    path = own if source is None else Path(source)
    templates = _read_names(path)
    if not isinstance(templates, list):
        raise ValueError(f"{path}: expected one template a line, or a JSON list, got a JSON object")
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template and "{}" not in template:
            raise ValueError(f"{path}: template {number}, {template!r}, has no {{c}} where the class name goes")
    return templates


def fill_template(template: str, class_name: str) -> str:
    """Put a class name into a template."""
    return template.replace("{c}", class_name).replace("{}", class_name)


def _open_clip_list(name: str) -> Sequence:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"class names and templates of ImageNet are open_clip's: install open_clip_torch, or give a file ({error})"
        ) from error
    return {
        "IMAGENET_CLASSNAMES": open_clip.IMAGENET_CLASSNAMES,
        "OPENAI_IMAGENET_TEMPLATES": open_clip.OPENAI_IMAGENET_TEMPLATES,
    }[name]


def _read_names(path: Path) -> list[str] | dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected names one a line, or JSON")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    names = json.loads(text)
    values = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{path}: expected a JSON list of names, or an object from folder to name")
    return names


def _open_folders(path: Path, class_names: str | None) -> LabelledImages:
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(
            f"{path} has no folder of a class; expected <class>/*.jpg, or CLIP_benchmark's {CLASS_NAMES_FILE} with "
            "<split>/nshards.txt"
        )
    names = read_class_names(class_names) if class_names else None
    labels = _folder_labels(path, folders, names)
    if names is None:
        names = folders
    elif isinstance(names, dict):
        names = [names[folder] for folder in folders]
    ids, files, of_image = [], [], []
    for folder in folders:
        images = sorted(
            os.path.join(directory, name)
            for directory, _, found in os.walk(path / folder)
            for name in found
            if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.startswith(".")
        )
        ids += [Path(image).relative_to(path).as_posix() for image in images]
        files += [ImageFile(Path(image)) for image in images]
        of_image += [labels[folder]] * len(images)
    return LabelledImages(path, ids, files, of_image, names)


def _folder_labels(path: Path, folders: Sequence[str], names: list[str] | Mapping[str, str] | None) -> dict[str, int]:
    """The number of each folder's class."""
    if isinstance(names, Mapping):
        if unnamed := [folder for folder in folders if folder not in names]:
            raise ValueError(f"{path}: class_names has no name for the folder {unnamed[0]!r} ({len(unnamed)} such)")
        return {folder: number for number, folder in enumerate(folders)}
    if names is not None and all(folder.isdecimal() for folder in folders):
        return {folder: int(folder) for folder in folders}
    if names is not None and len(names) != len(folders):
        raise ValueError(
            f"{path} has {len(folders)} folders, class_names {len(names)} names; they are matched in order, so the "
            "numbers must agree: give a JSON object from folder to name instead"
        )
    return {folder: number for number, folder in enumerate(folders)}


def _open_webdataset(path: Path, split: str, class_names: str | None) -> LabelledImages:
    names = read_class_names(class_names or str(path / CLASS_NAMES_FILE))
    if isinstance(names, dict):
        raise ValueError(f"{path}: class_names must be in the order of the .cls numbers, not an object")
    count_file = path / split / "nshards.txt"
    if not count_file.is_file():
        splits = sorted(file.parent.name for file in path.glob("*/nshards.txt"))
        raise FileNotFoundError(f"{count_file} does not exist; {path} has the splits {splits}")
    count = count_file.read_text().strip()
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"{count_file} holds {count!r}, expected the number of tars")
    ids, files, labels, problems = [], [], [], []
    for number in range(int(count)):
        tar = path / split / f"{number}.tar"
        if not tar.is_file():
            raise FileNotFoundError(f"{tar} does not exist, but {count_file} counts {count} tars")
        try:
            rows = list(read_tar(tar, {"cls"}))
        except tarfile.TarError as error:
            raise ValueError(f"{tar}: {error}") from error
        for row in rows:
            label = None if isinstance(row, Problem) else row.record.get("cls", "").strip()
            if isinstance(row, Problem):
                problems.append(f"{row.where}: {row.reason}")
            elif not label or not label.isdecimal():
                problems.append(f"{row.where}: its .cls holds {label!r}, expected a number")
            else:
                assert row.image is not None
                ids.append(row.where)
                files.append(ImageFile(tar, row.image.offset, row.image.size))
                labels.append(int(label))
    if problems:
        raise ValueError(f"{path / split}: {len(problems)} bad samples, such as {'; '.join(problems[:3])}")
    return LabelledImages(path, ids, files, labels, names)
