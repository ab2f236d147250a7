"""A profile of a running server, from a few minutes of closed-loop load on it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.hardware.calibrate import Regime
from llmserve_env.hardware.iteration_fit import (
    Iterations,
    fit_error,
    fit_iterations,
    predicted_s,
    regimes,
)
from llmserve_env.hardware.profile import Engine, Gpu, Latency, Model, Profile, Server, Tier, Tiers
from llmserve_env.live.calibrate.iterations import IterationLog
from llmserve_env.live.calibrate.load import Answer, Load, Target, closed_loop
from llmserve_env.live.servers.doctor import diagnose
from llmserve_env.sim.state import BLOCK_TOKENS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PLAN = Path(__file__).parents[1] / "data" / "calibration.toml"
_SETTLE_S = 0.3  # until the log has the last iteration
_WARMING = Load(clients=4, prompt_tokens=(16, 64), output_tokens=(8, 16))
_DEFAULTS = {"max_num_seqs": 256, "max_num_batched_tokens": 2048}
"""What vLLM takes where nothing is said (0.32, `vllm serve` on a CPU or a small GPU)."""


def shipped_plan() -> list[Load]:
    """The loads of `data/calibration.toml`."""
    tables = tomllib.loads(_PLAN.read_text(encoding="utf-8"))["load"]
    return [Load.model_validate(table) for table in tables]


@dataclass(frozen=True)
class EngineLimits:
    """Settings of the engine that the simulator must share.

    Attributes:
        model: its name at the server.
        max_num_seqs: running sequences.
        max_num_batched_tokens: token budget of an iteration.
        async_scheduling: whether the engine schedules ahead, see `Engine.async_scheduling`.
        kv_tokens: capacity of the KV cache, less vLLM's null block.
        block_tokens: tokens in one of its blocks.
        max_model_len: longest sequence (tokens).
        prefix_cache: whether it is on.
        told: where each comes from, in words.
        logged: names of those that the server's log told.
    """

    model: str
    max_num_seqs: int
    max_num_batched_tokens: int
    async_scheduling: bool
    kv_tokens: int
    block_tokens: int
    max_model_len: int
    prefix_cache: bool
    told: str
    logged: tuple[str, ...] = ()


def find_engine_limits(
    url: str,
    log: Path | None = None,
    *,
    model: str | None = None,
    api_key: str | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    async_scheduling: bool | None = None,
) -> EngineLimits:
    """Ask a server, and read what it logged at its start; what is given goes before.

    Args:
        url: URL of the server, with or without /v1.
        log: the file that its output goes to, from its start on.
        model: its name there (default: the first that the server lists).
        api_key: sent as a bearer token.
        max_num_seqs: as given.
        max_num_batched_tokens: as given.
        async_scheduling: as given (default: what vLLM does by default: not on CPUs).

    Raises:
        InputError: the server cannot be reached, or does not tell the size of its KV cache or the model.
    """
    found = diagnose(url, api_key=api_key, model=model)
    if found.scrape is None or found.scrape.kv_tokens is None:
        missing = next((check for check in found.checks if check.status in ("unreachable", "missing")), None)
        reason = "its metrics do not tell the size of its KV cache" if missing is None else missing.found
        raise InputError(f"{found.url} cannot be used: {reason}", field="url")
    name = model or next(iter(found.models), "")
    if name not in found.models:
        raise InputError(f"expected one of {', '.join(found.models)}, found {name!r}", field="model")
    logged = _logged(log)
    given = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    asynchronous = logged.get("async") if async_scheduling is None else async_scheduling
    limits = {name: value or logged.get(name) or _DEFAULTS[name] for name, value in given.items()}
    told = "; ".join(
        f"{name}: {'as given' if value else 'as logged' if name in logged else 'an assumption, the default'}"
        for name, value in given.items()
    )
    config = found.scrape.config
    block_tokens = int(config.get("block_size", BLOCK_TOKENS))
    return EngineLimits(
        model=name,
        **limits,
        async_scheduling=True if asynchronous is None else bool(asynchronous),
        kv_tokens=int(found.scrape.kv_tokens) - block_tokens,
        block_tokens=block_tokens,
        max_model_len=found.models[name] or 4096,
        prefix_cache=config.get("enable_prefix_caching", "True") != "False",
        told=f"{told}; KV cache: its metrics",
        logged=tuple(logged),
    )


def _logged(path: Path | None) -> dict[str, int]:
    """What vLLM says of its settings at its start."""
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            text = file.read(1 << 20).decode(errors="replace")
    except OSError as error:
        raise InputError(f"cannot be read: {error}", file=str(path)) from error
    found: dict[str, int] = {}
    for name in _DEFAULTS:
        match = re.search(rf"'{name}': (\d+)", text) or re.search(rf"{name}=(\d+)", text)
        if match:
            found[name] = int(match[1])
    if "device_config=cpu" in text:
        found["async"] = False
    return found


@dataclass(frozen=True)
class Phase:
    """What a load gave.

    Attributes:
        load: the load.
        answers: answers of its requests.
        iterations: iterations that were logged; None without a log.
    """

    load: Load
    answers: list[Answer]
    iterations: Iterations | None


@dataclass(frozen=True)
class Fit:
    """A fit and what it rests on.

    Attributes:
        profile: the profile.
        iterations: logged, or derived from client timings.
        predicted_s: what the profile says of each.
        regimes: its error by kind of batch.
        gaps: gaps by load, the time between two iterations, measured and as fitted (us); empty without a log.
    """

    profile: Profile
    iterations: Iterations
    predicted_s: NDArray[np.float64]
    regimes: dict[str, Regime]
    gaps: list[dict[str, Any]]


def measure(
    target: Target,
    limits: EngineLimits,
    log: Path | None,
    *,
    minutes: float,
    rounds: int = 2,
    plan: Sequence[Load] | None = None,
    say: Any = None,
) -> list[Phase]:
    """Put a server under the loads of a plan, several rounds of it, so that drift falls on all alike.

    Args:
        target: the server; nobody else should use it meanwhile.
        limits: its settings: loads that exceed them are cut.
        log: the file that its iterations are logged to; None: client timings only.
        minutes: all together.
        rounds: rounds of the plan.
        plan: the loads (default: the shipped one).
        say: called with a line on each load.

    Raises:
        InputError: the server, or its log, cannot be used.
    """
    loads = [_within(load, limits) for load in (shipped_plan() if plan is None else plan)]
    seconds = 60 * minutes / rounds / sum(load.share for load in loads)
    reader = None if log is None else IterationLog(log, limits.kv_tokens, limits.block_tokens)
    closed_loop(target, _within(_WARMING, limits), min(2.0, seconds), 0)
    phases = []
    for number in range(rounds * len(loads)):
        load = loads[number % len(loads)]
        if reader is not None:
            time.sleep(_SETTLE_S)
            reader.mark()
        answers = closed_loop(target, load, seconds * load.share, number + 1)
        if reader is not None:
            time.sleep(_SETTLE_S)
        phases.append(Phase(load, answers, None if reader is None else reader.since_mark()))
        if say is not None:
            say(
                f"{load.clients} clients, prompts of {load.prompt_tokens[0]} to {load.prompt_tokens[1]}: "
                f"{len(answers)} requests"
            )
    return phases


def _within(load: Load, limits: EngineLimits) -> Load:
    longest = limits.max_model_len - load.output_tokens[1]
    low, high = (max(1, min(each, longest)) for each in load.prompt_tokens)
    return load.model_copy(
        update={"clients": min(load.clients, limits.max_num_seqs), "prompt_tokens": (low, high)}
    )


def fit_profile(phases: Sequence[Phase], limits: EngineLimits, model: Model, name: str, hardware: str) -> Fit:
    """Make a profile of what was measured.

    Args:
        phases: with the iterations of all or of none.
        limits: limits of the server.
        model: that it serves.
        name: name of the profile.
        hardware: what it runs on, in words.

    Raises:
        InputError: too little was measured.
    """
    answered = sum(not answer.error for phase in phases for answer in phase.answers)
    if answered < 10:
        errors = {answer.error for phase in phases for answer in phase.answers if answer.error}
        why = "; ".join(sorted(errors)[:3])
        raise InputError(f"{answered} requests were answered, too few; {why}", field="url")
    if all(phase.iterations is not None for phase in phases):
        iterations = Iterations.joined([phase.iterations for phase in phases if phase.iterations is not None])
        server, gaps = _server(phases)
        source = f"vLLM's log of {len(iterations):,} iterations under closed-loop load"
    else:
        iterations, server, gaps = _from_clients(phases), None, []
        source = f"client timings of {answered:,} requests under closed-loop load; mixed batches not measured"
    step_us, sequence_us = (0.0, 0.0) if server is None else (server.step_us, server.sequence_us)
    latency = fit_iterations(iterations, step_us, sequence_us, source)
    profile = _profile(name, hardware, model, limits, latency=latency, server=server)
    predicted = predicted_s(profile, iterations)
    found = regimes(iterations, predicted)
    latency = latency.model_copy(update={"fit_error": fit_error(found)})
    return Fit(profile.model_copy(update={"latency": latency}), iterations, predicted, found, gaps)


def _server(phases: Sequence[Phase]) -> tuple[Server, list[dict[str, Any]]]:
    """What lies between iterations, and between client and engine.

    A request that decodes is part of every iteration from its first to its last token: the sum of those spans
    less the logged time of the iterations, counted for every sequence in them, is what passes between them.
    """
    import scipy.optimize

    rows, rests = [], []
    for phase in phases:
        found = phase.iterations
        assert found is not None
        span_s = sum(answer.token_s[-1] - answer.token_s[0] for answer in phase.answers if not answer.error)
        sequences = found.decodes + found.prefills
        weight = found.decodes.sum()
        rows.append([1.0, float((found.decodes * sequences).sum() / weight)])
        rests.append(float(1e6 * (span_s - (found.decodes * found.elapsed_s).sum()) / weight))
    step_us, sequence_us = scipy.optimize.nnls(np.array(rows), np.array(rests))[0].tolist()
    outside_s = []
    for phase in phases:
        found = phase.iterations
        assert found is not None
        firsts = found.elapsed_s[found.prefills > 0]
        if phase.load.clients == 1 and len(firsts) == len(phase.answers):  # one iteration prefills each
            outside_s += [
                answer.token_s[0] - answer.sent_s - elapsed_s
                for answer, elapsed_s in zip(phase.answers, firsts.tolist(), strict=True)
                if not answer.error
            ]
    request_us = 0.0
    if outside_s:
        request_us = max(0.0, 1e6 * float(np.median(outside_s)) - step_us - sequence_us)
    server = Server(
        request_us=round(request_us, 1),
        step_us=round(step_us, 1),
        sequence_us=round(sequence_us, 2),
        source="client timings less logged iterations: of decoding requests under all loads, and of the "
        "first tokens of single clients",
    )
    gaps = [
        {
            "clients": phase.load.clients,
            "sequences": sequences,
            "measured_us": rest,
            "fitted_us": step_us + sequence_us * sequences,
        }
        for phase, (_, sequences), rest in zip(phases, rows, rests, strict=True)
    ]
    return server, gaps


def _from_clients(phases: Sequence[Phase]) -> Iterations:
    """Iterations as clients know them: first tokens of single clients, and the usual gap of each answer."""
    rows: list[tuple[float, float, float, float, float]] = []
    for phase in phases:
        good = [answer for answer in phase.answers if not answer.error and len(answer.token_s) > 1]
        clients = phase.load.clients
        for answer in good:
            if clients == 1:
                rows.append((1, answer.prompt_tokens, 0, 0, answer.token_s[0] - answer.sent_s))
            gap_s = float(np.median(np.diff(answer.token_s)))
            if gap_s > 0:
                mean = answer.prompt_tokens + len(answer.token_s) / 2
                rows.append((0, 0, clients, clients * mean, gap_s))
    return Iterations(*np.array(rows or np.zeros((0, 5)), float).T)


def _profile(
    name: str, hardware: str, model: Model, limits: EngineLimits, *, latency: Latency, server: Server | None
) -> Profile:
    held = model.weight_bytes + limits.kv_tokens * model.kv_bytes_per_token
    return Profile(
        name=name,
        notes=(
            "calibrated on a running server: times hold for its hardware, model and settings",
            f"prefix cache of the server: {'on' if limits.prefix_cache else 'off'}",
            *(
                []
                if server
                else ["without an iteration log: HTTP and streaming are part of the engine's times"]
            ),
        ),
        gpu=Gpu(name=hardware, memory_bytes=round(held / 0.9) + 1, source="weights and KV cache, over 0.9"),
        model=model,
        engine=Engine(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            reserved_bytes_per_gpu=0,
            kv_blocks=limits.kv_tokens // BLOCK_TOKENS + 1,
            async_scheduling=limits.async_scheduling,
            source=f"{limits.told}, {limits.block_tokens} tokens in a block there, {BLOCK_TOKENS} here",
        ),
        tiers=Tiers(FP16=Tier(weight_bytes=model.weight_bytes, source="as served")),
        latency=latency,
        server=server,
    )


def report(fit: Fit) -> dict[str, Any]:
    """A fit's figures, for JSON."""
    server = fit.profile.server
    return {
        "profile": fit.profile.name,
        "iterations": len(fit.iterations),
        "regimes": {name: asdict(each) for name, each in fit.regimes.items()},
        "server": None if server is None else server.model_dump(),
        "gaps": fit.gaps,
    }


def ordinary_tokens(model: Model) -> tuple[int, int]:
    """Range of token ids for prompts: without the first ones, which are special in most vocabularies."""
    return min(100, model.vocab_size // 2), model.vocab_size
