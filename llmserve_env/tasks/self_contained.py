"""Tasks from others, which must not name files of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmserve_env.errors import InputError
from llmserve_env.hardware import list_profiles
from llmserve_env.workloads.presets import presets
from llmserve_env.workloads.sources import GENERATORS
from llmserve_env.workloads.uri import parse_uri

if TYPE_CHECKING:
    from llmserve_env.tasks.task import Task


def refuse_files(task: Task) -> None:
    """Refuse a task that would have files read: it may name only what is shipped, and generators.

    Raises:
        InputError: names the field.
    """
    _choose(task.cell.profile, list_profiles(), "cell.profile")
    if isinstance(task.workload, str):
        uri = parse_uri(task.workload)
        _choose(uri.scheme, [name for name in GENERATORS if name != "servegen"], "workload")
        _choose(uri.path, [""], "workload")
        _check_lengths(uri.query.get("lengths"), "workload")
        if "tenants" in uri.query:
            _choose(uri.query["tenants"], presets("tenants"), "workload")
        return
    tenants = task.workload.get("tenants")
    for name, entry in tenants.items() if isinstance(tenants, Mapping) else ():
        if isinstance(entry, Mapping):
            _check_lengths(entry.get("lengths"), f"workload.tenants.{name}.lengths")


def _check_lengths(text: object, field: str) -> None:
    if isinstance(text, str) and not text.startswith("fixed:"):
        _choose(text, presets("lengths"), field)


def _choose(found: str, known: Any, field: str) -> None:
    if found not in known:
        choice = ", ".join(name or "no path" for name in known)
        raise InputError(
            f"expected {choice}, found {found!r}; who sends a task may not name files",
            field=field,
        )
