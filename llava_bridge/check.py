"""`llava-bridge check --data FILE --image_root DIR`: say what is wrong with instruction data before training on it.

Reads the dialogues, looks for every image and decodes it; prints what there is, and the problems by kind. Exit code 2
if more of the rows are bad than training would accept.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from llava_bridge.dialogues import DialogueData
    from llm2clip.caption_sources import Problem

logger = logging.getLogger(__name__)

_CHUNK = 4096  # images submitted at once
_NUM_EXAMPLES = 3


class ImageReport(NamedTuple):
    """What decoding the images found."""

    bad: dict[str, str]
    """Path -> the reason why it cannot be decoded."""
    misnamed: dict[str, str]
    """Path -> the format that the file really has."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="llava-bridge check",
        description="Report what is wrong with instruction data. Exit code 2 if more of it is bad than is accepted.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="LLaVA's .json, or .jsonl")
    parser.add_argument("--image_root", type=Path, metavar="DIR", help="what image paths are below; default: FILE's")
    parser.add_argument(
        "--decode", choices=("true", "false"), default="true", help="decode every image (false: only look for them)"
    )
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.001, metavar="SHARE", help="accepted share of bad rows (0.001)"
    )
    parser.add_argument("--problems", type=Path, metavar="OUT.jsonl", help="list every bad row in this file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode images")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        ValueError: There is no usable row, or too many are bad; the report has been printed.
    """
    args = parse(argv)

    from llava_bridge.dialogues import DialogueData
    from llm2clip.caption_sources import skipped_line
    from llm2clip.run_dir import atomic_write

    data = DialogueData(args.data, args.image_root)
    images = decode_images(data, args.workers) if args.decode == "true" else None
    problems = data.problems + (rows_with(data, images.bad) if images else [])
    if args.problems:
        atomic_write(args.problems, "".join(skipped_line(data.path, problem) for problem in problems))
    num_usable = data.num_rows - len(problems)
    sys.stdout.write(
        f"{data.path}: {data.num_rows:,} rows, {num_usable:,} of them usable; {len(data.image_paths()):,} images "
        f"below {data.image_root}\n"
    )
    for line in [*_describe_words(data), *_describe_problems(problems), *_describe_notes(data, images)]:
        sys.stdout.write(line.rstrip() + "\n")
    if not data.num_rows:
        raise ValueError(f"{args.data}: no rows")
    if not num_usable or len(problems) > args.max_bad_fraction * data.num_rows:
        raise ValueError(
            f"{args.data}: {len(problems):,} of {data.num_rows:,} rows are bad; at most {args.max_bad_fraction:.2%} "
            "may be (max_bad_fraction)"
        )


def decode_images(data: DialogueData, num_workers: int = 1) -> ImageReport:
    """Decode every image once."""
    from llm2clip.images import decode_image

    def check(path: str) -> tuple[str | None, str | None]:
        try:
            content = data.image_bytes(path)
            decode_image(content)
        except ValueError as error:
            return str(error), None
        return None, _format_unlike_name(path, content)

    report = ImageReport({}, {})
    paths = data.image_paths()
    with ThreadPoolExecutor(num_workers) as pool:
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            for path, (reason, real_format) in zip(chunk, pool.map(check, chunk), strict=True):
                if reason:
                    report.bad[path] = reason
                elif real_format:
                    report.misnamed[path] = real_format
            logger.info("decoded %d of %d images", start + len(chunk), len(paths))
    return report


def _format_unlike_name(path: str, content: bytes) -> str | None:
    """The format of a decodable image, if its extension stands for another one."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        real_format = image.format
    real_format = "JPEG" if real_format == "MPO" else real_format  # a JPEG with more pictures behind the first
    named_format = Image.registered_extensions().get(PurePath(path).suffix.lower())
    return None if named_format == real_format else real_format


def rows_with(data: DialogueData, bad: Mapping[str, str]) -> list[Problem]:
    """One problem for each row that has an image in `bad` (path -> reason)."""
    from llm2clip.caption_sources import Problem

    problems = []
    for index in range(len(data)) if bad else ():
        path = next((path for path in data.images_of(index) if path in bad), None)
        if path is not None:
            problems.append(Problem(data.describe(index), f"{bad[path]}, in {path}"))
    return problems


def _describe_words(data: DialogueData) -> list[str]:
    """How many words the rows of each modality have."""
    import numpy as np

    words = np.abs(np.array(data.word_lengths(), dtype=np.int64))
    modalities = {
        "one image": data.num_images == 1,
        "several images": data.num_images > 1,
        "text only": data.num_images == 0,
    }
    lines = ["", f"{'words':<16}{'rows':>10}{'min':>8}{'median':>8}{'90 %':>8}{'99 %':>8}{'max':>8}"]
    for name, mask in modalities.items():
        quantiles = np.quantile(words[mask], [0, 0.5, 0.9, 0.99, 1], method="inverted_cdf") if mask.any() else []
        lines.append(f"{name:<16}{mask.sum():>10,}" + "".join(f"{value:>8,.0f}" for value in quantiles))
    return [*lines, "", *_histogram(words)]


def _histogram(words: np.ndarray) -> list[str]:
    """Rows by number of words, in steps of a power of two, from the first that is not empty to the last."""
    import numpy as np

    if not len(words):
        return []
    counts = np.bincount(np.frexp(words)[1])  # exponent e: 2 ** (e - 1) <= words < 2 ** e
    return [
        f"{2 ** (e - 1):>8,} -{2**e - 1:>6,}{counts[e]:>10,}  {'#' * int(np.ceil(40 * counts[e] / counts.max()))}"
        for e in range(int(counts.nonzero()[0][0]), len(counts))
    ]


def _describe_problems(problems: Sequence[Problem]) -> list[str]:
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(problem.kind, []).append(problem)
    lines = ["", f"{len(problems):,} bad rows" + (", left out in training:" if problems else "")]
    for kind, group in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(group):8,} {kind}")
        lines += [f"           {problem.where}: {problem.reason}" for problem in group[:_NUM_EXAMPLES]]
    return lines


def _describe_notes(data: DialogueData, images: ImageReport | None) -> list[str]:
    examples = {"image with another extension": [f"{old} -> {new}" for old, new in data.resolved.items()]}
    counts = dict(data.notes)
    if images and images.misnamed:
        counts["image file whose extension is not its format"] = len(images.misnamed)
        examples["image file whose extension is not its format"] = [
            f"{path} is {real_format}" for path, real_format in images.misnamed.items()
        ]
    lines = ["", "Used all the same:"] if counts else []
    for note, count in counts.items():
        lines.append(f"{count:8,} {note}")
        lines += [f"           {example}" for example in examples.get(note, [])[:_NUM_EXAMPLES]]
    return [*lines, "", "Images were not decoded (--decode false)."] if images is None else lines
