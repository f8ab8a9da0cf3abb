"""`llm2clip data demo`: build the demo's images and captions from ordinary packages.

Writes `train/scenes/`, `train/singles/`, `train/text_pairs.jsonl` and `train/layout_pairs.jsonl`,
`pools/{val,test}/<pool>/`, each a directory of caption data, and `contact_sheet.png`, `data_card.md`, `sources.json`.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm2clip.config import StageCall, parse_stage
from llm2clip.demo import packages
from llm2clip.run_dir import RunDir, atomic_write, fingerprint

if TYPE_CHECKING:
    from llm2clip.demo.concepts import Concept, Split
    from llm2clip.demo.recipe import Item
    from llm2clip.demo.scenes import Drawings

logger = logging.getLogger(__name__)

OWN_PACKAGES = ("openmoji", "emoji", "fluent", "twemoji", "noto", "cldr")
PARALLEL_FROM = 2000
"""Fewer tasks than this are not worth starting processes for."""


@dataclass(kw_only=True)
class DemoConfig(packages.PackageConfig):
    """Build the demo's images and captions from ordinary packages: emoji drawings on a grid, described in words."""

    num_concepts: int | None = None
    """Use this many concepts, chosen by hash; None uses all of the lexicon."""
    num_scenes: int = 6000
    """Training scenes with captions of their own."""
    num_renderings: int = 3
    """Pictures of each training scene: other styles, places and background under the same captions."""
    num_singles: int = 12000
    """Training pictures of one concept each."""
    num_layout_pairs: int = 2000
    """Pairs of texts that differ from others in where things are, for caption-contrastive tuning."""
    num_raw_captions: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of raw captions that a training scene may have, equally likely."""
    num_long_captions: list[int] = field(default_factory=lambda: [2, 3])
    """Numbers of long captions that a training scene may have, equally likely."""
    num_val_scenes: int = 500
    """Scenes in each pool of val."""
    num_test_scenes: int = 500
    """Scenes in each pool of test."""
    image_size: int = 96
    """Side of the pictures in pixels."""
    grid: Literal[2, 3] = 3
    """Cells per side of a scene."""
    languages: list[str] = field(default_factory=lambda: ["de", "fr", "es", "it", "pt", "zh", "ja"])
    """Languages of the cross-lingual test pools."""
    tokenizer: Path | None = None
    """A tokenizer.json to count caption tokens with, for the data card; None counts words only."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, expected at least {least}"
            for name, least in (
                ("num_scenes", 1),
                ("num_renderings", 1),
                ("num_singles", 0),
                ("num_val_scenes", 1),
                ("num_test_scenes", 1),
            )
            if getattr(self, name) < least
        ]
        problems += [
            f"{name} is {getattr(self, name)}, expected numbers of at least 1"
            for name in ("num_raw_captions", "num_long_captions")
            if min(getattr(self, name), default=0) < 1
        ]
        if self.num_concepts is not None and self.num_concepts < 20:
            problems.append(f"num_concepts is {self.num_concepts}, expected at least 20: each split needs some")
        if self.image_size < 16 * self.grid:
            problems.append(
                f"image_size is {self.image_size}, expected at least 16 pixels for each of {self.grid} cells"
            )
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[DemoConfig]:
    return parse_stage(DemoConfig, argv, prog="llm2clip data demo")


def inputs(call: StageCall[DemoConfig]) -> dict[str, str]:
    """Digests of the packages that can be had, fetching those that are not cached."""
    found = packages.fetch(packages.wanted(call.config, OWN_PACKAGES), call.config.cache_dir)
    digests = {name: fetched.package.sha256 for name, fetched in found.items()}
    if call.config.tokenizer:
        digests["tokenizer"] = fingerprint(call.config.tokenizer)
    return digests


def run(call: StageCall[DemoConfig]) -> None:
    """Build everything below the output directory."""
    with RunDir(call, stage="data demo", inputs=inputs(call)) as run:
        if run.complete:
            logger.info("data demo: already complete, %s", run.path)
            return
        facts = _build(call.config, run.path)
        run.finish(outputs=["train", "pools", "contact_sheet.png", "data_card.md", packages.SOURCES], **facts)


def main(argv: Sequence[str] | None = None) -> None:
    run(parse(argv))


