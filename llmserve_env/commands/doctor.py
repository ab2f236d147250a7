"""`llmserve doctor`: whether vLLM servers are ready for a live run."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from llmserve_env.live.servers.doctor import Diagnosis

STATUS = {"missing": 1, "unreachable": 2}
"""Exit status by the worst that was found."""


def doctor(
    url: Annotated[list[str], tyro.conf.UseAppendAction],
    *,
    model: str | None = None,
    timeout_s: float = 10.0,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> int:
    """Say whether vLLM servers are up, what they tell, what of an action they can apply, and what to mend.

    Sends each server a few GETs and one completion of 3 tokens. A key is taken from OPENAI_API_KEY. The exit
    status is 0 if all is there that a live run needs, 1 if something is missing, 2 if a server cannot be
    reached.

    Args:
        url: URL of a server, with or without /v1; once for each.
        model: model that the completion is asked of (default: the first that a server lists).
        timeout_s: time that an answer may take (s).
        json_file: file for what was found, as JSON.

    Raises:
        InputError: a URL or the file cannot be used.
    """
    from llmserve_env.commands.shared.report import check_outputs, table, write_json
    from llmserve_env.errors import InputError
    from llmserve_env.live.servers.doctor import TOKENS, controls, diagnose

    if not url:
        raise InputError("expected one or more", field="--url")
    if not timeout_s > 0:
        raise InputError(f"expected seconds > 0, found {timeout_s}", field="--timeout-s")
    check_outputs({"json": json_file})
    key = os.environ.get("OPENAI_API_KEY")
    print(f"asks each server for one completion of {TOKENS} tokens\n", flush=True)
    found = []
    for each in url:
        diagnosis = diagnose(each, api_key=key, timeout_s=timeout_s, model=model)
        found.append(diagnosis)
        _print(diagnosis)
    fields = controls(found)
    reached = [each for each in found if not each.has("unreachable")]
    if reached:
        print("what of an action can be applied while servers serve\n")
        rows = [[each.field, each.stock, each.gateway, each.scheduler, each.here] for each in fields]
        print(
            table(["field", "stock vLLM", "gateway", "scheduler class", "with these servers"], rows, left=5)
        )
    status = max((STATUS.get(check.status, 0) for each in found for check in each.checks), default=0)
    if json_file is not None:
        content = {
            "status": status,
            "servers": [_content(each) for each in found],
            "controls": [asdict(each) for each in fields],
        }
        write_json(json_file, content)
    return status


def _print(found: Diagnosis) -> None:
    from llmserve_env.commands.shared.report import table

    rows = []
    for check in found.checks:
        rows.append([check.name, check.status, check.found])
        if check.mend:
            rows.append(["", "", f"→ {check.mend}"])
    print(found.url)
    print(table(["check", "status", "found"], rows, left=3) + "\n", flush=True)


def _content(found: Diagnosis) -> dict[str, Any]:
    scrape = found.scrape
    return {
        "url": found.url,
        "version": found.version,
        "models": found.models,
        "round_trip_s": found.round_trip_s,
        "clock_ahead_s": found.clock_ahead_s,
        "metrics": None if scrape is None else scrape.names,
        "kv_tokens": None if scrape is None else scrape.kv_tokens,
        "cache_config": None if scrape is None else scrape.config,
        "checks": [asdict(check) for check in found.checks],
    }
