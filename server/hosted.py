"""Tasks that the service plays for clients: which, and how large."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from llmserve_env.controls import to_array
from llmserve_env.episode import EpisodeBatch
from llmserve_env.errors import InputError, as_input_error
from llmserve_env.grading import grade
from llmserve_env.schema import EpisodeLog, GradeResult
from llmserve_env.tasks import EVALUATION_SEEDS, TRAINING_SEEDS, Task, list_tasks, load_task
from llmserve_env.tasks.catalog import catalog
from llmserve_env.tasks.self_contained import refuse_files
from server.messages.refusals import NotFound
from server.messages.requests import ResetRequest

DEFAULT_TASK = "static_workload"


def shipped_task(task_id: str) -> Task:
    """A task by its id.

    Raises:
        NotFound: lists those that there are.
    """
    if task_id not in list_tasks():
        raise NotFound(f"no task {task_id!r}: expected one of {', '.join(list_tasks())}")
    return _shipped(task_id, None)


def is_shaped(request: ResetRequest) -> bool:
    """Whether the episode is other, or longer, than a shipped one: then it may cost anything."""
    longest_s = shipped_task(request.task_id).horizon_s
    return request.workload is not None or (request.horizon_s or 0.0) > longest_s


def requested_task(request: ResetRequest) -> Task:
    """The task that a request asks for; one that `is_shaped` has to pass `check_request` first.

    Raises:
        NotFound: no such task.
        InputError: the workload or the horizon cannot be; names the field.
    """
    shipped = shipped_task(request.task_id)
    changes = {name: getattr(request, name) for name in ("workload", "horizon_s")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if "workload" not in changes:
        return _shipped(request.task_id, request.horizon_s)
    try:
        task = Task.model_validate({**shipped.model_dump(mode="json"), **changes})
    except ValidationError as error:
        raise as_input_error(error) from error
    refuse_files(task)
    return task


def check_request(request: ResetRequest, max_windows: int, max_requests: int) -> None:
    """Play the episode that a client shaped once, to see that it can be.

    Args:
        request: with a seed.
        max_windows: that it may have.
        max_requests: that it may have.

    Raises:
        NotFound: no such task.
        InputError: it cannot be played, or is larger than it may be; names the field.
    """
    task = requested_task(request)
    assert request.seed is not None
    if task.windows > max_windows:
        most_s = max_windows * task.window_s
        raise InputError(f"expected at most {most_s:g}, found {task.horizon_s:g}", field="horizon_s")
    _check_size(task, request.seed, max_requests, "workload")
    batch = EpisodeBatch(task)
    batch.reset([request.seed])
    action = to_array([task.start])
    while not batch.over[0]:
        batch.step(action)


def grade_posted(log: EpisodeLog, max_windows: int, max_requests: int) -> GradeResult:
    """The grade of a log that a client sent.

    Args:
        log: what it sent.
        max_windows: that it may have.
        max_requests: that its episode may have.

    Raises:
        InputError: the log does not match its replay, is larger than it may be, or is of a live episode,
            which nobody can replay.
    """
    if log.live:
        reason = "expected false: a live episode cannot be replayed, and its score would be hearsay"
        raise InputError(reason, field="live")
    if len(log.actions) > max_windows:
        raise InputError(f"expected at most {max_windows:,}, found {len(log.actions):,}", field="actions")
    with suppress(ValidationError):  # the grader says better what is wrong with the task
        task = Task.model_validate(log.task)
        refuse_files(task)
        if 0 <= log.seed < 2**63:
            _check_size(task, log.seed, max_requests, "task.workload")
    return grade(log)


@lru_cache(maxsize=1)
def task_list() -> dict[str, Any]:
    """Everything that can be played, as /tasks has it."""
    return {
        "tasks": [task.model_dump(mode="json") for task in catalog()],
        "default": DEFAULT_TASK,
        "seeds": {
            "training": (TRAINING_SEEDS.start, TRAINING_SEEDS.stop - 1),
            "evaluation": (EVALUATION_SEEDS.start, EVALUATION_SEEDS.stop - 1),
        },
    }


def _check_size(task: Task, seed: int, most: int, field: str) -> None:
    requests = len(task.requests(seed))
    if requests > most:
        raise InputError(
            f"expected at most {most:,} requests in the episode, found {requests:,}", field=field
        )


@lru_cache(maxsize=128)
def _shipped(task_id: str, horizon_s: float | None) -> Task:
    return load_task(task_id) if horizon_s is None else load_task(task_id, horizon_s=horizon_s)
