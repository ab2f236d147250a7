"""Prometheus text of a gateway itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from llmserve_env.controls import SPECS
from llmserve_env.live.pilot.decisions import Decision
from llmserve_env.live.servers.fault import fault_of
from llmserve_env.report.version import __version__
from llmserve_env.schema import QuantizationTier

if TYPE_CHECKING:
    from prometheus_client import Metric

    from llmserve_env.live.gateway.history import History
    from llmserve_env.live.gateway.totals import Distribution

_PREFIX = "llmserve_gateway_"
_BITS = {QuantizationTier.FP16: 16, QuantizationTier.INT8: 8, QuantizationTier.INT4: 4}
_DECIDERS = get_args(Decision.model_fields["by"].annotation)


class GatewayMetrics(Collector):
    """What a gateway has counted and what it does now: `llmserve_gateway_*`. Counters never fall.

    Args:
        history: history of the gateway.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def collected(self) -> list[Metric]:
        """What there is now, the process' own metrics with it."""
        return list(self._registry.collect())

    def describe(self) -> Iterable[Metric]:
        """Nothing: what is collected need not be known before."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """What there is now."""
        yield from self._requests()
        yield from self._latencies()
        yield from self._upstreams()
        yield from self._action()
        yield from self._decisions()

    def _requests(self) -> Iterator[Metric]:
        history, gateway = self._history, self._history.gateway
        of_tenants = {
            tenant.name: totals for tenant, totals in zip(gateway.tenants, gateway.ledger.totals, strict=True)
        }
        for name, of, text in (
            ("requests_arrived", "arrived", "Requests that a tenant sent."),
            ("requests_in_slo", "in_slo", "Requests completed within their tenant's SLO, TTFT and TPOT."),
            ("prompt_tokens", "prompt_tokens", "Tokens of prompts; of text, one for every four bytes."),
            ("output_tokens", "output_tokens", "Tokens of answers."),
        ):
            samples = [((tenant,), getattr(totals, of)) for tenant, totals in of_tenants.items()]
            yield _family(CounterMetricFamily, name, text, ["tenant"], samples)
        ended: list[tuple[tuple[str, ...], float]] = [
            ((tenant, outcome), count)
            for tenant, totals in of_tenants.items()
            for outcome, count in totals.outcomes.items()
        ]
        yield _family(
            CounterMetricFamily,
            "requests",
            "Requests that are over. completed; failed: without a complete answer; refused: at the admission "
            "rate or a full queue; given_up: by their client; rejected: by the upstream, for a mistake of "
            "their client, so no demand; turned_away: from somebody unknown or with a body that cannot be "
            "used, and so of no tenant.",
            ["tenant", "outcome"],
            [*ended, (("", "turned_away"), history.turned_away.total())],
        )
        reasons = gateway.ledger.failures + history.turned_away
        yield _family(
            CounterMetricFamily,
            "failures",
            "Requests without a complete answer, and whose fault that is: client, upstream or gateway.",
            ["reason", "owner"],
            [((reason, fault_of(reason).owner.value), count) for reason, count in reasons.items()],
        )
        in_flight = [((tenant,), totals.in_flight) for tenant, totals in of_tenants.items()]
        yield _family(
            GaugeMetricFamily, "requests_in_flight", "Requests that are not over.", ["tenant"], in_flight
        )
        yield _family(
            GaugeMetricFamily,
            "requests_waiting",
            "Requests in the gateway's queue.",
            [],
            [((), gateway.waiting)],
        )

    def _latencies(self) -> Iterator[Metric]:
        gateway = self._history.gateway
        for name, of, text in (
            ("time_to_first_token", "ttft_s", "From a request's arrival to its first token."),
            ("inter_token_latency", "itl_s", "From a piece of an answer to the next."),
            ("time_per_output_token", "tpot_s", "A completed request's mean after its first token."),
            ("e2e_latency", "e2e_s", "From a completed request's arrival to its last token."),
        ):
            family = HistogramMetricFamily(f"{_PREFIX}{name}_seconds", text, labels=["tenant"])
            for tenant, totals in zip(gateway.tenants, gateway.ledger.totals, strict=True):
                _observed(family, [tenant.name], getattr(totals, of))
            yield family
        promised = [((each.name, "ttft"), each.ttft_slo_s) for each in gateway.tenants]
        promised += [((each.name, "tpot"), each.tpot_slo_s) for each in gateway.tenants]
        text = "Latency that a tenant was promised."
        yield _family(GaugeMetricFamily, "slo_seconds", text, ["tenant", "latency"], promised)

    def _upstreams(self) -> Iterator[Metric]:
        history = self._history
        found = {each.url: each for each in history.upstreams()}  # one that is named twice has one line
        for name, of, text in (
            ("requests_at_upstream", "running", "Sequences of the requests at an upstream."),
            ("upstream_up", "up", "1 where it gets requests; 0 where it is ejected or drains."),
            ("upstream_kv_usage_ratio", "kv_usage", "Share of its KV cache in use."),
            ("telemetry_age_seconds", "telemetry_age_s", "Since its metrics were last read."),
        ):
            values = {url: getattr(each, of) for url, each in found.items()}
            samples = [((url,), value) for url, value in values.items() if value is not None]
            yield _family(GaugeMetricFamily, name, text, ["upstream"], samples)
        states = [((url, each.state, each.cause or ""), 1) for url, each in found.items()]
        text = "Always 1: what is to be expected of an upstream, and why it is not well."
        yield _family(GaugeMetricFamily, "upstream_state", text, ["upstream", "state", "cause"], states)
        ejections = {
            (each.shown_url, cause.value): count
            for each in history.gateway.upstreams
            for cause, count in each.health.ejections.items()
        }
        text = "How often an upstream was ejected."
        labels = ["upstream", "cause"]
        yield _family(CounterMetricFamily, "ejections", text, labels, list(ejections.items()))
        retries = [((cause.value,), count) for cause, count in history.gateway.retries.items()]
        text = "Requests that were sent to a second upstream, by what failed at the first."
        yield _family(CounterMetricFamily, "retries", text, ["cause"], retries)
        stale = history.stale is not None
        text = "1 while the upstreams' metrics cannot be trusted."
        yield _family(GaugeMetricFamily, "telemetry_stale", text, [], [((), stale)])

    def _action(self) -> Iterator[Metric]:
        action, not_applied = self._history.action, self._history.not_applied
        yield _family(
            GaugeMetricFamily,
            "action",
            "What is in force. quantization_tier in bits, switches 0 or 1; without admission_rate all are "
            "let in.",
            ["field"],
            [
                ((name,), _BITS[value] if isinstance(value, QuantizationTier) else SPECS[name].code(value))
                for name, value in action
                if value is not None
            ],
        )
        yield _family(
            GaugeMetricFamily,
            "action_not_applied",
            "1 for what is in force and has no effect.",
            ["field"],
            [((name,), name in not_applied) for name in type(action).model_fields],
        )

    def _decisions(self) -> Iterator[Metric]:
        history = self._history
        names = (__version__, history.agent or "", history.task or "", str(history.dry_run).lower())
        labels = ["version", "agent", "task", "dry_run"]
        yield _family(GaugeMetricFamily, "info", "Always 1.", labels, [(names, 1)])
        yield _family(CounterMetricFamily, "windows", "Windows over.", [], [((), history.windows)])
        decided = [((by,), history.decisions[by]) for by in _DECIDERS]
        text = "Decisions by who changed them last."
        yield _family(CounterMetricFamily, "decisions", text, ["by"], decided)
        yield _family(
            CounterMetricFamily,
            "interventions",
            "Decisions that were not the agent's; of a limit, each field that it held back.",
            ["by", "rule"],
            list(history.interventions.items()),
        )
        family = HistogramMetricFamily(f"{_PREFIX}decision_seconds", "Time that a decision took.", labels=[])
        _observed(family, [], history.decision_s)
        yield family
        rewards = [] if history.reward is None else [((), history.reward)]
        yield _family(GaugeMetricFamily, "reward", "Of the last window.", [], rewards)


def exposed(metrics: list[Metric]) -> bytes:
    """Metrics in Prometheus' text format, version 0.0.4."""

    class Collected(Collector):
        def collect(self) -> list[Metric]:
            return metrics

    return generate_latest(Collected())


def _family(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    text: str,
    labels: Sequence[str],
    samples: Sequence[tuple[tuple[str, ...], float]],
) -> Metric:
    family = kind(_PREFIX + name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _observed(family: HistogramMetricFamily, labels: Sequence[str], of: Distribution) -> None:
    bounds = [*(str(bound) for bound in of.bounds), "+Inf"]
    family.add_metric(labels, list(zip(bounds, accumulate(of.counts), strict=True)), of.sum)
