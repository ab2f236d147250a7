"""Server-sent events are those of the standard, however the stream is cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmserve_env.live.servers.events import Event, EventReader, EventTooLong

LINES = [
    *(
        "data: a",
        "data:b",
        "data:  c",
        "data",
        "data: é",
        "event: error",
        "event: x",
        "event",
        "id: 1",
        "retry: 5",
    ),
    *(
        ": comment",
        ":",
        "unknown: y",
        " data: d",
        "data : d",
        "Data: d",
        "\N{ZERO WIDTH NO-BREAK SPACE}data: e",
        "",
    ),
]


def reference(stream: bytes) -> list[tuple[str, str]]:
    """The events of a whole stream, word for word as the standard tells to read it."""
    text = stream.decode(errors="replace").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    events, data, name = [], "", ""
    for line in re.split("\r\n|\r|\n", text)[:-1]:  # what has no line end is no line
        if line == "":
            if data != "":
                events.append((data.removesuffix("\n"), name))
            data = name = ""
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "data":
                data += value + "\n"
            elif field == "event":
                name = value
    return events


def read(stream: bytes, cuts: list[int]) -> tuple[list[tuple[str, str]], EventReader, list[bytes]]:
    reader, events, whole = EventReader(), [], []
    bounds = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    for start, end in pairwise(bounds):
        events += reader.feed(stream[start:end])
        whole.append(reader.whole)
    return (
        [(data.decode(errors="replace"), name.decode(errors="replace")) for data, name in events],
        reader,
        whole,
    )


streams = st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from(["\n", "\r", "\r\n"]))).map(
    lambda lines: "".join(line + end for line, end in lines).encode()
)
anything = st.lists(
    st.one_of(
        st.sampled_from([b"data:", b"event:", b": ", b"\r", b"\n", b"\xef\xbb\xbf", b"\xff"]),
        st.binary(max_size=4),
    )
).map(b"".join)


@given(st.one_of(streams, anything), st.lists(st.integers(0, 10_000), max_size=12))
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 10, 19])  # between CR and LF
@example(b"data: a\r\rdata: b\r\r", [8, 9])
@example(b"\xef\xbb\xbfdata: a\n\n", [1, 2])
@example(b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [])
def test_any_bytes_cut_anyhow_are_read_as_by_the_standard(stream, cuts):
    events, reader, whole = read(stream, cuts)
    assert events == reference(stream)
    passed_on = b"".join(whole)
    assert passed_on == stream[: len(passed_on)]
    assert reader.held == len(stream) - len(passed_on)
    # Whoever reads what was passed on, each time, sees whole events: all of them, and none begun.
    assert reference(passed_on) == events
    if passed_on.endswith(b"\r"):
        passed_on += b"\n"
    assert reference(passed_on + b"data: next\n\n")[len(events) :] == [("next", "")]


@given(st.one_of(streams, anything), st.lists(st.integers(0, 10_000), max_size=6))
def test_a_stream_that_is_over_has_no_event_left(stream, cuts):
    events, reader, whole = read(stream, cuts)
    events += [
        (data.decode(errors="replace"), name.decode(errors="replace")) for data, name in reader.finish()
    ]
    passed_on = b"".join(whole) + reader.whole
    assert passed_on.rstrip(b"\n") == stream.rstrip(b"\n")
    assert reference(passed_on) == events == reference(stream + b"\n\n")
    assert reader.held == 0
    assert reader.finish() == ()


def test_a_comment_between_events_is_passed_on_at_once_and_one_within_an_event_is_not():
    reader = EventReader()
    assert (reader.feed(b": keep-alive\nda"), reader.whole) == ([], b": keep-alive\n")
    assert (reader.feed(b"ta: a\n: pi"), reader.whole) == ([], b"")
    assert (reader.feed(b"ng\n\n"), reader.whole) == ([Event(b"a")], b"data: a\n: ping\n\n")


@pytest.mark.parametrize("part", [b"data: aaaaaaa\n", b": aaaaaaaaaaaaa", b"aaaaaaaaaaaaaaa", b"id: 1\n"])
def test_an_event_without_end_is_held_up_to_a_bound(part):
    reader = EventReader(max_event_bytes=1000)
    reader.feed(b"data: a\n\n")

    def send():
        for _ in range(1000 // len(part) + 1):
            reader.feed(part)
            assert reader.held <= 1000

    with pytest.raises(EventTooLong):
        send()


def test_events_and_comments_without_end_are_not():
    reader = EventReader(max_event_bytes=100)
    for _ in range(100):
        assert reader.feed(b": comment\r\ndata: a\ndata: b\r\r") == [Event(b"a\nb")]
        assert reader.held == 0
