"""A client of a server that says more than it was asked for."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from llmserve_env.net.http import open_session

OTHER = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nother"


def asked_in_turn(more, turns):
    """What a session gets for five requests, one after the other, and how many connections it took.

    The server says `more` when each answer has been read, so many turns of the loop before the next request.
    """
    connections, was_read, was_sent = [], asyncio.Event(), asyncio.Event()

    async def serve(reader, writer):
        connections.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                request = await reader.readuntil(b"\r\n\r\n")
                number = request.split(b" ")[1].removeprefix(b"/")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n" + number)
                await was_read.wait()
                was_read.clear()
                if more is None:
                    writer.transport.abort()
                    await writer.wait_closed()
                else:
                    writer.write(more)
                was_sent.set()
        writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = "http://127.0.0.1:{}".format(*server.sockets[0].getsockname()[1:])
        got = []
        async with open_session() as session:
            for number in range(5):
                async with session.get(f"{url}/{number}") as response:
                    got.append(await response.text())
                was_read.set()
                await was_sent.wait()
                was_sent.clear()
                for _ in range(turns):
                    await asyncio.sleep(0)
        server.close()
        for writer in connections:
            with suppress(ConnectionError):
                await writer.wait_closed()
        return got, len(connections)

    return asyncio.run(main())


@pytest.mark.parametrize("turns", [0, 20])
@pytest.mark.parametrize(
    ("more", "connections"),
    [(b"", 1), (OTHER, 5), (b"no HTTP", 5), (None, 5)],
    ids=["nothing", "an answer", "garbage", "the end"],
)
def test_a_connection_over_which_something_came_unasked_is_not_used_again(more, connections, turns):
    assert asked_in_turn(more, turns) == (["0", "1", "2", "3", "4"], connections)
