"""Pages of other origins: which may read answers, by what browsers look at."""

from __future__ import annotations

import asyncio

import pytest

from llmserve_env.errors import InputError
from llmserve_env.net.cors import CrossOrigin, origin_of

PREFLIGHT = [
    (b"origin", b"http://ui.example"),
    (b"access-control-request-method", b"POST"),
    (b"access-control-request-headers", b"authorization,content-type"),
]


async def app(scope, receive, send):
    """Refuses everybody, and says of other origins what it should not."""
    headers = [(b"Access-Control-Allow-Origin", b"*"), (b"x-own", b"1")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": b"no"})


def ask(origins, method="POST", headers=()):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/v1/x", "headers": list(headers)}
    asyncio.run(CrossOrigin(app, origins)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize(
    ("origins", "allowed"),
    [(["http://other.example", "http://ui.example"], b"http://ui.example"), (["*"], b"*")],
)
def test_a_preflight_is_answered_before_a_key_is_asked_for(origins, allowed):
    status, headers = ask(origins, "OPTIONS", PREFLIGHT)
    assert status == 204
    assert headers[b"access-control-allow-origin"] == allowed
    assert b"POST" in headers[b"access-control-allow-methods"]
    assert headers[b"access-control-allow-headers"] == b"authorization,content-type"
    assert b"access-control-allow-credentials" not in headers


@pytest.mark.parametrize(
    ("origins", "allowed"), [(["http://ui.example:80/"], b"http://ui.example"), (["*"], b"*")]
)
def test_answers_can_be_read_by_the_pages_that_may(origins, allowed):
    status, headers = ask(origins, headers=PREFLIGHT[:1])
    assert (status, headers[b"x-own"]) == (401, b"1")
    assert headers[b"access-control-allow-origin"] == allowed
    assert headers[b"access-control-expose-headers"] == b"*"
    assert (b"vary" in headers) == (allowed != b"*")


@pytest.mark.parametrize(
    "origins", [[], ["http://other.example"], ["https://ui.example"], ["http://ui.example:81"]]
)
@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
def test_others_may_not_whatever_the_server_says(origins, method):
    _, headers = ask(origins, method, PREFLIGHT)
    assert not any(name.lower().startswith(b"access-control-") for name in headers)
    assert (b"vary" in headers) == bool(origins)


def test_programs_are_answered_as_ever():
    assert ask([])[1] == {b"Access-Control-Allow-Origin": b"*", b"x-own": b"1"}
    assert b"access-control-allow-origin" not in ask(["http://ui.example"])[1]
    assert ask(["*"], "OPTIONS")[0] == 401


def test_a_header_that_is_none_is_not_allowed():
    _, headers = ask(["*"], "OPTIONS", [*PREFLIGHT[:2], (PREFLIGHT[2][0], b"a\xe9\r\nb")])
    assert b"access-control-allow-headers" not in headers


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("http://ui.example", "http://ui.example"),
        ("HTTPS://UI.example:443/", "https://ui.example"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abc", "chrome-extension://abc"),
    ],
)
def test_origins_are_written_as_browsers_send_them(text, origin):
    assert origin_of(text) == origin


@pytest.mark.parametrize(
    "text",
    ["ui.example", "http://", "http://a/b", "http://a?b", "http://u@a", "http://a:x", "null", "http://é"],
)
def test_what_is_no_origin_is_refused(text):
    with pytest.raises(InputError, match="cors-origin"):
        origin_of(text)
