"""What a surge leaves behind in `death_spiral`, without and with admission control.

    python -m evaluate.experiments.spiral --picture docs/images/death-spiral.png

plays evaluation seeds with vLLM's defaults, the best constant configuration that lets everybody in (of the
task's whole grid, chosen on training seeds), the best constant of all and the tuned rule. It prints their
scores and how many requests they answer in time for each one that arrives after a surge, from `AFTER_S`
seconds after its end on, when no other surge is under way. The picture is of one episode.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro

from evaluate.search import PlanPlayer
from llmserve_env.agents import load_agent
from llmserve_env.agents.constant import ConstantAgent
from llmserve_env.controls import to_action
from llmserve_env.episode import EpisodeBatch
from llmserve_env.play import play, play_batch
from llmserve_env.report.figures import BLUE, GREY, INK, ORANGE, picture_file
from llmserve_env.report.stats import interval, paired_difference
from llmserve_env.tasks import EVALUATION_SEEDS, TRAINING_SEEDS, Task, load_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from llmserve_env.agents.agent import Agent

TASK = "death_spiral"
AFTER_S = 60.0
"""Time that is left for what a surge has sent to be answered or given up: twice the deadline (s)."""


def main(*, seeds: int = 20, picture: Path | None = None, episode: int = 2) -> None:
    """Print the table, and draw an episode if asked.

    Args:
        seeds: evaluation seeds that are played.
        picture: file to draw to.
        episode: index of the episode that is drawn.
    """
    task = load_task(TASK)
    chosen = list(EVALUATION_SEEDS[:seeds])
    agents = {
        "vLLM's defaults": load_agent("defaults", task),
        "best constant that lets everybody in": _everybody(task),
        "best constant": load_agent("best-constant", task),
        "reactive rule": load_agent("reactive", task),
    }
    scores = {name: play(agent, task, chosen).scores for name, agent in agents.items()}
    print("| | score | in time after surges |\n|---|---|---|")
    windows = {}
    for name, agent in agents.items():
        windows[name] = _windows(agent, task, chosen)
        after = in_time_after(task, chosen, windows[name])
        print(f"| {name} | {interval(scores[name])} | {interval(after[np.isfinite(after)])} |")
    gain = paired_difference(scores["reactive rule"], scores["best constant"])
    print(f"| reactive rule − best constant | {gain} | |")
    if picture is not None:
        _draw(picture, task, chosen[episode], {name: found[:, episode] for name, found in windows.items()})
        print(f"\nwrote {picture}")


def _everybody(task: Task) -> Agent:
    """The constant of the grid with the best mean score on training seeds among those that refuse nobody."""
    grid = task.grid.all()
    grid = grid[np.isinf(grid["admission_rate"])]
    seeds = list(TRAINING_SEEDS[:16])
    player = PlanPlayer(task)
    scores = [player.play(seeds, np.repeat(row[None, None], len(seeds), axis=0)).mean() for row in grid]
    return ConstantAgent(to_action(grid[int(np.argmax(scores))]), "everybody")


def _windows(agent: Agent, task: Task, seeds: Sequence[int]) -> NDArray[np.void]:
    """WINDOW[window, seed] of an agent's episodes."""
    found: list[NDArray[np.void]] = []
    play_batch(
        agent, EpisodeBatch(task, len(seeds)), seeds, lambda batch, _: found.append(batch.windows.copy())
    )
    return np.array(found)


def surges_of(task: Task, seed: int) -> list[tuple[float, float]]:
    """Begin and end of each surge of an episode (s)."""
    assert task.scenario is not None
    visits = task.scenario.timeline(seed, task.horizon_s)
    ends = [start_s for start_s, _ in visits[1:]] + [task.horizon_s]
    return [(start_s, end_s) for (start_s, name), end_s in zip(visits, ends, strict=True) if "surge" in name]


def in_time_after(task: Task, seeds: Sequence[int], windows: NDArray[np.void]) -> NDArray[np.float64]:
    """float64[seeds], requests in SLO per arrival after surges; nan where there is no such time."""
    shares = np.full(len(seeds), np.nan)
    for column, seed in enumerate(seeds):
        surges = surges_of(task, seed)
        start_s, end_s = windows["start_s"][:, column], windows["end_s"][:, column]
        calm = np.zeros(len(windows), bool)
        if surges:
            calm = start_s >= surges[0][1] + AFTER_S
        for begin_s, over_s in surges:
            calm &= (end_s <= begin_s) | (start_s >= over_s + AFTER_S)
        arrived = windows["arrived"][calm, column].sum()
        if arrived:
            shares[column] = windows["tenant_in_slo"][calm, column].sum() / arrived
    return shares


def _draw(path: Path, task: Task, seed: int, windows: dict[str, NDArray[np.void]]) -> None:
    with picture_file(path, (9.0, 6.4)) as figure:
        panels = figure.subplots(len(windows), 1, sharex=True, sharey=True)
        for axes, (name, found) in zip(panels, windows.items(), strict=True):
            _panel(axes, task, seed, found)
            axes.set_title(name)
        panels[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, handlelength=1.4)
        panels[-1].set_xlabel("time (s)")
        figure.supylabel("tries and requests per second", fontsize=9, color="#374151")


def _panel(axes: Axes, task: Task, seed: int, windows: NDArray[np.void]) -> None:
    time_s, per_s = windows["end_s"], 1.0 / task.window_s
    for number, (begin_s, end_s) in enumerate(surges_of(task, seed)):
        axes.axvspan(begin_s, end_s, color=ORANGE, alpha=0.12, lw=0, label="" if number else "surge")
    tries = (windows["arrived"] + windows["retries"]) * per_s
    axes.plot(time_s, tries, color=GREY, lw=0.9, label="tries")
    axes.plot(time_s, windows["arrived"] * per_s, color=INK, lw=0.9, label="requests that arrive")
    in_time = windows["tenant_in_slo"].sum(axis=1) * per_s
    axes.fill_between(time_s, in_time, color=BLUE, alpha=0.35, lw=0)
    axes.plot(time_s, in_time, color=BLUE, lw=1.2, label="answered in time")
    axes.set_xlim(0, task.horizon_s)
    axes.set_ylim(0, 24)


if __name__ == "__main__":
    tyro.cli(main)
