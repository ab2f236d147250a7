"""From a URI or a path to a workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.files import read_toml
from llmserve_env.workloads import parameters
from llmserve_env.workloads.generators import (
    MMPP,
    Clients,
    Diurnal,
    Gamma,
    Generator,
    OnOff,
    Poisson,
    ServeGenClients,
    Sessions,
    Weibull,
    generate,
)
from llmserve_env.workloads.generators.generate import MAX_REQUESTS
from llmserve_env.workloads.lengths import DEFAULT_LENGTHS, length_law
from llmserve_env.workloads.loaders import Hints, LoadReport, load
from llmserve_env.workloads.loaders.hints import parse_columns
from llmserve_env.workloads.overlay import MAX_STRETCHES, overlaid
from llmserve_env.workloads.parameters import Parameters, parameter
from llmserve_env.workloads.presets import preset, presets
from llmserve_env.workloads.scenario import parse_scenario
from llmserve_env.workloads.tenants import tenant_mix
from llmserve_env.workloads.uri import WorkloadURI, parse_uri
from llmserve_env.workloads.workload import Workload

GENERATORS: dict[str, type[Generator]] = {
    "poisson": Poisson,
    "gamma": Gamma,
    "weibull": Weibull,
    "mmpp": MMPP,
    "onoff": OnOff,
    "diurnal": Diurnal,
    "clients": Clients,
    "sessions": Sessions,
    "servegen": ServeGenClients,
}

SHARES, LENGTHS = "shares", "lengths"
ASSIGN = "tenants by their shares, at random, or by lengths: who sends such lengths"


@dataclass(frozen=True)
class GeneratorOptions(Parameters):
    """What every generator's URI takes beside the generator's own parameters."""

    duration_s: float | None = parameter(
        "duration", None, "time to cover (s); without it 600, diurnal 86400", above=0
    )
    requests: int | None = parameter(
        "requests", None, "stop after this many requests", at_least=1, at_most=MAX_REQUESTS
    )
    seed: int = parameter("seed", 0, "the same seed gives the same requests", at_least=0)
    lengths: str | None = parameter("lengths", None, "length law: a preset, fixed:PROMPT,OUTPUT or a file")
    tenants: str | None = parameter("tenants", None, "mix of tenants: a preset or a .toml file")
    assign: str = parameter("assign", SHARES, ASSIGN)
    preset: str | None = parameter("preset", None, "published parameters; those in the URI go before them")


@dataclass(frozen=True)
class TraceOptions(Parameters):
    """What a trace's URI takes."""

    scale: float = parameter("scale", 1.0, "factor on the arrival rate", above=0)
    limit: int | None = parameter("limit", None, "keep the first requests", at_least=1)
    duration_s: float | None = parameter(
        "duration", None, "keep what arrives before (s, after scaling)", above=0
    )
    jitter_s: float | None = parameter(
        "jitter",
        None,
        "spread of each arrival (s); without it the step of coarse times",
        at_least=0,
    )
    time_unit: str | None = parameter("time_unit", None, "unit of the file's times: s, ms, us or ns")
    block_tokens: int | None = parameter("block_tokens", None, "prompt tokens of a prefix block", at_least=1)
    columns: str | None = parameter(
        "columns", None, "names of a file's own columns: arrival_s:NAME,prompt_tokens:NAME,output_tokens:NAME"
    )
    seed: int = parameter("seed", 0, "of the spread and of the tenants", at_least=0)
    tenants: str | None = parameter("tenants", None, "mix of tenants: a preset or a .toml file")
    assign: str = parameter("assign", SHARES, ASSIGN)
    overlay: int | None = parameter(
        "overlay",
        None,
        "play so many stretches at once, from places that the seed draws",
        at_least=1,
        at_most=MAX_STRETCHES,
    )


@dataclass(frozen=True)
class ScenarioOptions(Parameters):
    """What a scenario's URI takes."""

    duration_s: float = parameter("duration", 600.0, "time to cover (s)", above=0)
    seed: int = parameter("seed", 0, "the same seed gives the same requests", at_least=0)
    scale: float = parameter("scale", 1.0, "factor on all rates", above=0)


def open_workload(
    source: str | Path, *, seed: int | None = None, skip_bad_rows: bool = False, silent: bool = False
) -> Workload:
    """Open a workload by URI, or a trace by its path.

    Args:
        source: such as "gamma://?rate=8&shape=0.25", "trace://FILE?scale=1.5", "scenario://FILE.toml", or a
            path. Any generator works without parameters, except servegen, which needs its table's path.
        seed: goes before the URI's own seed.
        skip_bad_rows: skip rows of a file that cannot be read, rather than refuse the file.
        silent: whether a time in which nothing arrives is a workload, rather than refused.

    Returns:
        The workload; its `source` opens it again.

    Raises:
        InputError: names the file and line, or the parameter, and what was expected.
    """
    return open_reported(source, seed=seed, skip_bad_rows=skip_bad_rows, silent=silent)[0]


def open_reported(
    source: str | Path, *, seed: int | None = None, skip_bad_rows: bool = False, silent: bool = False
) -> tuple[Workload, LoadReport | None]:
    """As `open_workload`; with what became of a trace's rows, None for a generator or scenario."""
    uri = parse_uri(str(source))
    if seed is not None:
        uri = replace(uri, query={**uri.query, "seed": str(seed)})
    if uri.scheme == "trace":
        return _open_trace(uri, skip_bad_rows, silent)
    if uri.scheme == "scenario":
        return _open_scenario(uri, silent), None
    if uri.scheme not in GENERATORS:
        known = ", ".join(["trace", *GENERATORS, "scenario"])
        raise InputError(f"unknown scheme {uri.scheme!r}: expected one of {known}")
    return _open_generator(uri, skip_bad_rows, silent), None


