"""What a person looks at: the contact sheet and the data card."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from llm2clip.demo.concepts import SPLITS, Concept
from llm2clip.demo.packages import Fetched, Package
from llm2clip.demo.recipe import Item
from llm2clip.run_dir import atomic_path, atomic_write

PARTS_PER_ROW = 2
PICTURES_PER_PART = 4
PICTURE_SIZE = 128
TEXT_WIDTH = 40
MAX_LINES = 11
COLUMN_WIDTH = 250
ROW_HEIGHT = PICTURE_SIZE + 185
TEXTS_PER_BATCH = 4096
UNDRAWABLE = ("lang_zh", "lang_ja", "lang_ko")
"""Pools whose script the font lacks."""


def facts(
    parts: Mapping[str, Sequence[Item]],
    concepts: Sequence[Concept],
    pairs: Sequence[Mapping[str, str]],
    tokenizer: Path | None,
) -> dict[str, Any]:
    """Counts for the manifest and the data card."""
    counts: dict[str, Any] = {
        "concepts": dict(Counter(concept.split for concept in concepts)),
        "wordings": _wordings_by_split(concepts),
        "text_pairs": dict(Counter(pair["kind"] for pair in pairs)),
        "parts": {},
    }
    texts = sorted(
        {text for items in parts.values() for item in items for texts in item.captions.values() for text in texts}
    )
    lengths = _token_counts(texts, tokenizer)
    for part, items in parts.items():
        kinds: dict[str, dict[str, Any]] = {}
        for kind in sorted({kind for item in items for kind in item.captions}):
            distinct = {text for item in items for text in item.captions.get(kind, ())}
            kinds[kind] = {"captions": len(distinct), "mean_words": _mean([len(text.split()) for text in distinct])}
            if tokenizer:
                kinds[kind]["mean_tokens"] = _mean([lengths[text] for text in distinct])
                kinds[kind]["max_tokens"] = max(lengths[text] for text in distinct)
        counts["parts"][part] = {"pictures": len(items), "kinds": kinds}
    counts["distinct_captions"] = len(texts)
    if tokenizer:
        counts["tokens_of_distinct_captions"] = sum(lengths.values())
    return counts


def _wordings_by_split(concepts: Sequence[Concept]) -> dict[str, int]:
    """How many wordings of training concepts each split holds."""
    train = [concept for concept in concepts if concept.split == "train"]
    return {split: sum(len(concept.wordings[split]) for concept in train) for split in SPLITS}


def _token_counts(texts: Sequence[str], tokenizer: Path | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode_batch_fast
    lengths = {}
    for start in range(0, len(texts), TEXTS_PER_BATCH):  # all at once take half a gigabyte
        batch = list(texts[start : start + TEXTS_PER_BATCH])
        lengths |= {text: len(encoding.ids) for text, encoding in zip(batch, encode(batch), strict=True)}
    return lengths


def _mean(values: Sequence[int]) -> float:
    return round(sum(values) / len(values), 1)


def contact_sheet(folder: Path, parts: Mapping[str, Sequence[Item]]) -> None:
    """Write contact_sheet.png: a few pictures of each part with their captions, two parts side by side."""
    shown = {part: items for part, items in parts.items() if Path(part).name not in UNDRAWABLE and items}
    height = (len(shown) + 1) // PARTS_PER_ROW * ROW_HEIGHT
    sheet = Image.new("RGB", (PARTS_PER_ROW * PICTURES_PER_PART * COLUMN_WIDTH, height), "white")
    draw = ImageDraw.Draw(sheet)
    typeface = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # Pillow's own lacks accents
    title, font = ImageFont.truetype(typeface, 14), ImageFont.truetype(typeface, 10)
    for index, (part, items) in enumerate(shown.items()):
        top = index // PARTS_PER_ROW * ROW_HEIGHT
        start = index % PARTS_PER_ROW * PICTURES_PER_PART * COLUMN_WIDTH
        draw.line((start, top, start + PICTURES_PER_PART * COLUMN_WIDTH, top), fill="#bbbbbb")
        draw.text((start + 6, top + 3), part, fill="#1f4e79", font=title)
        step = max(1, len(items) // PICTURES_PER_PART)
        for column, item in enumerate(items[::step][:PICTURES_PER_PART]):
            left = start + column * COLUMN_WIDTH + 6
            with Image.open(folder / part / "images" / f"{item.id}.png") as picture:
                sheet.paste(picture.convert("RGB").resize((PICTURE_SIZE, PICTURE_SIZE)), (left, top + 24))
            draw.rectangle((left - 1, top + 23, left + PICTURE_SIZE, top + 24 + PICTURE_SIZE), outline="#dddddd")
            lines = []
            for kind, texts in item.captions.items():
                lines += textwrap.wrap(f"{kind}: {texts[0]}", TEXT_WIDTH)
            below = (left, top + PICTURE_SIZE + 27)
            draw.multiline_text(below, "\n".join(lines[:MAX_LINES]), fill="black", font=font, spacing=1)
    with atomic_path(folder / "contact_sheet.png") as temporary:
        sheet.save(temporary, "PNG")


def data_card(
    folder: Path, counts: Mapping[str, Any], table: Mapping[str, Package], found: Mapping[str, Fetched]
) -> None:
    """Write data_card.md: what is in the data, how it is split, where it comes from."""
    lines = [
        "# Demo data",
        "",
        "Emoji drawings of several vendors, alone and composed on a grid, with English captions written by a grammar "
        "(`raw` like alt text, `short`, `long`) and names in other languages. Made by `llm2clip data demo`; "
        "`contact_sheet.png` shows samples.",
        "",
        "## Splits",
        "Each is decided by sha256 of a stable key, never by order.",
        "",
        f"- **Concepts**: {_listed(counts['concepts'])}. No training picture shows a held-out "
        "one, and no training text is about one.",
        f"- **Wording** (other names of training concepts, written by hand): {_listed(counts['wordings'])}. "
        "A held-out one shares no content word with the concept's name or its training wordings, belongs to one "
        "concept only, and is in no training caption or text pair of that concept.",
        "- **Compositions**: pairs of concepts, four of a kind, and places of a concept that training never shows.",
        "- **Style**: the held-out style redraws the scenes of `seen` and `concepts`.",
        "- **Languages**: the pictures of `seen`; training text is English only.",
        "",
        "In a pool no scene's objects contain another's, so that captions identify their picture.",
        "",
        f"## Counts ({counts['distinct_captions']:,} distinct captions"
        + (f", {counts['tokens_of_distinct_captions']:,} tokens)" if "tokens_of_distinct_captions" in counts else ")"),
        "| part | pictures | kind | distinct captions | mean words | mean tokens | max tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, row in counts["parts"].items():
        for kind, facts in row["kinds"].items():
            lines.append(
                f"| {part} | {row['pictures']:,} | {kind} | {facts['captions']:,} | {facts['mean_words']} "
                f"| {facts.get('mean_tokens', '-')} | {facts.get('max_tokens', '-')} |"
            )
    lines += [
        "",
        f"`train/text_pairs.jsonl` and `train/layout_pairs.jsonl`: {_listed(counts['text_pairs'])}.",
        "",
        "## Sources",
        "| package | licence | holds | used |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {package.requirement} | {package.licence} | {package.holds} | {'yes' if name in found else 'no'} |"
        for name, package in table.items()
        if name in found or not package.needed
    ]
    lines += ["", "The pictures keep their vendors' licences and are not to be republished with this toolkit:", ""]
    lines += [f"- {fetched.package.notice}" for fetched in found.values()]
    atomic_write(folder / "data_card.md", "\n".join(lines) + "\n")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
