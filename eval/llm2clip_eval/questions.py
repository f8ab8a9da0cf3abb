"""Question files: pictures, questions about them and their answers; and when an answer is right.

A file is parquet, as `datasets` writes it, one question a row: `id`, `image` (a `datasets.Image`), `question`,
`answer`, `type` and `subtype` of the question, `language`, `image_id` (questions about one image are no independent
observations) and `chance`, the share of such questions that a guess among their possible answers gets right. The
demo's also have `choices`, these answers, which the task demo_choice draws from.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    from PIL import Image

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}


@dataclass(frozen=True)
class Question:
    """One row of a question file, without its image."""

    id: str
    question: str
    answer: str
    type: str
    subtype: str
    language: str
    image_id: str
    chance: float


TEXTS = ("id", "question", "answer", "type", "subtype", "language", "image_id")


class QuestionFile:
    """The questions of one parquet file; images are decoded when they are asked for.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if columns are missing, it is empty, or a row is not a question, naming the row.
    """

    def __init__(self, path: Path) -> None:
        import datasets
        import pyarrow
        import pyarrow.parquet

        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected a parquet file of questions")
        try:
            num_rows = pyarrow.parquet.read_metadata(path).num_rows
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is no parquet file: {error}") from error
        if not num_rows:
            raise ValueError(f"{path} holds no questions")
        table: Any = datasets.Dataset.from_parquet(str(path))
        if missing := {"image", "chance", *TEXTS} - set(table.column_names):
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; there are {table.column_names}")
        self.path = path
        self._images = table.select_columns("image").cast_column("image", datasets.Image(decode=False))
        rows = table.select_columns([*TEXTS, "chance"])
        self.questions = [_question(path, number, row) for number, row in enumerate(rows)]
        times = Counter(question.id for question in self.questions)
        if repeated := [name for name, count in times.items() if count > 1]:
            raise ValueError(f"{path}: {len(repeated)} id(s) stand more than once, first {repeated[0]!r}")

    def __len__(self) -> int:
        return len(self.questions)

    def load_image(self, index: int) -> Image.Image:
        """The image of one question, 8-bit RGB.

        Raises:
            ValueError: if it cannot be decoded, naming the question.
        """
        from llm2clip.images import decode_image

        data = self._read(index)
        try:
            return decode_image(data)
        except ValueError as error:
            raise ValueError(f"{self.path}, question {self.questions[index].id}: {error}") from error

    def image_digests(self) -> list[bytes]:
        """For every question a digest of its image file: questions about the same picture have the same.

        Raises:
            ValueError: if an image is missing, naming the question.
        """
        return [hashlib.sha256(self._read(index)).digest() for index in range(len(self))]

    def _read(self, index: int) -> bytes:
        cell = self._images[index]["image"]
        if cell is None:
            raise ValueError(f"{self.path}, question {self.questions[index].id}: no image")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def _question(path: Path, number: int, row: dict[str, Any]) -> Question:
    for name in TEXTS:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{path}, row {number}: {name} is {row[name]!r}, expected text")
    if not isinstance(row["chance"], (int, float)) or not 0 <= row["chance"] <= 1:
        raise ValueError(f"{path}, row {number}: chance is {row['chance']!r}, expected a number from 0 to 1")
    return Question(**row)


def is_correct(prediction: str, answer: str) -> bool:
    """Whether an answer is the expected one: all of it, as `normalized` has it; no part of it counts."""
    return bool(normalized(prediction)) and normalized(prediction) == normalized(answer)


def normalized(text: str) -> str:
    """What of an answer is compared.

    Case, Unicode composition, repeated space, punctuation around words (a final full stop, quotes) and the articles a,
    an and the do not count; number words from zero to ten are the digits. Punctuation within a word does count (3.5,
    T-shirt), and an article that is the whole answer is kept, as in a question with choices A and B.
    """
    words = [_bare(word) for word in unicodedata.normalize("NFKC", text).casefold().split()]
    words = [NUMBERS.get(word, word) for word in words if word]
    return " ".join([word for word in words if word not in ARTICLES] or words)


def _bare(word: str) -> str:
    inner = [place for place, character in enumerate(word) if not unicodedata.category(character).startswith("P")]
    return word[inner[0] : inner[-1] + 1] if inner else ""
