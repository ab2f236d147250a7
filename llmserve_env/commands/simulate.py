"""`llmserve simulate`: any trace, served by any profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llmserve_env.commands.shared.controls import flag, options
from llmserve_env.controls import CONTROLS, within_action
from llmserve_env.errors import InputError

if TYPE_CHECKING:
    from llmserve_env.hardware import Profile
    from llmserve_env.schema import ServeAction


if TYPE_CHECKING:
    Settings = Any
else:
    Settings = options("Settings", flags=True, unset=frozenset({"batch_cap"}))


def simulate(
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),  # noqa: B008 - immutable
    *,
    trace: str,
    profile: str,
    out: Path,
    max_num_batched_tokens: int | None = None,
    kv_tokens: int | None = None,
    max_model_len: int | None = None,
    tp: int | None = None,
    engines: int = 1,
    prefix_cache: bool = True,
    skip_bad_rows: bool = False,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Serve a workload and say what its users got.

    Writes one row a request: its lengths, TTFT, TPOT and end-to-end latency, preemptions and status. Prints a
    summary.

    Args:
        settings: the configuration; running sequences are the profile's when left out, and up to 2,048.
        trace: a trace file, or a URI such as "gamma://?rate=8" or "trace://FILE?limit=1000".
        profile: hardware and model: a shipped profile, or the path of a .toml file.
        out: the CSV file to write.
        max_num_batched_tokens: token budget of an iteration; the profile's when left out.
        kv_tokens: KV cache of one engine in tokens, full blocks count; the profile's when left out.
        max_model_len: longest context, prompt and answer together (tokens); the profile's when left out. A
            prompt that fills it is cancelled, as vLLM refuses it, and an answer ends at it.
        tp: GPUs of one engine, to make sure that the profile has them.
        engines: like engines that share the requests.
        prefix_cache: whether blocks of finished or preempted requests can be found again.
        skip_bad_rows: whether rows of the trace that cannot be read are skipped and counted, not refused.
        json_file: file for the summary, as JSON.
    """
    from llmserve_env.commands.shared.report import check_outputs, write_json
    from llmserve_env.commands.shared.serving import Cell, serve, write_requests
    from llmserve_env.commands.shared.summary import rows, summarise
    from llmserve_env.hardware import load_profile
    from llmserve_env.hardware.memory import kv_blocks
    from llmserve_env.workloads import open_reported

    check_outputs({"out": out, "json": json_file}, trace=trace, profile=profile)
    hardware = load_profile(profile)
    _check_tp(hardware, tp)
    budget = (
        hardware.engine.max_num_batched_tokens if max_num_batched_tokens is None else max_num_batched_tokens
    )
    values = {name: getattr(settings, flag(name)) for name in CONTROLS}
    if values["batch_cap"] is None:
        values["batch_cap"] = hardware.engine.max_num_seqs
    values["batch_cap"], sequences = within_action(values["batch_cap"])
    action = _action(**values)
    blocks = kv_blocks(hardware, action.quantization_tier.value)
    if kv_tokens is not None:
        blocks = kv_tokens // hardware.engine.block_tokens
        if blocks < 1:
            expected = hardware.engine.block_tokens
            raise InputError(
                f"expected at least one block of {expected}, found {kv_tokens}", field="kv_tokens"
            )
    cell = Cell(hardware, action, budget, blocks, engines, prefix_cache, sequences, max_model_len)
    workload, report = open_reported(trace, skip_bad_rows=skip_bad_rows)
    served = serve(workload, cell)
    write_requests(out, served)
    summary = summarise(served)
    if json_file is not None:
        write_json(json_file, summary)
    if report is not None:
        print(report)
    words = rows(summary)
    width = max(len(label) for label, _ in words)
    print(workload.source)
    for label, value in words:
        print(f"  {label:<{width}}  {value}")
    print(f"wrote {out}")


def _check_tp(profile: Profile, tp: int | None) -> None:
    """Refuse another number of GPUs than the profile was measured on: its times cannot be rescaled."""
    if tp is None or tp == profile.gpu.count:
        return
    from llmserve_env.hardware import list_profiles, load_profile

    fitting = [name for name in list_profiles() if load_profile(name).gpu.count == tp]
    known = f"shipped profiles with {tp}: {', '.join(fitting)}" if fitting else f"no shipped profile has {tp}"
    raise InputError(
        f"profile '{profile.name}' was measured on {profile.gpu.count}, and times do not rescale; {known}",
        field="tp",
    )


def _action(**values: object) -> ServeAction:
    from pydantic import ValidationError

    from llmserve_env.errors import as_input_error
    from llmserve_env.schema import ServeAction

    try:
        return ServeAction.model_validate(values)
    except ValidationError as error:
        refused = as_input_error(error)
        raise InputError(refused.reason, field=flag(str(refused.field))) from error
