"""`llmserve run`: one episode with an agent, before running servers or in the simulator."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llmserve_env.errors import InputError
from llmserve_env.schema import QuantizationTier

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    import numpy as np
    from numpy.typing import NDArray

    from llmserve_env.agents import Agent
    from llmserve_env.episode import Episode, EpisodeBatch, StepResult
    from llmserve_env.live.pilot.decisions import Decision
    from llmserve_env.live.pilot.pilot import Pilot
    from llmserve_env.schema import ServeAction, ServeObservation
    from llmserve_env.tasks import Task


@dataclass(frozen=True)
class Piloting:
    """What stands between agent and service."""

    pilot: Literal["live", "always", "never"] = "live"
    """Services with a pilot (shield, limits on change, fallback): live ones, the simulator, too, or none."""
    shield: bool = True
    """Shield, where there is a pilot."""
    decide_limit_s: float | None = None
    """Time that the agent has for a decision (s; default: half of the window)."""
    dry_run: bool = False
    """Dry run: decisions are told and not applied."""
    decisions: Path | None = None
    """Log of all decisions, to be appended to."""


@dataclass(frozen=True)
class Endpoint:
    """What is sent to live servers."""

    model: str | None = None
    """Name of the model (default: the first that the first server lists)."""
    precision: QuantizationTier | None = None
    """Precision of the weights behind servers that state none; without it nothing is earned for quality."""
    max_requests_per_step: int = 100
    """Requests that arrive in a window; further ones are left out of the episode."""
    max_prompt_tokens: int = 1024
    """Longest prompt (tokens); longer ones are shortened to it."""
    max_completion_tokens: int = 256
    """Longest answer (tokens); longer ones are shortened to it."""
    request_timeout_s: float = 120.0
    """Time after which an unfinished request has failed (s)."""
    token_ids: tuple[int, int] | None = None
    """Random token ids that prompts hold, from the first to below the second (default: random words)."""


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
        agent: name of an agent, llm:MODEL@URL, or folder of a policy.
        task: id of a task, or its .toml file.
        live: URL of a running vLLM server, with ,tier=FP16|INT8|INT4 and ,speculation=DEPTH what it was
            started with, ,engines=N how many it has, ,control=FOLDER the folder of its LiveScheduler, and
            ,key=KEY its API key (default: OPENAI_API_KEY's); once for each (default: the simulator serves).
        seed: random seed of the episode.
        window_s: time between two decisions (s; default: the task's).
        horizon_s: length of the episode (s; default: the task's).
        workload: URI of the workload (default: the task's).
        log: file for the episode's log, gzip'ed if it ends in .gz.
        piloting: pilot between agent and service.
        endpoint: bounds of what live servers are asked.

    Raises:
        InputError: the task, the agent, a server, an option or a file cannot be used.
    """
    import signal

    from llmserve_env.agents.find import find_agent
    from llmserve_env.commands.grade import tell
    from llmserve_env.commands.shared.report import check_folders
    from llmserve_env.grading import grade, write_log
    from llmserve_env.live.gateway.steering import warm_up
    from llmserve_env.play import play_batch
    from llmserve_env.tasks import load_task

    check_folders(log, piloting.decisions)
    if seed < 0:
        raise InputError(f"expected 0 or more, found {seed}", field="--seed")
    if not live and endpoint != Endpoint():
        raise InputError("expected --live with what is said of live servers", field="--live")
    changes = {"window_s": window_s, "horizon_s": horizon_s, "workload": workload}
    played = load_task(task, **{name: value for name, value in changes.items() if value is not None})
    decides = find_agent(agent, played)
    runner = _Run(decides, _episode(played, live, endpoint), piloting, live=bool(live))

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        if live:
            warm_up(decides, played)
        play_batch(runner, runner.episode.batch, [seed], runner.watch)
    finally:
        try:
            runner.close()
        finally:
            signal.signal(signal.SIGTERM, before)
            found = runner.episode.log()
            if found.actions:
                if log is not None:
                    write_log(log, found)
                print()
                tell(grade(found, allow_files=True))
                print(f"  missed SLOs cost {runner.cost / played.windows:.4f} a window")
                if log is not None:
                    print(f"wrote {log}")


def _episode(task: Task, live: list[str], endpoint: Endpoint) -> Episode:
    """An episode before running servers, or in the simulator where there are none."""
    from llmserve_env.episode import Episode

    if not live:
        return Episode(task)
    from llmserve_env.live.episode import LiveEpisode
    from llmserve_env.live.settings import open_endpoint

    settings = open_endpoint(live, api_key=os.environ.get("OPENAI_API_KEY"), **vars(endpoint))
    return LiveEpisode(task, settings)


class _Run:
    """The agent of an episode, behind a pilot where there is one; a line for every window.

    Args:
        agent: the agent that decides.
        episode: the episode that is played, whoever serves it.
        piloting: pilot between the two.
        live: whether running servers serve it.

    Attributes:
        episode: as given.
        cost: cost of what missed its SLO so far.

    Raises:
        InputError: something is said of a pilot, and there is none.
    """

    def __init__(self, agent: Agent, episode: Episode, piloting: Piloting, *, live: bool) -> None:
        self.name = agent.name
        self.cost = 0.0
        self._agent = agent
        self.episode = episode
        self._piloting = piloting
        self._flown = piloting.pilot == "always" or (piloting.pilot == "live" and live)
        if not self._flown and piloting != Piloting(piloting.pilot):
            raise InputError("expected always with what is said of a pilot", field="--pilot")
        self._pilot: Pilot | None = None
        self._decision: Decision | None = None
        self._before = self._action = episode.task.start

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Say how each field is applied, where there is something to say of it, and take the controls."""
        capabilities = self.episode.batch.backend.capabilities()
        if capabilities:
            from llmserve_env.commands.shared.report import table

            rows = list(map(list, capabilities.items()))
            print(table(["field", "how it is applied"], rows, left=2) + "\n")
        if self._flown:
            self._pilot = _pilot(self._agent, task, self._piloting, seeds[0], capabilities)
        else:
            self._agent.reset(task, seeds)

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[1]."""
        from llmserve_env.controls import to_action, to_array

        self._before = self._action
        if self._pilot is None:
            actions = self._agent.act(observations, windows)
            self._action = to_action(actions[0])
            return actions
        backend = self.episode.batch.backend
        applied = self._pilot.decide(windows[0].copy(), backend.stale, backend.excused).applied
        self._decision = self._pilot.applied(backend.not_applied(applied))
        self._action = applied
        return to_array([applied])

    def watch(self, batch: EpisodeBatch, result: StepResult) -> None:
        """Say what a window brought."""
        self.cost += float(batch.costs[0])
        if self._pilot is not None:
            self._pilot.result(batch.windows[0].copy(), float(result.rewards[0]))
        seen = self.episode.observation()
        print(_line(seen, batch.task, self._before, self._action, self._decision), flush=True)

    def close(self) -> None:
        """Let go of the controls, and of the episode."""
        if self._pilot is not None:
            self._pilot.close()
        self.episode.close()


def _pilot(agent: Agent, task: Task, piloting: Piloting, seed: int, capabilities: dict[str, str]) -> Pilot:
    from llmserve_env.live.pilot.decision_log import DecisionLog
    from llmserve_env.live.pilot.pilot import Pilot

    limit_s = piloting.decide_limit_s
    return Pilot(
        agent,
        task,
        task.start,
        shield=piloting.shield,
        decide_limit_s=task.window_s / 2 if limit_s is None else limit_s,
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
