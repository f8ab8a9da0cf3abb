"""Question files as `llm2clip-eval answers` reads them, made up; shared by the tests."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

TEXTS = ("id", "question", "answer", "type", "subtype", "language", "image_id")


@cache
def picture(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A PNG of coarse random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


def question(number: int, **changes: Any) -> dict[str, Any]:
    """One row; two questions in a row are about the same image."""
    return {
        "id": f"q-{number}",
        "image": {"bytes": picture(number // 2), "path": None},
        "question": f"How many {('cats', 'red dogs', 'big trees near the house')[number % 3]}?",
        "answer": str(number % 3),
        "type": "count",
        "subtype": "object",
        "language": "en",
        "choices": ["0", "1", "2"],
        "chance": 1 / 3,
        "image_id": f"image-{number // 2}",
        **changes,
    }


def write_questions(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as `datasets` writes them; returns `path`."""
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in TEXTS},
            "image": datasets.Image(),
            "choices": [datasets.Value("string")],
            "chance": datasets.Value("float64"),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path
