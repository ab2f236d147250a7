"""Who does what when, drawn from a seed: the same seed, the same schedule."""

from __future__ import annotations

import random
from dataclasses import dataclass

from llmserve_env.schema import ServeAction

from .clients import CLIENTS
from .faults import AT_THE_DOOR, FAULTS
from .sides import SIDES

PHASE_S = 4.0
"""Time for which upstreams behave in one way (s)."""
KINDS = [*FAULTS, *AT_THE_DOOR]
"""What upstreams do with completions."""
MINUTES = len(KINDS) * PHASE_S / 60
"""Length of a schedule (min)."""

_ACTIONS = (
    ServeAction(batch_cap=64),
    ServeAction(batch_cap=64),
    ServeAction(batch_cap=8, priority_routing=True),
    ServeAction(batch_cap=64, admission_rate=8.0),
    ServeAction(batch_cap=16, kv_budget_fraction=0.5),
)


@dataclass(frozen=True)
class Visit:
    """A client comes.

    Attributes:
        at_s: when, from the beginning of its phase (s).
        kind: name of CLIENTS.
        tenant: index of whom it speaks for.
        tag: of its request.
    """

    at_s: float
    kind: str
    tenant: int
    tag: str


@dataclass(frozen=True)
class Phase:
    """A time in which nothing changes.

    Attributes:
        kinds: of KINDS, of each upstream.
        sides: of SIDES, of each upstream.
        action: in force.
        visits: in the order of their times.
    """

    kinds: tuple[str, ...]
    sides: tuple[str, ...]
    action: ServeAction
    visits: tuple[Visit, ...]


@dataclass(frozen=True)
class Schedule:
    """All phases, one after the other.

    Attributes:
        seed: that it was drawn from.
        phases: phases; in all of them together each upstream is of every kind once, but for the good one.
    """

    seed: int
    phases: tuple[Phase, ...]

    @property
    def upstreams(self) -> int:
        return len(self.phases[0].kinds)


def draw(seed: int, tenants: int = 2) -> Schedule:
    """The schedule of a seed.

    By the seed there is one upstream, or one that misbehaves beside a good one, or two beside a good one.
    Each kind of client meets each kind of upstream where there is one, and half of the kinds where there are
    more.
    """
    clients = list(CLIENTS)
    drawn = random.Random(seed)
    bad = (1, 1, 2)[seed % 3]
    beside = ("good",) if seed % 3 else ()
    count = len(clients) // 2 if beside else len(clients)
    orders = [drawn.sample(KINDS, len(KINDS)) for _ in range(bad)]
    phases = []
    for number, kinds in enumerate(zip(*orders, strict=True)):
        visits = sorted(
            (
                Visit(drawn.uniform(0, PHASE_S), kind, drawn.randrange(tenants), f"{number}-{kind}")
                for kind in drawn.sample(clients, count)
            ),
            key=lambda visit: visit.at_s,
        )
        sides = [drawn.choice(list(SIDES)) if drawn.random() < 0.5 else "well" for _ in kinds]
        phases.append(
            Phase(
                (*beside, *kinds),
                (*("well" for _ in beside), *sides),
                drawn.choice(_ACTIONS),
                tuple(visits),
            )
        )
    return Schedule(seed, tuple(phases))
