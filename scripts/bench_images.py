"""Decoding and training transform, images per second on one core, beside open_clip's (needs the dev extra).

    python scripts/bench_images.py

Pictures are random but with the detail of photos; both sides get the same bytes and scale 0.9-1.0.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import open_clip
import PIL
import torch
from open_clip.transform import AugmentationCfg, image_transform
from PIL import Image

from llm2clip.images import ImageTransform, decode_image

CASES = [  # width, height, format, size of the tower's input
    (512, 384, "JPEG", 224),
    (640, 480, "JPEG", 336),
    (1024, 768, "JPEG", 224),
    (3000, 2000, "JPEG", 336),
    (128, 128, "PNG", 64),
]


def photo(width: int, height: int, image_format: str) -> bytes:
    rng = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3))
    for cell, weight in ((64, 0.5), (16, 0.3), (4, 0.15), (1, 0.05)):
        noise = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        pixels += weight * np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, image_format, quality=90)
    return buffer.getvalue()


def rate(function: Callable[[], object], seconds: float = 0.5, repeats: int = 5) -> float:
    """Calls per second of processor time, the best of several runs."""
    best = 0.0
    for _ in range(repeats):
        start, calls = time.process_time(), 0
        while time.process_time() - start < seconds:
            function()
            calls += 1
        best = max(best, calls / (time.process_time() - start))
    return best


def measure(width: int, height: int, image_format: str, size: int) -> str:
    """One row of the table."""
    data = photo(width, height, image_format)
    peer = image_transform(size, is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))
    transform = ImageTransform(size=size)
    rng = np.random.default_rng(0)
    theirs = rate(lambda: peer(Image.open(io.BytesIO(data))))
    ours = rate(lambda: transform.train(decode_image(data), rng))
    drafted = rate(lambda: transform.train(decode_image(data, min_edge=transform.min_edge), rng))
    return (
        f"| {width}x{height} {image_format} | {size} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.2f} "
        f"| {drafted:.0f} | {drafted / theirs:.2f} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Pillow {PIL.__version__}, open_clip {open_clip.__version__}; images/s/core")
    print("| image | to | open_clip | llm2clip | ratio | with min_edge | ratio |\n|---|---|---|---|---|---|---|")
    for case in CASES:
        print(measure(*case))


if __name__ == "__main__":
    main()
