"""`llmserve dataset`: an agent's episodes for offline reinforcement learning."""

from __future__ import annotations

import copy
import secrets
import shutil
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from llmserve_env.agents import Agent
    from llmserve_env.episode import EpisodeBatch, StepResult
    from llmserve_env.live.pilot.decision_log import Stretch
    from llmserve_env.tasks import Task

_PART = 32
"""Episodes that are played side by side, and written together."""

_BY = ("agent", "shield", "limit", "fallback")
"""Who decided, as numbers in infos of a decision log's episodes."""


def dataset(
    *,
    task: str | None = None,
    agent: str | None = None,
    episodes: int | None = None,
    first_seed: int | None = None,
    decisions: tuple[Path, ...] = (),
    name: str | None = None,
    out: Path | None = None,
) -> None:
    """Record an agent's episodes as a Minari dataset, or make one of what a live service's log has.

    Observations and actions are those of the environment LLMServe-v0: in every window the agent plays the
    point of the task's grid that is nearest to what it would set, so that every episode can be played again
    from its seed and its actions. Infos hold the parts of each reward (`components`) and its cost. The
    metadata say which task, seeds, agent and version made it, and what observations and actions mean.

    Of decision logs, an episode is a stretch of windows without a gap, and an action the point of the grid
    that is nearest to what was in force. Infos hold what was in force exactly (`applied`, one number a
    control, as in `llmserve_env.controls.ACTION`) and who decided it (`by`: 0 the agent, 1 the shield, 2 a
    limit, 3 the fallback). Such episodes cannot be played again.

    Needs `minari` and `h5py`.

    Args:
        task: id of a shipped task.
        agent: name of an agent, or folder of a trained policy (default: reactive).
        episodes: number of episodes (default: 100).
        first_seed: first seed of the episodes; all must be seeds of training (default: 0).
        decisions: files of decision logs, in place of all of the above.
        name: name of the dataset (default: llmserve/TASK/AGENT-v0, of decision logs
            llmserve/TASK/AGENT-live-v0).
        out: folder of datasets (default: Minari's own, where `minari.load_dataset(NAME)` looks).
    """
    if decisions:
        if (task, agent, episodes, first_seed) != (None,) * 4:
            raise InputError("a log says all that --task, --agent, --episodes say", field="decisions")
        _of_logs(decisions, name, out)
    elif task is None:
        raise InputError("expected --task, or --decisions", field="task")
    else:
        count = 100 if episodes is None else episodes
        first = first_seed or 0
        _of_agent(task, agent or "reactive", range(first, first + count), name, out)


def _of_agent(task: str, agent: str, seeds: range, name: str | None, out: Path | None) -> None:
    """Play, and record."""
    from tqdm import tqdm

    from llmserve_env.agents.find import find_agent
    from llmserve_env.tasks import TRAINING_SEEDS, list_tasks, load_task

    if task not in list_tasks():
        raise InputError(f"expected one of {', '.join(list_tasks())}, found '{task}'", field="task")
    if not seeds:
        raise InputError(f"expected 1 or more, found {seeds.stop - seeds.start}", field="episodes")
    if seeds[0] not in TRAINING_SEEDS or seeds[-1] not in TRAINING_SEEDS:
        raise InputError(
            f"expected seeds of training, {TRAINING_SEEDS.start} to {TRAINING_SEEDS.stop - 1}: on others "
            f"nothing may be trained; found {seeds[0]} to {seeds[-1]}",
            field="first_seed",
        )
    played = load_task(task)
    player = OnGrid(find_agent(agent, played))
    minari = _minari()
    name = name or f"llmserve/{task}/{player.name.replace(':', '-')}-v0"
    metadata = _metadata(name, played, player.name, minari.__version__)
    metadata["llmserve"]["seeds"] = [seeds[0], seeds[-1]]

    def fill(storage: Any) -> None:
        with tqdm(total=len(seeds), unit="episode", disable=None) as bar:
            for low in range(0, len(seeds), _PART):
                part = seeds[low : low + _PART]
                storage.update_episodes(record(player, played, part))
                bar.update(len(part))

    path = _path(minari, name, out)
    _write(path, played, metadata, fill, spec=True)
    _say(len(seeds), path, name, out)


