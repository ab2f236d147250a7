"""The suites: reference agents and the trained policy, the same each time, and a language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llmserve_env
from llmserve_env.agents import AGENTS, Agent, lacks_weights, load_agent
from llmserve_env.agents.llm import LLMAgent, LLMSettings
from llmserve_env.episode import EpisodeBatch, StepResult
from llmserve_env.play import play_batch
from llmserve_env.rewards import COMPONENTS
from llmserve_env.schema import GradeResult
from llmserve_env.session import RemoteEpisode, Session
from llmserve_env.tasks import EVALUATION_SEEDS, Task, list_tasks, load_task
from server.baseline_results import Results

Progress = Callable[[float, int, str], object]
"""Called with the episodes that are over (and the share of one being played), of how many, and which."""

BASELINES = (*AGENTS, "ppo")
"""Reference agents, and the trained policy on the tasks that there are weights for."""

_OUTCOMES = ("arrived", "completed", "in_slo", "failed")


def deterministic_suite(
    task_ids: Sequence[str] | None = None,
    episodes: int = 5,
    progress: Progress = lambda done, total, what: None,
    *,
    seed: int = EVALUATION_SEEDS.start,
    session: Session | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Play tasks with `BASELINES`.

    Args:
        task_ids: shipped tasks (default: all).
        episodes: of each task and agent.
        progress: see `Progress`.
        seed: of the first episode; the others follow.
        session: plays the episodes (default: they are played here).
        output: JSON file, see `Results`.

    Returns:
        `settings`, `summary` by task and agent, `episodes`: JSON, and the same each time.
    """
    settings = {
        "mode": "deterministic",
        "package_version": llmserve_env.__version__,
        "runtime": "in-process" if session is None else "http",
        "not_played": _without_weights(),
    }

    def play_one(task_id: str, agent: str, seed: int, watch: Callable[[float], object]) -> dict[str, Any]:
        task = load_task(task_id)
        return _played(load_agent(agent, task), task, seed, session, None if session is None else watch)

    return _run(
        Results(settings, output),
        play_one,
        task_ids,
        BASELINES,
        range(seed, seed + episodes),
        progress=progress,
    )


def openai_suite(
    task_ids: Sequence[str] | None = None,
    episodes: int = 1,
    progress: Progress = lambda done, total, what: None,
    *,
    llm: LLMSettings | None = None,
    seed: int = EVALUATION_SEEDS.start,
    session: Session | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Play tasks with a language model.

    Args:
        task_ids: shipped tasks (default: all).
        episodes: of each task.
        progress: see `Progress`.
        llm: how the model is asked (default: `LLMSettings.from_environment()`).
        seed: of the first episode; the others follow.
        session: plays the episodes (default: they are played here).
        output: JSON file, see `Results`.

    Returns:
        `settings`, `summary` by task, `episodes` with what asking came to (`llm`): JSON.

    Raises:
        InputError: the endpoint cannot be used, or gave up answering; finished episodes are in `output`.
    """
    llm = llm or LLMSettings.from_environment()
    with LLMAgent(llm) as asking:
        asked = {name: value for name, value in asdict(llm).items() if name != "api_key"}
        settings = {
            "mode": "openai",
            "package_version": llmserve_env.__version__,
            "runtime": "in-process" if session is None else "http",
            **asked,
            "endpoint": asking.endpoint,
            "fallback": "an answer that cannot be used leaves the configuration in force as it is",
        }

        def play_one(task_id: str, agent: str, seed: int, watch: Callable[[float], object]) -> dict[str, Any]:
            begun = time.perf_counter()
            found = _played(asking, load_task(task_id), seed, session, watch)
            return {**found, "llm": asking.usage.told(), "wall_s": time.perf_counter() - begun}

        results = Results(settings, output)
        return _run(results, play_one, task_ids, [llm.model], range(seed, seed + episodes), progress=progress)


def _run(
    results: Results,
    play_one: Callable[[str, str, int, Callable[[float], object]], dict[str, Any]],
    task_ids: Sequence[str] | None,
    agents: Sequence[str],
    seeds: Sequence[int],
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Play what is not finished yet."""
    for task_id in task_ids or ():
        load_task(task_id)  # refuses what there is not, before anything is played
    jobs = [
        (task_id, agent, seed)
        for task_id in task_ids or list_tasks()
        for agent in agents
        for seed in seeds
        if not lacks_weights(agent, task_id)
    ]
    for done, (task_id, agent, seed) in enumerate(jobs):
        what = f"{task_id}, {agent}"
        progress(done, len(jobs), what)
        if not results.has(task_id, agent, seed):

            def watch(share: float, done: int = done, what: str = what) -> None:
                progress(done + share, len(jobs), what)

            found = play_one(task_id, agent, seed, watch)
            results.add({"task_id": task_id, "agent": agent, "seed": seed, **found})
    progress(len(jobs), len(jobs), "done")
    return results.content()


def _without_weights() -> dict[str, str]:
    """Players who do not play all tasks, and which ones not; the same whatever is asked for."""
    lacking = {name: [task for task in list_tasks() if lacks_weights(name, task)] for name in BASELINES}
    return {name: f"has no weights for {', '.join(tasks)}" for name, tasks in lacking.items() if tasks}


def _played(
    agent: Agent,
    task: Task,
    seed: int,
    session: Session | None,
    watch: Callable[[float], object] | None,
) -> dict[str, Any]:
    """An episode, played here or in a session; `watch` is told the share of it that is over."""

    def told(batch: Any, _: StepResult) -> None:
        if watch is not None:
            watch(float(batch.steps[0]) / task.windows)

    if session is not None:
        episode = RemoteEpisode(task, session)
        play_batch(agent, episode.batch, [seed], told)
        return _graded(episode.grade())
    batch = play_batch(agent, EpisodeBatch(task), [seed], told)
    return {
        "score": min(float(batch.scores[0]), 1.0),  # as grades are bounded
        "components": dict(zip(COMPONENTS, batch.totals[0].tolist(), strict=True)),
        "requests": dict(zip(_OUTCOMES, batch.requests[0].tolist(), strict=True)),
    }


def _graded(result: GradeResult) -> dict[str, Any]:
    """An episode by its grade."""
    return {
        "score": result.score,
        "components": result.components,
        "requests": {name: result.requests[name] for name in _OUTCOMES if name in result.requests},
    }
