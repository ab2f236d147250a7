"""A good upstream beside a bad one, of every kind."""

from __future__ import annotations

import asyncio

import pytest

from .answers import Asked, Violation
from .clients import Client, Connection, Tally
from .faults import SERVING
from .schedule import KINDS
from .virtual_time import run
from .world import TENANTS, World

FIRST = 20
"""Requests in which a bad upstream is found out."""


async def served(world: World, count: int, at_once: int = 8) -> list[bool]:
    """Of so many requests, by clients who come one after the other, which were answered."""
    found, numbers = [], iter(range(count))

    async def client() -> None:
        connection = await Connection.to(world.running.port)
        for number in numbers:
            asked = Asked(f"{len(found)}-{number}", stream=bool(number % 2), tokens=3)
            one = Client(world.running.port, asked, TENANTS[0].key, Tally(), world.turned_away)
            await connection.send(one.request())
            found.append(await one.told(connection) == "answer")
        await connection.close()

    await asyncio.gather(*(client() for _ in range(at_once)))
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SERVING])
def test_the_good_one_serves_and_the_bad_one_comes_back(kind, chaos_requests):
    async def main():
        async with World.of(2) as world:
            bad = world.upstreams[1]
            await bad.become(kind)
            found = await served(world, FIRST + chaos_requests)
            later = found[FIRST:]
            assert later.count(True) >= 0.99 * len(later)
            await bad.become("good")
            bad.met.clear()
            began_s = asyncio.get_running_loop().time()
            while not bad.met and asyncio.get_running_loop().time() - began_s < 10.0:
                assert all(await served(world, 4, at_once=2))
                await asyncio.sleep(0.5)
            assert bad.met

    run(main())
