"""Read the caption files of retrieval benchmarks, each as its makers publish it.

| format | annotations | images |
|---|---|---|
| `karpathy` | dataset_flickr30k.json, dataset_coco.json | flickr30k-images; the folder of val2014 and train2014 |
| `sharegpt4v` | share-captioner_coco_lcs_sam_1246k_1107.json, first 1000 rows: ShareGPT4V-1k | its `data` folder |
| `urban1k` | the folder with caption/1.txt, ... | the folder with image/1.jpg, ... |
| `docci` | docci_descriptions.jsonlines | images |
| `flickr_cn` | flickr30k-cn's test.txt: `1007129816#zhm#0 <tab> caption` | flickr30k-images |
| `coco_cn` | imageid.human-written-caption.txt: `COCO_val2014_000000000042#0 <tab> caption` | COCO's folders |
| `xm3600` | captions.jsonl, 36 languages | images |

Every reader yields one `Entry` per image, with all its captions in the order of the file: images may have different
numbers of them (25,010 captions for COCO's 5,000 test images).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

BenchmarkFormat = Literal["karpathy", "sharegpt4v", "urban1k", "docci", "flickr_cn", "coco_cn", "xm3600"]
SHAREGPT4V_ROWS = 1000
"""LLM2CLIP and Long-CLIP take the first thousand rows of the file, and the second turn as the caption."""


class Entry(NamedTuple):
    """One image of a benchmark."""

    where: str
    """File and line or item, for messages."""
    id: str
    image: str
    """Path below the folder of images."""
    captions: dict[str, list[str]]
    """Texts by kind."""


def read_benchmark(data_format: BenchmarkFormat, annotations: Path, split: str) -> Iterator[Entry]:
    """Read a benchmark's annotations.

    Args:
        data_format: see the table above.
        annotations: the file, or for urban1k the folder.
        split: of karpathy and docci; for flickr_cn and coco_cn a file with the split's image ids, one a line, or
            "test", which takes all that the annotations hold.

    Raises:
        FileNotFoundError: there is nothing at `annotations`.
        ValueError: an item is not as it should be; names file and item.
    """
    if not annotations.exists():
        raise FileNotFoundError(f"annotations: {annotations} does not exist")
    readers: dict[str, Callable[[Path, str], Iterator[Entry]]] = {
        "karpathy": _karpathy,
        "sharegpt4v": _sharegpt4v,
        "urban1k": _urban1k,
        "docci": _docci,
        "flickr_cn": _tabbed,
        "coco_cn": _tabbed,
        "xm3600": _xm3600,
    }
    return readers[data_format](annotations, split)


def _karpathy(path: Path, split: str) -> Iterator[Entry]:
    images = _json(path)
    images = images.get("images") if isinstance(images, dict) else None
    if not isinstance(images, list):
        raise ValueError(f"{path}: expected an object with a list of images, as in dataset_flickr30k.json")
    for number, image in enumerate(images):
        where = f"{path.name}, image {number}"
        name, of_split = _strings(where, image, ("filename", "split"))
        if of_split != split:
            continue
        sentences = image.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            raise ValueError(f"{where} ({name}): expected a list of sentences, got {sentences!r:.80}")
        texts = [_strings(f"{where} ({name})", sentence, ("raw",))[0] for sentence in sentences]
        folder = image.get("filepath", "")  # only COCO's has one
        yield Entry(where, name.rpartition(".")[0], f"{folder}/{name}" if folder else name, {"raw": texts})


def _sharegpt4v(path: Path, split: str) -> Iterator[Entry]:
    rows = _json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows with image and conversations")
    for number, row in enumerate(rows[:SHAREGPT4V_ROWS]):
        where = f"{path.name}, row {number}"
        (image,) = _strings(where, row, ("image",))
        turns = row.get("conversations")
        if not isinstance(turns, list) or len(turns) < 2:
            raise ValueError(f"{where}: expected conversations with a question and a caption, got {turns!r:.80}")
        (caption,) = _strings(where, turns[1], ("value",))
        yield Entry(where, str(row.get("id", number)), image, {"long": [_one_line(caption)]})


def _urban1k(path: Path, split: str) -> Iterator[Entry]:
    folder = path / "caption" if (path / "caption").is_dir() else path
    files = sorted(folder.glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise ValueError(f"{folder} has no caption file, such as 1.txt")
    for file in files:
        # LLM2CLIP reads the first line
        lines = file.read_text(encoding="utf-8").strip().splitlines()
        if not lines:
            raise ValueError(f"{file}: empty caption")
        yield Entry(file.name, file.stem, f"{file.stem}.jpg", {"long": [lines[0].strip()]})


def _docci(path: Path, split: str) -> Iterator[Entry]:
    for where, row in _json_lines(path):
        name, of_split, caption = _strings(where, row, ("image_file", "split", "description"))
        if of_split == split:
            yield Entry(where, name.rpartition(".")[0], name, {"long": [caption]})


def _tabbed(path: Path, split: str) -> Iterator[Entry]:
    """`<image id>#<anything> <tab> caption`, the captions of an image not necessarily together."""
    wanted = None if split == "test" else set(Path(split).read_text(encoding="utf-8").split())
    captions: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        key, separator, caption = line.partition("\t")
        if not separator or not key.strip() or not caption.strip():
            raise ValueError(f"{path.name}:{number}: expected <image id>#<n> <tab> <caption>, got {line!r:.80}")
        image = key.strip().partition("#")[0].removesuffix(".jpg")
        if wanted is None or image in wanted:
            captions.setdefault(image, []).append(caption.strip())
            first.setdefault(image, f"{path.name}:{number}")
    if wanted and (missing := sorted(wanted - set(captions))):
        raise ValueError(f"{path}: no caption of {missing[0]}, which {split} lists ({len(missing)} such images)")
    for image, texts in captions.items():
        # COCO's names hold the folder: COCO_val2014_000000000042 lies in val2014
        folder = f"{image.split('_')[1]}/" if image.startswith("COCO_") else ""
        yield Entry(first[image], image, f"{folder}{image}.jpg", {"zh": texts})


def _xm3600(path: Path, split: str) -> Iterator[Entry]:
    for where, row in _json_lines(path):
        (key,) = _strings(where, row, ("image/key",))
        captions = {
            language: value["caption"]
            for language, value in row.items()
            if isinstance(value, dict) and isinstance(value.get("caption"), list) and value["caption"]
        }
        if not captions:
            raise ValueError(f'{where} ({key}): no language with captions, such as "en": {{"caption": [...]}}')
        yield Entry(where, key, f"{key}.jpg", captions)


def keep_first(entries: Iterable[Entry], max_captions: int | None, kinds: Sequence[str] | None) -> Iterator[Entry]:
    """Drop captions beyond the first so many of each kind, and kinds that are not wanted."""
    for entry in entries:
        yield entry._replace(
            captions={
                kind: texts[:max_captions] for kind, texts in entry.captions.items() if kinds is None or kind in kinds
            }
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        yield where, row


def _strings(where: str, row: Any, keys: Sequence[str]) -> list[str]:
    values = [row.get(key) if isinstance(row, dict) else None for key in keys]
    bad = [key for key, value in zip(keys, values, strict=True) if not isinstance(value, str) or not value.strip()]
    if bad:
        raise ValueError(f"{where}: expected text in {', '.join(keys)}, but there is none in {', '.join(bad)}")
    return [str(value) for value in values]


def _one_line(text: str) -> str:
    return text.replace("\n", " ")  # as Long-CLIP and LLM2CLIP do
