"""`llmserve demo`: the reference agents and the trained policies play the tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from llmserve_env.agents import Agent
    from llmserve_env.tasks import Task


def demo(
    *,
    out: Path = Path("out/demo"),
    tasks: tuple[str, ...] = (
        "bursty_workload",
        "adversarial_multitenant",
        "death_spiral",
        "static_workload",
        "trace_replay",
    ),
    agents: tuple[str, ...] = ("random", "defaults", "best-constant", "reactive", "ppo"),
    seeds: int = 10,
) -> None:
    """Play the tasks with the reference agents, and with the trained policy where there is one for a task.

    Prints each agent's score on each task, the interquartile mean over seeds of evaluation with its 95%
    interval, and writes all scores and a picture of an episode: the first task under the last agent that
    plays it.

    Args:
        out: folder for the files.
        tasks: ids of tasks.
        agents: names of agents: random, defaults, best-constant, reactive, aimd, mpc, ppo, ppo-1, ppo-2,
            ppo-3, bc, or shielded:NAME. A policy (ppo to bc) plays the tasks that there are weights for.
        seeds: episodes of each task, 2 or more.
    """
    from tqdm import tqdm

    from llmserve_env.agents import lacks_weights, load_agent
    from llmserve_env.commands.shared.report import check_outputs, table, write_json
    from llmserve_env.report.provenance import made_by
    from llmserve_env.report.stats import interval
    from llmserve_env.tasks import EVALUATION_SEEDS, load_task

    if seeds < 2:
        raise InputError(f"expected 2 or more, found {seeds}", field="seeds")
    for field, given in (("tasks", tasks), ("agents", agents)):
        if not given:
            raise InputError("expected one or more, found none", field=field)
    loaded = [load_task(task) for task in tasks]
    players = [
        {name: load_agent(name, task) for name in agents if not lacks_weights(name, task.id)}
        for task in loaded
    ]
    for task, row in zip(loaded, players, strict=True):
        if not row:
            load_agent(agents[-1], task)  # says what there are weights for
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot be made: {reason}", file=str(out)) from error
    written = [out / "scores.json", out / "episode.png"]
    check_outputs({"out": written[0]})
    check_outputs({"out": written[1]})
    chosen = EVALUATION_SEEDS[:seeds]
    results: dict[str, dict[str, Any]] = {}
    columns = []
    with tqdm(total=sum(map(len, players)) * seeds, unit="episode") as bar:
        for task, row in zip(loaded, players, strict=True):
            results[task.id] = {}
            for name, agent in row.items():
                bar.set_description(f"{task.id}, {name}")
                results[task.id][name] = _result(agent, task, chosen)
                bar.update(seeds)
            scores = {name: str(interval(found["scores"])) for name, found in results[task.id].items()}
            columns.append([scores.get(name, "–") for name in agents])
    write_json(written[0], {"made_by": made_by(), "seeds": list(chosen), "tasks": results})
    _draw(list(players[0].values())[-1], loaded[0], chosen[0], written[1])
    lines = [[name, *cells] for name, cells in zip(agents, zip(*columns, strict=True), strict=True)]
    print(f"\nscores, interquartile mean over {seeds} seeds of evaluation with its 95% interval\n")
    print(f"{table(['', *results], lines)}\n")
    for path in written:
        print(f"wrote {path}")


def _result(agent: Agent, task: Task, seeds: range) -> dict[str, Any]:
    """An agent's scores on a task as they go into the file."""
    from dataclasses import asdict

    from llmserve_env.agents import play
    from llmserve_env.report.stats import interval
    from llmserve_env.rewards import COMPONENTS

    played = play(agent, task, seeds, threads=None)
    return {
        "iqm": asdict(interval(played.scores)),
        "scores": played.scores.tolist(),
        "components": dict(zip(COMPONENTS, played.components.mean(axis=0).tolist(), strict=True)),
        "requests": dict(
            zip(
                ("arrived", "completed", "in_slo", "failed"),
                played.requests.sum(axis=0).tolist(),
                strict=True,
            )
        ),
    }


def _draw(agent: Agent, task: Task, seed: int, path: Path) -> None:
    """Draw an episode."""
    from llmserve_env.envs.render import draw_episode
    from llmserve_env.episode import EpisodeBatch
    from llmserve_env.play import play_batch

    batch = play_batch(agent, EpisodeBatch(task, recorded=True), [seed])
    (episode,) = batch.recordings
    draw_episode(path, task, episode.windows, episode.actions, episode.components)
