"""A control, a window figure and a feature are added in five places of a copy, and all goes on as before."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve_env.agents.trained import trained_tasks
from llmserve_env.tasks import load_task

ROOT = Path(__file__).parents[1]
POLICIES = [(task_id, name) for name in ("ppo-1", "ppo-2", "ppo-3", "bc") for task_id in trained_tasks(name)]

PLAY = """
import json, sys
import numpy as np
from llmserve_env.agents.trained import trained_agent
from llmserve_env.controls import ACTION
from llmserve_env.episode import EpisodeBatch
from llmserve_env.tasks import load_task

def played(task_id, name, changes):
    task = load_task(task_id)
    task = load_task(task_id, horizon_s=task.window_s * 12, controls=task.controls | changes)
    batch, agent = EpisodeBatch(task, recorded=True), trained_agent(name, task)
    observations = batch.reset([7])
    agent.reset(task, [7])
    while not batch.over.all():
        observations = batch.step(agent.act(observations, batch.windows)).observations
    log = batch.log()
    return [log.digests[-1], log.score, observations.shape[1], len(task.grid.nvec), log.task]

def all_played(policies, changes):
    return {f"{task_id} {name}": played(task_id, name, changes) for task_id, name in policies}
"""

CHECK = """
from llmserve_env.controls import SPECS, ActionGrid, BoxActions, to_array
from llmserve_env.observation import Observer, feature_names
from llmserve_env.schema import ServeAction

task = load_task("static_workload", horizon_s=20.0)
values = {name: [value] for name, value in task.start.model_dump().items()}
grid = ActionGrid({**values, "clock_mhz": [4, 500, 2000]})
assert ActionGrid(task.grid.values).values == task.grid.values
saving = load_task("static_workload", horizon_s=20.0, extra_groups=["energy"])
slow = EpisodeBatch(
    load_task("static_workload", horizon_s=20.0, controls=task.controls | {"clock_mhz": [4, 500, 2000]})
)
slow.reset([1])
running = []
for clock in (2000, 4):
    while not slow.over.all() and len(running) < 8 * (1 + (clock == 4)):
        slow.step(to_array([ServeAction(clock_mhz=clock)]))
        running.append(int(slow.windows["running"][0]))
print(json.dumps({
    "played": all_played(policies, {}),
    "granted": all_played(policies[:2], {"clock_mhz": [4, 500, 2000]}),
    "more": sorted(set(feature_names(saving)) - set(feature_names(task))),
    "box": BoxActions(grid).records(np.zeros((1, len(SPECS))))["clock_mhz"].tolist(),
    "fast": max(running[:8]), "slow": running[-1],
}))
"""


def insert(path: Path, after: str, text: str) -> None:
    """Put text behind the only match of an expression."""
    source = path.read_text(encoding="utf-8")
    (found,) = re.finditer(after, source)
    path.write_text(source[: found.end()] + text + source[found.end() :], encoding="utf-8")


@pytest.fixture
def extended(tmp_path):
    """A copy of the package with more in it."""
    without = shutil.ignore_patterns("__pycache__")
    for name in ("llmserve_env", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    package = tmp_path / "llmserve_env"
    schema, backend = package / "schema.py", package / "backend.py"
    insert(
        schema,
        r"None lets all in\.\n    \"\"\"\n",
        "    clock_mhz: Annotated[\n"
        '        int, Field(ge=1, le=2000), Control("Clock", "log", "MHz", group="energy")\n'
        "    ] = 2000\n"
        '    """Clock of the GPUs."""\n',
    )
    source = schema.read_text(encoding="utf-8")
    schema.write_text(source.replace("EXTRA_GROUPS: tuple[str, ...] = ()", 'EXTRA_GROUPS = ("energy",)'))
    insert(
        backend,
        r"the precision of the engine that ended them\.\"\"\"\n",
        '    energy_j: Annotated[float, Figure("count", "energy", "J")]\n    """Energy taken."""\n',
    )
    insert(
        package / "observation" / "features.py",
        r"_CELL = \(\n",
        '    Feature("power", "power (W)", "energy", ("energy_j",), per="engine_s", half=500.0),\n',
    )
    (kernel,) = [
        path
        for path in (package / "sim").rglob("*.py")
        if "e.depth = action.speculation_depth" in path.read_text(encoding="utf-8")
    ]
    insert(
        kernel,
        r"e\.depth = action\.speculation_depth\n",
        "        e.batch_cap = min(e.batch_cap, action.clock_mhz)  # stands for what a slow clock does\n",
    )
    return tmp_path


def test_policies_play_as_before_where_there_is_more(extended):
    script = f"{PLAY}\npolicies = {POLICIES!r}\n{CHECK}"
    path = extended / "check.py"
    path.write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(extended), "NUMBA_CACHE_DIR": str(extended / "cache")}
    done = subprocess.run(
        [sys.executable, str(path)],
        env=environment,
        cwd=extended,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    scope: dict[str, object] = {}
    exec(PLAY, scope)
    before = scope["all_played"](POLICIES, {})  # type: ignore[operator]
    assert found["played"] == before
    for name, (_, score, features, controls, _) in found["granted"].items():
        assert score == before[name][1], "a control that a policy does not know stays as it starts"
        assert features == before[name][2] + 2, "power, and what is set of the clock"
        assert controls == before[name][3] + 1
    assert found["more"] == ["power", "set_clock_mhz"]
    assert found["box"] == [round((4 * 2000) ** 0.5)]
    assert found["slow"] <= 4 < found["fast"]


def test_the_policies_are_all_that_are_shipped():
    shipped = {
        (path.parent.parent.name, path.parent.name) for path in (ROOT / "weights").glob("*/*/policy.json")
    }
    assert set(POLICIES) == shipped
    assert load_task("static_workload").groups == load_task("death_spiral").groups
