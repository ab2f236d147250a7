"""What a vLLM server can do for a live run, found out from outside before the run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal

from llmserve_env.errors import InputError, missing_package
from llmserve_env.live.servers.engine_settings import SCHEDULER_VERSIONS
from llmserve_env.live.servers.metrics import METRICS, Scrape, read_metrics
from llmserve_env.live.servers.stream import RequestFailed, StreamReader
from llmserve_env.net.http import get, open_client
from llmserve_env.net.urls import server_url, without_credentials
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    import httpx

Status = Literal["ok", "note", "missing", "unreachable"]

TOKENS = 3
"""Of the one completion that is asked for."""
CLOCK_NOTE_S = 2.0
"""Clocks that differ by more are told; a Date header is cut to whole seconds."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: name of the check.
        status: ok; note, worth knowing; missing, a live run needs it; unreachable.
        found: what was found.
        mend: what to do about it; empty where nothing needs to be done.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Ways:
    """How a field of an action can be applied to the servers while they serve.

    Attributes:
        field: field of `ServeAction`.
        stock: how vLLM itself applies it.
        gateway: how `llmserve gateway` before the servers applies it.
        scheduler: how the project's scheduler class within them applies it.
        here: what stands in the way with these servers; empty where nothing is seen to.
    """

    field: str
    stock: str
    gateway: str
    scheduler: str
    here: str


@dataclass
class Diagnosis:
    """What was found of one server.

    Attributes:
        url: URL of the server, without credentials.
        checks: checks in the order in which they were made.
        version: version of vLLM; None where it does not tell.
        models: longest sequence by model name (tokens; None where it does not tell).
        scrape: its metrics; None where there are none.
        clock_ahead_s: lead of its clock over this machine's (s); None where it does not tell.
        round_trip_s: round trip of a small request (s).
    """

    url: str
    checks: list[Check] = field(default_factory=list)
    version: str | None = None
    models: dict[str, int | None] = field(default_factory=dict)
    scrape: Scrape | None = None
    clock_ahead_s: float | None = None
    round_trip_s: float | None = None

    def add(self, name: str, status: Status, found: str, mend: str = "") -> None:
        """Add a check."""
        self.checks.append(Check(name, status, found, mend))

    def has(self, status: Status) -> bool:
        """Whether a check ended so."""
        return any(check.status == status for check in self.checks)


def diagnose(
    url: str, *, api_key: str | None = None, timeout_s: float = 10.0, model: str | None = None
) -> Diagnosis:
    """Look at one server. Sends it a few GETs and one completion of 3 tokens.

    Args:
        url: URL of the server, with or without /v1.
        api_key: sent as a bearer token (default: none).
        timeout_s: time that an answer may take (s).
        model: model to ask for the completion (default: the first that the server lists).

    Raises:
        InputError: the URL is none; the `httpx` or the `prometheus_client` package is missing.
    """
    try:
        import httpx
        import prometheus_client  # noqa: F401 - else a server would be said to have no metrics
    except ImportError as error:
        raise missing_package(error) from error
    base = server_url(url)
    found = Diagnosis(without_credentials(base))
    try:
        with open_client(base, api_key, timeout_s=timeout_s) as client:
            _look(client, found, model)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        what = "no answer in time" if isinstance(error, httpx.TimeoutException) else str(error)
        found.add(
            "up",
            "unreachable",
            f"{type(error).__name__}: {what}",
            "start the server, or correct the URL; vLLM loads a model for minutes before it answers",
        )
    return found


