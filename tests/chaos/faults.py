"""What upstreams do with requests for completions, at the level of bytes."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable

from .answers import Asked, event, events, whole
from .exchange import STEP_S, Exchange

Fault = Callable[[Exchange], Awaitable[None]]
FAULTS: dict[str, Fault] = {}
"""What an upstream does with a request for a completion, by name. The connection is kept unless it is closed
there."""
SERVING = {"good"}
"""Those of them that answer."""
AT_THE_DOOR = ("refused", "slow_accept")
"""Those that no request gets as far as; not in FAULTS."""


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


def serving(function: Fault) -> Fault:
    SERVING.add(function.__name__)
    return fault(function)


@fault
async def good(x):
    await x.answer()


# ------------------------------------------------------------------------------------------------- refusals


@fault
async def status_500(x):
    await x.plain("500 Internal Server Error", b'{"error": {"message": "CUDA error", "code": 500}}')


@fault
async def status_503(x):
    await x.plain("503 Service Unavailable", b"<h1>no healthy upstream</h1>", "text/html")


@fault
async def status_429(x):
    await x.plain("429 Too Many Requests", b'{"detail": "slow down"}')


@fault
async def status_429_retry_after(x):
    await x.plain("429 Too Many Requests", b'{"detail": "slow down"}', "application/json", "retry-after: 3")


@fault
async def status_404(x):
    await x.plain("404 Not Found", b'{"message": "no such model", "type": "NotFoundError", "code": 404}')


@fault
async def status_401(x):
    await x.plain("401 Unauthorized", b'{"error": "Unauthorized"}')


@fault
async def status_999(x):
    await x.plain("999 Whatever", b"{}")


@fault
async def status_204(x):
    await x.head("204 No Content")


@fault
async def redirect(x):
    await x.plain("307 Temporary Redirect", b"", "text/plain", "location: /login")


@fault
async def error_event_first(x):
    """As vLLM refuses a request that wants a stream."""
    await x.start_stream()
    error = {"message": "queue is full", "type": "overloaded", "param": None, "code": 503}
    await x.chunk(event({"error": error}))
    await x.chunk(b"data: [DONE]\n\n")
    await x.send(b"0\r\n\r\n")


@fault
async def error_event_within(x):
    await x.beginning()
    await x.chunk(event({"error": {"message": "engine died", "type": "x", "param": None, "code": 500}}))
    await x.send(b"0\r\n\r\n")


@fault
async def error_with_200(x):
    await x.plain("200 OK", b'{"error": {"message": "boom", "type": "x", "param": null, "code": 500}}')


# ----------------------------------------------------------------------------------------- lost connections


@fault
async def reset_before_headers(x):
    x.reset()


@fault
async def closed_before_headers(x):
    x.writer.close()


@fault
async def reset_within_stream(x):
    await x.beginning()
    x.reset()


@fault
async def cut_between_events(x):
    await x.beginning()
    x.writer.close()


@fault
async def cut_within_event(x):
    await x.beginning(1)
    await x.chunk(list(events(x.asked))[1][:20])
    x.writer.close()


@fault
async def ends_within_event(x):
    """As HTTP has it, but the last event is not whole."""
    await x.beginning(1)
    await x.chunk(list(events(x.asked))[1][:20])
    await x.send(b"0\r\n\r\n")


@fault
async def ends_without_a_finish(x):
    await x.beginning(1)
    await x.send(b"0\r\n\r\n")


@serving
async def closes_between_requests(x):
    """It says nothing of it before."""
    await x.answer()
    x.writer.close()


@serving
async def resets_between_requests(x):
    await x.answer()
    await asyncio.sleep(STEP_S)
    x.reset()


# -------------------------------------------------------------------------------------------------- silence


@fault
async def silent(x):
    await x.never()


@fault
async def stalls_within_headers(x):
    await x.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-st")
    await x.never()


@fault
async def stalls_within_stream(x):
    await x.beginning()
    await x.never()


@fault
async def comments_for_ever(x):
    """A proxy that keeps a connection open to an engine that is frozen."""
    await x.start_stream("text/event-stream" if x.asked.stream else "application/json")
    while True:
        await x.chunk(b": ping\n\n" if x.asked.stream else b"  ")
        await asyncio.sleep(1.0)


@serving
async def trickles(x):
    """A byte at a time."""
    if not x.asked.stream:
        body = whole(x.asked)
        await x.head("200 OK", "content-type: application/json", f"content-length: {len(body)}")
        for start in range(0, len(body), 16):
            await x.send(body[start : start + 16])
            await asyncio.sleep(0.1)
        return
    await x.start_stream()
    for part in events(x.asked):
        for start in range(0, len(part), 16):
            await x.chunk(part[start : start + 16])
            await asyncio.sleep(0.1)
    await x.send(b"0\r\n\r\n")


@serving
async def starts_slowly(x):
    await asyncio.sleep(3.0)
    await x.answer()


# ------------------------------------------------------------------------------------ answers that are none


@fault
async def login_page(x):
    await x.plain("200 OK", b"<!doctype html><form>password</form>", "text/html; charset=utf-8")


@fault
async def empty_200(x):
    await x.plain("200 OK", b"")


@fault
async def half_json(x):
    body = whole(x.asked)
    await x.plain("200 OK", body[: len(body) // 2])


@fault
async def null_json(x):
    await x.plain("200 OK", b"null")


@fault
async def shorter_than_stated(x):
    body = whole(x.asked)
    await x.head("200 OK", "content-type: application/json", f"content-length: {len(body) + 10}")
    await x.send(body)
    x.writer.close()


@fault
async def longer_than_stated(x):
    body = whole(x.asked)
    await x.head("200 OK", "content-type: application/json", f"content-length: {len(body) - 10}")
    await x.send(body)


@serving
async def answers_twice(x):
    """The second answer is nobody's: the next request on the connection must not get it."""
    await x.answer()
    await x.plain("200 OK", whole(Asked("nobody", tokens=2)))


