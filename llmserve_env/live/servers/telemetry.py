"""What vLLM servers tell of themselves, window by window: their metrics, scraped, subtracted and merged.

Counts and histograms are what grew between scrapes. A server that was restarted begins anew: what it counted
between the last scrape before and its end is lost, and nothing is ever negative. A server that has not
answered for `stale_after_s` is stale: it has no figures, not even zeros, and what it did meanwhile is in no
window.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from llmserve_env.errors import InputError
from llmserve_env.live.servers.health import SILENT_S
from llmserve_env.live.servers.metrics import (
    METRICS,
    Histogram,
    Scrape,
    add_histograms,
    read_metrics,
    server_of,
    weighted_mean,
)
from llmserve_env.net.http import bearer, fetch, open_session
from llmserve_env.net.loops import forever
from llmserve_env.net.urls import server_url, without_credentials

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import aiohttp

    from llmserve_env.live.servers.metrics import Labels

MAX_BYTES = 16 * 2**20
"""Of an answer; a server with some hundred engines shows a few megabytes."""

_HISTOGRAMS = tuple(name for name, metric in METRICS.items() if metric.kind == "histogram")


@dataclass(frozen=True)
class TelemetryWindow:
    """A window as the servers tell it. Gauges are of its end; None is what nobody told.

    Attributes:
        replicas: servers that were asked.
        stale: servers without figures.
        restarts: restarts of servers, in this window.
        span_s: time that the counts are of (s, mean over the servers); a little more or less than the window,
            much less where a server was lost for a part of it.
        rests_on: number of servers that a field rests on, by field.
        waiting: requests in the queue, all servers.
        running: requests in a batch, all servers.
        kv_occupancy: share of KV blocks held, servers weighted by their capacity where all tell it.
        mean_kv_occupancy: the same over the window's scrapes with running requests; 0 without such.
        kv_tokens: capacity of the KV caches (tokens).
        preemptions: requests thrown back to the queue.
        prompt_tokens: prompt tokens of requests whose prefill ended, cached ones too.
        output_tokens: tokens generated.
        prefix_queried_tokens: looked up in the prefix cache; blocks before 0.9.
        cached_tokens: found there; blocks before 0.9.
        drafted_tokens: draft tokens.
        accepted_tokens: draft tokens that were accepted.
        finished: requests over, by vLLM's reason: stop, length, abort, error.
        rejected: requests that a limit of the queue refused, by reason.
        ttft_s: times to first token (s).
        gap_s: times between steps of a sequence (s); a step yields several tokens under speculation.
        e2e_s: times from arrival to last token (s).
        queue_s: times in the queue (s).
    """

    replicas: int = 1
    stale: int = 0
    restarts: int = 0
    span_s: float | None = None
    rests_on: Mapping[str, int] = field(default_factory=dict)
    waiting: float | None = None
    running: float | None = None
    kv_occupancy: float | None = None
    mean_kv_occupancy: float | None = None
    kv_tokens: float | None = None
    preemptions: float | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    prefix_queried_tokens: float | None = None
    cached_tokens: float | None = None
    drafted_tokens: float | None = None
    accepted_tokens: float | None = None
    finished: Mapping[str, float] | None = None
    rejected: Mapping[str, float] | None = None
    ttft_s: Histogram | None = None
    gap_s: Histogram | None = None
    e2e_s: Histogram | None = None
    queue_s: Histogram | None = None

    def figures(self) -> dict[str, float | None]:
        """One number a figure, by the names of `backend.WINDOW` where it has them.

        None is what nobody told; nan the mean or a percentile of nothing.
        """
        plain = {
            name: getattr(self, name)
            for name in METRICS
            if name not in _HISTOGRAMS and METRICS[name].by is None
        }
        ended = None if self.finished is None else sum(self.finished.values())
        rejected = None if self.rejected is None else sum(self.rejected.values())
        latencies: dict[str, float | None] = {}
        for name in _HISTOGRAMS:
            histogram: Histogram | None = getattr(self, name)
            latencies[f"mean_{name}"] = None if histogram is None else histogram.mean
            for q in (50, 90, 99):
                latencies[f"p{q}_{name}"] = None if histogram is None else histogram.quantile(q / 100)
        first = None if self.ttft_s is None else self.ttft_s.count
        return plain | {"finished": ended, "rejected": rejected, "first_tokens": first} | latencies


def merge(windows: Sequence[TelemetryWindow]) -> TelemetryWindow:
    """One window of several servers: what nobody told stays None, the rest is of those who told.

    Requests, tokens and counts are summed, shares weighted by capacity, histograms added by bucket.
    """
    told: dict[str, list[Any]] = {}
    for each in fields(TelemetryWindow):
        values = [getattr(window, each.name) for window in windows]
        told[each.name] = [value for value in values if value is not None]
    merged: dict[str, Any] = {}
    for name in ("kv_tokens", *METRICS):
        values = told[name]
        if not values:
            continue
        if name in _HISTOGRAMS:
            merged[name] = add_histograms(values)
        elif name == "kv_occupancy":
            with_it = [window for window in windows if window.kv_occupancy is not None]
            capacities = [window.kv_tokens for window in with_it]
            merged[name] = weighted_mean(values, capacities)
            means = [window.mean_kv_occupancy or 0.0 for window in with_it]
            merged["mean_kv_occupancy"] = weighted_mean(means, capacities)
        elif name in METRICS and METRICS[name].by is not None:
            reasons = {reason for value in values for reason in value}
            merged[name] = {
                reason: sum(value.get(reason, 0.0) for value in values) for reason in sorted(reasons)
            }
        else:
            merged[name] = sum(values)
    spans = told["span_s"]
    return TelemetryWindow(
        replicas=sum(told["replicas"]),
        stale=sum(told["stale"]),
        restarts=sum(told["restarts"]),
        span_s=sum(spans) / len(spans) if spans else None,
        rests_on={
            name: sum(window.rests_on.get(name, 0) for window in windows) for name in ("kv_tokens", *METRICS)
        },
        **merged,
    )


class Replica:
    """The scrapes of one server.

    Args:
        url: URL of the server, with or without /v1.
        stale_after_s: age of its last answer from which on it has no figures (s).

    Attributes:
        url: without /v1.
        last: its last answer.
        error: why the last scrape was lost; None where it was not.
        moved_s: when what it told of its engine last changed (s of the scrapes' clock).
    """

    def __init__(self, url: str, stale_after_s: float) -> None:
        self.url = server_url(url)
        self.stale_after_s = stale_after_s
        self.last: Scrape | None = None
        self.error: str | None = None
        self.moved_s = 0.0
        self._begin()

    def took(self, scrape: Scrape) -> None:
        """It answered."""
        before, self.last, self.error = self.last, scrape, None
        self._note_kv(scrape)
        if before is None or _moves(scrape) != _moves(before):
            self.moved_s = scrape.at_s
        if before is None:
            return
        restarted = _restarted(before, scrape)
        self._restarts += len(restarted)
        if scrape.at_s - before.at_s > self.stale_after_s:
            return
        self._span_s += scrape.at_s - before.at_s
        for name, series in scrape.counters.items():
            by = METRICS[name].by
            for labels, value in series.items():
                if server_of(labels) not in before.servers:
                    continue  # its server was not in the text: what it counted meanwhile is of no window
                begins = server_of(labels) in restarted
                start = 0.0 if begins else before.counters.get(name, {}).get(labels, 0.0)
                key = "" if by is None else dict(labels).get(by, "")
                grown = self._counts.setdefault(name, {})
                grown[key] = grown.get(key, 0.0) + (value - start if value >= start else value)
        for name, found in scrape.histograms.items():
            earlier = before.histograms.get(name, {})
            observed = [
                histogram.since(earlier[labels])
                if labels in earlier and server_of(labels) not in restarted
                else histogram
                for labels, histogram in found.items()
                if server_of(labels) in before.servers
            ]
            if name in self._observed:
                observed.append(self._observed[name])
            if observed:
                self._observed[name] = add_histograms(observed)

    def lost(self, reason: str) -> None:
        """It did not answer."""
        self.error = reason

    def stale(self, now_s: float) -> bool:
        """Whether it has no figures."""
        return self.last is None or now_s - self.last.at_s > self.stale_after_s

    def still_s(self, now_s: float) -> float | None:
        """Time for which nothing has moved there (s); None where nothing runs for so long, or nobody tells.

        The end of requests does not count, which an API server notes without its engine.
        """
        if self.stale(now_s) or self.last is None:
            return None
        still_s = max(0.0, self.last.at_s - self.moved_s)
        return still_s if self.last.gauges.get("running") or still_s < SILENT_S else None

    def window(self, now_s: float) -> TelemetryWindow:
        """What it did since this was last asked."""
        counts, observed, span_s, restarts = self._counts, self._observed, self._span_s, self._restarts
        busy_kv = self._busy_kv
        self._begin()
        if self.stale(now_s) or self.last is None:
            return TelemetryWindow(stale=1)
        values: dict[str, Any] = {**self.last.gauges, "kv_tokens": self.last.kv_tokens}
        self._note_kv(self.last)  # the next window begins with what was last seen
        mean_kv = None if "kv_occupancy" not in values else sum(busy_kv) / max(len(busy_kv), 1)
        if span_s > 0:
            values |= {
                name: grown[""] if METRICS[name].by is None else dict(sorted(grown.items()))
                for name, grown in counts.items()
            }
            values |= observed
        return TelemetryWindow(
            restarts=restarts,
            span_s=span_s or None,
            rests_on={name: 1 for name, value in values.items() if value is not None},
            mean_kv_occupancy=mean_kv,
            **values,
        )

    def _begin(self) -> None:
        self._counts: dict[str, dict[str, float]] = {}
        self._observed: dict[str, Histogram] = {}
        self._busy_kv: list[float] = []
        self._span_s = 0.0
        self._restarts = 0

    def _note_kv(self, scrape: Scrape) -> None:
        if scrape.gauges.get("running") and (held := scrape.gauges.get("kv_occupancy")) is not None:
            self._busy_kv.append(held)


def _moves(scrape: Scrape) -> tuple[object, ...]:
    """What an engine that does anything changes: memory in a prefill, counts of tokens in each iteration."""
    gauges, counters = scrape.gauges, scrape.counters
    return (
        gauges.get("running"),
        gauges.get("kv_occupancy"),
        *(counters.get(name) for name in ("prompt_tokens", "output_tokens", "preemptions")),
    )


def _restarted(before: Scrape, after: Scrape) -> set[Labels]:
    """Servers that began anew, by when they say that they began; without that, by a counter that fell."""
    common = before.started.keys() & after.started.keys()
    told = {server_of(key) for key in common}
    fell = {
        server_of(labels)
        for name, series in after.counters.items()
        for labels, value in series.items()
        if value < _count(before.counters, name, labels)
    }
    return (fell - told) | {server_of(key) for key in common if before.started[key] != after.started[key]}


def _count(counters: Mapping[str, Mapping[Labels, float]], name: str, labels: Labels) -> float:
    return counters.get(name, {}).get(labels, 0.0)


class Telemetry:
    """Scrapes servers in the background while its context is open. Nothing here waits for a server.

    Args:
        urls: URLs of the servers, with or without /v1.
        api_key: sent as a bearer token (default: none).
        interval_s: from one scrape of a server to its next (s).
        timeout_s: a scrape that has not ended by then is lost (s).
        stale_after_s: age of a server's last answer from which on it has no figures (s).

    Raises:
        InputError: an argument is out of range; the `aiohttp` package is missing.

    Example:
        >>> async with Telemetry(["http://127.0.0.1:8101"]) as telemetry:
        ...     await asyncio.sleep(10)
        ...     window = merge(telemetry.windows())
        >>> window.figures()["p99_ttft_s"]
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str | None = None,
        interval_s: float = 1.0,
        timeout_s: float = 2.0,
        stale_after_s: float = 5.0,
    ) -> None:
        if not urls:
            raise InputError("expected one or more", field="urls")
        if not interval_s > 0:
            raise InputError(f"expected seconds > 0, found {interval_s}", field="interval_s")
        if not timeout_s > 0:
            raise InputError(f"expected seconds > 0, found {timeout_s}", field="timeout_s")
        if not stale_after_s > interval_s:
            raise InputError(
                f"expected more than interval_s, {interval_s}, found {stale_after_s}", field="stale_after_s"
            )
        self.interval_s = interval_s
        self.timeout_s = timeout_s
        self.replicas = [Replica(url, stale_after_s) for url in urls]
        self._api_key = api_key
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Telemetry:
        """Begin to scrape."""
        self._session = open_session(trust_env=True)  # the environment may name a proxy
        self._tasks = [
            asyncio.create_task(self._poll(self._session, replica), name=f"telemetry {index}")
            for index, replica in enumerate(self.replicas)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop scraping."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def windows(self) -> list[TelemetryWindow]:
        """What each server did since this was last called, from the scrapes that there are."""
        now_s = time.monotonic()
        return [replica.window(now_s) for replica in self.replicas]

    async def _poll(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        """Scrape a server again and again; a scrape that is lost, for whatever reason, is not the last."""

        async def turn() -> None:
            try:
                replica.took(await self._scraped(session, replica.url))
            except Exception as error:
                replica.lost(str(error) or type(error).__name__)
                raise

        await forever(turn, self.interval_s, f"the scrape of {without_credentials(replica.url)}")

    async def _scraped(self, session: aiohttp.ClientSession, url: str) -> Scrape:
        """A scrape within the time that there is."""
        asking = asyncio.ensure_future(scrape(session, url, self._api_key))
        try:
            # wait_for would do, but before Python 3.12 it can lose the cancellation at the end.
            done, _ = await asyncio.wait({asking}, timeout=self.timeout_s)
            if not done:
                raise InputError(f"no answer within {self.timeout_s:g} s")
            return asking.result()
        finally:
            asking.cancel()


async def scrape(session: aiohttp.ClientSession, url: str, api_key: str | None = None) -> Scrape:
    """Ask a server for its metrics.

    Args:
        session: HTTP client; its time limit is the caller's choice.
        url: Server's address, without /v1.
        api_key: Key that is sent as a bearer token.

    Raises:
        InputError: no answer came, or none that can be read.
    """
    import aiohttp

    at_s = time.monotonic()
    try:
        status, content = await fetch(session, f"{url}/metrics", bearer(url, api_key), max_bytes=MAX_BYTES)
    except InputError as error:
        raise InputError(error.reason, field="/metrics") from error
    except asyncio.TimeoutError as error:
        raise InputError("no answer in time", field="/metrics") from error
    except (aiohttp.ClientError, OSError) as error:
        raise InputError(f"{type(error).__name__}: {error}", field="/metrics") from error
    if status != 200:
        raise InputError(f"expected HTTP 200, found {status}", field="/metrics")
    # Not in the caller's loop, which may have streams to pass on.
    return await asyncio.to_thread(read_metrics, content.decode(errors="replace"), at_s)
