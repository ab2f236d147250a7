"""`llmserve grade`: what an episode's log is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmserve_env.schema import GradeResult


def grade(file: Path, /, *, allow_files: bool = False, max_windows: int = 10_000) -> None:
    """Replay an episode's log and say what it scores.

    A log that is not what the simulator did is refused, with the place that differs.

    Args:
        file: a log that `llmserve_env.grading.write_log` wrote, gzip'ed if it ends in .gz.
        allow_files: whether the log's task may name files of this machine, such as a trace of your own.
        max_windows: windows that the log may have; no more is read of a file that is longer than such a log.

    Raises:
        InputError: the file cannot be read, or the log does not match its replay.
    """
    from llmserve_env import grading
    from llmserve_env.errors import InputError

    if max_windows < 1:
        raise InputError(f"expected 1 or more, found {max_windows}", field="--max-windows")
    log = grading.read_log(file, max_windows=max_windows)
    try:
        result = grading.grade(log, allow_files=allow_files)
    except InputError as error:
        place = error.file or str(file)
        raise InputError(error.reason, file=place, line=error.line, field=error.field) from error
    tell(result)


def tell(result: GradeResult) -> None:
    """Print a grade."""
    print(f"{result.task_id}, {'evaluation' if result.held_out else 'training'} seed {result.seed}")
    if result.custom:
        print("not the shipped task of this name" if _is_shipped(result.task_id) else "not a shipped task")
    rows = [("score", f"{result.score:.4f}")]
    rows += [(f"  {name}", f"{part:.4f}") for name, part in result.components.items()]
    rows += [
        ("windows", f"{result.windows}{'' if result.complete else ', cut short: the rest earns nothing'}")
    ]
    rows += [(name.replace("_", " "), f"{count:,}") for name, count in result.requests.items()]
    rows += [("verified", "yes, by replay" if result.verified else "no: live, its score is what it states")]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"  {label:<{width}}  {value}")


def _is_shipped(task_id: str) -> bool:
    from llmserve_env.tasks import list_tasks

    return task_id in list_tasks()