def controls(found: Sequence[Diagnosis]) -> list[Ways]:
    """How each field of an action can be applied to these servers while they serve."""
    speculates = all(each.scrape is not None and "drafted_tokens" in each.scrape.names for each in found)
    tells_kv = all(each.scrape is not None and "kv_occupancy" in each.scrape.names for each in found)
    tried = all((each.version or "").split("+")[0] in SCHEDULER_VERSIONS for each in found)
    several = len(found) > 1
    no_class = "" if tried else f"the scheduler class takes vLLM {', '.join(SCHEDULER_VERSIONS)} only"
    one_pool = "" if several else "needs a server for each pool, one is given"
    known = {
        "batch_cap": Ways(
            "batch_cap",
            "--max-num-seqs at start",
            "yes, for each server",
            "yes, not above the start's",
            no_class,
        ),
        "kv_budget_fraction": Ways(
            "kv_budget_fraction",
            "no",
            "yes, by the KV gauge",
            "yes, gates admissions",
            "" if tells_kv else "the gateway needs the KV gauge, which is missing",
        ),
        "speculation_depth": Ways(
            "speculation_depth",
            "--speculative-config at start",
            "a pool for each depth",
            "0 to the start's",
            no_class if speculates else "no server speculates: start with --speculative-config",
        ),
        "quantization_tier": Ways(
            "quantization_tier", "weights at start", "a pool for each precision", "no", one_pool
        ),
        "prefill_decode_split": Ways(
            "prefill_decode_split", "KV connector at start", "no", "no", "no way while servers serve"
        ),
        "priority_routing": Ways(
            "priority_routing",
            "--scheduling-policy priority at start",
            "yes, its own queue",
            "no",
            "",
        ),
        "admission_rate": Ways("admission_rate", "--max-num-queued-reqs at start", "yes", "no", ""),
    }
    return [
        known.get(name, Ways(name, "no", "no", "no", "no way known")) for name in ServeAction.model_fields
    ]


def _look(client: httpx.Client, found: Diagnosis, model: str | None) -> None:
    client.get("/health")  # opens the connection, and tells whether there is a server at all
    began_s = time.monotonic()
    health = client.get("/health")
    found.round_trip_s = time.monotonic() - began_s
    note_clock(found, health)
    if health.status_code == 200:
        found.add("up", "ok", f"answers within {1e3 * found.round_trip_s:.1f} ms")
    else:
        mend = "wait until it is up, or restart it" if health.status_code >= 500 else ""
        status: Status = "missing" if health.status_code >= 500 else "note"
        found.add("up", status, f"HTTP {health.status_code} at /health", mend)
    _version(client, found)
    _metrics(client, found)
    if found.version is None and found.scrape is None:
        found.add("vLLM", "missing", "neither a version nor metrics of vLLM", "give the URL of a vLLM server")
    if _models(client, found):
        _completion(client, found, model or next(iter(found.models)))


def _version(client: httpx.Client, found: Diagnosis) -> None:
    body = _json(client.get("/version"))
    version = body.get("version") if isinstance(body, dict) else None
    if not isinstance(version, str):
        found.add("version", "note", "not told at /version", "very old versions of vLLM do not tell it")
        return
    found.version = version
    if version.split("+")[0] in SCHEDULER_VERSIONS:
        found.add("version", "ok", f"vLLM {version}")
    else:
        found.add(
            "version",
            "note",
            f"vLLM {version}; tried with {', '.join(SCHEDULER_VERSIONS)}",
            "use that version for the scheduler class; gateway and telemetry take others, too",
        )


def note_clock(found: Diagnosis, answer: httpx.Response) -> None:
    """Compare the clocks, by the Date header of an answer that has just come."""
    here = datetime.now(timezone.utc)
    try:
        there = parsedate_to_datetime(answer.headers["date"])
        ahead_s = (there - here).total_seconds() + 0.5  # the header is cut to seconds
    except (KeyError, TypeError, ValueError):
        found.add("clock", "note", "the server does not tell its time", "windows are timed here alone")
        return
    found.clock_ahead_s = ahead_s
    if abs(ahead_s) > CLOCK_NOTE_S:
        found.add(
            "clock",
            "note",
            f"the server's is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}",
            "set both by NTP to compare its log with this machine's; windows are timed here alone",
        )
    else:
        found.add("clock", "ok", "as here, to a second")


