"""The health of one upstream: one state, with its cause, for everybody who asks.

It is fed by what became of requests (`fault` says what each outcome means), by what moves while they run, and
by the upstream's /health. It is a state machine over times that it is given: it has no clock.
"""

from __future__ import annotations

import math
from collections import Counter
from enum import Enum

from llmserve_env.live.servers.fault import Cause

CONSECUTIVE = 3
"""Failures in a row that eject."""
RECENT, RECENT_FAILURES = 10, 5
"""Of so many outcomes so many failures eject, too."""
EJECTED_S, LONGEST_S = 1.0, 5.0
"""First ejection, and longest; each one in a row is twice as long as the one before."""
FORGIVEN_S = 60.0
"""Time that it is well after which an ejection is the first again."""
HEEDED_S = 60.0
"""Longest Retry-After that is heeded."""
SILENT_S = 10.0
"""Time without a token, and without a counter that moves, that no iteration of an engine takes."""
HELD_S = 3.0
"""Time that an ejection lasts on after its evidence was last seen: of silence, of a failing /health."""
PROBES_LOST = 2
"""Answers of /health in a row that are missing or bad."""

AT_ONCE = frozenset({Cause.UNREACHABLE, Cause.KEY_REFUSED})
"""Causes that leave no doubt: a single failure ejects."""
HARD = frozenset({Cause.UNREACHABLE, Cause.SILENT, Cause.UNHEALTHY})
"""Causes that no request of a client's can bring about."""


class State(str, Enum):
    """What is to be expected of an upstream."""

    WELL = "well"
    SUSPECT = "suspect"
    """Its last requests failed; it still gets some."""
    EJECTED = "ejected"
    """It gets none for a time."""
    PROBING = "probing"
    """That time is over: it gets one request, whose outcome decides."""
    DRAINING = "draining"
    """It gets none by command; those that it has go on."""


UP = frozenset({State.WELL, State.SUSPECT, State.PROBING})
"""States in which an upstream gets requests."""


