"""Write tests/golden/tasks anew after an intended change: python -m tests.contract.regenerate_goldens."""

from __future__ import annotations

from llmserve_env.grading import write_log
from llmserve_env.tasks import list_tasks

from .episodes import GOLDENS, golden_episode

if __name__ == "__main__":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for stale in {path.stem for path in GOLDENS.glob("*.json")} - set(list_tasks()):
        (GOLDENS / f"{stale}.json").unlink()
        print(f"{stale}.json: removed, there is no such task")
    for task_id in list_tasks():
        path = GOLDENS / f"{task_id}.json"
        before = path.read_bytes() if path.exists() else None
        write_log(path, golden_episode(task_id).log())
        print(f"{path.name}: {'as before' if path.read_bytes() == before else 'changed'}")