def _of_logs(files: Sequence[Path], name: str | None, out: Path | None) -> None:
    """Of what decision logs have."""
    import sys

    from llmserve_env.live.pilot.decision_log import one_task, read_decisions

    stretches = read_decisions(files, lambda text: print(text, file=sys.stderr))
    if not stretches:
        raise InputError("no window whose outcome is known", file=", ".join(map(str, files)))
    task = one_task(stretches)
    minari = _minari()
    agent = ", ".join(sorted({each.beginning.agent for each in stretches}))
    name = name or f"llmserve/{task.id}/{agent.replace(', ', '-').replace(':', '-')}-live-v0"
    metadata = _metadata(name, task, agent, minari.__version__)
    metadata["llmserve"] |= {
        "runs": sorted({each.beginning.run for each in stretches}),
        "rewards": sorted({each.beginning.reward for each in stretches}),
        "by": list(_BY),
    }
    episodes = [_episode(stretch, task) for stretch in stretches]
    path = _path(minari, name, out)
    _write(path, task, metadata, lambda storage: storage.update_episodes(episodes), spec=False)
    _say(len(episodes), path, name, out)


def _episode(stretch: Stretch, task: Task) -> Any:
    """A Minari episode of a stretch; it is cut off at its end, and does not terminate."""
    from llmserve_env.controls import CONTROLS, to_array

    buffer = import_module("minari.data_collector").EpisodeBuffer
    actions = to_array([each.applied for each in stretch.decisions])
    count = len(actions)
    applied = np.stack([actions[control].astype(np.float64) for control in CONTROLS], axis=1)
    by = np.array([_BY.index(each.by) for each in stretch.decisions])
    return buffer(
        observations=stretch.observations,
        actions=task.grid.indices(actions),
        rewards=stretch.rewards,
        terminations=np.zeros(count, bool),
        truncations=np.arange(count) == count - 1,
        infos={
            key: np.concatenate([np.zeros_like(each[:1]), each])
            for key, each in {"applied": applied, "by": by}.items()
        },
    )


def _write(
    path: Path, task: Task, metadata: dict[str, Any], fill: Callable[[Any], object], *, spec: bool
) -> None:
    """Write a dataset that appears whole or not at all."""
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    new = [each for each in path.parents if not each.exists()]
    try:
        folder.mkdir(parents=True)
        storage = _storage(folder, task, spec=spec)
        storage.update_metadata(metadata)
        fill(storage)
        folder.rename(path)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", file=str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for each in new:  # those that nothing came to lie in
            with suppress(OSError):
                each.rmdir()


def _say(episodes: int, path: Path, name: str, out: Path | None) -> None:
    print(f"wrote {episodes} episodes, {path}")
    where = (
        f"minari.load_dataset({name!r})" if out is None else f"minari.MinariDataset({str(path / 'data')!r})"
    )
    print(f"read it with {where}")


class OnGrid:
    """An agent that sets the nearest points of the task's grid; it keeps what it saw and set.

    Args:
        agent: agent whose choices are taken there.

    Attributes:
        name: the agent's.
        observations: float32[n, features] of every window so far.
        indices: int64[n, controls], what was set in them.
    """

    def __init__(self, agent: Agent) -> None:
        self.name = agent.name
        self._agent = agent
        self._task: Task | None = None
        self.observations: list[NDArray[np.float32]] = []
        self.indices: list[NDArray[np.int64]] = []

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes."""
        self._task = task
        self.observations, self.indices = [], []
        self._agent.reset(task, seeds)

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], points of the grid."""
        if self._task is None:
            raise InputError("call reset before act")
        grid = self._task.grid
        self.observations.append(observations)
        self.indices.append(grid.indices(self._agent.act(observations, windows)))
        return grid.actions(self.indices[-1])


