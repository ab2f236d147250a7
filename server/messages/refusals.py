"""Why the service refuses a request, and with which HTTP status."""

from __future__ import annotations

from math import ceil


class Refusal(Exception):
    """A request that cannot be served now, or not by this session.

    Args:
        detail: why, and what would do.
    """

    status = 400

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Unauthorized(Refusal):
    """The service's key is missing, or another one."""

    status = 401


class Forbidden(Refusal):
    """Not for anybody here."""

    status = 403


class NotFound(Refusal):
    """A session or task that there is not."""

    status = 404


class Conflict(Refusal):
    """Not in this state of the episode."""

    status = 409


class AtCapacity(Refusal):
    """No room now.

    Args:
        detail: of what.
        retry_after_s: when there may be room again (s).
    """

    status = 429

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = max(1, ceil(retry_after_s))


class Unavailable(Refusal):
    """Something of the service itself does not work."""

    status = 503
