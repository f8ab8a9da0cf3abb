"""Responses of one model to one task, on disk as soon as they are there.

One JSON object a line, appended and synced one by one: after a kill -9 at most the last line is torn, and it is
dropped when the file is opened again. A response is found by its key, which `LlavaAdapter` makes of everything that
it depends on, the content of the model's files and the rest of its batch included: other weights at the same path,
another prompt, other settings or another torch find nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Response:
    """What became of one request: a text, empty only if the model ended at once, or else what went wrong."""

    key: str
    """See `digest`."""
    doc_id: int
    """Place of the document in the task's data."""
    text: str | None
    error: str | None
    seconds: float
    """Its share of the time that its batch took."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.error is None):
            raise ValueError(f"document {self.doc_id}: expected a text or an error, got {self.text!r}, {self.error!r}")


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON types, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def image_digest(image: Image.Image) -> str:
    """32 hex digits that tell an image's pixels from those of others, whatever file they came from."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()[:32]


def describe_document(document: Mapping[str, Any]) -> dict[str, str]:
    """A document without its media, as text."""
    return {name: repr(value) for name, value in document.items() if not _is_media(value)}


class ResponseStore:
    """The file of one model's responses to one task; locked while it is open.

    Args:
        path: `.jsonl` file, made with its directory if it is not there.

    Raises:
        ValueError: if another process has the file open, or a line that is not the last is no response.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path} is in use by another process; wait for it or end it") from None
        self._texts = {found.key: found for found in self._read() if found.error is None}

    def __enter__(self) -> ResponseStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Number of responses; errors do not count."""
        return len(self._texts)

    def find(self, key: str) -> Response | None:
        """The response with this key; failures are not found, so that they are asked for again."""
        return self._texts.get(key)

    def append(self, response: Response) -> None:
        """Write a response or a failure; it is on disk when this returns."""
        self._file.write((json.dumps(asdict(response), ensure_ascii=True) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        if response.error is None:
            self._texts[response.key] = response

    def _read(self) -> list[Response]:
        """All that is in the file; what was written of a last line without its end is cut off."""
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        found = []
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                found.append(_response(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number} is no response ({error}); delete the file") from error
        return found


def _is_media(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_media(item) for item in value)
    return not isinstance(value, (str, int, float, bool, dict, type(None)))


def _response(row: Mapping[str, Any]) -> Response:
    return Response(**row)
