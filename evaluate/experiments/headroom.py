"""How much control is worth in a task: from random actions to a plan that knows the episode beforehand.

    python -m evaluate.experiments.headroom --task bursty_workload

plays evaluation seeds with random actions, vLLM's defaults, the best constant action of a search over at
least 2,000 (on training seeds), the tuned reactive rule, and a clairvoyant plan, which is searched anew for
every episode. Then, for each control, the clairvoyant plan once more with that control fixed at its best
constant value: what it loses is what changing that control is worth. Each seed's results are written as they
come; the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from evaluate.search import PlanPlayer, best_constants, clairvoyant
from llmserve_env.agents import load_agent
from llmserve_env.controls import to_action, to_array
from llmserve_env.episode import prepare
from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.play import play
from llmserve_env.report.provenance import made_by
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, TRAINING_SEEDS, Task, load_task

if TYPE_CHECKING:
    from numpy.typing import NDArray

REFERENCES = ("random", "defaults", "reactive")
"""Agents that are played as they are shipped."""

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Settings:
    """What is searched, and how hard.

    Attributes:
        task: id of a shipped task, or path of a task file.
        seeds: evaluation seeds that are played.
        constants: constant actions that are tried, at least.
        rounds: rounds of the clairvoyant search.
        children: plans played in a round.
        more_rounds: rounds that follow from that plan on, with all controls free and with each one fixed.
    """

    task: str
    seeds: int = 10
    constants: int = 2048
    rounds: int = 20
    children: int = 128
    more_rounds: int = 5


def main(
    settings: Annotated[Settings, tyro.conf.arg(name="")], *, jobs: int = 2, out: Path | None = None
) -> None:
    """Measure the headroom of a task.

    Args:
        settings: what is searched, and how hard.
        jobs: number of processes.
        out: file of the results (default: evaluate/results/headroom-TASK.json).
    """
    if settings.seeds < 2:
        raise InputError(f"expected 2 or more, found {settings.seeds}", field="seeds")
    task = load_task(settings.task)
    path = out or RESULTS / f"headroom-{task.id}.json"
    state = _resumed(path, settings) or {
        "settings": asdict(settings),
        "best_constant": _best_constant(task, settings),
        "scores": {},
    }
    _save(path, state)
    seeds = [seed for seed in EVALUATION_SEEDS[: settings.seeds] if str(seed) not in state["scores"]]
    starts = [ServeAction.model_validate(row) for row in state["best_constant"]["survivors"]]
    prepare()
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(seeds), unit="episode", desc="clairvoyant plans", disable=None) as progress,
    ):
        futures: dict[Future[dict[str, float]], int] = {
            pool.submit(_episode, settings, starts, seed): seed for seed in seeds
        }
        try:
            for future in as_completed(futures):
                state["scores"][str(futures[future])] = future.result()
                _save(path, state)
                progress.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _save(path, {**state, "made_by": made_by(), "references": _references(task, settings)})
    print(f"wrote {path}; python -m evaluate.experiments.headroom_report makes the table and the picture")


def _references(task: Task, settings: Settings) -> dict[str, list[float]]:
    """Scores of the agents that are played as they are shipped, in the order of the seeds."""
    seeds = list(EVALUATION_SEEDS[: settings.seeds])
    return {name: play(load_agent(name, task), task, seeds).scores.tolist() for name in REFERENCES}


def _resumed(path: Path, settings: Settings) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = state["settings"] == asdict(settings)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("is no result of this command; give another --out", file=str(path)) from error
    if not same:
        raise InputError("holds results of other settings; remove it or give another --out", file=str(path))
    return state


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(state, indent=1) + "\n")


def _best_constant(task: Task, settings: Settings) -> dict[str, Any]:
    with tqdm(unit="episode", desc="constant actions", disable=None) as progress:
        player = PlanPlayer(task, progress=progress.update)
        actions, scores = best_constants(player, list(TRAINING_SEEDS[:16]), at_least=settings.constants)
    return {
        "action": to_action(actions[0]).model_dump(mode="json"),
        "tuning_score": float(scores[0]),
        "tried": max(settings.constants, task.grid.size),
        "episodes": player.episodes,
        "survivors": [to_action(row).model_dump(mode="json") for row in actions],
    }


def _episode(settings: Settings, starts: list[ServeAction], seed: int) -> dict[str, float]:
    """Scores of the best constant, the clairvoyant plan, and that with each control fixed."""
    task = load_task(settings.task)
    player = PlanPlayer(task)
    constants = to_array([*starts, task.start])[:, None]
    scores = {"best_constant": float(player.play([seed], constants[:1])[0])}
    plan, _ = clairvoyant(player, seed, constants, rounds=settings.rounds, children=settings.children)
    known: NDArray[np.void] = np.empty((len(constants) + 1, task.windows), plan.dtype)
    known[:-1], known[-1] = constants, plan
    for name in (None, *task.grid.granted):  # all go on from the same plan, equally far
        scores["clairvoyant" if name is None else f"fixed {name}"] = clairvoyant(
            player,
            seed,
            known,
            rounds=settings.more_rounds,
            children=settings.children,
            fixed=[] if name is None else [name],
        )[1]
    return scores


if __name__ == "__main__":
    tyro.cli(main)
