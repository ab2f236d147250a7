"""Servers that are steered and watched as one: a gateway before them, their engines' folders, their metrics.

Of an action, the gateway applies what can be applied before a server, and a `LiveScheduler`, where a server
has one, what can be applied within. Of a window, the gateway knows what clients got, and the servers' metrics
what only engines know. What nobody can apply or tell is named, and never made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmserve_env.backend import WindowRecord
from llmserve_env.errors import InputError
from llmserve_env.live.gateway.ledger import UNMEASURED
from llmserve_env.live.servers.control_folder import ControlFolder
from llmserve_env.live.servers.engine_settings import EngineSettings, EngineStatus, read_statuses
from llmserve_env.live.servers.fault import Cause
from llmserve_env.live.servers.health import State
from llmserve_env.live.servers.telemetry import Telemetry, merge
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from llmserve_env.live.gateway.gateway import Gateway
    from llmserve_env.live.servers.telemetry import Replica, TelemetryWindow
    from llmserve_env.live.servers.upstreams import Upstream

SCRAPE_S = 0.5
STALE_S = 3.0
ANSWER_S = 1.0
"""Engines look at their settings twenty times a second; one that has not answered by then does not."""


class Deployment:
    """One service of several parts. All calls belong into the gateway's event loop.

    Args:
        gateway: before the servers. Its KV gate reads the telemetry's gauges from now on.
        telemetry: telemetry of its upstreams, or of those that show metrics; None where none does.
        clock: clock of all times here (s).

    Attributes:
        gateway: as given.
        telemetry: as given.
        row: WINDOW, the last record; before the first, that of a service that has done nothing.
        unmeasured: fields of an observation that the last record does not tell, or not quite: what they hold.

    Raises:
        InputError: an upstream's control folder is none, is steered by another process, or its settings
            cannot be read.

    Example:
        >>> gateway = Gateway([parse_upstream("http://127.0.0.1:8101,control=/run/llmserve")])
        >>> telemetry = Telemetry([each.url for each in gateway.upstreams])
        >>> async with Deployment(gateway, telemetry) as deployment:
        ...     not_applied = deployment.apply(ServeAction(batch_cap=8, speculation_depth=2))
        ...     await asyncio.sleep(10)
        ...     record = deployment.window()
    """

    def __init__(
        self,
        gateway: Gateway,
        telemetry: Telemetry | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gateway = gateway
        self.telemetry = telemetry
        self._clock = clock
        self._start = gateway.action
        self._folders = _control_folders(gateway.upstreams)
        self._written_s = clock()
        self._replicas: dict[str, Replica] = {}
        if telemetry is not None:
            self._replicas = {replica.url: replica for replica in telemetry.replicas}
            gateway.kv_usage = self._kv_usage
            gateway.listen_to(self._still_s)
        self.row: NDArray[np.void] = gateway.blank()
        self.unmeasured: dict[str, str] = dict(UNMEASURED)

    async def __aenter__(self) -> Deployment:
        """Begin to watch."""
        if self.telemetry is not None:
            await self.telemetry.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Bring back the settings that were found, and steer and watch no more."""
        try:
            self.restore()
        finally:
            for folder in self._folders.values():
                folder.close()
            if self.telemetry is not None:
                await self.telemetry.__aexit__()

    @property
    def action(self) -> ServeAction:
        """In force."""
        return self.gateway.action

    # ---------------------------------------------------------------------------------------------- steering

    def apply(self, action: ServeAction) -> dict[str, str]:
        """Put an action into force: at once in the gateway, a twentieth of a second later in engines.

        Returns:
            Fields that cannot be applied as they stand, with the reason.

        Raises:
            InputError: a control folder cannot be written.
        """
        settings = EngineSettings.of(action)
        for folder in self._folders.values():
            if folder.written != settings:
                folder.write(settings)
                self._written_s = self._clock()
        self._see_engines()
        self.gateway.apply(action)
        return self.not_applied

    @property
    def not_applied(self) -> dict[str, str]:
        """Fields of the action in force that have no effect now, or not as they stand, with the reason."""
        found = dict(self.gateway.not_applied)
        for upstream, folder in self._folders.items():
            if folder.written is not None:
                found = self._refused_by(upstream, folder.written) | found
        return found

    def cannot_apply(self, action: ServeAction) -> dict[str, str]:
        """Fields of an action that could not be applied now, or not as they stand, with the reason."""
        self._see_engines()
        found = self.gateway.cannot_apply(action)
        for upstream in self._folders:
            found = self._refused_by(upstream, EngineSettings.of(action)) | found
        return found

    def capabilities(self) -> dict[str, str]:
        """How each field of an action is applied here.

        Returns:
            By field, in a line that begins with "gateway: ", "engine: ", "routing: " or "not applied: ".
        """
        self._see_engines()
        ways = {
            "batch_cap": self._batch_cap_way(),
            "kv_budget_fraction": self._kv_way(),
            "speculation_depth": self._depth_way(),
            "quantization_tier": self._tier_way(),
            "prefill_decode_split": "not applied: a server has the roles that it was started with",
            "priority_routing": (
                "gateway: order of its queue; vLLM is told, and heeds it with --scheduling-policy priority"
            ),
            "admission_rate": "gateway: a token bucket before its queue",
        }
        return {name: ways.get(name, "not applied: no way known") for name in ServeAction.model_fields}

    def restore(self) -> None:
        """Bring back the settings that were found: the files in control folders, the gateway's action.

        Raises:
            InputError: a folder cannot be written; all others are as they were.
        """
        failed = None
        for upstream, folder in self._folders.items():
            try:
                folder.restore()
            except InputError as error:
                failed = failed or error
            upstream.in_engine = frozenset()
        self.gateway.apply(self._start)
        if failed is not None:
            raise failed

    # ---------------------------------------------------------------------------------------------- watching

    def window(self, start_s: float | None = None, end_s: float | None = None) -> WindowRecord:
        """What happened since the last call; `row` and `unmeasured` are of it, too.

        Args:
            start_s: what the record says of its start (s; default: since the gateway began).
            end_s: end of the window, likewise (s).
        """
        try:
            return self.close_window(start_s, end_s)
        finally:
            self.gateway.open_window()

    def close_window(self, start_s: float | None = None, end_s: float | None = None) -> WindowRecord:
        """As `window`; until the gateway's `open_window` no time counts as busy."""
        row, ttft, gaps = self.gateway.close_window(start_s, end_s)
        self.unmeasured = dict(UNMEASURED)
        self._fill(row)
        if "kv_cache_occupancy" in self.unmeasured:
            row["kv_occupancy"] = 0.0  # of some servers it may be known
        self.row = row
        not_applied = self.not_applied
        self._see_engines()  # one may have come, or gone
        return WindowRecord.of(row, len(self.gateway.tenants), ttft, gaps, not_applied)

    @property
    def stale(self) -> str | None:
        """Why the last figures cannot be trusted now; None where they can.

        A server's metrics do not come, or it is silent: requests run there, and nothing moves.
        """
        now_s = time.monotonic()  # as telemetry's
        for upstream in self.gateway.upstreams:
            silent = upstream.health.cause is Cause.SILENT
            if silent and self.gateway.state(upstream) is not State.PROBING:
                return f"{upstream.shown_url}: requests run, and nothing moves"
        lost = [each for each in self._replicas.values() if each.stale(now_s)]
        if not lost:
            return None
        first = lost[0]
        said = "yet" if first.last is None else f"for {now_s - first.last.at_s:.0f} s"
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        return f"{_shown(first.url, self.gateway.upstreams)}: no metrics {said}{more}"

    @property
    def excused(self) -> int:
        """Requests of the last window that were late, or failed, because a server was silent meanwhile."""
        return self.gateway.ledger.excused

    # ----------------------------------------------------------------------------------------------- engines

    def _see_engines(self) -> None:
        """Find out which fields engines apply, and leave the others to the gateway."""
        changed = False
        for upstream in self._folders:
            statuses, reason = self._statuses(upstream)
            if upstream.speculation is None and statuses:
                upstream.speculation = statuses[0].started.speculation_depth
            in_engine = frozenset() if reason else _free(statuses)
            changed = changed or in_engine != upstream.in_engine
            upstream.in_engine = in_engine
        if changed:
            self.gateway.apply(self.gateway.action)

    def _statuses(self, upstream: Upstream) -> tuple[list[EngineStatus], str]:
        """What its engines answered, and why none of it counts."""
        assert upstream.control is not None
        try:
            statuses = read_statuses(upstream.control)
        except InputError as error:
            return [], str(error)
        if not statuses:
            return [], "no engine has answered in its control folder: was it started with LiveScheduler?"
        refused = next((each.refused for each in statuses if each.refused is not None), None)
        if refused is not None:
            return statuses, f"the engine refused its settings: {refused}"
        settings = self._folders[upstream].written
        late = self._clock() - self._written_s > ANSWER_S
        if settings is not None and late and any(each.asked != settings for each in statuses):
            return statuses, "the engine does not answer in its control folder"
        return statuses, ""

    def _refused_by(self, upstream: Upstream, settings: EngineSettings) -> dict[str, str]:
        """What its engines do not apply of settings, as far as it is left to them."""
        found: dict[str, str] = {}
        for status in self._statuses(upstream)[0]:
            found |= settings.within(status.started, fixed_depth=status.fixed_depth)[1]
        shown = upstream.shown_url
        return {name: f"{shown}: {reason}" for name, reason in found.items() if name in upstream.in_engine}

    # ---------------------------------------------------------------------------------------------- the ways

    def _batch_cap_way(self) -> str:
        within = [each for each in self._folders if "batch_cap" in each.in_engine]
        if not within:
            reasons = [f"{each.shown_url}: {self._statuses(each)[1]}" for each in self._folders]
            return "; ".join(["gateway: sequences at each engine", *reasons])
        return f"engine: up to {self._least(within, 'batch_cap'):g}; the gateway keeps to it, too"

    def _kv_way(self) -> str:
        upstreams = self.gateway.upstreams
        gated = [each for each in upstreams if "kv_budget_fraction" not in each.in_engine]
        if not gated:
            return "engine: gates admissions"
        blind = [each for each in gated if self.gateway.kv_usage(each) is None]
        if blind:
            return f"not applied: {blind[0].shown_url} does not tell the usage of its KV cache"
        return "gateway: sends nothing to a server whose KV cache is as full"

    def _depth_way(self) -> str:
        upstreams = self.gateway.upstreams
        within = [each for each in upstreams if "speculation_depth" in each.in_engine]
        depths = sorted({each.speculation for each in upstreams if each.speculation is not None})
        if len(within) == len(upstreams):
            return f"engine: 0 to {self._least(within, 'speculation_depth'):g}"
        if within:
            return (
                f"engine: 0 to {self._least(within, 'speculation_depth'):g}, on {len(within)} of "
                f"{len(upstreams)} servers, which the others' requests go to"
            )
        if depths:
            return f"routing: to servers with depth {', '.join(map(str, depths))}"
        if self._folders:
            return (
                "not applied: its engines do not answer, or were started without speculation of varying depth"
            )
        return "not applied: no server is stated to have a depth, none has a control folder"

    def _tier_way(self) -> str:
        tiers = [
            tier.value
            for tier in type(self._start.quantization_tier)
            if any(each.tier == tier for each in self.gateway.upstreams)
        ]
        if not tiers:
            return "not applied: no server is stated to have a precision"
        return f"routing: to servers with {', '.join(tiers)}"

    def _least(self, upstreams: list[Upstream], name: str) -> float:
        """The least that one of their engines was started with."""
        found: list[float] = [
            getattr(each.started, name) for one in upstreams for each in self._statuses(one)[0]
        ]
        return min(found)

    # --------------------------------------------------------------------------------------------- telemetry

    def _kv_usage(self, of: Upstream) -> float | None:
        """Share of an upstream's KV cache that is in use; None where it is not known now."""
        replica = self._replicas.get(of.url)
        if replica is None or replica.last is None or replica.stale(time.monotonic()):
            return None
        return replica.last.gauges.get("kv_occupancy")

    def _still_s(self, of: Upstream) -> float | None:
        """Time for which an upstream that runs something has stood still; None where that is not known."""
        replica = self._replicas.get(of.url)
        return None if replica is None else replica.still_s(time.monotonic())

    def _fill(self, row: NDArray[np.void]) -> None:
        """What only engines know; all of them must have told it."""
        if self.telemetry is None:
            return
        told = merge(self.telemetry.windows())
        if self._take(row, told, "kv_cache_occupancy", kv_occupancy="kv_occupancy"):
            row["mean_kv_occupancy"] = told.mean_kv_occupancy
        self._take(row, told, "preemptions", preemptions="preemptions")
        self._take(
            row,
            told,
            "spec_acceptance_rate",
            drafted_tokens="drafted_tokens",
            accepted_tokens="accepted_tokens",
        )
        if self._take(
            row, told, "prefix_hit_rate", prefill_tokens="prompt_tokens", cached_tokens="cached_tokens"
        ):
            row["prefill_tokens"] = max(row["prefill_tokens"] - row["cached_tokens"], 0)

    def _take(self, row: NDArray[np.void], told: TelemetryWindow, field: str, **names: str) -> bool:
        """Take over figures that all servers told, and with them a field of an observation."""
        values: dict[str, Any] = {
            name: getattr(told, source)
            for name, source in names.items()
            if told.rests_on.get(source, 0) == len(self.gateway.upstreams)
        }
        if len(values) < len(names):
            return False
        for name, value in values.items():
            row[name] = value
        self.unmeasured.pop(field, None)
        return True


def _free(statuses: list[EngineStatus]) -> frozenset[str]:
    """Fields that all of these engines apply."""
    depth = all(not each.fixed_depth and each.started.speculation_depth for each in statuses)
    return frozenset(EngineSettings.model_fields) - (frozenset() if depth else {"speculation_depth"})


def _control_folders(upstreams: tuple[Upstream, ...]) -> dict[Upstream, ControlFolder]:
    """The folders that these are steered through; servers of one folder are steered as one."""
    opened: dict[Path, ControlFolder] = {}
    found = {}
    try:
        for upstream in upstreams:
            if upstream.control is not None:
                path = upstream.control.resolve()
                if path not in opened:
                    opened[path] = ControlFolder(upstream.control)
                found[upstream] = opened[path]
    except BaseException:
        for folder in opened.values():
            folder.close()
        raise
    return found


def _shown(url: str, upstreams: tuple[Upstream, ...]) -> str:
    return next((each.shown_url for each in upstreams if each.url == url), "a server")
