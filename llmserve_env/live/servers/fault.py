"""Whose fault it is that a request has no complete answer, and what that says of its upstream: one table."""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple


class Owner(str, Enum):
    """Who an outcome belongs to."""

    CLIENT = "client"
    UPSTREAM = "upstream"
    GATEWAY = "gateway"


class Cause(str, Enum):
    """Why an upstream is not well."""

    UNREACHABLE = "unreachable"
    """It takes no connection."""
    LOST = "connection lost"
    """It hung up before it answered."""
    SERVER_ERROR = "server error"
    """It answered with 5xx, or with an error in a stream."""
    BUSY = "busy"
    """It answered with 429."""
    STALLED = "stalled"
    """Answers did not begin in time, or stopped."""
    CUT = "cut"
    """It broke streams off."""
    NO_COMPLETION = "no completion"
    """It answered with 200 and something else than a completion."""
    KEY_REFUSED = "key refused"
    """It does not take the key that the gateway has for it."""
    SILENT = "silent"
    """Requests run there, and nothing moves: neither tokens nor counters."""
    UNHEALTHY = "unhealthy"
    """Its /health fails, or does not come."""


class Fault(NamedTuple):
    """What a reason means.

    Attributes:
        owner: whose fault it is.
        cause: what it says of the upstream; None for nothing.
    """

    owner: Owner
    cause: Cause | None = None


_CLIENT, _GATEWAY = Fault(Owner.CLIENT), Fault(Owner.GATEWAY)


def _upstream(cause: Cause) -> Fault:
    return Fault(Owner.UPSTREAM, cause)


FAULTS = {
    "upstream down": _upstream(Cause.UNREACHABLE),
    "upstream lost": _upstream(Cause.LOST),
    "upstream silent": _upstream(Cause.STALLED),
    "stream broken off": _upstream(Cause.CUT),
    "error in the stream": _upstream(Cause.SERVER_ERROR),
    "stream without JSON": _upstream(Cause.NO_COMPLETION),
    "no completion": _upstream(Cause.NO_COMPLETION),
    "empty answer": _upstream(Cause.NO_COMPLETION),
    "answer too long": Fault(Owner.UPSTREAM),
    "event too long": Fault(Owner.UPSTREAM),
    "connection": _upstream(Cause.LOST),  # this and the next: as live episodes call them
    "timeout": _upstream(Cause.STALLED),
    "key refused": Fault(Owner.GATEWAY, Cause.KEY_REFUSED),
    "admission rate": _GATEWAY,
    "queue full": _GATEWAY,
    "displaced": _GATEWAY,
    "queue timeout": _GATEWAY,
    "gateway stopped": _GATEWAY,
    "memory": _GATEWAY,
    "unknown tenant": _CLIENT,
    "invalid body": _CLIENT,
    "body too large": _CLIENT,
    "body timeout": _CLIENT,
    "too many sequences": _CLIENT,
    "client went away": _CLIENT,
    "client does not read": _CLIENT,
    "patience": _CLIENT,
    "deadline": _CLIENT,
}
"""By reason, as `Ledger.failures` counts them; those of HTTP statuses are in `of_status`."""

_STATUS = re.compile(r"(?:http|refused with) (\d{3})")


def fault_of(reason: str) -> Fault:
    """What a reason means; one that nobody foresaw is the gateway's fault."""
    if (fault := FAULTS.get(reason)) is not None:
        return fault
    status = _STATUS.fullmatch(reason)
    return _GATEWAY if status is None else of_status(int(status[1]))


def of_status(status: int) -> Fault:
    """What an HTTP status other than 200 means, as the answer to a completion."""
    if status == 429:
        return _upstream(Cause.BUSY)
    if status == 408:
        return _upstream(Cause.STALLED)
    if 400 <= status < 500:
        return _CLIENT
    return _upstream(Cause.SERVER_ERROR if status >= 500 else Cause.NO_COMPLETION)
