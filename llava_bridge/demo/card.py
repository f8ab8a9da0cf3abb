"""What a person looks at: the data card and the contact sheet."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from llava_bridge.demo.dialogues import Sample
from llava_bridge.demo.questions import Question
from llm2clip.demo.packages import Fetched
from llm2clip.run_dir import atomic_path, atomic_write

PICTURE_SIZE = 120
COLUMN_WIDTH = 300
ROW_HEIGHT = 240
COLUMNS = 5
TEXT_WIDTH = 50
MAX_LINES = 8
NUM_COMMON = 4
TITLES = {"type": "type", "subtype": "subtype", "language": "lang."}


def facts(pretrain: Sequence[Sample], finetune: Sequence[Sample], evaluation: Mapping[str, Sequence[dict]]) -> dict:
    """Counts for the manifest and the data card."""
    guesses = Guesses([question for sample in finetune for question in sample.questions])
    return {
        "pretrain": {
            "samples": len(pretrain),
            "kinds": dict(Counter(question.subtype for sample in pretrain for question in sample.questions)),
        },
        "finetune": {
            "samples": len(finetune),
            "without_picture": sum(sample.picture is None for sample in finetune),
            "questions": sum(len(sample.questions) for sample in finetune),
            "by_subtype": _by_subtype([_row(question) for sample in finetune for question in sample.questions]),
        },
        "eval": {
            name: {
                "questions": len(rows),
                "pictures": len({row["image_id"] for row in rows}),
                "by_subtype": _by_subtype(rows, guesses),
            }
            for name, rows in evaluation.items()
        },
    }


class Guesses:
    """What somebody who knows the training dialogues by heart answers without the picture.

    The most frequent training answer to that very text, else to that subtype in that language.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        self._by_text: dict[tuple[str, str], Counter[str]] = {}
        self._by_subtype: dict[tuple[str, str], Counter[str]] = {}
        for question in questions:
            self._by_text.setdefault((question.text, question.language), Counter())[question.answer] += 1
            self._by_subtype.setdefault((question.subtype, question.language), Counter())[question.answer] += 1

    def guess(self, row: Mapping[str, Any]) -> str | None:
        known = self._by_text.get((row["question"], row["language"]))
        known = known or self._by_subtype.get((row["subtype"], row["language"]))
        return known.most_common(1)[0][0] if known else None


def _row(question: Question) -> dict[str, str]:
    return {name: getattr(question, name) for name in ("type", "subtype", "language", "answer")}


def _by_subtype(rows: Sequence[Mapping[str, Any]], guesses: Guesses | None = None) -> list[dict[str, Any]]:
    """Per type, subtype and language: how many, the common answers, and what blind guesses would get right."""
    parts: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(tuple(row[name] for name in TITLES), []).append(row)
    counted = []
    for key, part in sorted(parts.items()):
        answers = Counter(row["answer"] for row in part)
        entry = dict(zip(TITLES, key, strict=True)) | {
            "questions": len(part),
            "answers": len(answers),
            "majority": round(max(answers.values()) / len(part), 4),
            "common": dict(sorted(answers.items(), key=lambda item: (-item[1], item[0]))[:NUM_COMMON]),
        }
        if guesses:
            entry["chance"] = round(part[0]["chance"], 4)
            entry["blind"] = round(sum(guesses.guess(row) == row["answer"] for row in part) / len(part), 4)
        counted.append(entry)
    return counted


