"""Streamed answers are read whatever their form."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmserve_env.live.servers.stream import RequestFailed, StreamReader, error_status

from ..endpoint_server import event, piece, usage

TOLD = ("events", "ended", "usage", "error", "garbled")


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
    assert (steps, reader.events, reader.ended, reader.error) == (3, 7, True, None)  # a comment is no event
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
        # Of a named event the data is always parsed.
        short, long = StreamReader(), StreamReader()
        assert short.feed(b"data: " + data + b"\n\n") == long.feed(b"event: x\ndata: " + data + b"\n\n"), each
        assert all(getattr(short, name) == getattr(long, name) for name in TOLD), each


TEXTS = ["", "a", "é", '"finish_reason": null', '"error"', "\n\n", "\r", '{"usage": {"n": 1}}']
PLAIN = b'"finish_reason":null'
DATA = st.one_of(
    st.builds(
        lambda text, end, more: json.dumps(
            {"choices": [{"text": text, "finish_reason": end}], **more}, ensure_ascii=False
        ).encode(),
        st.sampled_from(TEXTS),
        st.sampled_from([None, None, "stop"]),
        st.sampled_from([{}, {}, {"usage": {"completion_tokens": 1}}, {"error": {"message": "m"}}]),
    ),
    st.sampled_from(
        [b"[DONE]", b"", b"no JSON", b"[1]", PLAIN, PLAIN + b"\xff", PLAIN + b"\r", PLAIN + b"\r\rdata: 1"]
    ),
)
CHUNKS = st.builds(
    lambda before, data, after: before + data + after,
    st.sampled_from([b"data: ", b"data: ", b"data:", b"data:  ", b"event: x\ndata: ", b": c\n\ndata: ", b""]),
    DATA,
    st.sampled_from([b"\n\n", b"\n\n", b"\r\n\r\n", b"\n", b"", b"\n\ndata: 1\n\n", b"\r\r"]),
)


@given(st.lists(CHUNKS, max_size=5))
@example([b"data: " + PLAIN + b"\r\rdata: 1\n\n"])
@example([b"data: " + PLAIN + b"\xff\n\n"])
def test_chunks_that_are_an_event_are_read_as_the_same_bytes_in_pieces(chunks):
    at_once, in_pieces = StreamReader(max_event_bytes=1000), StreamReader(max_event_bytes=1000)
    for chunk in chunks:
        steps, passed_on = 0, b""
        for byte in chunk:
            steps += in_pieces.feed(bytes([byte]))
            passed_on += in_pieces.whole
        assert at_once.feed(chunk) == steps
        assert at_once.whole == passed_on
        told = (*TOLD, "finished", "within_event")
        assert [getattr(at_once, name) for name in told] == [getattr(in_pieces, name) for name in told]


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_the_sequences_of_pieces_are_told_apart(separators):
    def of(index, **choice):
        said = {"id": "x", "choices": [{"index": index, **choice, "finish_reason": None}]}
        return event(json.dumps(said, separators=separators))

    call = {"delta": {"tool_calls": [{"index": 7, "function": {"arguments": '"index": 5'}}]}}
    several = {"choices": [{"index": 4, "text": "a"}, {"index": "x", "text": "b"}, {"text": "c"}]}
    stream = of(2, text='"index": 9') + of(0, text="a") + of(13, **call) + event(json.dumps(several))
    reader = StreamReader(apart=True)
    assert (reader.feed(stream), reader.sequences) == (6, [2, 0, 13, 4, 0, 0])
    assert (reader.feed(of(3, text="a")[:-1]), reader.sequences) == (0, [])
    assert (reader.finish(), reader.sequences) == (1, [3])


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
    assert (reader.feed(said.encode()), reader.events, reader.garbled) == (1, 1, False)
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


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize(
    "before", ["", "event: chunk\nid: 1\n", ": ping\n", "\n", "\n\n: ping\n\n", "retry: 9\n"]
)
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_tokens_are_counted_whatever_stands_before_the_data(before, end, size):
    said = [piece("a"), piece("b"), piece("", "stop"), "[DONE]"]
    stream = "".join(f"{before}data: {each}\n\n" for each in said).replace("\n", end).encode()
    reader = StreamReader()
    steps = sum(reader.feed(stream[at : at + size]) for at in range(0, len(stream), size))
    assert (steps, reader.events, reader.ended, reader.garbled) == (2, 4, True, False)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ('event: error\ndata: {"error": {"message": "no", "code": 400}}', {"message": "no", "code": 400}),
        ('data: {"message": "no", "code": "x"}\nevent: error', {"message": "no", "code": "x"}),
        ("event: error\ndata: out of\ndata: memory", {"message": "out of\nmemory"}),
        ('data: {"type": "error", "message": "m"}', {"type": "error", "message": "m"}),
        ('data: {"type": "response.failed", "response": {"error": {"code": "x"}}}', {"code": "x"}),
    ],
)
def test_errors_by_name_and_by_type(said, error):
    reader = StreamReader()
    assert reader.feed(b": keep-alive\n\nevent: error\n\n") == 0
    assert (reader.events, reader.error) == (0, None)
    assert reader.feed(f"{said}\n\n".encode()) == 0
    assert reader.error == error


def test_named_events_may_be_no_json_and_messages_may_not():
    reader = StreamReader()
    reader.feed(b"event: ping\ndata: still here\n\ndata:\n\ndata\n\n")
    assert not reader.garbled
    reader.feed(b"event: message\ndata: still here\n\n")
    assert reader.garbled


@pytest.mark.parametrize("half", ['{"choices": [{"text": "a", "finish_reason": null', "[DON"])
def test_the_half_of_an_event_at_the_end_is_for_nobody(half):
    reader = StreamReader()
    assert reader.feed(event(piece("a")) + f"data: {half}".encode()) == 1
    assert reader.whole == event(piece("a"))
    assert (reader.finish(), reader.whole, reader.garbled) == (0, b"", True)


def test_an_event_that_is_too_long_fails():
    reader = StreamReader(max_event_bytes=100)
    reader.feed(event(piece("a")))
    with pytest.raises(RequestFailed, match="too long"):
        reader.feed(b"data: " + b"a" * 100)


def test_responses_are_read_as_completions_are():
    usage = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    said = [
        {"type": "response.created", "response": {"status": "in_progress", "usage": None}},
        {"type": "response.reasoning_text.delta", "delta": "hm"},
        {"type": "response.output_text.delta", "delta": "a"},
        {"type": "response.output_text.done", "text": "a"},
        {"type": "response.completed", "response": {"status": "completed", "usage": usage}},
    ]
    stream = "".join(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in said).encode()
    reader = StreamReader()
    assert reader.feed(stream) == 2
    assert (reader.ended, reader.error, reader.garbled) == (True, None, False)
    assert reader.usage == {"prompt_tokens": 3, "completion_tokens": 2}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"code": 404}, 404),
        ({"code": "404"}, 404),
        ({"code": 404.0, "type": "BadRequestError"}, 400),
        ({"code": "context_length_exceeded", "type": "invalid_request_error"}, 400),
        ({"code": "rate_limit_exceeded", "type": "requests"}, 429),
        ({"code": "insufficient_quota"}, 429),
        ({"code": "model_not_found", "type": "invalid_request_error"}, 404),
        ({"code": None, "type": "NotFoundError"}, 404),
        ({"code": "invalid_api_key"}, 401),
        ({"type": "RateLimitError"}, 429),
        ({"type": "server_error"}, 500),
        ({"status": 422}, 422),
        ({"code": 200}, 502),
        ({"code": True}, 502),
        ({"code": "\N{SUPERSCRIPT TWO}00"}, 502),
        ({"message": "no"}, 502),
    ],
)
def test_the_status_of_an_error_object(error, status):
    assert error_status(error) == status
