"""What anybody may send to a server before its application is asked, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from llmserve_env.errors import InputError
from llmserve_env.net.connections import ConnectionLimits
from llmserve_env.net.protocols import bounded
from tests.live.endpoint_server import Running

LIMITS = ConnectionLimits(
    max_connections=50, header_timeout_s=600.0, body_timeout_s=600.0, write_timeout_s=600.0
)
SOON_S = 0.1
GET = b"GET / HTTP/1.1\r\nHost: h\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"


class App:
    """Answers with the size of a body, or the text of a message, once `go` is set.

    Attributes:
        begun: how many requests have come to it.
        left: how many of them ended with their connection.
    """

    def __init__(self, answer=b""):
        self.go = asyncio.Event()
        self.go.set()
        self.begun = self.left = 0
        self._answer = answer

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":
            await self._talk(receive, send)
            return
        self.begun += 1
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            size, more = size + len(message["body"]), message["more_body"]
        await self.go.wait()
        content = self._answer or b"%d" % size
        headers = [(b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _talk(self, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": str(len(message["text"]))})
        self.left += 1


@contextlib.asynccontextmanager
async def standing(app=None, **changes):
    """A server of an application within bounds."""
    limits = replace(LIMITS, **changes)
    async with Running(app or App(), **bounded(limits)) as here:
        yield here


async def opened(here, content=b""):
    """A connection that has sent something."""
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
    writer.write(content)
    return reader, writer


async def rest(connection):
    """All that comes until the server closes the connection."""
    reader, writer = connection
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := await asyncio.wait_for(reader.read(1 << 16), 60):
            found += part
    writer.close()
    return found


async def sent(here, content):
    """The answer to what is sent, to the end of its connection."""
    connection = await opened(here, content)
    with contextlib.suppress(ConnectionError):
        await connection[1].drain()
    return await rest(connection)


async def answer(connection, content):
    """Status and body of the answer to a request on a connection that stays open."""
    reader, writer = connection
    writer.write(content)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head.split()[1]), await asyncio.wait_for(reader.readexactly(length), 60)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


LONG = b"a" * 70_000


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(GET + b"X: " + LONG + b"\r\n\r\n", id="a header"),
        pytest.param(GET + b"X: " + LONG, id="a header without end"),
        pytest.param(GET + b"X: " + b"a" * 3_000_000, id="a header without end, far beyond"),
        pytest.param(GET + b"X: aaaa\r\n" * 8000 + b"\r\n", id="many headers"),
        pytest.param(GET + b"X: aaaa\r\n" * 8000, id="many headers without end"),
        pytest.param(b"GET /" + LONG + b" HTTP/1.1\r\n\r\n", id="an address"),
        pytest.param(b"GET /" + LONG, id="an address without end"),
        pytest.param(CHUNKED + b"X: " + 8 * LONG, id="a trailer without end"),
        pytest.param(CHUNKED + b"X: aaaa\r\n" * 80_000 + b"\r\n", id="many trailers"),
        pytest.param(GET + b"\r\n" + GET + b"X: " + 8 * LONG, id="a header of the second request"),
    ],
)
def test_headers_that_are_too_long_are_refused_and_nobody_else_notices(content):
    async def main():
        async with standing() as here:
            other = await opened(here)
            assert await answer(other, GET + b"\r\n") == (200, b"0")
            found = await sent(here, content)
            assert b"HTTP/1.1 431 " in found
            assert b"at most 65,536 bytes" in found
            assert await answer(other, GET + b"\r\n") == (200, b"0")
            other[1].close()

    asyncio.run(main())


def test_what_is_within_the_bounds_passes():
    long = b"X: " + b"a" * 60_000 + b"\r\n\r\n"

    async def main():
        async with standing() as here:
            connection = await opened(here)
            assert await answer(connection, GET + long) == (200, b"0")
            connection[1].write(20 * (GET + long))  # one after the other without waiting
            for _ in range(20):
                assert await answer(connection, b"") == (200, b"0")
            body = b"Content-Length: 3000000\r\n\r\n" + b"a" * 3_000_000
            assert await answer(connection, POST + body) == (200, b"3000000")
            chunks = POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n"
            assert await answer(connection, chunks) == (200, b"50000")
            connection[1].close()

    asyncio.run(main())


def test_an_answer_of_unstated_length_ends_with_the_connection_for_who_knows_no_chunks():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"one ", b"", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def main():
        async with standing(app) as here:
            reader, writer = await opened(here, b"GET / HTTP/1.0\r\nHost: h\r\n\r\n")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert body == b"one two"
            assert b"connection: close" in head
            assert b"transfer-encoding" not in head

    asyncio.run(main())


def test_what_the_parser_refuses_is_refused_as_before():
    async def main():
        async with standing() as here:
            assert (await sent(here, b"\0\r\n\r\n")).startswith(b"HTTP/1.1 400 ")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", b""), (b"\r\n", b""), (b"GE", b"HTTP/1.1 408 "), (GET + b"X: 1", b"HTTP/1.1 408 ")],
)
def test_a_request_whose_headers_do_not_come_is_hung_up_on(content, found):
    async def main():
        async with standing(header_timeout_s=SOON_S) as here:
            assert (await sent(here, content))[:13] == found

    asyncio.run(main())


def test_so_is_the_next_one_on_a_connection():
    async def main():
        async with standing(header_timeout_s=SOON_S) as here:
            for content, found in ((b"\r\nGET /", b"HTTP/1.1 408 "), (b"\r\n", b"")):
                connection = await opened(here, GET + b"\r\n")
                assert await answer(connection, b"") == (200, b"0")
                connection[1].write(content)  # the server keeps one that says nothing far longer
                assert (await rest(connection))[:13] == found

    asyncio.run(main())


def test_who_sends_the_next_request_early_is_answered_first():
    async def main():
        app = App()
        app.go.clear()
        async with standing(app, header_timeout_s=SOON_S) as here:
            connection = await opened(here, GET + b"\r\n" + b"GET /")
            await until(lambda: app.begun)
            await asyncio.sleep(3 * SOON_S)  # the next one's headers are late
            app.go.set()
            assert await answer(connection, b"") == (200, b"0")
            assert (await rest(connection)).startswith(b"HTTP/1.1 408 ")

    asyncio.run(main())


def test_requests_far_ahead_of_their_answers_are_hung_up_on_before_they_are_kept():
    async def main():
        app = App()
        app.go.clear()
        async with standing(app) as here:
            connection = await opened(here, 10 * (GET + b"\r\n"))
            await until(lambda: app.begun)
            assert await sent(here, 3000 * (GET + b"\r\n")) == b""
            app.go.set()
            for _ in range(10):
                assert await answer(connection, b"") == (200, b"0")
            await until(lambda: app.begun >= 11)
            assert app.begun == 11  # of the others, the application was told of the first alone
            connection[1].close()

    asyncio.run(main())


def test_the_application_hears_of_a_client_that_left_with_further_requests_sent():
    async def main():
        left = asyncio.Event()
        begun = asyncio.Event()

        async def waiting(scope, receive, send):
            while (message := await receive())["type"] != "http.disconnect":
                assert not message["more_body"]
                begun.set()
            left.set()

        async with standing(waiting) as here:
            _, writer = await opened(here, 2 * (GET + b"\r\n"))
            await asyncio.wait_for(begun.wait(), 60)
            writer.close()
            await asyncio.wait_for(left.wait(), 60)

    asyncio.run(main())


def test_a_body_that_does_not_end_is_hung_up_on_and_the_application_told():
    async def main():
        app = App()
        async with standing(app, body_timeout_s=SOON_S) as here:
            found = await sent(here, POST + b"Content-Length: 100\r\n\r\n" + b"a" * 99)
            assert found.startswith(b"HTTP/1.1 408 ")
            await until(lambda: app.left == 1)

    asyncio.run(main())


def test_a_body_that_nobody_waits_for_is_not_sent_for_ever():
    async def refusing(scope, receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def main():
        async with standing(refusing, body_timeout_s=SOON_S) as here:
            found = await sent(here, POST + b"Content-Length: 100\r\n\r\n" + b"a" * 50)
            assert found.startswith(b"HTTP/1.1 404 ")
            assert b"408" not in found

    asyncio.run(main())


def test_half_sent_bodies_are_bounded_together_and_the_first_gives_way():
    part = POST + b"Content-Length: 100000\r\n\r\n" + b"a" * 60_000

    async def main():
        app = App()
        async with standing(app, max_unfinished_bytes=100_000) as here:
            first = await opened(here, part)
            await until(lambda: app.begun == 1)
            second = await opened(here, part)
            assert (await rest(first)).startswith(b"HTTP/1.1 408 ")
            assert await answer(second, b"a" * 40_000) == (200, b"100000")
            for _ in range(5):  # what has ended counts no more
                assert await answer(second, part + b"a" * 40_000) == (200, b"100000")
            second[1].close()

    asyncio.run(main())


def test_connections_that_would_not_be_missed_give_way_to_new_ones():
    async def main():
        async with standing(max_connections=3) as here:
            half = [await opened(here, content) for content in (b"", GET, GET)]
            used = await opened(here)
            assert await answer(used, GET + b"\r\n") == (200, b"0")
            assert await rest(half[0]) == b""
            for _ in range(10):  # more strangers come: they are sent away first
                half.append(await opened(here, GET))
            last = await opened(here)
            assert await answer(last, GET + b"\r\n") == (200, b"0")
            assert await answer(used, GET + b"\r\n") == (200, b"0")
            for connection in (used, last, *half):
                connection[1].close()

    asyncio.run(main())


def test_where_all_are_served_the_next_one_is_refused():
    async def main():
        app = App()
        app.go.clear()
        async with standing(app, max_connections=2) as here:
            busy = [await opened(here, GET + b"\r\n") for _ in range(2)]
            await until(lambda: app.begun == 2)
            refused = await sent(here, GET + b"\r\n")
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in refused
            app.go.set()
            for connection in busy:
                assert await answer(connection, b"") == (200, b"0")
            late = await opened(here)
            assert await answer(late, GET + b"\r\n") == (200, b"0")
            for connection in (*busy, late):
                connection[1].close()

    asyncio.run(main())


def test_a_client_that_does_not_read_is_hung_up_on():
    async def main():
        async with standing(App(b"a" * 30_000_000), write_timeout_s=SOON_S) as here:
            _, writer = await opened(here, GET + b"Connection: close\r\n\r\n")
            writer.transport.pause_reading()
            connections = here._server.server_state.connections
            await until(lambda: connections)
            await until(lambda: not connections)
            writer.transport.abort()

    asyncio.run(main())


def frame(content, opcode=1, final=True, length=None):
    """A frame as a client sends it; with a longer length not all of it."""
    head = struct.pack("!BBQ", opcode | (0x80 if final else 0), 0x80 | 127, length or len(content))
    return head + b"\0\0\0\0" + content


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(frame(b"a" * 99, length=100), id="a frame"),
        pytest.param(frame(b"a", final=False), id="a message of several"),
        pytest.param(frame(b"a", final=False) + frame(b"", 9), id="a ping within a message"),
    ],
)
def test_a_message_that_does_not_end_is_hung_up_on(content):
    async def main():
        app = App()
        async with (
            standing(app, body_timeout_s=SOON_S) as here,
            connect(here.url.replace("http", "ws")) as ws,
        ):
            await ws.send("abc")
            assert await ws.recv() == "3"
            ws.transport.write(content)
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.wait_for(ws.recv(), 60)
            assert closed.value.rcvd.code == 1008
            await until(lambda: app.left == 1)

    asyncio.run(main())


def test_half_sent_messages_are_bounded_together_and_whole_ones_are_free():
    async def main():
        async with standing(max_unfinished_bytes=100_000) as here:
            url = here.url.replace("http", "ws")
            async with connect(url) as first, connect(url) as second:
                for _ in range(5):
                    await second.send("a" * 90_000)
                    assert await second.recv() == "90000"
                first.transport.write(frame(b"a" * 60_000, length=90_000))
                await second.ping()  # ends, as messages do
                second.transport.write(frame(b"a" * 60_000, length=90_000))
                with pytest.raises(ConnectionClosed):
                    await asyncio.wait_for(first.recv(), 60)
                second.transport.write(b"a" * 30_000)
                assert await second.recv() == "90000"

    asyncio.run(main())


def test_a_websocket_that_talks_keeps_its_place():
    async def main():
        async with standing(max_connections=2) as here:
            url = here.url.replace("http", "ws")
            async with connect(url) as ws:
                await ws.send("abc")
                assert await ws.recv() == "3"
                strangers = [await opened(here, GET) for _ in range(5)]
                async with connect(url) as silent:  # in a stranger's place
                    last = await opened(here)
                    assert await answer(last, GET + b"\r\n") == (200, b"0")
                    await asyncio.wait_for(silent.wait_closed(), 60)
                    await ws.send("abcd")
                    assert await ws.recv() == "4"
                for connection in (*strangers, last):
                    connection[1].close()

    asyncio.run(main())


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused_by_its_name(value):
    with pytest.raises(InputError, match=r"field 'header_timeout_s': expected a number above 0"):
        ConnectionLimits(header_timeout_s=value)


def test_there_is_room_for_as_many_connections_as_files_may_be_open():
    code = "import sys; from llmserve_env.net.connections import room_for as r; print(r(2048), r(2048, 2))"
    command = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["160", "80"]
