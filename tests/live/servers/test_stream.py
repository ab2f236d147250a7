"""Streamed answers are read whatever their form."""

from __future__ import annotations

import json

import pytest

from llmserve_env.live.servers.stream import StreamReader

from ..endpoint_server import event, piece, usage


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_streams_are_read_however_they_are_cut(size):
    chat = [
        {"delta": {"role": "assistant", "content": ""}, "finish_reason": None},
        {"delta": {"content": "é"}, "finish_reason": None},
        {"delta": {"reasoning": "so"}, "finish_reason": None},
        {"delta": {"content": ""}, "finish_reason": None},
        {"delta": {"content": ""}, "finish_reason": "stop"},
    ]
    said = [event(json.dumps({"choices": [choice]}, ensure_ascii=False)) for choice in chat]
    stream = b": ping\r\n\r\n" + b"".join(said) + event(usage(3, 9)) + event("[DONE]")
    reader = StreamReader()
    steps = sum(reader.feed(stream[at : at + size]) for at in range(0, len(stream), size))
    # Half a character is a token without text; the role and the end are none.
    assert (steps, reader.events, reader.ended, reader.error) == (3, 8, True, None)
    assert reader.usage["completion_tokens"] == 9
    assert not reader.within_event


def test_streams_of_completions():
    reader = StreamReader()
    steps = [reader.feed(event(piece(*said))) for said in [("a",), ("",), ("b", "length"), ("", "stop")]]
    assert steps == [1, 1, 1, 0]
    assert reader.feed(b'data: {"choices": [{"text": "x"}') == 0
    assert reader.within_event


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_the_short_way_of_reading_finds_what_the_long_one_does(separators):
    texts = ["", "a", '"finish_reason": null', '"error"', '{"usage": {"completion_tokens": 1}}']
    choices = [{"text": text} for text in texts] + [{"delta": {"content": text}} for text in texts]
    choices += [{"delta": {"role": "assistant", **more}} for more in ({}, {"content": "a"})]
    choices = [{**choice, "finish_reason": end} for choice in choices for end in (None, "stop")]
    said = [{"choices": [choice], "usage": usage} for choice in choices for usage in (None, {"n": 1})]
    said += [{"choices": choices[:2]}, {"choices": choices[:3]}, {"choices": []}, {"error": {"message": "m"}}]
    for each in said:
        data = json.dumps(each, separators=separators).encode()
        short, long = StreamReader(), StreamReader()
        assert short._event(data) == long._read(data), each
        assert vars(short) == vars(long), each


@pytest.mark.parametrize(
    "said", ['{"error": {"message": "m"}}', '{"error": "m"}', '{"object": "error", "message": "m"}']
)
def test_errors_in_streams(said):
    reader = StreamReader()
    assert reader.feed(event(said)) == 0
    assert reader.error["message"] == "m"
    reader = StreamReader()
    reader.feed(event(piece('"error"')))
    assert reader.error is None


def test_the_data_of_an_event_is_found_among_its_other_lines():
    reader = StreamReader()
    said = f"event: message\r\ndata: {piece('a')}\r\nid: 1\r\n\r\n: ping\n\nretry: 5\n\n"
    assert (reader.feed(said.encode()), reader.events, reader.garbled) == (1, 3, False)
    first, second = piece("b").split(",", 1)
    assert reader.feed(f"data: {first},\ndata:{second}\n\n".encode()) == 1


def test_the_last_event_needs_no_end():
    reader = StreamReader()
    assert reader.feed(b"data: " + piece("a").encode() + b"\n") == 0
    assert reader.finish() == 1
    assert reader.feed(b"data: [DONE]") == reader.finish() == 0
    assert reader.ended


@pytest.mark.parametrize("data", ["{", "[1]", "[" * 100_000, "\xff"])
def test_data_that_is_no_object_is_noted(data):
    reader = StreamReader()
    assert reader.feed(f"data: {data}\n\n".encode("latin-1")) == 0
    assert (reader.garbled, reader.error, reader.usage) == (True, None, {})