def data_card(folder: Path, counts: Mapping[str, Any], found: Mapping[str, Fetched]) -> None:
    """Write data_card.md: what is in the data, how answers are distributed, where it comes from."""
    pretrain, finetune = counts["pretrain"], counts["finetune"]
    lines = [
        "# Demo dialogues",
        "",
        "Made by `llava-bridge data questions` from the exact facts of `llm2clip data demo`; `contact_sheet.png` "
        "shows samples. Training reads `train/` only: no held-out concept, wording, pair, count or place is in it.",
        "",
        "## How answers are kept from being guessed",
        "- Yes/no questions come in pairs: one text, asked of two scenes, true of exactly one. P(yes | text) is one "
        "half.",
        "- Otherwise the fact whose answer was given least so far is asked: answers are as equally frequent as the "
        "scenes allow. Things counted zero times are those of another scene.",
        "- easy-VQA's texts are answered with yes as often as with no, but for one question each in training.",
        "",
        "`majority`: the most frequent answer's share, the best a constant answer can get. `chance`: one over the "
        "number of different answers. `blind`: right answers of a guess that knows every training dialogue (the most "
        "frequent answer to that text, else to that subtype) and no picture. `left of` and the like mean any column "
        "or row further on that side.",
        "",
        "## pretrain.json",
        f"{pretrain['samples']:,} pictures with one caption each: "
        + ", ".join(f"{number:,} {kind}" for kind, number in sorted(pretrain["kinds"].items()))
        + ".",
        "",
        "## finetune.json",
        f"{finetune['samples']:,} dialogues, {finetune['without_picture']:,} of them without a picture, "
        f"{finetune['questions']:,} questions.",
        "",
        *_table(finetune["by_subtype"]),
    ]
    for name, part in counts["eval"].items():
        lines += [
            "",
            f"## eval/{name}.parquet",
            f"{part['questions']:,} questions about {part['pictures']:,} pictures.",
            "",
            *_table(part["by_subtype"]),
        ]
    lines += ["", "## Sources", "The pictures keep their vendors' licences and are not to be republished:", ""]
    lines += ["- the drawings: see the data card of `llm2clip data demo`"]
    lines += [f"- {fetched.package.requirement}: {fetched.package.notice}" for fetched in found.values()]
    atomic_write(folder / "data_card.md", "\n".join(lines) + "\n")


def _table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    blind = bool(entries) and "blind" in entries[0]
    columns = ["questions", "answers", "majority", *(["chance", "blind"] if blind else [])]
    header = [*TITLES.values(), *columns, "most frequent answers"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for entry in entries:
        cells = [str(entry[name]) for name in (*TITLES, *columns)]
        common = ", ".join(f"{answer.replace('|', '/')} {number}" for answer, number in entry["common"].items())
        lines.append(f"| {' | '.join(cells)} | {common} |")
    return lines


def contact_sheet(folder: Path, finetune: Sequence[Sample], evaluation: Mapping[str, Sequence[dict]]) -> None:
    """Write contact_sheet.png: pictures with their questions, a row for each part."""
    with_picture = [sample for sample in finetune if sample.picture]
    parts: dict[str, list[tuple[bytes, list[str]]]] = {}
    for sample in with_picture:
        title = f"finetune, {sample.id.rsplit('-', 1)[0]}, {sample.questions[0].language}"
        cells = parts.setdefault(title, [])
        if len(cells) < COLUMNS:
            assert sample.picture
            cells.append((sample.picture.read(), [f"{q.text} {q.answer}" for q in sample.questions]))
    for name, rows in evaluation.items():
        shown = rows[:: max(1, len(rows) // COLUMNS)][:COLUMNS]
        parts[f"eval/{name}"] = [(row["image"]["bytes"], [f"{row['question']} {row['answer']}"]) for row in shown]
    sheet = Image.new("RGB", (COLUMNS * COLUMN_WIDTH, len(parts) * ROW_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    typeface = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # Pillow's own lacks accents
    title_font, font = ImageFont.truetype(typeface, 14), ImageFont.truetype(typeface, 10)
    for number, (title, cells) in enumerate(parts.items()):
        top = number * ROW_HEIGHT
        draw.text((6, top + 2), title, fill="#1f4e79", font=title_font)
        for column, (png, texts) in enumerate(cells):
            left = column * COLUMN_WIDTH + 6
            with Image.open(io.BytesIO(png)) as picture:
                sheet.paste(picture.convert("RGB").resize((PICTURE_SIZE, PICTURE_SIZE)), (left, top + 22))
            lines = [line for text in texts for line in textwrap.wrap(text, TEXT_WIDTH, subsequent_indent="   ")]
            below = (left, top + PICTURE_SIZE + 25)
            draw.multiline_text(below, "\n".join(lines[:MAX_LINES]), fill="black", font=font, spacing=0)
    with atomic_path(folder / "contact_sheet.png") as temporary:
        sheet.save(temporary, "PNG")
