"""Responses are on disk as soon as they are there, and are found again only by what they depend on."""

from __future__ import annotations

import json

import pytest

from llm2clip_eval.response_store import Response, ResponseStore, digest


def response(number: int, text: str | None = "yes", error: str | None = None) -> Response:
    return Response(digest([number]), number, text, error, 0.5)


def test_what_was_appended_is_there_before_the_file_is_closed(tmp_path):
    path = tmp_path / "new" / "task.jsonl"
    with ResponseStore(path) as store:
        for number, text in enumerate(("yes", "", "zwei\nZeilen \ud83d\u2028 \x00")):
            store.append(response(number, text))
            assert len(path.read_bytes().splitlines()) == number + 1
    with ResponseStore(path) as store:
        assert [store.find(digest([number])) for number in range(2)] == [response(0), response(1, "")]
        third = store.find(digest([2]))
        assert third and third.text == "zwei\nZeilen \ud83d\u2028 \x00"
        assert store.find(digest([3])) is None and len(store) == 3


def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "task.jsonl"
    with ResponseStore(path) as store:
        store.append(response(0))
        store.append(response(1))
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        with ResponseStore(path) as store:
            assert store.find(digest([0])) and not store.find(digest([1]))
            store.append(response(1))
        assert path.read_bytes() == whole


def test_failures_are_kept_as_failures_and_asked_again(tmp_path):
    path = tmp_path / "task.jsonl"
    with ResponseStore(path) as store:
        store.append(response(0, None, "ValueError: no image"))
        assert store.find(digest([0])) is None and len(store) == 0
    with ResponseStore(path) as store:
        assert store.find(digest([0])) is None
        store.append(response(0))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["error"] for row in rows] == ["ValueError: no image", None]
    with ResponseStore(path) as store:
        assert store.find(digest([0])) == response(0)


def test_a_response_is_a_text_or_an_error():
    for text, error in ((None, None), ("yes", "ValueError: no")):
        with pytest.raises(ValueError, match="a text or an error"):
            response(0, text, error)


def test_two_processes_cannot_write_one_file(tmp_path):
    with ResponseStore(tmp_path / "task.jsonl"):
        with pytest.raises(ValueError, match="in use by another process"):
            ResponseStore(tmp_path / "task.jsonl")
    ResponseStore(tmp_path / "task.jsonl").__exit__()


def test_a_broken_line_in_the_middle_is_told(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"key": 1}\n')
    with pytest.raises(ValueError, match=r"task.jsonl, line 1 is no response"):
        ResponseStore(path)


def test_digests_do_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    with pytest.raises(ValueError):
        digest(float("nan"))