def _build(config: DemoConfig, folder: Path) -> dict[str, Any]:
    from llm2clip.demo import pools, sheet, styles, training
    from llm2clip.demo.concepts import load_concepts
    from llm2clip.demo.recipe import Recipe

    start = time.monotonic()
    found = packages.fetch(packages.wanted(config, OWN_PACKAGES), config.cache_dir)
    packages.write_sources(folder, found)
    concepts = load_concepts(found, config.languages, config.num_concepts, config.seed)
    drawings = _draw(config, found, concepts)
    has_held_out = styles.HELD_OUT_STYLE in found
    recipe = Recipe(
        concepts=concepts,
        seed=config.seed,
        grid=config.grid,
        styles=tuple(style for style in styles.TRAINING_STYLES if style in found),
        held_out_style=styles.HELD_OUT_STYLE if has_held_out else None,
        num_raw=config.num_raw_captions,
        num_long=config.num_long_captions,
        has_held_out_style=lambda concept: styles.HELD_OUT_STYLE in drawings.styles_of(concept),
    )
    logger.info(
        "data demo: %d concepts in %d styles, %.1f s", len(concepts), len(drawings.styles), time.monotonic() - start
    )
    parts: dict[str, list[Item]] = {
        "train/scenes": list(training.training_scenes(recipe, config.num_scenes, config.num_renderings)),
        "train/singles": list(training.training_singles(recipe, config.num_singles)),
    }
    sizes: dict[Split, int] = {"val": config.num_val_scenes, "test": config.num_test_scenes}
    for split, size in sizes.items():
        for name, items in pools.pools(recipe, split, size, config.languages):
            parts[f"pools/{split}/{name}"] = items
    logger.info("data demo: captions written, %.1f s", time.monotonic() - start)
    _write_captions(folder, parts)
    pairs = training.text_pairs(recipe)
    atomic_write(folder / "train" / "text_pairs.jsonl", _jsonl(pairs))
    layout = training.layout_pairs(recipe, config.num_layout_pairs)
    atomic_write(folder / "train" / "layout_pairs.jsonl", _jsonl(layout))
    _write_images(folder, parts, drawings, config.seed)
    logger.info("data demo: %d pictures, %.1f s", sum(map(len, parts.values())), time.monotonic() - start)
    facts = sheet.facts(parts, concepts, [*pairs, *layout], config.tokenizer)
    sheet.contact_sheet(folder, parts)
    sheet.data_card(folder, facts, packages.TABLE, found)
    return facts


def _draw(config: DemoConfig, found: Mapping[str, packages.Fetched], concepts: Sequence[Concept]) -> Drawings:
    """Render every concept in every style that is there."""
    from llm2clip.demo import styles
    from llm2clip.demo.scenes import Drawings, draw_svg

    wanted = []
    for style in (*styles.TRAINING_STYLES, styles.HELD_OUT_STYLE):
        if style in found:
            svgs = styles.read_svgs(style, found[style], concepts)
            wanted += [(style, key, svg) for key, svg in svgs.items()]
    images: dict[str, dict[str, Any]] = {}
    drawn = _in_parallel(lambda index: draw_svg(wanted[index][2], config.image_size), len(wanted))
    for (style, key, _), image in zip(wanted, drawn, strict=True):
        images.setdefault(style, {})[key] = image
    if missing := sorted({concept.key for concept in concepts} - set(images["openmoji"])):
        raise ValueError(f"openmoji has no drawing of {missing}; take these out of lexicon.json")
    return Drawings(images, config.image_size, config.grid)


def _write_captions(folder: Path, parts: Mapping[str, Sequence[Item]]) -> None:
    for part, items in parts.items():
        (folder / part / "images").mkdir(parents=True, exist_ok=True)
        atomic_write(folder / part / "captions.jsonl", _jsonl(item.row() for item in items))


def _jsonl(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_images(folder: Path, parts: Mapping[str, Sequence[Item]], drawings: Drawings, seed: int) -> None:
    """Draw every picture once, also those that several parts show."""
    from random import Random

    jobs: dict[tuple[str, tuple[str, ...]], tuple[Item, list[Path]]] = {}
    for part, items in parts.items():
        for item in items:
            _, paths = jobs.setdefault((item.render_key, item.styles), (item, []))
            paths.append(folder / part / "images" / f"{item.id}.png")
    listed = list(jobs.values())

    def render(index: int) -> None:
        item, paths = listed[index]
        png = drawings.render(item.groups, item.styles, Random(f"{seed}:{item.render_key}"))
        for path in paths:
            path.write_bytes(png)

    for _ in _in_parallel(render, len(listed)):
        pass


_task: Callable[[int], Any] | None = None


def _in_parallel(task: Callable[[int], Any], count: int) -> Iterator[Any]:
    """`task(0)`, `task(1)`, ... over all cores, in order. Forked processes inherit what `task` refers to."""
    global _task
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < PARALLEL_FROM or processes == 1:
        yield from map(task, range(count))
        return
    _task = task
    try:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            yield from pool.imap(_run_task, range(count), chunksize=64)
    finally:
        _task = None


def _run_task(index: int) -> Any:
    assert _task is not None
    return _task(index)
