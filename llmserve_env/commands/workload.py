"""`llmserve workload`: a trace or a generator in numbers."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path

from llmserve_env.commands.shared.report import check_outputs
from llmserve_env.files import write_atomic
from llmserve_env.report.figures import check_suffix
from llmserve_env.workloads import describe, open_reported


def workload(
    source: str,
    /,
    *,
    picture: Path | None = None,
    json: Path | None = None,
    skip_bad_rows: bool = False,
    seed: int | None = None,
) -> None:
    """Describe a workload: rate, burstiness, lengths, prefix reuse.

    Args:
        source: a trace file, or a URI such as "gamma://?rate=8&shape=0.25".
        picture: picture of the workload (png, svg or pdf).
        json: file for the numbers.
        skip_bad_rows: whether rows that cannot be read are skipped and counted, rather than refused.
        seed: random seed, in place of the URI's own.

    Raises:
        InputError: the source cannot be used, or a file cannot be written.
    """
    check_outputs({"picture": picture, "json": json}, source=source)
    if picture is not None:
        check_suffix(picture)
    requests, report = open_reported(source, seed=seed, skip_bad_rows=skip_bad_rows)
    description = describe(requests)
    print(description.as_table())
    if report is not None:
        print(report)
    if json is not None:
        content = {**description.as_dict(), "load": None if report is None else asdict(report)}
        write_atomic(json, json_format.dumps(content, indent=2, allow_nan=False) + "\n")
    if picture is not None:
        from llmserve_env.workloads.picture import draw

        draw(requests, description, picture)
