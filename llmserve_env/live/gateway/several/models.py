"""Which upstream serves which model, from the lists that they show at /v1/models."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmserve_env.errors import InputError
from llmserve_env.net.loops import Failures, forever

if TYPE_CHECKING:
    from llmserve_env.live.servers.upstreams import Upstream

LOG = logging.getLogger(__name__)

REFRESH_S = 10.0
"""Time from one look at the lists to the next (s)."""
_ASK_AGAIN_S = 1.0
"""Age of the lists from which on they are asked for again for a model that nobody lists (s)."""
_FIRST_S = 2.0
"""Time that the first requests wait for lists that nobody has seen yet (s)."""


class NoModel(Exception):
    """No upstream lists a model."""


class Models:
    """Knows the lists of the upstreams, the adapters of models (LoRA) among them.

    An upstream whose list is not known, or is empty, may serve any model. A list stays known while its
    upstream does not answer: a request for a model is not sent to those that lack it meanwhile.

    Args:
        upstreams: the upstreams. Of a single one nothing is asked: it gets all requests.
        ask: asks an upstream for its list; raises InputError where it has none that can be read.
        clock: clock (s).
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        ask: Callable[[Upstream], Awaitable[bytes]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._upstreams = upstreams
        self._ask = ask
        self._clock = clock
        self._lists: dict[Upstream, frozenset[str]] = {}
        self._failures = {each: Failures(f"the list of models of {each.shown_url}") for each in upstreams}
        self._told: dict[Upstream, frozenset[str]] = {}
        self._asked_s: float | None = None
        self._asking: asyncio.Task[None] | None = None

    def serves(self, upstream: Upstream, model: str) -> bool:
        """Whether an upstream serves a model, as far as is known."""
        listed = self._lists.get(upstream)
        return listed is None or model in listed

    async def places(self, model: str | None) -> frozenset[Upstream] | None:
        """Upstreams that serve a model; None for all.

        Args:
            model: as a request names it; None for one that names none.

        Raises:
            NoModel: none does.
        """
        if model is None or len(self._upstreams) == 1:
            return None
        if self._asked_s is None:
            await asyncio.wait({self._refreshing()}, timeout=_FIRST_S)
        found = self._places(model)
        if not found and self._asked_s is not None and self._clock() - self._asked_s > _ASK_AGAIN_S:
            await asyncio.wait({self._refreshing()})  # an adapter may have been loaded since
            found = self._places(model)
        if not found:
            raise NoModel
        return None if len(found) == len(self._upstreams) else found

    def _places(self, model: str) -> frozenset[Upstream]:
        return frozenset(each for each in self._upstreams if self.serves(each, model))

    async def keep(self, interval_s: float = REFRESH_S) -> None:
        """Look at the lists again and again, until cancelled.

        Args:
            interval_s: time from one look to the next (s).
        """
        if len(self._upstreams) > 1:
            await forever(self.refresh, interval_s, "the look at the upstreams' models")

    async def refresh(self) -> None:
        """Look at the lists."""
        await asyncio.shield(self._refreshing())

    def stop(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()

    def _refreshing(self) -> asyncio.Task[None]:
        """The look that is under way, or a new one: many may wait for it."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._look())
        return self._asking

    async def _look(self) -> None:
        await asyncio.gather(*map(self._look_at, self._upstreams))
        self._asked_s = self._clock()
        if len(set(self._lists.values())) > 1 and self._lists != self._told:
            said = "; ".join(f"{each.shown_url}: {_shown(found)}" for each, found in self._lists.items())
            LOG.warning(
                "upstreams list different models, and requests go to those that list theirs: %s", said
            )
        self._told = dict(self._lists)

    async def _look_at(self, upstream: Upstream) -> None:
        failures = self._failures[upstream]
        try:
            listed = frozenset(each["id"] for each in read_models(await self._ask(upstream)))
        except Exception as error:  # whatever one upstream answers, the others are looked at
            failures.tell(error)
            return
        failures.end()
        if listed:
            self._lists[upstream] = listed
        else:
            self._lists.pop(upstream, None)


def read_models(body: bytes) -> list[dict[str, Any]]:
    """The models of an answer for /v1/models.

    Raises:
        InputError: it is none.
    """
    try:
        answer = json.loads(body.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError("expected JSON", field="/v1/models") from error
    listed = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(listed, list):
        raise InputError("expected an object with data, a list", field="/v1/models")
    return [each for each in listed if isinstance(each, dict) and isinstance(each.get("id"), str)]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _shown(names: frozenset[str]) -> str:
    first = sorted(names)[:10]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")
