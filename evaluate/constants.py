"""The best constant action of a task that was changed, by a small search on training seeds.

What was tuned to a task may fit badly once its traffic, cell or load is another, and whoever is compared with
it then looks good. So a constant is searched anew in each place, for an agent to be compared with that too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import llmserve_env
from evaluate.jobs import Setting
from evaluate.scores import setting_name
from evaluate.search import PlanPlayer, best_constants
from llmserve_env.agents.constant import ConstantAgent
from llmserve_env.agents.tuned import tuned_constant
from llmserve_env.controls import to_action, to_array
from llmserve_env.episode import prepare
from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.play import play
from llmserve_env.report.provenance import made_by
from llmserve_env.tasks import TRAINING_SEEDS, Task


@dataclass(frozen=True)
class Found:
    """A constant action that was searched for in a setting.

    Attributes:
        action: its controls.
        tuning_score: mean on the training seeds of the last rung; as the best of some, a little too high.
        episodes: that the search played.
        scores: float64[seeds], on the seeds of the comparison.
    """

    action: dict[str, Any]
    tuning_score: float
    episodes: int
    scores: NDArray[np.float64]


def search_constants(
    settings: Sequence[Setting], seeds: Sequence[int], tried: int, out: Path, *, processes: int = 1
) -> dict[Setting, Found]:
    """Search where it was not done yet, and play what was found.

    Args:
        settings: where.
        seeds: of the comparison; the search uses the first training seeds, whatever these are.
        tried: actions that are tried in each.
        out: folder of the results, a file for each setting.
        processes: to search in.

    Raises:
        InputError: fewer than 2 are to be tried, or a file holds something else.
    """
    if tried < 2:
        raise InputError(f"expected 2 or more, or 0 for no search, found {tried}", field="constants")
    paths = {setting: out / f"{setting_name(setting)}.json" for setting in settings}
    found = {}
    for setting, path in paths.items():
        state = _read(path, setting, tried)
        if state is not None and set(map(str, seeds)) <= set(state["scores"]):
            found[setting] = _found(state, seeds)
    missing = [setting for setting in settings if setting not in found]
    with tqdm(total=len(missing), unit="place", desc="constants", disable=not missing or None) as bar:
        for setting, state in _searched(missing, seeds, tried, processes):
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(paths[setting], json.dumps({**state, "made_by": made_by()}, indent=1) + "\n")
            found[setting] = _found(state, seeds)
            bar.update()
    return {setting: found[setting] for setting in settings}


def first_tries(task: Task, tried: int) -> NDArray[np.void]:
    """Constant actions to begin with.

    Returns:
        ACTION[tried]: the one that was tuned to the task, its start, as many as half of them like the former
        but for one or two controls, and random points of the grid.
    """
    rng = np.random.default_rng(0)
    best = to_array([tuned_constant(task.id)])
    near = np.repeat(best, tried // 2)
    values = {name: task.grid.codes(name) for name in task.controls}
    for row in near:
        for name in rng.choice(list(values), rng.integers(1, 3), replace=False):
            row[name] = rng.choice(values[name])
    random = task.grid.actions(rng.integers(task.grid.nvec, size=(tried, len(task.grid.nvec))))
    return np.concatenate([best, to_array([task.start]), near, random])[:tried]


def _search(setting: Setting, seeds: Sequence[int], tried: int) -> dict[str, Any]:
    task = setting.open()
    player = PlanPlayer(task)
    training = TRAINING_SEEDS[:12]
    tries = first_tries(task, tried)
    rungs = ((2, max(tried // 4, 1)), (6, max(tried // 16, 1)), (len(training), 1))
    actions, means = best_constants(player, training, rungs=rungs, actions=tries)
    carried = player.play(training, np.repeat(tries[:1, None], len(training), axis=0)).mean()
    if carried >= means[0]:  # it may have done badly on the first seeds only
        actions, means = tries[:1], np.array([carried])
    action = to_action(actions[0])
    scores = play(ConstantAgent(action, "constant"), task, seeds).scores
    return {
        "setting": setting.model_dump(mode="json"),
        "tried": tried,
        "package_version": llmserve_env.__version__,
        "action": action.model_dump(mode="json"),
        "tuning_score": float(means[0]),
        "episodes": player.episodes,
        "scores": dict(zip(map(str, seeds), scores.tolist(), strict=True)),
    }


def _searched(settings: Sequence[Setting], seeds: Sequence[int], tried: int, processes: int) -> Any:
    if processes < 2 or len(settings) < 2:
        for setting in settings:
            yield setting, _search(setting, seeds, tried)
        return
    prepare()
    with ProcessPoolExecutor(min(processes, len(settings)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_search, setting, seeds, tried): setting for setting in settings}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(path: Path, setting: Setting, tried: int) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = (state["setting"], state["tried"], state["package_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("is no result of this command; remove it", file=str(path)) from error
    if found != (setting.model_dump(mode="json"), tried, llmserve_env.__version__):
        raise InputError(
            "holds a search of another setting, size or version; remove it or give another --out",
            file=str(path),
        )
    return state


def _found(state: Mapping[str, Any], seeds: Sequence[int]) -> Found:
    scores = np.array([state["scores"][str(seed)] for seed in seeds])
    return Found(state["action"], state["tuning_score"], state["episodes"], scores)
