"""A shield around an agent, and a log of what it overrode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmserve_env.agents.shield.filter import RULES, Filtered, ShieldFilter, ShieldState
from llmserve_env.agents.shield.settings import ShieldSettings, shield_settings
from llmserve_env.controls import CONTROLS, to_action
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llmserve_env.agents.agent import Agent
    from llmserve_env.tasks import Task


class Shield:
    """Plays an agent's actions, but for those that a rule overrides (`ShieldFilter`).

    In every window the agent is asked, so that its memory goes on.

    Args:
        agent: is shielded.
        settings: thresholds (default: data/shield.toml).
        log_limit: interventions of an episode that are kept, the first ones.
        name: under which results are reported (default: "shielded:" and the agent's).

    Attributes:
        log: for each episode its interventions, JSON-ready: `window` (index of the one that the action is
            for), `seed`, `rule`, `reason`, `proposed` and `applied` (the controls in which the two differ).
        interventions: int64[n, 3], how many by rule, in the order of RULES; those beyond `log_limit`, too.
        windows: int64[n], for how many the agent was asked.
        in_force: ACTION[n], what the last windows were served under; None before the first action, which no
            rule changes. To be set where something else than the last action came into force.
    """

    def __init__(
        self,
        agent: Agent,
        settings: ShieldSettings | None = None,
        *,
        log_limit: int = 1000,
        name: str | None = None,
    ) -> None:
        self.name = name or f"shielded:{agent.name}"
        self.agent = agent
        self._settings = settings or shield_settings()
        self._limit = log_limit
        self._state: ShieldState | None = None
        self.log: list[list[dict[str, Any]]] = []
        self.interventions = np.zeros((0, len(RULES)), np.int64)
        self.windows = np.zeros(0, np.int64)
        self.in_force: NDArray[np.void] | None = None

    @property
    def autonomy_rate(self) -> NDArray[np.float64]:
        """float64[n], share of an episode's windows in which the agent's own action stood (1 before any)."""
        rate: NDArray[np.float64] = 1.0 - self.interventions.sum(axis=1) / np.maximum(self.windows, 1)
        return rate

    def reset(self, task: Task, seeds: Sequence[int]) -> None:
        """Begin episodes, with an empty log."""
        self.agent.reset(task, seeds)
        self._seeds = [int(seed) for seed in seeds]
        self._filter = ShieldFilter(task, self._settings)
        self._state = self._filter.begin(len(seeds))
        self.in_force = None
        self.log = [[] for _ in seeds]
        self.interventions = np.zeros((len(seeds), len(RULES)), np.int64)
        self.windows = np.zeros(len(seeds), np.int64)

    def act(self, observations: NDArray[np.float32], windows: NDArray[np.void]) -> NDArray[np.void]:
        """ACTION[n], the agent's or a rule's.

        Raises:
            InputError: no episode has begun.
        """
        if self._state is None:
            raise InputError("call reset before act")
        proposed = self.agent.act(observations, windows)
        in_force = proposed if self.in_force is None else self.in_force
        found = self._filter.filter(self._state, proposed, in_force, windows)
        self._note(proposed, found)
        self._state = found.state
        self.windows += found.going
        self.in_force = found.actions.copy()
        return found.actions

    def _note(self, proposed: NDArray[np.void], found: Filtered) -> None:
        """Log the episodes in which the agent's action does not stand."""
        for i, (rule, reason) in enumerate(zip(found.rules, found.reasons, strict=True)):
            if rule is None:
                continue
            self.interventions[i, RULES.index(rule)] += 1
            if len(self.log[i]) >= self._limit:
                continue
            names = [name for name in CONTROLS if proposed[name][i] != found.actions[name][i]]
            self.log[i].append(
                {
                    "window": int(self.windows[i]),
                    "seed": self._seeds[i],
                    "rule": rule,
                    "reason": reason,
                    "proposed": _values(proposed[i], names),
                    "applied": _values(found.actions[i], names),
                }
            )


def _values(row: NDArray[np.void], names: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = to_action(row).model_dump(mode="json", include=set(names))
    return values