@fault
async def garbage(x):
    await x.send(bytes(range(256)) * 4)


@fault
async def bad_chunks(x):
    await x.beginning()
    await x.send(b"zz\r\nnot a chunk\r\n")


@fault
async def bad_header(x):
    await x.head("200 OK", "content-type: application/json", "x-own: a\x00b", "content-length: 2")
    await x.send(b"{}")


@serving
async def packed(x):
    """Nobody asked for gzip."""
    if x.asked.stream:
        await x.answer()
        return
    await x.plain("200 OK", gzip.compress(whole(x.asked)), "application/json", "content-encoding: gzip")


@fault
async def no_utf8(x):
    if x.asked.stream:
        await x.start_stream()
        await x.chunk(b'data: {"choices": [{"index": 0, "text": "\xff\xfe", "finish_reason": null}]}\n\n')
        await x.chunk(b"data: \xff\n\n")
        await x.send(b"0\r\n\r\n")
    else:
        await x.plain("200 OK", b'{"choices": [{"text": "\xff\xfe"}]}')


# ------------------------------------------------------------------------------------------- without an end


@fault
async def endless_header(x):
    await x.send(b"HTTP/1.1 200 OK\r\nx-own: ")
    for _ in range(256):
        await x.send(b"x" * 4096)
    await x.never()


@fault
async def endless_headers(x):
    await x.send(b"HTTP/1.1 200 OK\r\n")
    for number in range(200):
        await x.send(b"".join(b"x-%d-%d: y\r\n" % (number, each) for each in range(100)))
    await x.never()


@fault
async def endless_body(x):
    await x.head("200 OK", "content-type: application/json", "transfer-encoding: chunked")
    while True:
        await x.chunk(b" " * 65536)
        await asyncio.sleep(STEP_S)


@fault
async def endless_event(x):
    await x.start_stream()
    await x.chunk(b"data: ")
    while True:
        await x.chunk(b"x" * 65536)
        await asyncio.sleep(STEP_S)


@fault
async def informed_for_ever(x):
    while True:
        await x.head("103 Early Hints")
        await asyncio.sleep(STEP_S)


# --------------------------------------------------------------------------------------- unusual, and right


@serving
async def stream_as_json(x):
    if not x.asked.stream:
        await x.answer()
        return
    await x.start_stream("application/json")
    for part in events(x.asked):
        await asyncio.sleep(STEP_S)
        await x.chunk(part)
    await x.send(b"0\r\n\r\n")


@serving
async def huge_events(x):
    if not x.asked.stream:
        await x.answer()
        return
    await x.start_stream()
    for part in events(x.asked, padding="-" * 100_000):
        await x.chunk(part)
    await x.send(b"0\r\n\r\n")


@serving
async def old_http(x):
    """No length, no chunks: the answer ends with the connection."""
    kind = "text/event-stream" if x.asked.stream else "application/json"
    await x.head("200 OK", f"content-type: {kind}", version="1.0")
    await x.send(b"".join(events(x.asked)) if x.asked.stream else whole(x.asked))
    x.writer.close()


@serving
async def informed(x):
    await x.head("103 Early Hints", "link: </style.css>")
    await x.answer()


@serving
async def commented(x):
    """Comments, names, numbers, CR LF."""
    if not x.asked.stream:
        await x.answer()
        return
    await x.start_stream()
    await x.chunk(b": hello\r\n\r\n")
    for number, part in enumerate(events(x.asked)):
        named = b"event: message\nid: %d\n" % number + part
        await x.chunk(named.replace(b"\n", b"\r\n"))
    await x.send(b"0\r\n\r\n")
