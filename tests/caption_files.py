"""Caption data in the four formats, written from the same records."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

COLOURS = [(10 * i, 255 - 10 * i, 7 * i) for i in range(24)]
FORMATS = ["jsonl", "tar", "parquet", "save_to_disk"]


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
