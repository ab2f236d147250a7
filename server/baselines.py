"""Reference runs that the service answers with: each episode is played once."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from llmserve_env.errors import InputError
from llmserve_env.tasks import EVALUATION_SEEDS, list_tasks
from server.hosted import shipped_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.guard import Guard

Mode = Literal["deterministic", "openai"]


class Baselines:
    """Plays what nobody has asked for yet, one task at a time, and remembers it.

    Who asks for fewer episodes reads those of who asked for more. A task is played for one client at a time;
    others wait for it only if they want more of the same.

    Args:
        guard: plays the reference agents.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._played: defaultdict[tuple[Mode, str], list[list[dict[str, Any]]]] = defaultdict(list)
        self._settings: dict[Mode, dict[str, Any]] = {}
        self._locks: defaultdict[tuple[Mode, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="language model")

    async def content(self, mode: Mode, task_id: str | None, episodes: int) -> dict[str, Any]:
        """Scores of agents that need nobody, or of the language model that the service has a key for.

        Args:
            mode: who plays. Where the language model does, a cancellation ends its episode after the call
                that is under way; finished episodes are kept.
            task_id: a shipped task; all of them if None.
            episodes: episodes of each task and agent.

        Returns:
            As the suites of `baseline_inference`.

        Raises:
            NotFound: no such task.
            InputError: there is no key, or no task is named for the language model, which is asked in every
                window.
        """
        from server.baseline_results import summary

        if task_id is None and mode == "openai":
            raise InputError(f"expected one of {', '.join(list_tasks())}", field="task_id")
        tasks = [shipped_task(task_id).id] if task_id else list_tasks()
        for task in tasks:
            async with self._locks[mode, task]:
                await self._play(mode, task, episodes)
        found = [entry for task in tasks for entry in _in_order(self._played[mode, task][:episodes])]
        return {"settings": self._settings[mode], "summary": summary(found), "episodes": found}

    def close(self) -> None:
        """End what is being played."""
        self._asking.shutdown(wait=False, cancel_futures=True)

    async def _play(self, mode: Mode, task_id: str, episodes: int) -> None:
        from server import baseline_inference

        played = self._played[mode, task_id]
        while (missing := episodes - len(played)) > 0:
            seed = EVALUATION_SEEDS.start + len(played)
            if mode == "openai":
                missing = 1  # so that what is finished is kept
                content = await self._ask(task_id, seed)
            else:
                content = await self._guard.run(
                    baseline_inference.deterministic_suite, [task_id], missing, seed=seed
                )
            self._settings[mode] = content["settings"]
            by_seed: dict[int, list[dict[str, Any]]] = {seed + number: [] for number in range(missing)}
            for entry in content["episodes"]:
                by_seed[entry["seed"]].append(entry)
            played += by_seed.values()

    async def _ask(self, task_id: str, seed: int) -> dict[str, Any]:
        """Have the language model play an episode, for as long as this is awaited."""
        from server import baseline_inference

        stopped = threading.Event()

        def check(*_: object) -> None:
            if stopped.is_set():
                raise _Stopped

        def play() -> dict[str, Any]:
            return baseline_inference.openai_suite([task_id], 1, check, seed=seed)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._asking, play)
        finally:
            stopped.set()


class _Stopped(Exception):
    """Nobody waits for the episode any more."""


def _in_order(episodes: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Entries by agent, then by seed, from entries by seed, then by agent."""
    return [entry for of_agent in zip(*episodes, strict=True) for entry in of_agent]
