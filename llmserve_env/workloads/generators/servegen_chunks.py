"""ServeGen's published folders, chunk by chunk, as the tables that `servegen://` reads.

    chunk-N-trace.csv      client N: window start (s), rate, CV, law, shape, scale; no header
    chunk-N-dataset.json   client N: by window start, the distributions of input and output tokens, as text

Source: https://github.com/alibaba/ServeGen, data/CATEGORY/MODEL.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.workloads.generators.servegen import LAWS
from llmserve_env.workloads.loaders.formats import SERVEGEN_FIELDS
from llmserve_env.workloads.loaders.reading import read_text

QUANTILE_FIELDS = ("model", "client", "rate", "field", "mean", "p10", "p50", "p90", "p99", "max")
_QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)
_LENGTHS = ("input_tokens", "output_tokens")
_NAME = re.compile(r"chunk-(\d+)-trace\.csv")

Window = tuple[int, float, float, float, str, float, float]
"""Client, start (s), rate (requests/s), CV, law, shape, scale."""


def read_windows_of(folder: Path | str) -> list[Window]:
    """The windows of all clients in which they send anything, in order of start and client.

    Raises:
        InputError: the folder has no chunks, or one cannot be read; names file, line and field.
    """
    files = {int(match[1]): path for path in _listed(folder) if (match := _NAME.fullmatch(path.name))}
    if not files:
        raise InputError("expected chunk-N-trace.csv files, found none", file=str(folder))
    windows = [window for client, path in files.items() for window in _windows(client, path)]
    if not windows:
        raise InputError("no client sends anything", file=str(folder))
    return sorted(windows, key=lambda window: (window[1], window[0]))


def table(windows: list[Window]) -> str:
    """The client table that `servegen://` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SERVEGEN_FIELDS)
    writer.writerows([client, f"{start_s:.15g}", *rest] for client, start_s, *rest in windows)
    return text.getvalue()


def quantile_table(folder: Path | str, windows: list[Window]) -> str:
    """The clients' length quantiles, over all their windows by the requests in them.

    Args:
        folder: folder with the chunks; the model has its last two names.
        windows: its windows.

    Raises:
        InputError: a dataset cannot be read; names file and field.
    """
    model = "/".join(Path(folder).resolve().parts[-2:])
    rates: dict[int, dict[float, float]] = defaultdict(dict)
    for client, start_s, rate_rps, *_ in windows:
        rates[client][start_s] = rate_rps
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(QUANTILE_FIELDS)
    for client, of_window in sorted(rates.items()):
        path = Path(folder) / f"chunk-{client}-dataset.json"
        lengths = _lengths(path, of_window)
        rate_rps = float(np.mean(list(of_window.values())))
        for name in _LENGTHS:
            tokens, weights = lengths[name]
            share = np.cumsum(weights) / weights.sum()
            at = np.minimum(np.searchsorted(share, _QUANTILES), len(tokens) - 1)
            mean = float((tokens * weights).sum() / weights.sum())
            writer.writerow([model, client, f"{rate_rps:.5f}", name, f"{mean:.2f}", *tokens[at]])
    return text.getvalue()


def _listed(folder: Path | str) -> list[Path]:
    try:
        return sorted(Path(folder).iterdir())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=str(folder)) from error


def _windows(client: int, path: Path) -> list[Window]:
    found: list[Window] = []
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        cells = [cell.strip() for cell in text.split(",")]
        if cells == [""]:
            continue
        if len(cells) < len(SERVEGEN_FIELDS) - 1:
            raise InputError(
                f"expected {', '.join(SERVEGEN_FIELDS[1:])}, found {len(cells)} fields",
                file=str(path),
                line=line,
            )
        start_s, rate_rps = (_number(cells[at], path, line, SERVEGEN_FIELDS[1 + at]) for at in (0, 1))
        if rate_rps == 0:
            continue  # silent: some have no law there
        cv, shape, scale = (_number(cells[at], path, line, SERVEGEN_FIELDS[1 + at]) for at in (2, 4, 5))
        if cells[3] not in LAWS:
            _refuse(f"expected {' or '.join(LAWS)}, found {cells[3]!r}", path, line, "pattern")
        if shape == 0:
            _refuse(f"expected a number > 0, found {cells[4]!r}", path, line, "shape")
        found.append((client, start_s, rate_rps, cv, cells[3], shape, scale))
    return found


def _refuse(reason: str, path: Path, line: int, field: str) -> NoReturn:
    raise InputError(reason, file=str(path), line=line, field=field)


def _number(text: str, path: Path, line: int, field: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value) or value < 0:
        _refuse(f"expected a number >= 0, found {text!r}", path, line, field)
    return value


def _lengths(path: Path, rates: dict[float, float]) -> dict[str, tuple[Any, Any]]:
    """Tokens in ascending order and the requests that have them, of either length."""
    try:
        content = json.loads(read_text(path))
        starts = {float(start): value for start, value in content.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"expected a JSON object by window start: {error}", file=str(path)) from error
    found = {}
    for name in _LENGTHS:
        weights: dict[int, float] = defaultdict(float)
        for start_s, rate_rps in rates.items():
            window = starts.get(start_s)
            for tokens, share in _distribution(window, name, path, start_s).items():
                weights[max(1, int(tokens))] += share * rate_rps
        if not weights:
            raise InputError("has no distribution of any window", file=str(path), field=name)
        lengths = sorted(weights)
        found[name] = np.array(lengths), np.array([weights[each] for each in lengths])
    return found


def _distribution(window: Any, name: str, path: Path, start_s: float) -> dict[float, float]:
    text = window.get(name) if isinstance(window, dict) else None
    if text is None:
        return {}
    try:
        found = ast.literal_eval(text) if isinstance(text, str) else text
        return {float(tokens): float(share) for tokens, share in found.items() if float(share) > 0}
    except (ValueError, SyntaxError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise InputError(
            f"expected shares by tokens: {error}", file=str(path), field=f"{start_s:g}.{name}"
        ) from error
