"""Read LLaVA's JSON row by row: the records of a file, and what one record says.

A record that cannot be used raises ValueError with the reason of a `Problem`, "<kind>: <detail>".
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava_bridge.templates import IMAGE_TOKEN
from llm2clip.caption_sources import IMAGE_EXTENSIONS, ImageFolder, Problem, parse_record

_ROLES = ("human", "gpt")  # of even and odd turns
_READ_CHARACTERS = 1 << 22
_SPACE = re.compile(r"[ \t\n\r]*")


class Record(NamedTuple):
    """A record whose turns and placeholders are in order; its images have not been looked for."""

    id: str
    images: list[str]
    texts: list[str]
    """What the user and the assistant say in turn."""
    num_words: int
    """Words between whitespace, of all turns as they are in the file."""
    notes: list[str]
    """What was irregular about it and has been put right."""


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield the line numbers, from 1, and records of JSON lines, or what is wrong with the line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, parse_record(line)
            except ValueError as error:
                yield number, error


def read_list(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the positions, from 0, and elements of a JSON list.

    They are parsed one by one: as Python objects the list would take several times the size of the file. Bytes that
    are not UTF-8 become lone surrogates, so that only their element is lost.

    Raises:
        ValueError: It is not JSON, or no list.
    """
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        text = file.read(_READ_CHARACTERS).lstrip()
        if not text.startswith("["):
            raise ValueError(
                f"{path}: expected a JSON list of dialogues, got {text[:20]!r}; the name of JSON lines ends in .jsonl"
            )
        separator, start, offset, number = "[", 1, 0, 0
        while separator != "]":
            begin = _skip_space(text, start)
            if separator == "[" and text.startswith("]", begin):
                start = begin + 1
                break
            try:
                record, end = decoder.raw_decode(text, begin)
                end = _skip_space(text, end)
                if text[end : end + 1] not in {",", "]"}:
                    raise ValueError(f"expected , or ] after it, got {text[end : end + 10]!r}")
            except (ValueError, RecursionError) as error:
                more = file.read(max(_READ_CHARACTERS, len(text)))  # twice as much, so that retries stay cheap
                if not more:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else error  # not its place in text
                    raise ValueError(
                        f"{path}: not JSON: element {number}, from character {offset + start}: {reason}; "
                        "has the file been cut off?"
                    ) from error
                text, start, offset = text[start:] + more, 0, offset + start
                continue
            yield number, record
            separator, start, number = text[end], end + 1, number + 1
        rest = (text[start:] + file.read()).strip()
        if rest:
            raise ValueError(f"{path}: not JSON: after the end of the list there is {rest[:20]!r}")


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


def parse_dialogue(record: object, number: int) -> Record:
    """Read a record; one without id is named by its number.

    Raises:
        ValueError: The reason of a problem.
    """
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"wrong shape: expected an object, got {reprlib.repr(record)}")
    record_id, images = _read_id(record, number), _read_images(record)
    texts, num_words, notes = _read_turns(record)
    notes += _match_placeholders(texts, len(images))
    try:
        "".join([record_id, *images, *texts]).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    return Record(record_id, images, texts, num_words, notes)


def _read_id(record: Mapping[str, Any], number: int) -> str:
    record_id = record.get("id")
    if record_id is None:
        return str(number)
    if not isinstance(record_id, str | int) or isinstance(record_id, bool) or record_id == "":
        raise ValueError(f'wrong shape: "id" must be text or a whole number, got {reprlib.repr(record_id)}')
    return str(record_id)


def _read_images(record: Mapping[str, Any]) -> list[str]:
    given = [record[name] for name in ("image", "images") if record.get(name) is not None]
    images = given[0] if given and isinstance(given[0], list) else given
    if len(given) > 1 or not all(isinstance(path, str) and path for path in images):
        raise ValueError(f'wrong shape: "image" must be a path or a list of paths, got {reprlib.repr(given)}')
    return images


def _read_turns(record: Mapping[str, Any]) -> tuple[list[str], int, list[str]]:
    """What user and assistant say in turn, the words of all turns there were, and notes."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            'wrong shape: "conversations" must be a list of {"from": "human" or "gpt", "value": TEXT}, got '
            f"{reprlib.repr(turns)}"
        )
    roles: list[str] = []
    texts: list[str] = []
    for position, turn in enumerate(turns):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError(f'wrong shape: turn {position} needs the texts "from", "value", got {reprlib.repr(turn)}')
        if role not in _ROLES:
            raise ValueError(f"unknown role: turn {position} is from {reprlib.repr(role)}, expected human or gpt")
        roles.append(role)
        texts.append(text)
    num_words = sum(len(text.split()) for text in texts)
    notes = []
    if roles[0] == "gpt":
        del roles[0], texts[0]
        notes.append("leading answer dropped")
    for position, role in enumerate(roles):
        if role != _ROLES[position % 2]:
            raise ValueError(f"wrong role order: a second turn in a row from {role}, {texts[position]!r:.60}")
    if len(roles) < 2 or roles[-1] != "gpt":
        raise ValueError(f"no answer: the turns are from {reprlib.repr(roles)}; expected human, gpt, human, gpt, ...")
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        if not answer.strip():
            raise ValueError(f"no answer: the one to {question!r:.60} is empty")
    return texts, num_words, notes


def _match_placeholders(texts: list[str], num_images: int) -> list[str]:
    """Make placeholders and images match, in place, where it is clear how.

    Returns:
        Notes.

    Raises:
        ValueError: The reason of a problem.
    """
    if any(IMAGE_TOKEN in answer for answer in texts[1::2]):
        raise ValueError(f"placeholder in answer: only human turns may hold {IMAGE_TOKEN}")
    marked = [position for position, text in enumerate(texts) if IMAGE_TOKEN in text]
    num_placeholders = sum(texts[position].count(IMAGE_TOKEN) for position in marked)
    if num_placeholders == num_images:
        return []
    if num_images != 1 or len(marked) > 1:
        raise ValueError(f"placeholder mismatch: {num_placeholders} {IMAGE_TOKEN} for {num_images} images")
    position = marked[0] if marked else 0
    texts[position] = f"{IMAGE_TOKEN}\n{texts[position].replace(IMAGE_TOKEN, '').strip()}".strip()
    return ["placeholders merged" if marked else "placeholder added"]


def find_image(folder: ImageFolder, path: str) -> str:
    """Find an image, or the only one whose name differs from it in the extension.

    Returns:
        Its path below the folder.

    Raises:
        ValueError: The reason of a problem.
    """
    try:
        folder.locate(path)
        return path
    except OSError as error:  # no permission to list the folder, a name that is too long
        raise ValueError(f"missing image: {error}") from error
    except ValueError as error:
        if Problem("", str(error)).kind != "missing image":
            raise
        stem, extension = os.path.splitext(path)
        stem = stem if extension[1:].lower() in IMAGE_EXTENSIONS else path
        names = [f"{stem}.{known}" for lower in sorted(IMAGE_EXTENSIONS) for known in (lower, lower.upper())]
        others = [name for name in names if _is_in(folder, name)]
        if len(others) != 1:
            raise ValueError(f"{error}; there are {', '.join(others)}" if others else str(error)) from None
        return others[0]


def _is_in(folder: ImageFolder, path: str) -> bool:
    try:
        return folder.locate(path) is not None
    except ValueError:
        return False
