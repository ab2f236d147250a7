"""The accounts: what the gateway shows that it has counted, and what its clients count themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from .clients import Tally


@dataclass
class Counts:
    """What the gateway says that it has counted, by its metrics."""

    arrived: Counter[str] = field(default_factory=Counter)
    ended: dict[str, Counter[str]] = field(default_factory=dict)
    in_flight: float = 0
    waiting: float = 0
    at_upstreams: float = 0
    turned_away: float = 0

    @property
    def at_rest(self) -> bool:
        """Whether no request is on its way."""
        return not (self.in_flight or self.waiting or self.at_upstreams)

    @classmethod
    def read(cls, text: str) -> Counts:
        found = cls()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name, labels = sample.name.removeprefix("llmserve_gateway_"), sample.labels
                if name == "requests_arrived_total":
                    found.arrived[labels["tenant"]] += sample.value
                elif name == "requests_total" and labels["outcome"] == "turned_away":
                    found.turned_away += sample.value
                elif name == "requests_total":
                    of_tenant = found.ended.setdefault(labels["tenant"], Counter())
                    of_tenant[labels["outcome"]] += sample.value
                elif name == "requests_in_flight":
                    found.in_flight += sample.value
                elif name == "requests_waiting":
                    found.waiting += sample.value
                elif name == "requests_at_upstream":
                    found.at_upstreams += sample.value
        return found


def differences(counts: Counts, tallies: Mapping[str, Tally], turned_away: Counter[bool]) -> Iterator[str]:
    """What does not add up when all is over.

    Args:
        counts: the gateway's.
        tallies: the clients', by tenant.
        turned_away: requests that are nobody's, by whether their clients are sure of that.
    """
    if not counts.at_rest:
        yield f"{counts.in_flight:g} in flight, {counts.waiting:g} wait, {counts.at_upstreams:g} at upstreams"
    for tenant, tally in tallies.items():
        arrived, ended = counts.arrived[tenant], counts.ended[tenant]
        if arrived != ended.total():
            yield f"{arrived:g} of {tenant} arrived, ended {ended}"
        stayed, answered = tally.verdicts.total(), tally.verdicts["answer"]
        gone = tally.left + tally.unsure
        if not stayed + tally.left <= ended.total() <= stayed + gone:
            yield f"ended {ended} of {tenant}, clients have {tally}"
        if not answered <= ended["completed"] <= answered + gone:
            yield f"{ended['completed']:g} completed of {tenant}, clients have {tally}"
    if not turned_away[True] <= counts.turned_away <= turned_away.total():
        yield f"{counts.turned_away:g} turned away, clients say {turned_away}"
