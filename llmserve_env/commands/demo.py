"""`llmserve demo`: one workload on two machines, from start to finish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from llmserve_env.commands._serving import Served

_TRAFFIC = "mmpp://?preset=azure-conv&tenants=premium-standard&duration=600&rate={rate:g}"
_CELLS = (("h100-llama-3.1-8b", 20.0), ("rtxpro6000-llama-3.1-8b", 8.5))
"""Profiles, and the mean rates (requests/s) that bring each near its capacity."""


def demo(*, out: Path = Path("out/demo")) -> None:
    """Serve ten minutes of chat traffic on an H100 and on an RTX PRO 6000, each near its capacity.

    Arrivals and lengths have the published statistics of Azure's conversation trace; two tenants with
    different promises send them. Prints what they got, and writes a row a request, the figures and a picture.

    Args:
        out: folder for the files.
    """
    from llmserve_env.commands._picture import draw_demo
    from llmserve_env.commands._report import table, write_json
    from llmserve_env.commands._serving import write_requests
    from llmserve_env.commands._summary import rows, summarise

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made: {error.strerror or error}", file=str(out)) from error
    runs = [(profile, _serve(profile, rate)) for profile, rate in _CELLS]
    summaries = {profile: summarise(served) for profile, served in runs}
    written = [out / "summary.json", out / "picture.png"]
    write_json(written[0], summaries)
    draw_demo(runs, "Ten minutes of chat traffic with the statistics of Azure's trace", written[1])
    for profile, served in runs:
        written.append(out / f"requests-{profile}.csv")
        write_requests(written[-1], served)
    left, right = (rows(summary) for summary in summaries.values())
    header = ["", *summaries]
    lines = [[label, mine, other] for (label, mine), (_, other) in zip(left, right, strict=True)]
    print(f"\n{table(header, lines, left=3)}\n")
    for path in written:
        print(f"wrote {path}")


def _serve(name: str, rate: float) -> Served:
    from llmserve_env.commands._serving import Cell, serve
    from llmserve_env.hardware import load_profile
    from llmserve_env.hardware.memory import kv_blocks
    from llmserve_env.schema import ServeAction
    from llmserve_env.workloads import open_workload

    workload = open_workload(_TRAFFIC.format(rate=rate))
    print(f"serving {len(workload):,} requests on {name}: {workload.source}", flush=True)
    profile = load_profile(name)
    action = ServeAction(batch_cap=profile.engine.max_num_seqs)
    cell = Cell(profile, action, profile.engine.max_num_batched_tokens, kv_blocks(profile))
    return serve(workload, cell, windows=400, name=name)