def record(player: OnGrid, task: Task, seeds: range) -> list[Any]:
    """Play episodes; a Minari episode for each."""
    from llmserve_env.agents import play

    buffer = import_module("minari.data_collector").EpisodeBuffer
    windows: list[tuple[NDArray[Any], ...]] = []
    lengths = np.zeros(len(seeds), np.int64)

    def watch(batch: EpisodeBatch, result: StepResult) -> None:
        lengths[:] = batch.steps
        windows.append(
            (
                result.observations,
                result.rewards,
                result.terminated,
                result.truncated,
                batch.components.copy(),
                batch.costs.copy(),
            )
        )

    play(player, task, seeds, size=len(seeds), watch=watch)
    observations, rewards, terminated, truncated, components, costs = (
        np.stack(column) for column in zip(*windows, strict=True)
    )
    seen = np.concatenate([player.observations[0][None], observations])
    actions = np.stack(player.indices)
    episodes = []
    for i, (seed, length) in enumerate(zip(seeds, lengths.tolist(), strict=True)):
        infos = {"components": components[:length, i], "cost": costs[:length, i]}
        episodes.append(
            buffer(
                seed=seed,
                observations=seen[: length + 1, i],
                actions=actions[:length, i],
                rewards=rewards[:length, i],
                terminations=terminated[:length, i],
                truncations=truncated[:length, i],
                # An entry for the reset, too: Minari's own collector has one.
                infos={key: np.concatenate([np.zeros_like(each[:1]), each]) for key, each in infos.items()},
            )
        )
    return episodes


def _minari() -> Any:
    try:
        import_module("h5py")
        return import_module("minari")
    except ImportError as error:
        raise InputError(f"the package {error.name} is missing: pip install 'minari[hdf5]'") from error


def _path(minari: Any, name: str, out: Path | None) -> Path:
    """Where the dataset comes to lie: absolute, as Minari joins a relative path to itself."""
    try:
        minari.dataset.minari_dataset.parse_dataset_id(name)
    except ValueError as error:
        raise InputError(f"expected NAMESPACE/NAME-vN, found '{name}'", field="name") from error
    root = out or Path(import_module("minari.storage.datasets_root_dir").get_dataset_path())
    try:
        path = Path(root).absolute() / name
        is_there = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise InputError(f"cannot be written: {error}", file=str(root)) from error
    if is_there:
        raise InputError("is there already: remove it or give another --name", file=str(path))
    return path


def _storage(folder: Path, task: Task, *, spec: bool) -> Any:
    """An empty dataset.

    Args:
        folder: folder of the dataset.
        task: task whose actions it has.
        spec: whether an environment can play its episodes again.
    """
    import gymnasium

    from llmserve_env.envs import spaces

    env_spec = None
    if spec:
        env_spec = copy.deepcopy(gymnasium.spec("LLMServe-v0"))
        env_spec.kwargs = {"task_id": task.id}
    data = folder / "data"
    return import_module("minari.dataset.minari_storage").MinariStorage.new(
        data,
        observation_space=spaces.observation_space(task.groups),
        action_space=spaces.action_space(task.grid),
        env_spec=env_spec,
        data_format="hdf5",
    )


def _metadata(name: str, task: Task, agent: str, minari_version: str) -> dict[str, Any]:
    from llmserve_env.observation import features
    from llmserve_env.report.provenance import made_by
    from llmserve_env.report.version import __version__
    from llmserve_env.rewards import COMPONENTS

    return {
        "dataset_id": name,
        "minari_version": minari_version,
        "algorithm_name": agent,
        "author": {"LLMServe contributors"},
        "description": f"{task.title}. Played by the agent {agent}.",
        "requirements": [f"llmserve-env=={__version__}"],
        "license": "Apache-2.0",
        "llmserve": {
            "package_version": __version__,
            "task_id": task.id,
            "task": task.model_dump(mode="json"),
            "agent": agent,
            "features": [
                {"name": feature.name, "meaning": feature.meaning, "half": feature.half}
                for feature in features(task.groups)
            ],
            "controls": {control: list(values) for control, values in task.grid.values.items()},
            "components": list(COMPONENTS),
            "made_by": made_by(),
        },
    }
