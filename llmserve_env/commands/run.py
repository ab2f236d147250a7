"""`llmserve run`: one episode with an agent, before running servers or in the simulator."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from types import FrameType

    import numpy as np
    from numpy.typing import NDArray

    from llmserve_env.agents import Agent
    from llmserve_env.live.pilot.decisions import Decision
    from llmserve_env.live.pilot.pilot import Pilot
    from llmserve_env.schema import EpisodeLog, ServeAction, ServeObservation
    from llmserve_env.tasks import Task


@dataclass(frozen=True)
class Piloting:
    """What stands between agent and service."""

    pilot: Literal["live", "always", "never"] = "live"
    """When to put shield, limits on change and fallback there: before live servers, in the simulator, too."""
    shield: bool = True
    """A shield, where there is a pilot."""
    decide_limit_s: float | None = None
    """Time that the agent has for a decision (s; default: half of the window)."""
    dry_run: bool = False
    """Only tell what would be done."""
    decisions: Path | None = None
    """Log of all decisions, to be appended to."""


@dataclass(frozen=True)
class Endpoint:
    """What is sent to live servers."""

    model: str | None = None
    """Its name (default: the first that the first server lists)."""
    precision: Literal["FP16", "INT8", "INT4"] | None = None
    """Of the weights behind servers that state none; without it nothing is earned for quality."""
    max_requests_per_step: int = 100
    """Requests that arrive in a window; further ones are left out of the episode."""
    max_prompt_tokens: int = 1024
    """Longer prompts are shortened to it."""
    max_completion_tokens: int = 256
    """Longer answers are shortened to it."""
    request_timeout_s: float = 120.0
    """A request that is not finished so long after it was sent has failed (s)."""
    token_ids: tuple[int, int] | None = None
    """Prompts are random token ids from the first to before the second (default: words)."""


def run(
    *,
    agent: str,
    task: str,
    live: Annotated[list[str], tyro.conf.UseAppendAction] = [],  # noqa: B006 - tyro makes another
    seed: int = 0,
    window_s: float | None = None,
    horizon_s: float | None = None,
    workload: str | None = None,
    log: Path | None = None,
    piloting: Annotated[Piloting, tyro.conf.arg(name="")] = Piloting(),
    endpoint: Annotated[Endpoint, tyro.conf.arg(name="")] = Endpoint(),
) -> None:
    """Play an episode of a task, a line a window, and say what it scores.

    Ctrl-C and SIGTERM end it: what was played is scored and logged, and settings of engines return.

    Args:
        agent: name of an agent, or folder of a policy.
        task: id of a task, or its .toml file.
        live: URL of a running vLLM server, with ,tier=FP16|INT8|INT4 and ,speculation=DEPTH what it was
            started with, ,engines=N how many it has, ,control=FOLDER the folder of its LiveScheduler, and
            ,key=KEY its API key (default: OPENAI_API_KEY's); once for each (default: the simulator serves).
        seed: of the episode.
        window_s: time between two decisions (s; default: the task's).
        horizon_s: length of the episode (s; default: the task's).
        workload: what is asked, as a URI (default: the task's).
        log: file for the episode's log, gzip'ed if it ends in .gz.
        piloting: between agent and service.
        endpoint: of live servers.

    Raises:
        InputError: the task, the agent, a server, an option or a file cannot be used.
    """
    import signal

    from llmserve_env.agents.find import find_agent
    from llmserve_env.commands.grade import tell
    from llmserve_env.commands.shared.report import check_folders
    from llmserve_env.errors import InputError
    from llmserve_env.grading import grade, write_log
    from llmserve_env.live.gateway.steering import warm_up
    from llmserve_env.tasks import load_task

    check_folders(log, piloting.decisions)
    if seed < 0:
        raise InputError(f"expected 0 or more, found {seed}", field="--seed")
    if not live and endpoint != Endpoint():
        raise InputError("expected --live with what is said of live servers", field="--live")
    changes = {"window_s": window_s, "horizon_s": horizon_s, "workload": workload}
    played = load_task(task, **{name: value for name, value in changes.items() if value is not None})
    player = find_agent(agent, played)
    world: _World = _Live(played, live, endpoint) if live else _Simulated(played)

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        if live:
            warm_up(player, played)
        world.begin(seed)
        _play(world, player, piloting, seed)
    finally:
        try:
            world.close()
        finally:
            signal.signal(signal.SIGTERM, before)
            found = world.log()
            if found.actions:
                if log is not None:
                    write_log(log, found)
                print()
                tell(grade(found, allow_files=True))
                print(f"  missed SLOs cost {sum(world.costs) / played.windows:.4f} a window")
                if log is not None:
                    print(f"wrote {log}")


class _World:
    """An episode, whoever serves.

    Attributes:
        task: what is played.
        costs: of each window.
        stale: why the last window's figures cannot be trusted, None if they can.
    """

    def __init__(self, task: Task, episode: Any) -> None:
        self.task = task
        self.costs: list[float] = []
        self.stale: str | None = None
        self._episode = episode

    def begin(self, seed: int) -> None:
        """Begin the episode."""
        self._episode.reset(seed)

    def step(self, action: ServeAction) -> ServeObservation:
        """Serve a window."""
        seen: ServeObservation = self._episode.step(action)
        self.costs.append(seen.metadata["cost"])
        return seen

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return bool(self._episode.done)

    def log(self) -> EpisodeLog:
        """The log so far."""
        found: EpisodeLog = self._episode.log()
        return found

    def close(self) -> None:
        """End what still goes on."""
        self._episode.close()

    def features(self) -> NDArray[np.float32]:
        """float32[features]."""
        raise NotImplementedError

    def window(self) -> NDArray[np.void]:
        """WINDOW, the last one."""
        raise NotImplementedError

    def cannot_apply(self, action: ServeAction) -> dict[str, str]:
        """Fields of an action that have no effect, with the reason."""
        raise NotImplementedError

    def capabilities(self) -> dict[str, str]:
        """How each field is applied, where that is to be told."""
        return {}


class _Simulated(_World):
    """The simulator serves."""

    def __init__(self, task: Task) -> None:
        from llmserve_env.episode import Episode

        super().__init__(task, Episode(task))

    def features(self) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._episode.batch.observations()[0]
        return found

    def window(self) -> NDArray[np.void]:
        found: NDArray[np.void] = self._episode.batch.windows[0].copy()
        return found

    def cannot_apply(self, action: ServeAction) -> dict[str, str]:
        return dict(self._episode.batch.simulator.not_applied(action))


class _Live(_World):
    """Running servers do."""

    def __init__(self, task: Task, urls: list[str], endpoint: Endpoint) -> None:
        from llmserve_env.live.episode import LiveEpisode
        from llmserve_env.live.settings import open_endpoint

        settings = open_endpoint(urls, api_key=os.environ.get("OPENAI_API_KEY"), **vars(endpoint))
        super().__init__(task, LiveEpisode(task, settings))

    def step(self, action: ServeAction) -> ServeObservation:
        seen = super().step(action)
        self.stale = self._episode.stale
        return seen

    def features(self) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._episode.features()
        return found

    def window(self) -> NDArray[np.void]:
        found: NDArray[np.void] = self._episode.window.copy()
        return found

    def cannot_apply(self, action: ServeAction) -> dict[str, str]:
        found: dict[str, str] = self._episode.cannot_apply(action)
        return found

    def capabilities(self) -> dict[str, str]:
        found: dict[str, str] = self._episode.capabilities()
        return found


def _play(world: _World, agent: Agent, piloting: Piloting, seed: int) -> None:
    """Play the episode to its end."""
    from llmserve_env.actions import to_action

    capabilities = world.capabilities()
    if capabilities:
        from llmserve_env.commands.shared.report import table

        print(table(["field", "how it is applied"], list(map(list, capabilities.items())), left=2) + "\n")
    pilot = _pilot(world, agent, piloting, seed, capabilities)
    if pilot is None:
        agent.reset(world.task, [seed])
    in_force = world.task.start
    try:
        while not world.done:
            window, decision = world.window(), None
            if pilot is not None:
                decision = pilot.decide(window, world.stale)
                action = decision.applied
                decision = pilot.applied(world.cannot_apply(action))
            else:
                action = to_action(agent.act(world.features()[None], window.reshape(1))[0])
            seen = world.step(action)
            if pilot is not None:
                pilot.result(world.window(), seen.reward)
            print(_line(seen, world.task, in_force, action, decision), flush=True)
            in_force = action
    finally:
        if pilot is not None:
            pilot.close()


def _pilot(
    world: _World, agent: Agent, piloting: Piloting, seed: int, capabilities: dict[str, str]
) -> Pilot | None:
    from llmserve_env.errors import InputError

    if piloting.pilot == "never" or (piloting.pilot == "live" and not isinstance(world, _Live)):
        if piloting != Piloting(piloting.pilot):
            raise InputError("expected always with what is said of a pilot", field="--pilot")
        return None
    from llmserve_env.live.pilot.decision_log import DecisionLog
    from llmserve_env.live.pilot.pilot import Pilot

    limit_s = piloting.decide_limit_s
    return Pilot(
        agent,
        world.task,
        world.task.start,
        shield=piloting.shield,
        decide_limit_s=world.task.window_s / 2 if limit_s is None else limit_s,
        dry_run=piloting.dry_run,
        seed=seed,
        log=None if piloting.decisions is None else DecisionLog(piloting.decisions),
        capabilities=capabilities,
    )


def _line(
    seen: ServeObservation, task: Task, before: ServeAction, action: ServeAction, decision: Decision | None
) -> str:
    """What a window brought, and what was set for it where that is something else."""
    counts = {
        name: sum(getattr(each, name) for each in seen.tenants.values())
        for name in ("arrived", "completed", "in_slo")
    }
    p99 = "-" if seen.p99_ttft_ms is None else f"{seen.p99_ttft_ms:.0f} ms"
    parts = [
        f"{seen.step_index}/{task.windows}: {counts['arrived']} arrived, {counts['completed']} completed "
        f"({counts['in_slo']} in SLO), {seen.failed_requests} failed, {seen.in_flight} in flight, "
        f"p99 TTFT {p99}, reward {seen.reward:.3f}, score {seen.metadata['score']:.3f}"
    ]
    values = action.model_dump(mode="json")
    changed = [name for name in values if getattr(before, name) != getattr(action, name)]
    if changed:
        parts.append(", ".join(f"{name} {values[name]}" for name in changed))
    if decision is not None and decision.by != "agent":
        parts.append(f"{decision.by}: {decision.rule}: {decision.reason}")
    return "; ".join(parts)
