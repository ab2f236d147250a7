"""A bad day: upstreams and clients of all kinds, on schedules that are drawn from seeds."""

from __future__ import annotations

from .clients import CLIENTS
from .schedule import KINDS, draw
from .sides import SIDES
from .virtual_time import run
from .world import World


def test_every_request_ends_once_and_nothing_is_left(seed, replay):
    world = World(draw(seed))
    run(world.play())
    assert not world.violations, "\n".join([*world.violations, f"again: {replay}"])


def test_a_seed_is_a_schedule():
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_schedules_have_clients_and_upstreams_of_every_kind():
    drawn = [draw(seed) for seed in range(3)]
    alone = [(phase.kinds, {visit.kind for visit in phase.visits}) for phase in drawn[0].phases]
    assert sorted(kinds for kinds, _ in alone) == sorted((kind,) for kind in KINDS)
    assert all(clients == set(CLIENTS) for _, clients in alone)
    assert [schedule.upstreams for schedule in drawn] == [1, 2, 3]
    assert {side for schedule in drawn for phase in schedule.phases for side in phase.sides} == set(SIDES)
