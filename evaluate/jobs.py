"""Episodes to play, in parts that do not depend on each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from evaluate.llm import play_llm
from llmserve_env.agents.find import find_agent
from llmserve_env.agents.llm_settings import LLM
from llmserve_env.errors import InputError
from llmserve_env.play import Played, play
from llmserve_env.tasks import Task, load_task
from llmserve_env.workloads.uri import parse_uri

LEAST_LOAD, GREATEST_LOAD = 0.5, 2.0


class Setting(BaseModel):
    """A task, as it is shipped or changed to see how far an agent generalises.

    Attributes:
        task: id of a shipped task, or path of a task file.
        workload: URI that takes the place of the task's traffic.
        profile: hardware and model that take the place of the task's.
        load: factor on all arrival rates.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    workload: str | None = None
    profile: str | None = None
    load: float = Field(1.0, ge=LEAST_LOAD, le=GREATEST_LOAD)

    @property
    def changed(self) -> bool:
        """Whether it is another than the task as it is shipped."""
        return self != Setting(task=self.task)

    def open(self) -> Task:
        """The task.

        Raises:
            InputError: the task, workload or profile cannot be used.
        """
        changes: dict[str, Any] = {
            name: value for name in ("workload", "profile") if (value := getattr(self, name)) is not None
        }
        if self.load != 1.0:
            changes["workload"] = _loaded(load_task(self.task, **changes).workload, self.load)
        return load_task(self.task, **changes)


def _loaded(workload: str | dict[str, Any], load: float) -> str | dict[str, Any]:
    """A workload with all its rates multiplied."""
    if not isinstance(workload, str):
        regimes = [
            {**regime, "rates": {name: rate * load for name, rate in regime["rates"].items()}}
            for regime in workload["regimes"]
        ]
        return {**workload, "regimes": regimes}
    uri = parse_uri(workload)
    name = "scale" if uri.scheme in ("trace", "scenario") else "rate"
    if name == "rate" and name not in uri.query:
        raise InputError(f"expected a workload with a rate, such as {uri.scheme}://?rate=8", field="load")
    rate = float(uri.query.get(name, "1")) * load
    return str(replace(uri, query={**uri.query, name: repr(rate)}))


class Job(NamedTuple):
    """A few episodes of an agent.

    Attributes:
        agent: as `find_agent` takes it.
        setting: what it plays.
        seeds: of the episodes, played side by side.
    """

    agent: str
    setting: Setting
    seeds: tuple[int, ...]


def play_job(job: Job) -> Played:
    """Play them."""
    task = job.setting.open()
    if job.agent.startswith(LLM):
        return play_llm(job.agent, task, job.seeds)
    return play(find_agent(job.agent, task), task, job.seeds)
