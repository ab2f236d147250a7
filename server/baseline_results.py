"""Results of baselines: one entry an episode, kept as it finishes, and what they amount to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.files import write_atomic
from llmserve_env.report.stats import interval

_KEY = ("task_id", "agent", "seed")


class Results:
    """Episodes that are finished; where there is a file, it has them as soon as they are.

    Args:
        settings: all that scores depend on beside task, agent and seed.
        path: of a JSON file; one with the same settings is gone on with.

    Attributes:
        settings: as given.
        episodes: an entry each, with task_id, agent, seed and score.

    Raises:
        InputError: the file has other settings, or is none of these.
    """

    def __init__(self, settings: dict[str, Any], path: Path | None = None) -> None:
        self.settings = settings
        self.path = path
        self.episodes: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.episodes = _read(path, settings)
        elif path is not None and not path.parent.is_dir():
            raise InputError(f"cannot be written: there is no folder {path.parent}", file=str(path))

    def has(self, task_id: str, agent: str, seed: int) -> bool:
        """Whether an episode is finished."""
        return any(tuple(entry[name] for name in _KEY) == (task_id, agent, seed) for entry in self.episodes)

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a finished episode."""
        self.episodes.append(entry)
        if self.path is not None:
            write_atomic(self.path, json.dumps(self.content(), indent=1, allow_nan=False) + "\n")

    def content(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"settings": self.settings, "summary": summary(self.episodes), "episodes": self.episodes}


def summary(episodes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean score and its 95% interval (None of a single episode) by task and agent."""
    scores: dict[str, dict[str, list[float]]] = {}
    for entry in episodes:
        scores.setdefault(entry["task_id"], {}).setdefault(entry["agent"], []).append(entry["score"])
    return {
        task_id: {agent: _statistics(found) for agent, found in agents.items()}
        for task_id, agents in scores.items()
    }


def _statistics(scores: list[float]) -> dict[str, Any]:
    sure = asdict(interval(scores, statistic=np.mean)) if len(scores) > 1 else None
    return {
        "episodes": len(scores),
        "mean": float(np.mean(scores)),
        "interval": [sure["low"], sure["high"]] if sure else None,
    }


def _read(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, episodes = content["settings"], content["episodes"]
        complete = all({*_KEY, "score"} <= set(entry) for entry in episodes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot be gone on with: {error!r}", file=str(path)) from error
    if not complete:
        raise InputError(f"expected {', '.join(_KEY)} and score of every episode", file=str(path))
    for name in sorted({*found, *settings}):
        if found.get(name) != settings.get(name):
            raise InputError(
                f"is of {found.get(name)!r}, not {settings.get(name)!r}: name another file",
                file=str(path),
                field=name,
            )
    kept: list[dict[str, Any]] = episodes
    return kept
