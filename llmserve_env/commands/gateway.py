"""`llmserve gateway`: a proxy before vLLM servers that limits, orders and routes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llmserve_env.commands.shared.controls import options
from llmserve_env.net.connections import ConnectionLimits
from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine

    import uvicorn

    from llmserve_env.backend import WindowRecord
    from llmserve_env.live.gateway.deployment import Deployment
    from llmserve_env.live.gateway.gateway import Gateway
    from llmserve_env.live.gateway.steering import Told
    from llmserve_env.live.pilot.decisions import Decision
    from llmserve_env.live.pilot.pilot import Pilot
    from llmserve_env.live.servers.drain import DrainFile
    from llmserve_env.live.servers.upstreams import Upstream
    from llmserve_env.tasks import Task


if TYPE_CHECKING:
    Safe = Any
else:
    Safe = options("Safe")
    Safe.__doc__ = "The configuration when the agent cannot be relied on; the rest is as at the start."


@dataclass(frozen=True)
class Steering:
    """Who sets the configuration."""

    agent: str | None = None
    """Name of an agent, or folder of a policy; it is asked after each window (default: nobody, the
    configuration stays)."""
    task: str | None = None
    """Id of the task that the agent plays, or a task's .toml file: tenants and what they were promised, the
    window, the fields that the agent sets and their values."""
    seed: int = 0
    """Random seed of the agent."""
    shield: bool = True
    """Shield around the agent."""
    decide_limit_s: float | None = None
    """Time that the agent has for a decision (s; default: half of the window)."""
    dry_run: bool = False
    """Dry run: decisions are told and not applied."""
    decisions: Path | None = None
    """Log of all decisions, to be appended to."""


def gateway(
    upstream: Annotated[list[str], tyro.conf.UseAppendAction],
    action: Annotated[ServeAction, tyro.conf.arg(name="")] = ServeAction(),  # noqa: B008 - immutable
    steering: Annotated[Steering, tyro.conf.arg(name="")] = Steering(),
    safe: Safe = Safe(),  # noqa: B008 - immutable
    *,
    host: str = "127.0.0.1",
    port: int = 8200,
    allowed_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    cors_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    tenants: Path | None = None,
    window_s: float | None = None,
    metrics: bool = True,
    max_waiting: int = 1000,
    max_sequences: int | None = None,
    max_body_mb: float = 8.0,
    queue_timeout_s: float = 60.0,
    first_byte_timeout_s: float = 300.0,
    idle_timeout_s: float = 300.0,
    drained: Path | None = None,
    drain_timeout_s: float = 30.0,
    connections: ConnectionLimits = ConnectionLimits(),  # noqa: B008 - immutable
) -> None:
    """Serve OpenAI's interface for completions and chats before one vLLM server or several.

    Prints a line for each window in which something happened, and each change of the configuration. Ends with
    Ctrl-C or SIGTERM; the settings that engines had before return.

    Args:
        upstream: URL of a server, with ,tier=FP16|INT8|INT4 and ,speculation=DEPTH what it was started with,
            with ,engines=N how many it has, with ,control=FOLDER the folder of its LiveScheduler, and with
            ,key=KEY its API key; once for each server.
        action: configuration in force, with an agent that of the start.
        steering: agent that changes the configuration.
        safe: configuration for when the agent cannot be relied on.
        host: address to listen on.
        port: port to listen on; 0 for a free one.
        allowed_host: name that clients may ask the gateway by, *.NAME for all below one; once for each
            (default: any, and none where only this machine can connect). Addresses and names without a dot
            are always good.
        cors_origin: origin of web pages that may use the gateway from a browser, SCHEME://HOST[:PORT], or *
            for all; once for each (default: none).
        tenants: TOML file of the callers (default: everybody, as one tenant; with a task of several, each by
            its name in the header x-tenant).
        window_s: length of a window (s; default: the task's, without one 10).
        metrics: whether the servers' metrics are read.
        max_waiting: sequences in the queue, at most.
        max_sequences: sequences of a request (n times its prompts), at most (default: as many as the batch
            cap lets run at the largest upstream, with an agent the largest cap that it may set).
        max_body_mb: size of a request, at most (MB).
        queue_timeout_s: time after which a waiting request is refused (s).
        first_byte_timeout_s: time that an upstream has to begin its answer (s); one that is not streamed
            begins with its end. Then another upstream is tried.
        idle_timeout_s: time after which a request is ended whose upstream or client does nothing (s).
        drained: file of the URLs of upstreams that get no new requests, a line each; read once a second.
        drain_timeout_s: time that requests under way have at the gateway's end (s).
        connections: bounds of connections, before anything else sees what clients send.

    Raises:
        InputError: an upstream, the tenants' file, the task, the agent, the log, a bound or the address
            cannot be used.
    """
    from llmserve_env.errors import InputError, missing_package

    try:
        import aiohttp  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_package(error) from error
    import logging

    from llmserve_env.commands.shared.report import check_outputs
    from llmserve_env.live.gateway.callers import Callers, load_tenants, task_tenants
    from llmserve_env.live.gateway.deployment import SCRAPE_S, STALE_S, Deployment
    from llmserve_env.live.gateway.gateway import Gateway
    from llmserve_env.live.gateway.history import History
    from llmserve_env.live.gateway.proxy import MAX_HELD_BYTES, Proxy
    from llmserve_env.live.servers.drain import DrainFile
    from llmserve_env.live.servers.telemetry import Telemetry
    from llmserve_env.live.servers.upstreams import parse_upstream
    from llmserve_env.net.connections import room_for
    from llmserve_env.net.cors import CrossOrigin, origin_of
    from llmserve_env.net.sockets import is_local, listen

    check_outputs({"decisions": steering.decisions}, task=steering.task, tenants=tenants)
    upstreams = [parse_upstream(each) for each in upstream]
    origins = [each if each == "*" else origin_of(each) for each in cors_origin]
    task = _task(steering, action, window_s, upstreams)
    window_s = task.window_s if task is not None else 10.0 if window_s is None else window_s
    for name, value in (
        ("window_s", window_s),
        ("max_body_mb", max_body_mb),
        ("drain_timeout_s", drain_timeout_s),
    ):
        if not value > 0:
            raise InputError(f"expected more than 0, found {value}", field=name)
    if tenants is not None:
        known = load_tenants(tenants, None if task is None else task.tenants)
    else:
        known = Callers() if task is None else task_tenants(task.tenants)
    here = Gateway(
        upstreams,
        known.all,
        action,
        max_waiting=max_waiting,
        max_sequences=_most_sequences(task, upstreams) if max_sequences is None else max_sequences,
        queue_timeout_s=queue_timeout_s,
        idle_timeout_s=idle_timeout_s,
        first_byte_timeout_s=first_byte_timeout_s,
    )
    telemetry = None
    if metrics:
        telemetry = Telemetry([each.url for each in upstreams], interval_s=SCRAPE_S, stale_after_s=STALE_S)
    deployment = Deployment(here, telemetry)
    pilot = None if task is None else _pilot(steering, safe, action, task)
    history = History(
        here,
        deployment,
        window_s=window_s,
        agent=steering.agent,
        task=None if task is None else task.id,
        dry_run=steering.dry_run,
    )
    proxy = Proxy(
        here,
        known,
        history=history,
        max_body_bytes=int(max_body_mb * 1e6),
        body_timeout_s=connections.body_timeout_s,
    )
    limits = replace(
        connections,
        max_connections=room_for(connections.max_connections, 2),  # each may have one to an upstream
        # The gateway's own bounds come first: it counts what it turns away, and knows whose bodies it holds.
        body_timeout_s=connections.body_timeout_s + 5,
        write_timeout_s=max(connections.write_timeout_s, idle_timeout_s),
        max_unfinished_bytes=connections.max_unfinished_bytes + MAX_HELD_BYTES,
    )

    drains = None if drained is None else DrainFile(drained, upstreams)
    if drains is not None:
        drains.look()
    listening = listen(host, port)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    teller = _Teller(action)

    def told(record: WindowRecord, decision: Decision | None, reward: float | None) -> None:
        """What is known of a window, once a window."""
        teller.tell(record, decision)
        history.add(record, decision, reward)

    # Where only this machine can connect, it is asked by this machine's names.
    hosts = allowed_host or (() if is_local(host) else None)
    config = _config(CrossOrigin(proxy, origins), limits, hosts, origins, drain_timeout_s)
    try:
        _serve(config, listening, here, _windows(deployment, action, window_s, pilot, told, drains=drains))
    finally:
        if pilot is not None:
            pilot.close()


def _config(
    app: Any,
    limits: ConnectionLimits,
    hosts: tuple[str, ...] | None,
    origins: list[str],
    drain_timeout_s: float,
) -> uvicorn.Config:
    """How the application is served: within bounds, and to no page of another site that was not named."""
    import math

    import uvicorn

    from llmserve_env.live.gateway.wire import error_json
    from llmserve_env.net.browsers import BrowserRules
    from llmserve_env.net.protocols import bounded

    def error_body(message: str, status: int) -> bytes:
        return error_json(message, "invalid_request_error" if status < 500 else "server_error", status)

    return uvicorn.Config(
        BrowserRules(app, hosts=hosts, origins=origins, error_body=error_body),
        **bounded(limits, error_body) | {"ws": "none"},
        log_level="warning",
        access_log=False,  # it is a line of work for every request
        headers=[("x-content-type-options", "nosniff")],
        proxy_headers=False,
        server_header=False,  # the upstream's pass
        date_header=False,
        timeout_graceful_shutdown=math.ceil(drain_timeout_s),
    )


async def _windows(
    deployment: Deployment,
    action: ServeAction,
    window_s: float,
    pilot: Pilot | None,
    told: Told,
    *,
    drains: DrainFile | None,
) -> None:
    """Steer until cancelled; the settings that were found return."""
    import asyncio
    from contextlib import AsyncExitStack

    from llmserve_env.live.gateway.deployment import SCRAPE_S
    from llmserve_env.live.gateway.steering import steer
    from llmserve_env.net.loops import forever

    async with AsyncExitStack() as stack:
        if drains is not None:
            looking = asyncio.create_task(forever(drains.look, 1.0, "the file of drained upstreams"))
            stack.callback(looking.cancel)
        await stack.enter_async_context(deployment)
        deployment.apply(action)
        await asyncio.sleep(2 * SCRAPE_S)
        if pilot is not None:
            pilot.capabilities = deployment.capabilities()
        for field, reason in deployment.not_applied.items():
            print(f"not applied: {field}: {reason}", flush=True)
        await steer(deployment, window_s, pilot, told)


def _serve(
    config: uvicorn.Config, listening: socket.socket, here: Gateway, windows: Coroutine[Any, Any, None]
) -> None:
    """Serve until a signal comes, and steer meanwhile."""
    import asyncio
    import gc
    import logging
    import signal

    import uvicorn

    class Server(uvicorn.Server):
        failure: Exception | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            gc.freeze()  # what is loaded stays: to look for garbage among it would hold up everybody
            print("listening on http://{}:{}".format(*listening.getsockname()[:2]), flush=True)
            self.steering = asyncio.create_task(windows)
            self.steering.add_done_callback(self.steered)

        def steered(self, _: asyncio.Task[None]) -> None:
            """It never ends of itself: what it could not begin with is told, and the command ends."""
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            self.steering.cancel()  # first of all: what drains, drains under the settings of before
            try:
                await self.steering
            except asyncio.CancelledError:
                pass
            except Exception as error:
                logging.getLogger(__name__).error("steering failed", exc_info=error)
                self.failure = error
            if here.in_flight:
                limit_s = config.timeout_graceful_shutdown
                print(f"draining: {here.in_flight} requests under way have up to {limit_s} s", flush=True)
            failures = here.ledger.failures
            await super().shutdown(sockets=sockets)
            await asyncio.sleep(0)  # what is left has been cancelled, and tells its client
            if cut := here.in_flight + failures["gateway stopped"]:
                print(f"ended {cut} requests that were still under way", flush=True)

    # uvicorn raises the signal again when it is done, which is the end that was asked for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    server = Server(config)
    server.run(sockets=[listening])
    if server.failure is not None:
        raise server.failure


def _task(
    steering: Steering, action: ServeAction, window_s: float | None, upstreams: list[Upstream]
) -> Task | None:
    """The task that the agent plays, on a cell of as many engines as there are.

    Where it grants a field, it starts as the action has it.
    """
    from llmserve_env.errors import InputError

    if steering.agent is None or steering.task is None:
        if steering != Steering():
            raise InputError(
                "expected --agent and --task, and with them what is said of decisions", field="agent"
            )
        return None
    from llmserve_env.tasks import load_task

    task = load_task(steering.task)
    engines = sum(each.engines for each in upstreams)
    cell = task.cell.model_dump(exclude_none=True) | {"engines": engines}
    if cell.get("prefill_engines", 0) >= engines:
        del cell["prefill_engines"]
    given = action.model_dump(mode="json")
    start = task.start.model_dump(mode="json") | {name: given[name] for name in task.grid.granted}
    changes = {} if window_s is None else {"window_s": window_s}
    return load_task(steering.task, cell=cell, start=start, **changes)


def _most_sequences(task: Task | None, upstreams: list[Upstream]) -> int | None:
    """Sequences that the largest upstream may run under the largest cap of an agent; None without one."""
    if task is None or "batch_cap" not in task.grid.granted:
        return None
    return int(task.grid.ends("batch_cap")[1]) * max(each.engines for each in upstreams)


def _pilot(steering: Steering, safe: Safe, action: ServeAction, task: Task) -> Pilot:
    """The agent, and what stands between it and the service."""
    from pydantic import ValidationError

    from llmserve_env.agents.find import find_agent
    from llmserve_env.errors import InputError, as_input_error
    from llmserve_env.live.gateway.steering import RunningReward, warm_up
    from llmserve_env.live.pilot.decision_log import DecisionLog
    from llmserve_env.live.pilot.pilot import Pilot

    assert steering.agent is not None
    limit_s = task.window_s / 2 if steering.decide_limit_s is None else steering.decide_limit_s
    if not limit_s < task.window_s:
        raise InputError(
            f"expected less than the window, {task.window_s:g}, found {limit_s:g}", field="decide_limit_s"
        )
    given = {name: value for name, value in vars(safe).items() if value is not None}
    try:
        safe_action = ServeAction(**(action.model_dump() | given))
    except ValidationError as error:
        refused = as_input_error(error)
        raise InputError(refused.reason, field=f"safe.{refused.field}") from error
    agent = find_agent(steering.agent, task)
    warm_up(agent, task)
    return Pilot(
        agent,
        task,
        action,
        safe=safe_action,
        shield=steering.shield,
        decide_limit_s=limit_s,
        dry_run=steering.dry_run,
        endless=True,
        seed=steering.seed,
        log=None if steering.decisions is None else DecisionLog(steering.decisions),
        reward=RunningReward.MEANING,
    )


class _Teller:
    """Prints a line for a window in which something happened, and for a decision that is another one.

    Args:
        action: configuration in force.
    """

    def __init__(self, action: ServeAction) -> None:
        self._in_force = action
        self._last: tuple[object, ...] = (action, "agent", None)

    def tell(self, record: WindowRecord, decision: Decision | None) -> None:
        """Of the next window, and what was decided after it."""
        if record.arrived or record.in_flight or record.completed or record.failed:
            print(_line(record), flush=True)
        if decision is None:
            return
        said = (decision.decided, decision.by, decision.rule)
        if said != self._last:
            print(_decision_line(decision, self._in_force), flush=True)
        self._last, self._in_force = said, decision.applied


def _line(record: WindowRecord) -> str:
    p99_ms = "-" if record.ttft_histogram.sum() == 0 else f"{1e3 * record.p99_ttft_s:.0f} ms"
    return (
        f"{record.end_s:.0f} s: {record.arrived} arrived, {record.completed} completed, "
        f"{record.failed} failed ({record.refused} refused), {record.running} at upstreams, "
        f"{record.waiting} waiting, {record.output_tokens} tokens, p99 TTFT {p99_ms}"
    )


def _decision_line(decision: Decision, before: ServeAction) -> str:
    """Who decided what, and why."""
    old, new = before.model_dump(mode="json"), decision.decided.model_dump(mode="json")
    changes = ", ".join(f"{name} {old[name]} to {new[name]}" for name in new if old[name] != new[name])
    rule = "" if decision.by == "limit" else f"{decision.rule}: "  # the reason names the fields
    why = "" if decision.rule is None else f" ({rule}{decision.reason})"
    would = ", if this were no dry run" if decision.dry_run else ""
    return f"decision {decision.window}, {decision.by}{why}: {changes or 'nothing changes'}{would}"