def _metrics(client: httpx.Client, found: Diagnosis) -> None:
    answer = get(client, "/metrics")
    try:
        if answer.status_code != 200:
            raise InputError(f"HTTP {answer.status_code}", field="/metrics")
        scrape = read_metrics(answer.text)
    except InputError as error:
        found.add(
            "metrics",
            "missing",
            error.reason,
            "let /metrics through any proxy; do not start vLLM with --disable-log-stats",
        )
        return
    found.scrape = scrape
    lacking = [name for name, metric in METRICS.items() if metric.needed and name not in scrape.names]
    optional = [name for name, metric in METRICS.items() if not metric.needed and name not in scrape.names]
    if lacking:
        mend = "do not start vLLM with --disable-log-stats; very old versions have too few"
        found.add("metrics", "missing", f"no {', '.join(lacking)}", mend)
    else:
        without = f", without {', '.join(optional)}" if optional else ""
        found.add("metrics", "ok", f"{len(scrape.names)} of {len(METRICS)} meanings{without}")
    old = [name for meaning, name in scrape.names.items() if name != f"vllm:{METRICS[meaning].names[0]}"]
    if old:
        found.add("metric names", "ok", f"of an older vLLM: {', '.join(old)}")
    engines = max(len(scrape.engines), 1)
    if scrape.kv_tokens is None:
        found.add("KV cache", "note", "capacity not told", "shares of several servers are averaged alike")
    else:
        found.add("KV cache", "ok", f"{scrape.kv_tokens:,.0f} tokens on {engines} engine(s)")
    caching = scrape.config.get("enable_prefix_caching")
    if caching is None:
        found.add("prefix caching", "note", "not told")
    else:
        found.add("prefix caching", "ok", "on" if caching == "True" else "off")


def _models(client: httpx.Client, found: Diagnosis) -> bool:
    answer = client.get("/v1/models")
    if answer.status_code in (401, 403):
        found.add(
            "models", "missing", f"HTTP {answer.status_code}", "give the server's key in OPENAI_API_KEY"
        )
        return False
    body = _json(answer)
    listed = body.get("data") if isinstance(body, dict) else None
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            length = entry.get("max_model_len")
            found.models[entry["id"]] = length if isinstance(length, int) else None
    if not found.models:
        found.add(
            "models", "missing", f"none at /v1/models (HTTP {answer.status_code})", "give vLLM's own URL"
        )
        return False
    shown = [
        name if length is None else f"{name} (to {length:,} tokens)" for name, length in found.models.items()
    ]
    found.add("models", "ok", ", ".join(shown))
    return True


def _completion(client: httpx.Client, found: Diagnosis, model: str) -> None:
    """Ask for one completion of 3 tokens, with all that a run asks for."""
    import httpx

    body = {
        "model": model,
        "prompt": "a b",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "priority": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        answer = client.post("/v1/completions", json=body)
    except httpx.TimeoutException:
        found.add("completion", "missing", "no answer in time", "is it overloaded or frozen? Look at its log")
        return
    if answer.status_code != 200:
        refused = "priority" in answer.text.lower() and answer.status_code == 400
        mend = "start with --scheduling-policy priority" if refused else "look at the server's log"
        found.add("completion", "missing", f"HTTP {answer.status_code}: {_shorten(answer.text)}", mend)
        return
    reader = StreamReader()
    try:
        pieces = reader.feed(answer.content) + reader.finish()
    except RequestFailed as failure:
        found.add("completion", "missing", f"{failure.reason} to read", "let vLLM's own answer through")
        return
    if reader.error is not None:
        reason = _shorten(str(reader.error.get("message")))
        found.add("completion", "missing", f"refused: {reason}", "read the refusal")
        return
    if not pieces:
        found.add("completion", "missing", "the answer is no stream", "let vLLM's own answer through")
        return
    found.add("completion", "ok", f"{TOKENS} tokens asked of {model}, {pieces} piece(s) came")
    usage = reader.usage
    if not usage:
        mend = "lengths of answers are counted by pieces; newer vLLM takes stream_options"
        found.add("usage in streams", "note", "not told", mend)
    elif usage.get("completion_tokens") == TOKENS:
        found.add("usage in streams", "ok", "told")
        found.add("ignore_eos", "ok", "taken: the answer has the length that was asked for")
    else:
        found.add("usage in streams", "ok", "told")
        count = usage.get("completion_tokens")
        found.add("ignore_eos", "note", f"{count} of {TOKENS} tokens", "answers may end before their length")
    found.add(
        "priority",
        "note",
        "accepted; whether it is honoured cannot be seen from outside",
        "start with --scheduling-policy priority: under fcfs, vLLM ignores it",
    )


def _json(answer: httpx.Response) -> Any:
    return _parse(answer.text) if answer.status_code == 200 else None


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _shorten(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= 200 else f"{plain[:199]}…"
