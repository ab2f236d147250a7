"""The last windows of a gateway and what was decided in them, for its dashboard and its metrics."""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.live.gateway.ledger import UNMEASURED
from llmserve_env.live.gateway.totals import Distribution
from llmserve_env.live.servers.health import UP

if TYPE_CHECKING:
    from llmserve_env.backend import WindowRecord
    from llmserve_env.live.gateway.deployment import Deployment
    from llmserve_env.live.gateway.gateway import Gateway
    from llmserve_env.live.pilot.decisions import Decision
    from llmserve_env.schema import ServeAction

DECISION_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_COUNTS = ("arrived", "completed", "failed", "refused", "timeouts", "output_tokens")
_GAUGES = ("in_flight", "waiting", "running", "oldest_wait_s")
_LATENCIES = ("p50_ttft_s", "p99_ttft_s", "p50_gap_s", "p99_gap_s")
_OF_TENANTS = ("arrived", "completed", "failed", "in_flight", "in_slo")


@dataclass(frozen=True)
class UpstreamNow:
    """An upstream at this moment.

    Attributes:
        url: without credentials.
        tier: precision of its weights, as stated.
        speculation: draft tokens a step, as stated.
        running: sequences of the requests there.
        up: it gets requests.
        state: what is to be expected of it, see `servers.health.State`.
        cause: why it is not well; None where it is.
        kv_usage: share of its KV cache in use; None where it is not known.
        telemetry_age_s: since its metrics were last read (s); None where they never were.
        error: why the last reading failed.
    """

    url: str
    tier: str | None
    speculation: int | None
    running: int
    up: bool
    state: str
    cause: str | None
    kv_usage: float | None
    telemetry_age_s: float | None
    error: str | None


