"""The side of a control folder that is an engine's, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmserve_env.errors import InputError
from llmserve_env.live.servers.engine_settings import (
    AppliedSettings,
    EngineSettings,
    EngineStatus,
    read_settings,
    write_status,
)

STARTED = AppliedSettings(batch_cap=64, kv_budget_fraction=1.0, speculation_depth=4)


@dataclass
class FolderEngine:
    """Answers in a control folder as `LiveScheduler` does, when it is told to look.

    Args:
        folder: of the server.
        engine: index within it.
        fixed_depth: whether its speculation depth cannot change.
        started: what it was started with.
    """

    folder: Path
    engine: int = 0
    fixed_depth: bool = False
    started: AppliedSettings = STARTED

    def __post_init__(self):
        self.asked = EngineSettings()
        self.look()

    def look(self) -> AppliedSettings:
        """Read the settings and answer; returns what is in force."""
        refused = None
        try:
            self.asked = read_settings(self.folder)
        except InputError as error:
            refused = str(error)
        applied, not_applied = self.asked.within(self.started, fixed_depth=self.fixed_depth)
        status = EngineStatus(
            engine=self.engine,
            pid=1,
            vllm_version="0.32.0",
            started=self.started,
            fixed_depth=self.fixed_depth,
            asked=self.asked,
            applied=applied,
            not_applied=not_applied,
            refused=refused,
        )
        write_status(self.folder, status)
        return applied
