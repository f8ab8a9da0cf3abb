"""Read the rows of caption data from JSONL files, WebDataset tars, parquet files and `datasets` directories.

Each reader yields a `Row` (the record, and where its image lies) or a `Problem` (what is wrong with the row); it never
reads image bytes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow as pa

from llm2clip.run_dir import atomic_write

if TYPE_CHECKING:
    import datasets.table

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif"})
_TABLE_BATCH = 10_000
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # how `datasets` names the files of one split
# WebDataset (webdataset/tariterators.py `base_plus_ext`): all after the first dot of the base name is extension.
_TAR_KEY = re.compile(r"(?P<key>(?:.*/|)[^./][^./]*)[.](?P<extension>[^/]*)", re.DOTALL)


class Problem(NamedTuple):
    """Something wrong with a row: where (file and line, id if known), and "<kind>: <detail>"."""

    where: str
    reason: str

    @property
    def kind(self) -> str:
        """The part of the reason that is the same for all problems of the kind."""
        return self.reason.partition(":")[0]


class HasProblems(Protocol):
    """Data that was read from `path`, and what was left out of it."""

    path: Path
    problems: list[Problem]


def skipped_line(data: Path, problem: Problem) -> str:
    """A line of skipped.jsonl."""
    return json.dumps({"data": str(data), "where": problem.where, "reason": problem.reason}) + "\n"


def write_skipped(path: Path, sources: Iterable[HasProblems]) -> int:
    """List what was left out of the data, once, with what `path` lists already.

    Returns:
        The number of lines.
    """
    lines = set(path.read_text(encoding="utf-8").splitlines(keepends=True)) if path.is_file() else set()
    lines |= {skipped_line(source.path, problem) for source in sources for problem in source.problems}
    atomic_write(path, "".join(sorted(lines)))
    return len(lines)


class ImageLocation(NamedTuple):
    """Where the bytes of an image are."""

    file: str | None
    """Path below the data's root; None: in the image column of a table."""
    offset: int
    """First byte in the file, or row of the table."""
    size: int
    """Number of bytes; -1: to the end of the file."""


class Row(NamedTuple):
    """One record, before its captions are looked at."""

    where: str
    record: dict[str, Any]
    image: ImageLocation | None
    key: str | None = None
    """The id if the record has none: a tar's key, a table's row number."""


def decode_text(data: bytes) -> str:
    """Decode UTF-8. Raises ValueError with a problem's reason."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error


def parse_record(data: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises ValueError with a problem's reason."""
    text = decode_text(data)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"wrong shape: expected a JSON object, got {type(record).__name__}")
    return record


def read_field(record: Mapping[str, Any], name: str) -> Any:
    """Look up a field; dots descend into nested objects. Returns None if it is not there."""
    value: Any = record
    for part in [name] if name in record else name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def captions_of(record: Mapping[str, Any], fields: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) for each caption of a record. Raises ValueError with a problem's reason."""
    captions: Any = {kind: read_field(record, name) for kind, name in fields.items()} or record.get("captions")
    if isinstance(captions, dict):
        pairs = list(captions.items())
    elif isinstance(captions, list) and all(isinstance(c, dict) and c.keys() >= {"kind", "text"} for c in captions):
        pairs = [(caption["kind"], caption["text"]) for caption in captions]
    else:
        raise ValueError(
            'wrong shape: "captions" must be {"kind": "text" or ["text", ...]} or [{"kind": ..., "text": ...}], '
            f'got {_shorten(captions)}; fields {{"KIND": "FIELD"}} reads captions from other fields'
        )
    for kind, texts in pairs:
        for text in texts if isinstance(texts, list) else [] if texts is None else [texts]:
            if not isinstance(text, str) or not isinstance(kind, str) or not kind:
                raise ValueError(f"wrong shape: a caption must be text, got {_shorten(text)} for kind {kind!r}")
            yield kind, text


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_relative(path: str) -> None:
    """Refuse paths that could leave the folder they are joined to. Raises ValueError with a problem's reason."""
    if path[0] in "/\\" or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"unsafe path: {path!r} is absolute or contains '..'; give a path below the data's folder")


class ImageFolder:
    """Checks image paths against a folder, listing each of its directories once instead of asking for each file."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self._listings: dict[str, dict[str, bool]] = {}

    def locate(self, path: object) -> ImageLocation | None:
        """Find an image. Raises ValueError with a problem's reason."""
        if path is None:
            return None
        if not isinstance(path, str) or not path:
            raise ValueError(f"wrong shape: image must be a path below the data's folder, got {path!r}")
        check_relative(path)
        directory, _, name = path.rpartition("/")
        if directory not in self._listings:
            self._listings[directory] = self._list(directory)
        is_symlink = self._listings[directory].get(name)
        if is_symlink is None:
            raise ValueError(f"missing image: {path!r} is not a file in {self.root}")
        if is_symlink:
            self._check_inside(path)
        return ImageLocation(path, 0, -1)

    def _list(self, directory: str) -> dict[str, bool]:
        self._check_inside(directory)
        try:
            with os.scandir(os.path.join(self.root, directory)) as entries:
                return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _check_inside(self, path: str) -> None:
        target = os.path.realpath(os.path.join(self.root, path))
        if os.path.commonpath([target, self.root]) != self.root:
            raise ValueError(f"unsafe path: {path!r} is a link to {target}, outside {self.root}")


