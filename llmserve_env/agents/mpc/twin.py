"""Simulated cells whose requests are told to them as they come, and whose state can be copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.sim.simulator import SimulatorBatch
from llmserve_env.sim.state import OUTCOME, PS_PER_S
from llmserve_env.workloads.workload import Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmserve_env.agents.mpc.traffic import Requests
    from llmserve_env.tasks import Task


class Twins(SimulatorBatch):
    """Cells like a task's, empty at first. Prompts share no prefixes.

    Args:
        task: says what the cells are and who is served.
        episodes: how many cells.
        room: requests that each can be told of.
        threads: threads that serve the cells (None: one for each core).
    """

    def __init__(self, task: Task, episodes: int, room: int, *, threads: int | None = 1) -> None:
        # Placeholders that reserve the room: none of them ever arrives.
        none, one = np.zeros(room), np.ones(room, np.int32)
        reserved = Workload(none, one, one, none.astype(np.int16), task.tenants)
        super().__init__(
            task.profile,
            [reserved] * episodes,
            engines=task.cell.engines,
            prefill_engines=task.cell.prefill_engines,
            max_num_batched_tokens=task.cell.max_num_batched_tokens,
            prefix_cache=task.cell.prefix_cache,
            action=task.start,
            threads=threads,
        )
        self.room = room
        self.cells["requests"] = 0

    def tell(self, episode: int, requests: Requests) -> None:
        """Let requests come, none before the present.

        Raises:
            InputError: there is no room for them.
        """
        known, count = int(self.cells["requests"][episode]), len(requests.arrival_s)
        if known + count > self.room:
            raise InputError(f"expected at most {self.room}, found {known + count}", field="requests")
        first = int(self._first[episode]) + known
        rows: Any = self.requests[first : first + count]
        rows["arrival_ps"] = np.rint(requests.arrival_s * PS_PER_S)
        for name in ("prompt_tokens", "output_tokens", "tenant"):
            rows[name] = getattr(requests, name)
        outcomes: Any = self.outcomes[first : first + count]
        outcomes[:] = np.zeros(1, OUTCOME)
        outcomes["next"] = outcomes["segment"] = -1
        outcomes["sent_ps"] = rows["arrival_ps"]
        self.cells["requests"][episode] = known + count

    def copy_from(self, episodes: NDArray[np.int64], source: Twins, episode: int) -> None:
        """Bring cells (int64[k]) to the state of another batch's cell, its requests included."""
        count, cells, engines = int(source.cells["requests"][episode]), len(self.cells), self.engines.shape[1]
        for name in ("cells", "engines", "now_s", "_now_ps", "_over", "windows"):
            getattr(self, name)[episodes] = getattr(source, name)[episode]
        self.engines["row"] = np.arange(self.engines.size).reshape(self.engines.shape)
        for name in ("slots", "queue", "nodes", "table"):
            mine, other = getattr(self, name), getattr(source, name)
            rows = mine.reshape(cells, engines, *mine.shape[1:])
            rows[episodes] = other.reshape(len(source.cells), engines, *other.shape[1:])[episode]
        for name in ("requests", "outcomes", "transfers", "retries"):
            mine, other = getattr(self, name), getattr(source, name)
            if len(mine):
                rows = mine.reshape(cells, self.room)
                rows[episodes, :count] = other.reshape(len(source.cells), source.room)[episode, :count]


def wider(task: Task, twins: Twins, room: int) -> Twins:
    """The same cells in the same state, with more room."""
    made = Twins(task, len(twins.cells), room)
    for episode in range(len(twins.cells)):
        made.copy_from(np.array([episode]), twins, episode)
    return made
