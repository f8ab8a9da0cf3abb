"""Caption data: images with many captions each, read from a user's files and never changed.

Formats: JSONL + image folder, WebDataset tars, parquet files and `datasets` directories. Rows are kept in Arrow
memory and images stay where they are, so that millions of rows open on an ordinary machine.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from llm2clip.caption_sources import (
    ImageLocation,
    Problem,
    Row,
    captions_of,
    open_table,
    read_field,
    read_jsonl,
    read_table,
    read_tar,
)

if TYPE_CHECKING:
    import datasets.table
    from PIL import Image

logger = logging.getLogger(__name__)

_BUILD_ROWS = 50_000
_SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "where": pa.large_string(),
        "file": pa.large_string(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "kinds": pa.large_list(pa.large_string()),
        "texts": pa.large_list(pa.large_string()),
    }
)
_NO_IMAGE = ImageLocation(None, -1, -1)


class Caption(NamedTuple):
    """One caption of an image."""

    kind: str
    text: str


class Sample(NamedTuple):
    """One image's id and captions."""

    id: str
    captions: tuple[Caption, ...]


class CaptionData:
    """Map-style caption data: `data[i]` is a `Sample`, `data.load_image(i)` its image.

    `path` is one of
      * a directory with `captions.jsonl`, or any `.jsonl` file; image paths are relative to its directory. A row:
        `{"id": "7", "image": "images/7.png", "captions": {"raw": "a cat", "long": ["...", "..."]}}`, or captions as a
        list of `{"kind": ..., "text": ...}`. Rows without `image` are text only;
      * a `.tar` or a directory of them (WebDataset): an image and a `.json` with the same `captions` for each key;
      * a `.parquet` file, a directory of them, or a `datasets` directory (`save_to_disk`), with columns `image` and
        `captions`. Rows without an `id` column are named by their number.

    `fields` reads foreign files: it maps caption kinds to field names (dots descend), for example
    `{"raw": "raw_caption", "long": "longSV_captions"}`; the keys `id` and `image` name those two fields.

    Rows that cannot be used are left out and kept in `problems`, so that indices are those of usable rows. An empty
    caption is left out of its row in the same way.

    Attributes:
        path: What was opened.
        problems: What was left out, in file order.
        num_skipped: Rows (and cut tars) among the problems; the others are empty captions of rows that are used.
        offsets: (rows + 1,) int64; the captions of row i are `texts[offsets[i]:offsets[i + 1]]`.
        texts: All captions, row by row, as one Arrow string array.
        ids: Arrow strings, the id of every row.
        kind_names: The caption kinds in order of appearance.
        kind_codes: (captions,) int32, indices into `kind_names`.
    """

    def __init__(self, path: str | Path, fields: Mapping[str, str] | None = None) -> None:
        """Read everything, however much of it is bad; `open` is what stages call."""
        self.path = Path(path)
        self._fields = dict(fields or {})
        self._images: datasets.table.Table | None = None
        self._image_field = self._fields.pop("image", "image")
        self._id_field = self._fields.pop("id", "id")
        self.problems: list[Problem] = []
        self.num_skipped = 0
        self._root, rows = self._rows()
        table = self._drop_duplicates(pa.Table.from_batches(self._batches(rows), _SCHEMA).combine_chunks())
        self.ids: pa.LargeStringArray = _one_chunk(table["id"])
        self._files = _one_chunk(table["file"])
        self._positions = np.stack([table["offset"].to_numpy(), table["size"].to_numpy()], axis=1)  # (rows, 2)
        captions = _one_chunk(table["texts"])
        self.offsets: np.ndarray = np.asarray(captions.offsets)
        self.texts: pa.LargeStringArray = captions.values
        kinds = _one_chunk(table["kinds"]).values.dictionary_encode()
        self.kind_names: list[str] = kinds.dictionary.to_pylist()
        self.kind_codes: np.ndarray = np.asarray(kinds.indices)
        pa.default_memory_pool().release_unused()  # as much again as the captions, left over from building
        unseen = set(self._fields) - set(self.kind_names)
        if len(self) and unseen:
            raise ValueError(
                f"{self.path}: no row has the field {', '.join(repr(self._fields[kind]) for kind in sorted(unseen))} "
                f"that fields maps to {sorted(unseen)}; row 0 has the kinds {[c.kind for c in self[0].captions]}"
            )

    @classmethod
    def open(
        cls, path: str | Path, fields: Mapping[str, str] | None = None, *, max_bad_fraction: float = 0.01
    ) -> CaptionData:
        """Open caption data and refuse it if too much of it is bad.

        Raises:
            FileNotFoundError: There is nothing at `path`.
            ValueError: It has no known format, no usable row, or more than `max_bad_fraction` of its rows are bad.
        """
        data = cls(path, fields)
        total = len(data) + data.num_skipped
        if data.problems:
            counts = ", ".join(f"{count} {kind}" for kind, count in Counter(p.kind for p in data.problems).items())
            first = "; ".join(f"{problem.where}: {problem.reason}" for problem in data.problems[:3])
            message = f"{path}: {data.num_skipped} of {total} rows skipped ({counts}). First: {first}"
            if not len(data) or data.num_skipped > max_bad_fraction * total:
                raise ValueError(
                    f"{message}. At most {max_bad_fraction:.1%} may be bad (max_bad_fraction); "
                    f"`llm2clip data check {path}` lists them all"
                )
            logger.warning(message)
        elif not len(data):
            raise ValueError(f"{path}: no rows")
        return data

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows in {self.path}")
        index %= len(self)
        names, codes, texts = self.kind_names, self.kind_codes, self.texts
        captions = tuple(
            Caption(names[codes[j]], texts[j].as_py()) for j in range(self.offsets[index], self.offsets[index + 1])
        )
        return Sample(self.ids[index].as_py(), captions)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def has_image(self, index: int) -> bool:
        """Whether the row names an image."""
        return bool(self._positions[index, 0] >= 0)

    def describe(self, index: int) -> str:
        """Name a row for people: its id, and its image's file if it has one of its own."""
        file = self._files[index].as_py()
        return f"{self.ids[index].as_py()}" + (f" ({file})" if file else "")

    def image_bytes(self, index: int) -> bytes:
        """Read the undecoded image of a row.

        Raises:
            ValueError: It has no image, or the image is no longer there.
        """
        offset, size = self._positions[index].tolist()
        file = self._files[index].as_py()
        if offset < 0:
            raise ValueError("missing image: the row is text only")
        if file is None:
            assert self._images is not None
            value = self._images.column(self._image_field)[offset].as_py()
            return value["bytes"] if isinstance(value, dict) else value
        try:
            descriptor = os.open(self._root / file, os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size if size < 0 else size
                data = os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ValueError(f"missing image: {error}") from error
        if len(data) < size:
            raise ValueError(f"truncated tar: {len(data)} of {size} bytes at {offset} in {file}")
        return data

    def load_image(self, index: int, *, min_edge: int | None = None) -> Image.Image:
        """Decode the image of a row to RGB; `min_edge` as in `images.decode_image`.

        Raises:
            ValueError: It is missing or cannot be decoded; names the row's id and the reason.
        """
        from llm2clip.images import decode_image

        try:
            return decode_image(self.image_bytes(index), min_edge=min_edge)
        except ValueError as error:
            raise ValueError(f"image of {self.describe(index)} in {self.path}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ids, kinds and texts in order; the same for the same rows in any format."""
        digest = hashlib.sha256()
        for strings in (self.ids, self.texts, pa.array(self.kind_names, pa.large_string())):
            _, offsets, characters = strings.buffers()
            offsets = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
            digest.update((offsets - offsets[0]).tobytes())
            digest.update(memoryview(characters)[offsets[0] : offsets[-1]])
        digest.update(self.offsets.tobytes())
        digest.update(self.kind_codes.tobytes())
        return digest.hexdigest()

    @cached_property
    def kinds(self) -> Counter[str]:
        """Number of captions of each kind."""
        counts = np.bincount(self.kind_codes, minlength=len(self.kind_names))
        return Counter(dict(zip(self.kind_names, counts.tolist(), strict=True)))

    def _rows(self) -> tuple[Path, Iterator[Row | Problem]]:
        """Recognise the format; returns the folder that image paths are relative to, and the rows."""
        path = self.path
        if not path.exists():
            raise FileNotFoundError(f"caption data {path} does not exist")
        if path.is_dir() and (path / "captions.jsonl").exists():
            return path, read_jsonl(path / "captions.jsonl", self._image_field)
        if path.suffix == ".jsonl":
            return path.parent, read_jsonl(path, self._image_field)
        root = path if path.is_dir() else path.parent
        tars = sorted(path.glob("*.tar")) if path.is_dir() else [path] * (path.suffix == ".tar")
        if tars:
            text_members = set(self._fields.values())
            return root, (row for tar in tars for row in read_tar(tar, text_members))
        if path.suffix == ".parquet" or (path / "state.json").exists() or any(path.glob("*.parquet")):
            self._images = open_table(path)
            table = self._images.table
            wanted = {name.split(".")[0] for name in (self._id_field, *(self._fields.values() or ["captions"]))}
            columns = [name for name in table.column_names if name in wanted]
            return root, read_table(table, columns, self._image_field, root)
        raise ValueError(
            f"{path} holds no caption data; expected captions.jsonl, *.tar, *.parquet or a `datasets` directory in it "
            "(of a DatasetDict, name one split), or a .jsonl, .tar or .parquet file"
        )

    def _batches(self, rows: Iterator[Row | Problem]) -> Iterator[pa.RecordBatch]:
        columns: list[list[Any]] = [[] for _ in _SCHEMA]
        for row in rows:
            if isinstance(row, Problem):
                self._skip(row)
                continue
            try:
                sample_id, kinds, texts = self._sample(row)
            except ValueError as error:
                self._skip(Problem(row.where, str(error)))
                continue
            values = (sample_id, row.where, *(row.image or _NO_IMAGE), kinds, texts)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            if len(columns[0]) == _BUILD_ROWS:
                yield _record_batch(columns)
                columns = [[] for _ in _SCHEMA]
        yield _record_batch(columns)

    def _skip(self, problem: Problem) -> None:
        self.problems.append(problem)
        self.num_skipped += 1

    def _sample(self, row: Row) -> tuple[str, list[str], list[str]]:
        """Take id, kinds and texts out of a row. Raises ValueError with a problem's reason if it cannot be used."""
        sample_id = read_field(row.record, self._id_field)
        sample_id = row.key if sample_id is None else sample_id
        if isinstance(sample_id, int) and not isinstance(sample_id, bool):
            sample_id = str(sample_id)
        if not isinstance(sample_id, str) or not sample_id:
            raise ValueError(
                f"wrong shape: {self._id_field!r} must be text or a whole number, got {sample_id!r}; "
                'fields {"id": FIELD} names another field'
            )
        kinds, texts = [], []
        for kind, text in captions_of(row.record, self._fields):
            if not text or text.isspace():
                self.problems.append(Problem(f"{row.where} ({sample_id})", f"empty caption: of kind {kind!r}"))
                continue
            kinds.append(kind)
            texts.append(text)
        if not texts:
            raise ValueError(f"no caption: {sample_id!r} has none of {list(self._fields) or 'its captions'} left")
        try:
            "".join([sample_id, *kinds, *texts]).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not UTF-8: {error}") from error
        return sample_id, kinds, texts

    def _drop_duplicates(self, table: pa.Table) -> pa.Table:
        """Keep the first row of each id."""
        numbers = np.asarray(_one_chunk(table["id"]).dictionary_encode().indices)  # 0, 1, 2 ... by first appearance
        highest = np.maximum.accumulate(np.concatenate([[-1], numbers]))[:-1]
        is_new = numbers > highest
        for index in np.flatnonzero(~is_new):
            self._skip(Problem(table["where"][index].as_py(), f"duplicate id: {table['id'][index].as_py()!r}"))
        return table if is_new.all() else table.filter(pa.array(is_new)).combine_chunks()


def _record_batch(columns: list[list[Any]]) -> pa.RecordBatch:
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )


def _one_chunk(column: pa.ChunkedArray) -> Any:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