class History:
    """Keeps the last windows, and counts all decisions.

    Args:
        gateway: whose windows they are.
        deployment: with the gateway in it; None where there is none.
        window_s: length of a window (s); None where nobody says.
        agent: who decides; None for nobody.
        task: id of the task that the agent plays.
        dry_run: whether decisions are only told.
        keep: windows and decisions, together.

    Attributes:
        run: another one for each History.
        began_s: Unix time (s).
        windows: windows that have ended.
        last: what was decided last.
        reward: reward of the last window; None without.
        decisions: decisions by author.
        interventions: interventions by author and rule; a limit counts at each field that it held back.
        decision_s: times that decisions took.
        turned_away: requests for completions that were not let in as those of a tenant, by reason.

    Example:
        >>> history = History(gateway, deployment, window_s=10)
        >>> app = Proxy(gateway, tenants, history=history)
        >>> history.add(deployment.window())  # every 10 s
    """

    def __init__(
        self,
        gateway: Gateway,
        deployment: Deployment | None = None,
        *,
        window_s: float | None = None,
        agent: str | None = None,
        task: str | None = None,
        dry_run: bool = False,
        keep: int = 1440,
    ) -> None:
        self.gateway = gateway
        self.window_s = window_s
        self.agent = agent
        self.task = task
        self.dry_run = dry_run
        self._deployment = deployment
        self._capabilities: dict[str, str] | None = None
        self.run = uuid.uuid4().hex
        self.began_s = time.time()
        self.windows = 0
        self.last: Decision | None = None
        self.reward: float | None = None
        self.decisions: Counter[str] = Counter()
        self.interventions: Counter[tuple[str, str]] = Counter()
        self.decision_s = Distribution(DECISION_BOUNDS_S)
        self.turned_away: Counter[str] = Counter()
        self._in_force = gateway.action
        self._numbers = 0
        self._entries: deque[dict[str, Any]] = deque(maxlen=keep)

    @property
    def action(self) -> ServeAction:
        """In force."""
        return self.gateway.action if self.last is None else self.last.applied

    @property
    def not_applied(self) -> dict[str, str]:
        """Fields of the action in force that have no effect now, with the reason."""
        return (self._deployment or self.gateway).not_applied

    @property
    def stale(self) -> str | None:
        """Why the upstreams' metrics cannot be trusted now; None where they can, or where there are none."""
        return None if self._deployment is None else self._deployment.stale

    @property
    def capabilities(self) -> dict[str, str]:
        """How each field of an action is applied, when the last window ended; empty where nobody says."""
        if self._capabilities is None:
            self._capabilities = {} if self._deployment is None else self._deployment.capabilities()
        return self._capabilities

    def upstreams(self) -> list[UpstreamNow]:
        """The upstreams, now."""
        telemetry = None if self._deployment is None else self._deployment.telemetry
        replicas = {} if telemetry is None else {each.url: each for each in telemetry.replicas}
        now_s, found = time.monotonic(), []
        for each in self.gateway.upstreams:
            replica = replicas.get(each.url)
            last = None if replica is None else replica.last
            error = None if replica is None else replica.error
            state = self.gateway.state(each)
            found.append(
                UpstreamNow(
                    url=each.shown_url,
                    tier=None if each.tier is None else each.tier.value,
                    speculation=each.speculation,
                    running=each.running,
                    up=state in UP,
                    state=state.value,
                    cause=None if each.health.cause is None else each.health.cause.value,
                    kv_usage=told(self.gateway.kv_usage(each)),
                    telemetry_age_s=None if last is None else now_s - last.at_s,
                    error=error,
                )
            )
        return found

    def add(
        self, record: WindowRecord, decision: Decision | None = None, reward: float | None = None
    ) -> None:
        """A window has ended.

        Args:
            record: record of the window.
            decision: decision that followed from it and is in force; None without an agent.
            reward: reward of the window; None without an agent.
        """
        served = self.action if decision is None else self._in_force
        self.reward = reward
        self._capabilities = None
        unmeasured = UNMEASURED if self._deployment is None else self._deployment.unmeasured
        self._append(
            "window",
            {
                "time_s": round(time.time(), 3),
                "span_s": record.end_s - record.start_s,
                **{name: getattr(record, name) for name in (*_COUNTS, *_GAUGES)},
                **{name: told(getattr(record, name)) for name in _LATENCIES},
                "preemptions": None if "preemptions" in unmeasured else record.preemptions,
                "tenants": [self._of_tenant(record, i) for i in range(len(self.gateway.tenants))],
                "upstreams": [
                    {"running": each.running, "kv_usage": each.kv_usage} for each in self.upstreams()
                ],
                "action": served.model_dump(mode="json"),
                "reward": told(reward),
            },
        )
        self.windows += 1
        if decision is not None:
            self._decided(decision, served)
        self._in_force = self.action

    def since(self, after: int) -> list[dict[str, Any]]:
        """Windows and decisions with a greater number, in their order, as JSON has them."""
        return [each for each in self._entries if each["number"] > after]

    def _decided(self, decision: Decision, before: ServeAction) -> None:
        self.last = decision
        self.decisions[decision.by] += 1
        self.decision_s.add(decision.decision_s)
        if decision.by != "agent":
            for rule in (decision.rule or "").split(","):
                self.interventions[decision.by, rule.strip()] += 1
        entry = decision.model_dump(mode="json") | {"before": before.model_dump(mode="json")}
        self._append("decision", entry)

    def _append(self, kind: str, entry: dict[str, Any]) -> None:
        self._entries.append({"number": self._numbers, "kind": kind, **entry})
        self._numbers += 1

    def _of_tenant(self, record: WindowRecord, tenant: int) -> dict[str, Any]:
        totals = self.gateway.ledger.totals[tenant]
        found: dict[str, Any] = {name: int(getattr(record, f"tenant_{name}")[tenant]) for name in _OF_TENANTS}
        for name, recent in (("ttft_s", totals.recent_ttft_s), ("tpot_s", totals.recent_tpot_s)):
            p50, p99 = np.percentile(recent, (50, 99)).tolist() if recent else (None, None)
            found |= {f"p50_{name}": p50, f"p99_{name}": p99}
            recent.clear()
        return found


def told(value: float | None) -> float | None:
    """A number as JSON can have it: None for nan and None."""
    return None if value is None or math.isnan(value) else float(value)
