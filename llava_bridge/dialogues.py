"""Visual instruction data in LLaVA's format: dialogues about images, read from a user's file and never changed.

Reads the official JSON (one list) or the same records as JSON lines. Rows are kept in Arrow memory and images stay
where they are, so that the 665k dialogues of LLaVA-1.5 open on an ordinary machine, once for each process.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from llava_bridge.dialogue_sources import find_image, parse_dialogue, read_lines, read_list
from llm2clip.caption_sources import ImageFolder, Problem
from llm2clip.run_dir import fingerprint

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TURN_TOKENS = 5
"""What a template writes around a turn, roughly; only differences between dialogues matter."""
_BUILD_ROWS = 50_000
_SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "number": pa.int64(),
        "images": pa.large_list(pa.large_string()),
        "texts": pa.large_list(pa.large_string()),
        "num_words": pa.int64(),
    }
)


class Turn(NamedTuple):
    """What one side says; `<image>` marks where an image goes, in user turns only."""

    role: Literal["user", "assistant"]
    text: str


class Dialogue(NamedTuple):
    """One training sample."""

    id: str
    images: tuple[str, ...]
    """Paths below the image root; empty: text only."""
    turns: tuple[Turn, ...]
    """user, assistant, user, assistant, ...; at least one of each."""


class DialogueData:
    """Map-style instruction data: `data[i]` is a `Dialogue`, `data.read_image(path)` one of its images.

    A row: `{"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
    {"from": "gpt", "value": "A cat."}]}`. Several images are a list, under `image` or `images`; rows with neither are
    text only. Other keys are ignored, and a row without id is named by its number.

    Rows that cannot be used are left out and kept in `problems`, so that indices are those of usable rows. Used all
    the same, and counted in `notes`:
      * the first turn is an answer: it is dropped, as in LLaVA;
      * one image and several placeholders in one turn: they become one, before the turn's text, as in LLaVA;
      * one image and no placeholder: one is put before the first turn (LLaVA would not show the image);
      * the id of an earlier row: ids only name rows in messages, and official ones repeat;
      * an image that is only there with another extension (`resolved`).

    Attributes:
        path: What was opened.
        image_root: The folder that image paths are relative to.
        problems: The rows that were left out, in file order.
        notes: Kind of irregularity -> number of rows that have it and are used.
        resolved: Image path in the data -> path of the image that is used instead.
        num_images: (rows,) int64.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        """Read everything, however much of it is bad; `open` is what stages call."""
        self.path = Path(path)
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        if not self.path.is_file():
            raise FileNotFoundError(f"dialogues {self.path}: no such file; expected LLaVA's .json, or .jsonl")
        if not self.image_root.is_dir():
            raise FileNotFoundError(f"image_root {self.image_root} is not a folder")
        self.problems: list[Problem] = []
        self.notes: Counter[str] = Counter()
        self.resolved: dict[str, str] = {}
        table = pa.Table.from_batches(self._batches(), _SCHEMA).combine_chunks()
        self._ids = _one_chunk(table["id"])
        self._numbers: np.ndarray = table["number"].to_numpy()
        self._images = _one_chunk(table["images"])
        self._texts = _one_chunk(table["texts"])
        self._num_words: np.ndarray = table["num_words"].to_numpy()
        self.num_images: np.ndarray = np.diff(np.asarray(self._images.offsets))
        if num_repeated := len(self) - len(self._ids.unique()):
            self.notes["repeated id"] = num_repeated
        del table
        pa.default_memory_pool().release_unused()  # as much again as the texts, left over from building

    @classmethod
    def open(
        cls, path: str | Path, image_root: str | Path | None = None, *, max_bad_fraction: float = 0.001
    ) -> DialogueData:
        """Open instruction data and refuse it if too much of it is bad.

        Args:
            path: `.jsonl` with one record a line, or JSON with a list of them.
            image_root: The folder that image paths are relative to; None: the one `path` is in.
            max_bad_fraction: Share of the rows that may be bad.

        Raises:
            FileNotFoundError: There is nothing at `path` or `image_root`.
            ValueError: It is no JSON list, has no usable row, or more than `max_bad_fraction` of its rows are bad.
        """
        data = cls(path, image_root)
        if data.problems:
            message = f"{path}: {len(data.problems)} of {data.num_rows} rows skipped: {summary(data.problems)}"
            if not len(data) or len(data.problems) > max_bad_fraction * data.num_rows:
                raise ValueError(
                    f"{message}. At most {max_bad_fraction:.2%} may be bad (max_bad_fraction); image paths are below "
                    f"{data.image_root} (image_root). `llava-bridge check --data {path}` tells more"
                )
            logger.warning(message)
        elif not len(data):
            raise ValueError(f"{path}: no rows")
        if data.notes:
            logger.info("%s: %s", path, ", ".join(f"{count} x {note}" for note, count in data.notes.items()))
        return data

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Dialogue:
        index = self._check_index(index)
        roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
        turns = tuple(Turn(roles[j % 2], text) for j, text in enumerate(self._texts[index].as_py()))
        return Dialogue(self._ids[index].as_py(), self.images_of(index), turns)

    def __iter__(self) -> Iterator[Dialogue]:
        return (self[index] for index in range(len(self)))

    @property
    def num_rows(self) -> int:
        """Rows of the file, usable or not."""
        return len(self) + len(self.problems)

    def images_of(self, index: int) -> tuple[str, ...]:
        """The image paths of a row."""
        return tuple(self._images[self._check_index(index)].as_py())

    def image_paths(self) -> list[str]:
        """Every image once, sorted."""
        return sorted(self._images.values.unique().to_pylist())

    def describe(self, index: int) -> str:
        """Name a row for people: its place in the file, and its id."""
        index = self._check_index(index)
        return self._where(self._numbers[index], self._ids[index].as_py())

    def image_bytes(self, path: str) -> bytes:
        """Read an image (one of `Dialogue.images`) without decoding it.

        Raises:
            ValueError: "missing image: ...": it is no longer there.
        """
        try:
            return (self.image_root / path).read_bytes()
        except OSError as error:
            raise ValueError(f"missing image: {error}") from error

    def read_image(self, path: str) -> Image.Image:
        """Decode an image (one of `Dialogue.images`) to upright RGB.

        Raises:
            ValueError: "<kind>: <detail>", as of `image_bytes` and `images.decode_image`.
        """
        from llm2clip.images import decode_image

        return decode_image(self.image_bytes(path))

    def word_lengths(self) -> list[int]:
        """Lengths for `sampler.modality_length_order`: the words of each row, negative if it is text only.

        All turns count as they are in the file, placeholders too (LLaVA, llava/train/train.py `modality_lengths`).
        """
        return self._negate_text_only(self._num_words)

    def token_lengths(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Lengths as of `word_lengths`, in tokens of the turns as they are used; an image counts as one."""
        texts, sizes = self._texts.values, []
        for start in range(0, len(texts), _BUILD_ROWS):
            chunk = texts.slice(start, _BUILD_ROWS).to_pylist()
            sizes += [len(ids) + TURN_TOKENS for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"]]
        ends = np.concatenate([[0], np.cumsum(sizes)])
        return self._negate_text_only(np.diff(ends[np.asarray(self._texts.offsets)]))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the file and over path and size of every image; images are not read."""
        digest = hashlib.sha256(fingerprint(self.path).encode())
        for path in self.image_paths():
            digest.update(f"\n{(self.image_root / path).stat().st_size} {path}".encode())
        return digest.hexdigest()

    def _negate_text_only(self, lengths: np.ndarray) -> list[int]:
        return np.where(self.num_images > 0, lengths, -lengths).tolist()

    def _check_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows in {self.path}")
        return int(index) % len(self)

    def _where(self, number: int, row_id: object) -> str:
        place = f"{self.path.name}:{number}" if self.path.suffix == ".jsonl" else f"{self.path.name}[{number}]"
        if not isinstance(row_id, str | int):
            return place
        return f"{place} ({str(row_id)[:80].encode(errors='backslashreplace').decode()})"

    def _batches(self) -> Iterator[pa.RecordBatch]:
        folder = ImageFolder(self.image_root)
        read = read_lines if self.path.suffix == ".jsonl" else read_list
        rows: list[tuple[Any, ...]] = []
        for number, record in read(self.path):
            try:
                rows.append(self._row(record, number, folder))
            except ValueError as error:
                row_id = record.get("id") if isinstance(record, dict) else None
                self.problems.append(Problem(self._where(number, row_id), str(error)))
            if len(rows) == _BUILD_ROWS:
                yield _record_batch(rows)
                rows = []
        yield _record_batch(rows)

    def _row(self, record: object, number: int, folder: ImageFolder) -> tuple[Any, ...]:
        """The values of `_SCHEMA`. Raises ValueError with a problem's reason if the row cannot be used."""
        row_id, asked, texts, num_words, notes = parse_dialogue(record, number)
        found = [self.resolved.get(path) or find_image(folder, path) for path in asked]
        if found != asked:
            self.resolved.update((old, new) for old, new in zip(asked, found, strict=True) if old != new)
            self.notes["image with another extension"] += 1
        self.notes.update(notes)
        return row_id, number, found, texts, num_words


def summary(problems: Sequence[Problem]) -> str:
    """Say how many problems there are of each kind, and the first few."""
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(p.kind for p in problems).most_common())
    return f"{counts}. First: " + "; ".join(f"{problem.where}: {problem.reason}" for problem in problems[:3])


def _record_batch(rows: Sequence[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )


def _one_chunk(column: pa.ChunkedArray) -> Any:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