def read_jsonl(path: Path, image_field: str) -> Iterator[Row | Problem]:
    """Yield the rows of a JSONL file; image paths are relative to its directory."""
    folder = ImageFolder(path.parent)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                record = parse_record(line)
                yield Row(where, record, folder.locate(record.get(image_field)))
            except ValueError as error:
                yield Problem(where, str(error))


def read_tar(path: Path, text_members: Set[str]) -> Iterator[Row | Problem]:
    """Yield the samples of a WebDataset tar: adjacent members of one key, of which one is an image.

    Args:
        path: An uncompressed tar.
        text_members: Extensions of members beside `.json` that are read as text into the record.
    """
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            named = ((match, member) for member in tar if (match := _TAR_KEY.fullmatch(member.name)))
            for key, group in itertools.groupby(named, key=lambda pair: pair[0]["key"]):
                members = [(match["extension"].lower(), member) for match, member in group]
                try:
                    yield _tar_row(path.name, key, members, file.fileno(), text_members)
                except ValueError as error:
                    yield Problem(f"{path.name}/{key}", str(error))
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                # tarfile takes a damaged or cut header for the end of the archive.
                yield Problem(path.name, f"truncated tar: no end mark at byte {tar.offset}")
    except tarfile.TarError as error:
        yield Problem(path.name, f"truncated tar: {error}; the samples before that point are used")


def _tar_row(
    shard: str, key: str, members: Sequence[tuple[str, tarfile.TarInfo]], descriptor: int, text_members: Set[str]
) -> Row:
    check_relative(key)
    record: dict[str, Any] = {}
    images: list[ImageLocation] = []
    for extension, member in members:
        if not member.isreg() or member.issparse():
            raise ValueError(f"unsafe path: member {member.name!r} is a link or a special file")
        if extension in IMAGE_EXTENSIONS:
            images.append(ImageLocation(shard, member.offset_data, member.size))
        elif extension == "json":
            record |= parse_record(os.pread(descriptor, member.size, member.offset_data))
        elif extension in text_members:
            record[extension] = decode_text(os.pread(descriptor, member.size, member.offset_data))
    if len(images) != 1:
        kind = "several images" if images else "missing image"
        raise ValueError(f"{kind}: expected one image, got members {[extension for extension, _ in members]}")
    return Row(f"{shard}/{key}", record, images[0], key)


def open_table(path: Path) -> datasets.table.Table:
    """Memory-map a `save_to_disk` directory or parquet files (through the cache of `datasets`)."""
    import datasets

    if path.is_dir() and (path / "state.json").exists():
        return datasets.Dataset.load_from_disk(str(path)).data
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    splits = {match[1] for file in files if (match := _SHARD.fullmatch(file.stem))}
    if len(splits) > 1:
        raise ValueError(
            f"{path} holds the parquet files of several splits, {sorted(splits)}; put each in its own folder"
        )
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets.Dataset.from_parquet([str(file) for file in files]).data  # type: ignore[union-attr]


def read_table(table: pa.Table, columns: Sequence[str], image_column: str, root: Path) -> Iterator[Row | Problem]:
    """Yield the rows of a table.

    Args:
        table: One row per image.
        columns: The columns that go into the records.
        image_column: Its values are bytes, a path below `root`, or the `{"bytes", "path"}` of `datasets.Image`.
        root: The folder of image paths.
    """
    folder = ImageFolder(root)
    has_bytes, paths = _image_columns(table, image_column)
    records = table.select(columns)
    for start in range(0, len(table), _TABLE_BATCH):
        batch = zip(
            _pylist(records.slice(start, _TABLE_BATCH)),
            has_bytes.slice(start, _TABLE_BATCH).to_pylist(),
            paths.slice(start, _TABLE_BATCH).to_pylist(),
            strict=True,
        )
        for number, (record, embedded, path) in enumerate(batch, start):
            where = f"row {number}"
            try:
                if isinstance(record, UnicodeDecodeError):
                    raise ValueError(f"not UTF-8: {record}")
                image = ImageLocation(None, number, -1) if embedded else folder.locate(path)
                yield Row(where, record, image, str(number))
            except ValueError as error:
                yield Problem(where, str(error))


def _pylist(table: pa.Table) -> list[dict[str, Any] | UnicodeDecodeError]:
    """`to_pylist` with the error in place of a row whose text is not UTF-8 (Arrow does not look)."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        if len(table) == 1:
            return [error]
        middle = len(table) // 2
        return _pylist(table.slice(0, middle)) + _pylist(table.slice(middle))


def _image_columns(table: pa.Table, name: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Whether each row has image bytes (bool), and its image path (string or null)."""
    rows = len(table)
    no_bytes, no_paths = pa.chunked_array([pa.repeat(False, rows)]), pa.chunked_array([pa.nulls(rows, pa.string())])
    if name not in table.column_names:
        return no_bytes, no_paths
    column = table.column(name)
    if pa.types.is_struct(column.type) and {field.name for field in column.type} >= {"bytes", "path"}:
        parts = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
        return parts["bytes"].is_valid(), parts["path"]
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return column.is_valid(), no_paths
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return no_bytes, column
    raise ValueError(
        f"column {name!r} has type {column.type}, expected image bytes, a path, or datasets.Image's {{bytes, path}}; "
        'name another one with fields {"image": COLUMN}'
    )
