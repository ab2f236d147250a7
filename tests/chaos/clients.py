"""Clients at the level of bytes, well-behaved and not."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from .answers import Asked, Verdict, Violation, judged
from .connection import Connection

PATIENCE_S = 300.0
"""Time of the loop after which a client that waits says so; all time limits of the gateway are shorter."""
MAX_BODY_BYTES = 200_000
"""Of a request, as the gateway is told."""


@dataclass
class Tally:
    """What the clients of a tenant count themselves: the sequences that they ask for.

    Attributes:
        verdicts: of requests whose client stayed to the end.
        left: requests whose client went away: however they ended, they are over.
        unsure: requests of which the gateway may have heard, or not.
    """

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    left: int = 0
    unsure: int = 0


@dataclass
class Client:
    """One client, who speaks for a tenant.

    Attributes:
        port: of the gateway.
        asked: what it asks for.
        key: its API key.
        tally: its tenant's.
        turned_away: requests that the gateway counts as nobody's, by whether that is sure.
        path: asked for.
    """

    port: int
    asked: Asked
    key: str
    tally: Tally
    turned_away: Counter[bool]
    path: str = "/v1/completions"

    def request(
        self, asked: Asked | None = None, *headers: str, body: bytes | None = None, version: str = "1.1"
    ) -> bytes:
        asked = asked or self.asked
        content = asked.body() if body is None else body
        lines = [f"POST {self.path} HTTP/{version}", "host: gateway", f"authorization: Bearer {self.key}"]
        if not any(each.startswith(("content-length", "transfer-encoding")) for each in headers):
            lines.append(f"content-length: {len(content)}")
        return "\r\n".join([*lines, *headers, "", ""]).encode() + content

    @contextlib.asynccontextmanager
    async def connected(self, *, narrow: bool = False):
        connection = await Connection.to(self.port, narrow=narrow)
        try:
            yield connection
        finally:
            await connection.close()

    async def told(self, connection: Connection, asked: Asked | None = None, version: str = "1.1") -> Verdict:
        """What the next response on a connection is, counted."""
        asked = asked or self.asked
        verdict: Verdict = "violation"
        try:
            response = await connection.response(version)
            if response is None:
                raise Violation("hung up without a word")
            verdict = judged(response, asked)
            return verdict
        except Violation as violation:
            raise Violation(str(violation), asked.tag) from None
        finally:
            self.tally.verdicts[verdict] += asked.sequences

    async def refused(self, connection: Connection, *statuses: int, sure: bool = True) -> None:
        """The next response turns it away; `sure` if the gateway's application has heard of it."""
        response = await connection.response()
        if response is None:
            raise Violation("hung up without a word")
        judged(response)
        if response.status not in statuses:
            raise Violation(f"HTTP {response.status}, expected {statuses}: {response.body[:80]!r}")
        self.turned_away[sure] += 1


Kind = Callable[[Client], Awaitable[None]]
CLIENTS: dict[str, Kind] = {}
"""Kinds of clients by name; each raises Violation where it sees what nobody should."""


def kind(function: Kind) -> Kind:
    CLIENTS[function.__name__] = function
    return function


# -------------------------------------------------------------------------------------- who stay to the end


@kind
async def plain(client):
    async with client.connected() as connection:
        await connection.send(client.request())
        await client.told(connection)


@kind
async def streaming(client):
    client.asked = replace(client.asked, stream=True)
    await plain(client)


@kind
async def chatting(client):
    """By another path; the made-up upstreams answer as ever."""
    client.path = "/v1/chat/completions"
    await streaming(client)


@kind
async def old(client):
    """HTTP/1.0, which has no chunks: the answer ends with the connection."""
    client.asked = replace(client.asked, stream=True)
    async with client.connected() as connection:
        await connection.send(client.request(version="1.0"))
        await client.told(connection, version="1.0")
        if not await connection.ended():
            raise Violation("goes on after the answer")


@kind
async def one_after_the_other(client):
    """On one connection; the second is of a stream."""
    async with client.connected() as connection:
        for number in range(3):
            asked = replace(client.asked, tag=f"{client.asked.tag}-{number}", stream=number == 1)
            await connection.send(client.request(asked))
            await client.told(connection, asked)


@kind
async def pipelining(client):
    """All at once on one connection; answers in the order of the requests."""
    asked = [
        replace(client.asked, tag=f"{client.asked.tag}-{number}", stream=number == 1) for number in range(3)
    ]
    async with client.connected() as connection:
        await connection.send(b"".join(map(client.request, asked)))
        for left, each in zip((2, 1, 0), asked, strict=True):
            try:
                await client.told(connection, each)
            except Violation:
                client.tally.unsure += left
                raise


@kind
async def in_chunks(client):
    """A body of unstated length, in parts that come slowly."""
    async with client.connected() as connection:
        await connection.send(client.request(None, "transfer-encoding: chunked", body=b""))
        content = client.asked.body()
        for start in range(0, len(content), 20):
            part = content[start : start + 20]
            await connection.send(b"%x\r\n%s\r\n" % (len(part), part))
            await asyncio.sleep(0.05)
        await connection.send(b"0\r\n\r\n")
        await client.told(connection)


@kind
async def polite(client):
    """It asks whether to go on before it sends its body."""
    content = client.asked.body()
    async with client.connected() as connection:
        headers = ("expect: 100-continue", f"content-length: {len(content)}")
        await connection.send(client.request(None, *headers, body=b""))
        await connection.reader.readuntil(b"\r\n\r\n")
        await connection.send(content)
        await client.told(connection)


@kind
async def several_sequences(client):
    client.asked = replace(client.asked, n=3, stream=True)
    await plain(client)