def trace_options(uri: WorkloadURI) -> TraceOptions:
    """What a trace's URI asks for.

    Raises:
        InputError: names the parameter and what was expected.
    """
    _refuse_unknown(uri, parameters.names(TraceOptions))
    return parameters.read(TraceOptions, uri.query)


def _open_trace(uri: WorkloadURI, skip_bad_rows: bool, silent: bool) -> tuple[Workload, LoadReport]:
    if not uri.path:
        raise InputError("trace:// needs a file: trace://FILE")
    options = trace_options(uri)
    named = () if options.columns is None else parse_columns(options.columns)
    workload, report = load(
        uri.path,
        skip_bad_rows=skip_bad_rows,
        jitter_s=options.jitter_s,
        seed=options.seed,
        hints=Hints(options.time_unit, options.block_tokens, named),
    )
    workload = _with_tenants(workload.scaled(options.scale), options, own_lengths=False)
    if options.overlay is not None:
        length_s = options.duration_s or workload.duration_s
        workload = overlaid(workload, options.overlay, seed=options.seed, duration_s=length_s)
    if options.duration_s is not None:
        workload = workload.take(np.flatnonzero(workload.arrival_s < options.duration_s))
        if len(workload) == 0 and not silent:
            raise InputError(f"no request arrives in {options.duration_s:g} s", field="duration")
    if options.limit is not None:
        workload = workload.take(np.arange(min(options.limit, len(workload))))
    plain = not uri.query and "://" not in uri.path
    return replace(workload, source=uri.path if plain else str(uri)), report


def _open_scenario(uri: WorkloadURI, silent: bool) -> Workload:
    if not uri.path:
        raise InputError("scenario:// needs a file: scenario://FILE.toml")
    _refuse_unknown(uri, parameters.names(ScenarioOptions))
    options = parameters.read(ScenarioOptions, uri.query)
    table = read_toml(Path(uri.path))
    try:
        scenario = parse_scenario(table.get("workload", table))
    except InputError as error:
        raise InputError(error.reason, file=uri.path, field=error.field) from None
    workload = scenario.scaled(options.scale).sample(options.seed, options.duration_s)
    if len(workload) == 0 and not silent:
        raise InputError(f"no request arrives in {options.duration_s:g} s", field="duration")
    return _sourced(workload, uri, options.seed)


def _open_generator(uri: WorkloadURI, skip_bad_rows: bool, silent: bool) -> Workload:
    cls = GENERATORS[uri.scheme]
    _refuse_unknown(uri, [*parameters.names(cls), *parameters.names(GeneratorOptions)])
    given = {**_preset_values(uri), **uri.query}
    options = parameters.read(GeneratorOptions, given)
    extra: dict[str, Any] = {}
    if cls is ServeGenClients:
        if not uri.path:
            raise InputError("servegen:// needs a client table: servegen://FILE")
        extra = {"path": uri.path, "skip_bad_rows": skip_bad_rows}
    elif uri.path:
        raise InputError(f"{uri.scheme}:// takes no path, found {uri.path!r}: parameters follow a '?'")
    if "lengths" in given and "quantiles" in given:
        raise InputError("expected lengths or quantiles, not both", field="lengths")
    generator = parameters.read(cls, given, **extra)
    lengths = length_law(options.lengths or DEFAULT_LENGTHS, skip_bad_rows=skip_bad_rows)
    workload = generate(
        generator,
        lengths,
        seed=options.seed,
        duration_s=options.duration_s,
        requests=options.requests,
        silent=silent,
    )
    own_lengths = "lengths" not in uri.query and not isinstance(generator, Sessions)
    workload = _with_tenants(workload, options, own_lengths=own_lengths)
    return _sourced(workload, uri, options.seed)


def _with_tenants(
    workload: Workload, options: GeneratorOptions | TraceOptions, *, own_lengths: bool
) -> Workload:
    """With the tenants that a URI names, if it does."""
    if options.assign not in {SHARES, LENGTHS}:
        raise InputError(f"expected {SHARES} or {LENGTHS}, found {options.assign!r}", field="assign")
    if options.tenants is None:
        if options.assign == LENGTHS:
            raise InputError("expected tenants, too, whose lengths are compared", field="assign")
        return workload
    mix = tenant_mix(options.tenants)
    if options.assign == LENGTHS:
        return mix.match(workload)
    return mix.assign(workload, seed=options.seed, own_lengths=own_lengths)


def _sourced(workload: Workload, uri: WorkloadURI, seed: int) -> Workload:
    """With the address that opens it again, whatever seed is then the default."""
    return replace(workload, source=str(replace(uri, query={**uri.query, "seed": str(seed)})))


def _preset_values(uri: WorkloadURI) -> Mapping[str, str]:
    if "preset" not in uri.query:
        return {}
    known = {name.split(".")[-1] for name in presets("generators").get(uri.scheme, {})}
    if uri.query["preset"] not in known:
        choice = f"expected one of {', '.join(sorted(known))}" if known else f"{uri.scheme}:// has none"
        raise InputError(f"{choice}, found {uri.query['preset']!r}", field="preset")
    entry = preset("generators", uri.scheme, field="preset")[uri.query["preset"]]
    return {name: parameters.written(value) for name, value in entry.items() if name != "source"}


def _refuse_unknown(uri: WorkloadURI, known: list[str]) -> None:
    for name in uri.query:
        if name not in known:
            raise InputError(
                f"unknown parameter of {uri.scheme}://: expected one of {', '.join(known)}", field=name
            )
