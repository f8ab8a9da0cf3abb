"""Command `benchmark`: make caption data of a retrieval benchmark's own files.

Reads annotations in one of the formats of `benchmark_data` and their images; writes `captions.jsonl` and `images/`,
which `retrieval`, `llm2clip extract-embeddings` and `llm2clip data check` read as any other caption data. Images are
hard links where the file system has them, else copies.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip.caption_sources import ImageFolder
from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_path, atomic_write, fingerprint
from llm2clip_eval.benchmark_data import Entry, keep_first, read_benchmark

logger = logging.getLogger(__name__)

CAPTIONS = "captions.jsonl"
IMAGES = "images"


@dataclass(kw_only=True)
class BenchmarkConfig(StageConfig):
    """Make caption data of a retrieval benchmark's own files, so that any stage can read it."""

    format: Literal["karpathy", "sharegpt4v", "urban1k", "docci", "flickr_cn", "coco_cn", "xm3600"]
    """karpathy: Flickr30k and COCO. flickr_cn, coco_cn: with a tab between image and caption."""
    annotations: Path
    """The caption file; for urban1k the folder of caption files."""
    images: Path
    """The folder that the annotations' image names are relative to."""
    split: str = "test"
    """Of karpathy and docci; for flickr_cn and coco_cn a file of image ids, or test for all that are there."""
    kinds: list[str] | None = None
    """Of xm3600: the languages to keep; default all."""
    max_captions: int | None = None
    """Keep only the first so many captions of each image; default all. COCO is mostly reported with all 25,010."""
    num_images: int | None = None
    """How many images the benchmark has: another number is an error. Flickr30k and Urban1k 1000, COCO and DOCCI 5000,
    XM3600 3600."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {getattr(self, name)} is not positive"
            for name in ("max_captions", "num_images")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[BenchmarkConfig]:
    """Read the configuration of a command line."""
    return parse_stage(BenchmarkConfig, argv, prog="llm2clip-eval benchmark")


def inputs(call: StageCall[BenchmarkConfig]) -> dict[str, str]:
    """Fingerprint of the annotations; the folder of images often holds far more than the benchmark."""
    return {"annotations": fingerprint(call.config.annotations)}


def run(call: StageCall[BenchmarkConfig]) -> None:
    """Write captions and images.

    Raises:
        FileNotFoundError: if annotations or images are not there.
        ValueError: if an item is not as it should be or its image is missing; names it.
    """
    config = call.config
    with RunDir(call, stage="benchmark", inputs=inputs(call)) as run:
        if run.complete:
            logger.info("benchmark: %s is complete", run.path)
            return
        if not config.images.is_dir():
            raise FileNotFoundError(f"images: {config.images} does not exist or is no folder")
        entries = read_benchmark(config.format, config.annotations, config.split)
        found = list(keep_first(entries, config.max_captions, config.kinds))
        check_entries(found, config)
        for entry in found:
            _place(config.images / entry.image, run.path / IMAGES / entry.image)
        rows = [caption_row(entry) for entry in found]
        atomic_write(run.path / CAPTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        num_captions = sum(len(texts) for entry in found for texts in entry.captions.values())
        logger.info("benchmark: %d images, %d captions", len(found), num_captions)
        run.finish(outputs=[CAPTIONS, IMAGES], num_images=len(found), num_captions=num_captions)


def caption_row(entry: Entry) -> dict[str, Any]:
    """The line of captions.jsonl."""
    return {"id": entry.id, "image": f"{IMAGES}/{entry.image}", "captions": entry.captions}


def check_entries(entries: Sequence[Entry], config: BenchmarkConfig) -> None:
    """Refuse what would be another benchmark than it is called.

    Raises:
        ValueError: for no images or another number than expected, images twice, without captions or missing.
    """
    if not entries:
        raise ValueError(f"{config.annotations}: no image of split {config.split!r}")
    if config.num_images is not None and len(entries) != config.num_images:
        raise ValueError(f"{config.annotations}: {len(entries)} images, expected num_images = {config.num_images}")
    folder = ImageFolder(config.images)
    problems = list(_problems(entries, folder))
    if problems:
        raise ValueError(f"{len(problems)} of {len(entries)} images cannot be used, such as {'; '.join(problems[:3])}")


def _problems(entries: Sequence[Entry], folder: ImageFolder) -> Iterable[str]:
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.id in seen:
            yield f"{entry.where}: duplicate id: {entry.id!r}, first in {seen[entry.id]}"
        seen.setdefault(entry.id, entry.where)
        if not any(text.strip() for texts in entry.captions.values() for text in texts):
            yield f"{entry.where} ({entry.id}): no caption"
        try:
            folder.locate(entry.image)
        except ValueError as error:
            yield f"{entry.where} ({entry.id}): {error}"


def _place(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it to another file system."""
    if target.is_file():
        return  # of a killed run
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        try:
            os.link(os.path.realpath(source), temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval benchmark`."""
    run(parse(argv))