class Health:
    """State of one upstream. All times are of the gateway's clock (s).

    Attributes:
        draining: whether it gets no requests by command.
        cause: why it is not well; None where it is.
        since_s: since when it has been out, or well; nan at the start.
        ejections: how often it was ejected, by cause.
        came_s: when a piece of an answer last came from it.
        busy_s: when it last got a request and had none.
    """

    def __init__(self) -> None:
        self.draining = False
        self.cause: Cause | None = None
        self.since_s = math.nan
        self.ejections: Counter[Cause] = Counter()
        self.came_s = self.busy_s = -math.inf
        self._until_s: float | None = None  # it is out; from then on it may be probed
        self._probes = 0  # requests that are under way to find out
        self._in_a_row = 0  # ejections
        self._failures = 0  # in a row
        self._recent = 0  # a bit for each outcome, the newest is the lowest
        self._health_lost = 0  # answers in a row

    @property
    def out(self) -> bool:
        """Whether it was ejected and has not proven since that it is well."""
        return self._until_s is not None

    @property
    def well(self) -> bool:
        """Whether it is neither out nor drains: it may get any request."""
        return self._until_s is None and not self.draining

    def state(self, now_s: float) -> State:
        """What is to be expected of it."""
        if self.draining:
            return State.DRAINING
        if self._until_s is None:
            return State.SUSPECT if self._failures else State.WELL
        return State.EJECTED if now_s < self._until_s else State.PROBING

    def takes(self, now_s: float) -> bool:
        """Whether it may get a request: an ejected one a single one, when its time has come."""
        if self.draining:
            return False
        return self._until_s is None or (now_s >= self._until_s and not self._probes)

    def badness(self) -> tuple[bool, float]:
        """A measure of how bad it is, among those that are out: the least is tried first."""
        return self.cause in HARD, -math.inf if self._until_s is None else self._until_s

    def sent(self, now_s: float, *, idle: bool) -> bool:
        """It gets a request; `idle`: it has no other.

        Returns:
            Whether the request finds out if it is well again.
        """
        if idle:
            self.busy_s = now_s
        if self._until_s is None:
            return False
        self._probes += 1
        return True

    def succeeded(self, now_s: float, *, probe: bool) -> None:
        """A request was answered, or has come far enough."""
        self._recent = self._recent << 1 & (1 << RECENT) - 1
        if probe:
            self._probes -= 1
        if self._until_s is None:
            if self._failures:
                self._failures, self.cause = 0, None
        elif probe:
            self._recover(now_s)

    def failed(
        self, cause: Cause, now_s: float, *, probe: bool = False, retry_after_s: float | None = None
    ) -> None:
        """A request failed by its fault.

        Args:
            cause: why.
            now_s: time (s).
            probe: whether the request was to find out if it is well.
            retry_after_s: time for which it asked to be left alone (s).
        """
        if probe:
            self._probes -= 1
        if self._until_s is not None:
            # What it had got before it was ejected says nothing new, unless nothing can reach it now.
            if probe and now_s >= self._until_s:
                self._eject(cause, now_s, retry_after_s)
            elif cause in AT_ONCE:
                self._seen(cause, now_s)
            return
        self._failures += 1
        self._recent = (self._recent << 1 | 1) & (1 << RECENT) - 1
        self.cause = cause
        if (
            cause in AT_ONCE
            or retry_after_s
            or self._failures >= CONSECUTIVE
            or bin(self._recent).count("1") >= RECENT_FAILURES
        ):
            self._eject(cause, now_s, retry_after_s)

    def left(self, *, probe: bool) -> None:
        """A request ended in a way that says nothing of it."""
        if probe:
            self._probes -= 1

    def silent(self, now_s: float) -> None:
        """Requests run there, and nothing moves."""
        self._seen(Cause.SILENT, now_s)

    def moved(self, now_s: float) -> None:
        """Its counters move, or nothing runs there any more: a request may find out if it is silent still."""
        if self.cause is Cause.SILENT and self._until_s is not None:
            self._until_s = min(self._until_s, now_s)

    def came(self, now_s: float) -> None:
        """A piece of an answer came from it: it is not silent any more."""
        if self.cause is Cause.SILENT and self._until_s is not None:
            self._recover(now_s)

    def answered(self, well: bool, now_s: float) -> None:
        """Its /health answered, well or not, or did not answer."""
        if well:
            self._health_lost = 0
            if self._until_s is not None and self.cause in (Cause.UNHEALTHY, Cause.UNREACHABLE):
                self._until_s = min(self._until_s, now_s)  # a request may find out
            return
        self._health_lost += 1
        if self._health_lost >= PROBES_LOST:
            self._seen(Cause.UNHEALTHY, now_s)

    def _eject(self, cause: Cause, now_s: float, retry_after_s: float | None = None) -> None:
        if self._until_s is None:
            # since_s is when it was last known to be well again; at the start it never was anything else.
            if not now_s - self.since_s <= FORGIVEN_S:
                self._in_a_row = 0
            self.since_s = now_s
        self._in_a_row += 1
        time_s = min(EJECTED_S * 2.0 ** min(self._in_a_row - 1, 10), LONGEST_S)
        self._until_s = now_s + max(time_s, min(retry_after_s or 0.0, HEEDED_S))
        self.cause = cause
        self.ejections[cause] += 1

    def _seen(self, cause: Cause, now_s: float) -> None:
        """It is out for as long as this is seen."""
        if self._until_s is None:
            self._eject(cause, now_s)
        elif self.cause not in HARD:
            self.cause = cause
        assert self._until_s is not None
        self._until_s = max(self._until_s, now_s + HELD_S)

    def _recover(self, now_s: float) -> None:
        self._until_s = self.cause = None
        self._failures = self._recent = 0
        self.since_s = now_s