@kind
async def several_prompts(client):
    client.asked = replace(client.asked, prompts=2, n=2)
    await plain(client)


@kind
async def large(client):
    """As long as may be."""
    client.asked = replace(client.asked, padding=MAX_BODY_BYTES - 500)
    await plain(client)


@kind
async def burst(client):
    """Many at once."""

    async def one(number: int) -> None:
        asked = replace(client.asked, tag=f"{client.asked.tag}-{number}", stream=bool(number % 2))
        async with client.connected() as connection:
            await connection.send(client.request(asked))
            await client.told(connection, asked)

    found = await asyncio.gather(*map(one, range(8)), return_exceptions=True)
    for each in found:
        if each is not None:
            raise each


@kind
async def slow_reader(client):
    """It takes what comes a little at a time, but takes it all."""
    client.asked = replace(client.asked, stream=True, tokens=16)
    async with client.connected(narrow=True) as connection:
        slowly = asyncio.StreamReader(limit=1 << 26)

        async def read() -> None:
            with contextlib.suppress(ConnectionError):
                while part := await connection.reader.read(1 << 16):
                    slowly.feed_data(part)
                    await asyncio.sleep(0.05)
            slowly.feed_eof()

        await connection.send(client.request())
        reading = asyncio.create_task(read())
        try:
            await client.told(Connection(slowly, connection.writer))
        finally:
            reading.cancel()


# ---------------------------------------------------------------------------------------------- who go away


@kind
async def gone_at_once(client):
    """It does not wait for anything."""
    async with client.connected() as connection:
        await connection.send(client.request())
        client.tally.unsure += 1


@kind
async def gone_before_the_first_byte(client):
    async with client.connected() as connection:
        await connection.send(client.request())
        await asyncio.sleep(0.05)
        client.tally.left += 1


@kind
async def gone_within_the_answer(client):
    client.asked = replace(client.asked, stream=True, tokens=50)
    async with client.connected() as connection:
        await connection.send(client.request())
        client.tally.left += 1
        await connection.reader.read(10)


@kind
async def reset_within_the_answer(client):
    client.asked = replace(client.asked, stream=True, tokens=50)
    connection = await Connection.to(client.port)
    await connection.send(client.request())
    client.tally.left += 1
    await connection.reader.read(10)
    connection.reset()


@kind
async def reads_nothing(client):
    """Until it is let go; an answer that fits into buffers is over before."""
    client.asked = replace(client.asked, stream=True, tokens=400)
    async with client.connected(narrow=True) as connection:
        await connection.send(client.request())
        client.tally.left += 1
        await asyncio.sleep(PATIENCE_S / 4)


# --------------------------------------------------------------------------------------------- who do wrong


@kind
async def half_a_body(client):
    """And then nothing more."""
    request = client.request()
    async with client.connected() as connection:
        await connection.send(request[:-20])
        await client.refused(connection, 408, sure=False)


@kind
async def gone_within_the_body(client):
    request = client.request()
    async with client.connected() as connection:
        await connection.send(request[:-20])
        await asyncio.sleep(0.05)


@kind
async def half_a_head(client):
    """And then nothing more."""
    async with client.connected() as connection:
        await connection.send(client.request()[:40])
        await client.refused(connection, 408, sure=False)


@kind
async def no_head(client):
    """It connects and says nothing."""
    async with client.connected() as connection:
        if await connection.response() is not None:
            raise Violation("an answer to nothing")


@kind
async def endless_head(client):
    """Refused long before its end."""
    async with client.connected() as connection:
        await connection.send(b"POST /v1/completions HTTP/1.1\r\nhost: gateway\r\nx-own: ")
        for _ in range(64):
            await connection.send(b"x" * 16384)
        response = await connection.response()
        if response is not None and response.status != 431:
            raise Violation(f"HTTP {response.status} to a head of a megabyte")


@kind
async def no_http(client):
    async with client.connected() as connection:
        await connection.send(bytes(range(256)) * 8 + b"\r\n\r\n")
        response = await connection.response()
        if response is not None and response.status != 400:
            raise Violation(f"HTTP {response.status} to bytes that are no HTTP")


@kind
async def wrong_json(client):
    async with client.connected() as connection:
        for body in (b'{"prompt": ', b"[]", b"\xff\xfe", b""):
            await connection.send(client.request(body=body))
            await client.refused(connection, 400)


@kind
async def unknown_key(client):
    client.key = "nobody's"
    async with client.connected() as connection:
        await connection.send(client.request())
        await client.refused(connection, 401)


@kind
async def too_large(client):
    """It states so, and waits for the answer before it sends more."""
    async with client.connected() as connection:
        length = f"content-length: {MAX_BODY_BYTES + 1}"
        await connection.send(client.request(None, length, body=b"{"))
        await client.refused(connection, 413)


@kind
async def too_large_in_chunks(client):
    async with client.connected() as connection:
        await connection.send(client.request(None, "transfer-encoding: chunked", body=b""))
        for _ in range(MAX_BODY_BYTES // 8192 + 1):
            await connection.send(b"2000\r\n" + b" " * 8192 + b"\r\n")
        await client.refused(connection, 413)


@kind
async def other_path(client):
    async with client.connected() as connection:
        for line, status in (("POST /v1/nothing", 404), ("DELETE /v1/completions", 405)):
            lines = [f"{line} HTTP/1.1", "host: gateway", f"authorization: Bearer {client.key}", "", ""]
            await connection.send("\r\n".join(lines).encode())
            response = await connection.response()
            if response is None or judged(response) != "error" or response.status != status:
                raise Violation(f"{line}: {response}")
