"""Each kind of upstream by itself: what is unusual serves, and what is bad leaves those beside it alone."""

from __future__ import annotations

import asyncio

import pytest

from .answers import Asked
from .connection import Connection
from .faults import SERVING
from .schedule import KINDS
from .service import Service
from .virtual_time import run

OF_CLIENTS = ("status_401", "status_404", "endless_body")
"""Kinds that say nothing of an upstream: its client may have asked for what cannot be, or for too much."""
FIRST = 20
"""Requests in which a bad upstream is found out."""
BACK_S = 10.0
"""Time that one which is well again has until it serves (s)."""


async def served(service: Service, count: int, at_once: int) -> list[bool]:
    """Which of so many requests were answered, in the order in which their clients sent them."""
    found, numbers = [False] * count, iter(range(count))

    async def ask() -> None:
        connection = await Connection.to(service.port)
        for number in numbers:
            asked = Asked(f"r{number}", stream=bool(number % 2), tokens=3)
            client = service.client(asked)
            await connection.send(client.request())
            found[number] = await client.told(connection) == "answer"
        await connection.close()

    await asyncio.gather(*(ask() for _ in range(at_once)))
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*SERVING, *OF_CLIENTS)])
def test_the_good_one_goes_on_serving_and_the_bad_one_comes_back(kind, beside):
    async def main():
        loop = asyncio.get_running_loop()
        async with Service(2) as service:
            bad = service.upstreams[1]
            await bad.become(kind)
            found = await served(service, FIRST + beside, at_once=8)
            assert sum(found[FIRST:]) >= 0.99 * beside
            bad.met.clear()
            await bad.become("good")
            well_s = loop.time()
            while not bad.met and loop.time() < well_s + BACK_S:
                assert all(await served(service, 4, at_once=2))
                await asyncio.sleep(0.5)
            assert bad.met

    run(main())


@pytest.mark.parametrize("kind", sorted(SERVING))
def test_what_is_unusual_and_right_is_served(kind):
    async def main():
        async with Service(1) as service:
            await service.upstreams[0].become(kind)
            assert all(await served(service, 16, at_once=2))

    run(main())
