"""What the schedules are judged by."""

from __future__ import annotations

import json

import pytest

from .answers import Asked, Response, Violation, asked_by, event, events, judged, whole

JSON = {"content-type": "application/json"}
PLAIN, STREAM = Asked("a", n=2), Asked("a", stream=True)
ERROR = {"error": {"message": "m", "type": "t", "param": None, "code": 500}}
PARTS = list(events(STREAM))
OTHER = list(events(Asked("b", stream=True)))


def test_a_request_is_known_by_its_body():
    assert asked_by(json.loads(PLAIN.body())) == PLAIN


@pytest.mark.parametrize(
    ("status", "body", "asked", "verdict"),
    [
        (200, whole(PLAIN), PLAIN, "answer"),
        (200, b"".join(PARTS), STREAM, "answer"),
        (200, b": hello\r\n\r\n" + b"".join(PARTS).replace(b"\n", b"\r\n"), STREAM, "answer"),
        (200, b"".join(PARTS[:-1]), STREAM, "answer"),
        (200, b"".join(PARTS[:2]) + event(ERROR), STREAM, "cut"),
        (503, json.dumps(ERROR).encode(), STREAM, "error"),
        (404, json.dumps(ERROR).encode(), None, "error"),
    ],
)
def test_what_a_client_may_get(status, body, asked, verdict):
    assert judged(Response(status, JSON, body, whole=True), asked) == verdict


@pytest.mark.parametrize(
    ("status", "body", "asked"),
    [
        (200, b"", PLAIN),
        (200, b"", STREAM),
        (200, whole(PLAIN)[:-5], PLAIN),
        (200, whole(Asked("b", n=2)), PLAIN),
        (200, whole(Asked("a")), PLAIN),
        (200, b"<html>", PLAIN),
        (200, json.dumps(ERROR).encode(), PLAIN),
        (200, b"".join(PARTS[:2]), STREAM),
        (200, b"".join(PARTS)[:-1], STREAM),
        (200, b"".join(PARTS[:2]) + PARTS[2][:9] + b"\n\n" + event(ERROR), STREAM),
        (200, b"".join([*PARTS[:1], *PARTS[2:]]), STREAM),
        (200, b"".join([*PARTS[:1], *OTHER[1:]]), STREAM),
        (200, b"".join(PARTS[:2]) + event(ERROR) + PARTS[-1], STREAM),
        (200, b"".join(PARTS * 2), STREAM),
        (200, whole(PLAIN), None),
        (307, json.dumps(ERROR).encode(), PLAIN),
        (500, b"Internal Server Error", PLAIN),
        (500, b'{"error": "m"}', PLAIN),
        (500, b'{"detail": "m"}', PLAIN),
    ],
)
def test_what_a_client_may_not_get(status, body, asked):
    with pytest.raises(Violation):
        judged(Response(status, JSON, body, whole=True), asked)


def test_what_breaks_off_is_nothing():
    with pytest.raises(Violation):
        judged(Response(200, JSON, b"".join(PARTS), whole=False), STREAM)
