"""One trace on a real server and in the simulator, side by side."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.controls import to_array, within_action
from llmserve_env.errors import InputError
from llmserve_env.hardware.iteration_fit import predicted_s, regimes
from llmserve_env.hardware.latency import compile_latency
from llmserve_env.live.calibrate.iterations import IterationLog
from llmserve_env.live.calibrate.load import Answer, Target, open_loop
from llmserve_env.schema import ServeAction
from llmserve_env.sim.simulator import SimulatorBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.hardware.profile import Profile
    from llmserve_env.live.calibrate.calibration import EngineLimits
    from llmserve_env.workloads.workload import Workload

QUANTILES = (50, 90, 99)
LATENCIES = ("ttft", "itl", "e2e")

_SETTLE_S = 0.3  # until the log has the last iteration
_SHORTEST_WINDOW_S = 2e-4
_STALLED_S = 60.0


@dataclass(frozen=True)
class Served:
    """What clients saw of a trace; times in seconds.

    Attributes:
        ttft_s: float64[n], of requests in order of arrival; nan without a first token.
        e2e_s: float64[n], to the last token; nan of a request that is not complete.
        itl_s: float64[m], between two tokens of a request, of all requests.
        output_tokens: output tokens of the complete requests.
        span_s: from the first arrival to the last token.
    """

    ttft_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]
    itl_s: NDArray[np.float64]
    output_tokens: int
    span_s: float

    @property
    def tokens_per_s(self) -> float:
        """Throughput."""
        return self.output_tokens / self.span_s


@dataclass(frozen=True)
class Comparison:
    """A trace on the server and in the simulator.

    Attributes:
        measured: figures of the server.
        simulated: figures of the simulator, the time between client and engine added.
        report: all figures, for JSON.
    """

    measured: Served
    simulated: Served
    report: dict[str, Any]


def compare(
    target: Target,
    limits: EngineLimits,
    profile: Profile,
    workload: Workload,
    *,
    log: Path | None = None,
    seed: int = 0,
) -> Comparison:
    """Play a trace open-loop on a server, then in the simulator, as it was sent.

    Args:
        target: the server; nobody else should use it meanwhile.
        limits: its settings.
        profile: what the simulator runs.
        workload: the trace.
        log: the file that the server's iterations are logged to.
        seed: seed of the prompts.

    Raises:
        InputError: the trace cannot be served by this server, or the server or its log cannot be used.
    """
    if len(workload) == 0:
        raise InputError("holds no request to serve", file=workload.source or None)
    longest = int((workload.prompt_tokens.astype(np.int64) + workload.output_tokens).max())
    if longest > limits.max_model_len:
        raise InputError(
            f"has a request of {longest:,} tokens, the server takes {limits.max_model_len:,} (max_model_len)",
            file=workload.source or None,
        )
    reader = None if log is None else IterationLog(log, limits.kv_tokens, limits.block_tokens)
    answers = open_loop(target, workload, seed)
    iterations = None
    if reader is not None:
        time.sleep(_SETTLE_S)
        iterations = reader.since_mark()
    measured = of_answers(answers)
    simulated = simulate(profile, as_sent(workload, answers), prefix_cache=limits.prefix_cache)
    late_s = np.array([answer.sent_s - answer.due_s for answer in answers])
    report: dict[str, Any] = {
        "trace": workload.source,
        "profile": profile.name,
        "requests": len(answers),
        "unanswered": _reasons(answers),
        "sent_late_p99_s": float(np.percentile(late_s, 99)),
        "latency": {name: _quantiles(name, measured, simulated) for name in LATENCIES},
        "tokens_per_s": _pair(measured.tokens_per_s, simulated.tokens_per_s),
        "iterations": None,
    }
    if iterations is not None:
        found = regimes(iterations, predicted_s(profile, iterations))
        report["iterations"] = {name: asdict(each) for name, each in found.items()}
    return Comparison(measured, simulated, report)


def as_sent(workload: Workload, answers: list[Answer]) -> Workload:
    """The trace at the times at which its requests were really sent."""
    sent_s = np.array([answer.sent_s or answer.due_s for answer in answers])
    order = np.argsort(sent_s, kind="stable")
    timeless = replace(workload, arrival_s=np.zeros(len(workload)))
    return replace(timeless.take(order), arrival_s=sent_s[order] - sent_s[order[0]])


def of_answers(answers: list[Answer]) -> Served:
    """What the clients of a run saw.

    Raises:
        InputError: no request was answered.
    """
    good = [answer for answer in answers if not answer.error]
    if not good:
        raise InputError(f"none of {len(answers)} requests was answered: {_reasons(answers)}", field="url")
    ordered = sorted(answers, key=lambda answer: answer.sent_s)
    return Served(
        ttft_s=np.array([a.token_s[0] - a.sent_s if a.token_s else math.nan for a in ordered]),
        e2e_s=np.array([math.nan if a.error else a.token_s[-1] - a.sent_s for a in ordered]),
        itl_s=np.concatenate([np.diff(answer.token_s) for answer in good]),
        output_tokens=sum(answer.output_tokens for answer in good),
        span_s=max(answer.token_s[-1] for answer in good) - ordered[0].sent_s,
    )


def simulate(profile: Profile, workload: Workload, *, prefix_cache: bool = True) -> Served:
    """What clients would see of the profile's engine under its own settings.

    The simulator keeps gaps in a histogram. Here its windows are shorter than an iteration: each tells the
    time of one and how many sequences got a token by it.

    Args:
        profile: hardware and model.
        workload: the trace.
        prefix_cache: whether the server has one.

    Raises:
        InputError: the simulator cannot serve it.
    """
    cap, sequences = within_action(profile.engine.max_num_seqs)
    action = ServeAction(batch_cap=cap)
    batch = SimulatorBatch(
        profile, [workload], prefix_cache=prefix_cache, action=action, max_num_seqs=sequences
    )
    actions = to_array([action])
    shortest_s = float(compile_latency(profile).dense_s[0, 1])
    window_s = max(shortest_s / 2, _SHORTEST_WINDOW_S)
    gaps: list[float] = []
    counts: list[int] = []
    over, idle_s = 0, 0.0
    while over < len(workload) and idle_s < _STALLED_S + workload.duration_s:
        window = batch.serve(actions, window_s)[0]
        over += int(window["completed"] + window["failed"] + window["cancelled"])
        iterations = int(window["iterations"])
        idle_s = 0.0 if iterations else idle_s + window_s
        if iterations:
            gaps.append(float(window["busy_s"]) / iterations)
            counts.append(int(batch.sums[0]["gap_histogram"].sum()))
    batch.fail_unfinished()
    outcomes = batch.outcomes_of(0)
    preempted = outcomes.preemptions > 0  # their longest gap spans several iterations
    outside_s = 0.0 if profile.server is None else 1e-6 * profile.server.request_us
    complete = ~np.isnan(outcomes.e2e_s)
    if not complete.any():
        raise InputError("the simulator completes none of the requests", file=workload.source or None)
    last_s = float((outcomes.arrival_s + outcomes.e2e_s)[complete].max())
    return Served(
        ttft_s=outcomes.ttft_s + outside_s,
        e2e_s=outcomes.e2e_s + outside_s,
        itl_s=np.concatenate([np.repeat(gaps, counts), outcomes.worst_gap_s[preempted & complete]]),
        output_tokens=int(workload.output_tokens[complete].sum()),
        span_s=last_s + outside_s - float(outcomes.arrival_s[0]),
    )


def _quantiles(name: str, measured: Served, simulated: Served) -> dict[str, dict[str, float | None]]:
    real, ours = (getattr(served, f"{name}_s") for served in (measured, simulated))
    return {f"p{each}": _pair(*(_percentile(values, each) for values in (real, ours))) for each in QUANTILES}


def _percentile(values: NDArray[np.float64], q: int) -> float | None:
    values = values[~np.isnan(values)]
    return float(np.percentile(values, q)) if len(values) else None


def _pair(measured: float | None, simulated: float | None) -> dict[str, float | None]:
    error = None if simulated is None or not measured else 100 * (simulated / measured - 1)
    return {"measured": measured, "simulated": simulated, "error_percent": error}


def _reasons(answers: list[Answer]) -> dict[str, int]:
    found: dict[str, int] = {}
    for answer in answers:
        if answer.error:
            found[answer.error] = found.get(answer.error, 0) + 1
    return found
