"""`llm2clip data check PATH`: say what is wrong with caption data, row by row.

Reads caption data of any format and decodes every image; prints one line per problem and their counts. Exit code 2
if there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm2clip.caption_data import CaptionData
    from llm2clip.caption_sources import Problem

_CHUNK = 4096  # images submitted at once


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        ValueError: The data has problems, all of which have been printed.
    """
    parser = argparse.ArgumentParser(
        prog="llm2clip data check",
        description="Report what is wrong with caption data, row by row. Exit code 2 if anything is.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, help="JSONL, tar, parquet, or a directory of one of them")
    parser.add_argument(
        "--fields",
        nargs="+",
        default=[],
        metavar="KIND=FIELD",
        help="where foreign files keep captions, e.g. raw=raw_caption long=longSV_captions; id=... and image=... too",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the problems as JSON lines")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode images")
    args = parser.parse_args(argv)
    fields = dict(
        pair.split("=", 1) if "=" in pair else parser.error(f"{pair!r} is not KIND=FIELD") for pair in args.fields
    )

    from llm2clip.caption_data import CaptionData

    data = CaptionData(args.path, fields)
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        report = stack.enter_context(args.report.open("w", encoding="utf-8")) if args.report else None
        for problem in find_problems(data, args.workers):
            counts[problem.kind] += 1
            sys.stdout.write(f"{problem.where}: {problem.reason}\n")
            if report is not None:
                report.write(
                    json.dumps({"where": problem.where, "kind": problem.kind, "reason": problem.reason}) + "\n"
                )
    captions = ", ".join(f"{count:,} {kind}" for kind, count in data.kinds.items()) or "none"
    sys.stdout.write(f"{args.path}: {len(data):,} usable rows, {data.num_skipped:,} skipped; captions: {captions}\n")
    for kind, count in counts.most_common():
        sys.stdout.write(f"{count:8,} {kind}\n")
    if counts or not len(data):
        raise ValueError(f"{args.path}: {counts.total():,} problems" if counts else f"{args.path}: no rows")


def find_problems(data: CaptionData, num_workers: int = 1) -> Iterator[Problem]:
    """Yield the problems met in reading the rows, then those of the images that cannot be decoded."""
    yield from data.problems
    with ThreadPoolExecutor(num_workers) as pool:
        for start in range(0, len(data), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(data)))
            yield from filter(None, pool.map(lambda index: _check_image(data, index), indices))


def _check_image(data: CaptionData, index: int) -> Problem | None:
    from llm2clip.caption_sources import Problem
    from llm2clip.images import decode_image

    if not data.has_image(index):
        return None
    try:
        decode_image(data.image_bytes(index))
    except ValueError as error:
        return Problem(data.describe(index), str(error))
    return None
