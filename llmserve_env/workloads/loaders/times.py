"""Columns of times in any unit, on any clock, as seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.loaders.hints import UNITS
from llmserve_env.workloads.loaders.records import Records

_STAMP = re.compile(
    r"((?:19[7-9]|20\d|21\d)\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)"
    r"( ?(?:Z|UTC|([+-])(\d\d)(?::?(\d\d))?))?"
)
_EXPECTED = "expected a time such as '2023-11-16 18:15:46.6805900' or '2024-05-10 00:00:00.009930+00:00'"
_UNIX_S = (946_684_800.0, 4_102_444_800.0)  # 2000 to 2100
LATE_S = 10 * 86_400.0
"""A trace whose first request comes later than this has a clock of its own."""
_BUSY_RPS = 1000.0
"""A file of a thousand requests a second, or of one in a thousand seconds, has times in another unit than its
keys usually have."""

_HASTY_RPS, _HASTY_S, _SLOW_RPS = 50.0, 10.0, 0.05
"""Milliseconds of more requests a second, or of a shorter time, may as well be seconds, and seconds of fewer
may be milliseconds: that is told."""

_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def seconds(records: Records, name: str, unit: str = "s", *, sure: bool = True) -> NDArray[np.float64]:
    """A column of numbers or of times of day as float64[n], in seconds.

    Times of day, Unix times and other times that begin after ten days are counted from the first usable one.

    Args:
        records: rows of the file; what is guessed goes to its `guesses`, what is changed to its `notes`.
        name: name of the column.
        unit: unit of its numbers, unless the reader was told another.
        sure: whether files of this format have always had that unit.
    """
    if _of_day(records.values(name)):
        records.clock = "times of day"
        if records.hints.time_unit is not None:
            records.notes.append("time_unit= is of no use: times of day have no unit")
        return _since_first(records, name)
    told = records.hints.time_unit
    raw = records.numbers(name, f"{_NAMES[told or unit]} >= 0")
    ways = UNITS if unit == "s" or not sure else (unit,)  # seconds under a name of ns would be a few of them
    _refuse_strays(records, name, raw, ways if told is None else (told,))
    good = raw[~records.bad]
    if not len(good):
        return raw
    least, most = float(good.min()), float(good.max())
    if told is None:
        whole = bool((good == np.floor(good)).all())
        found = _unit(unit, least, most, len(good), sure=sure, whole=whole)
        doubted = not sure and whole == (unit == "s")  # milliseconds have no fractions, seconds mostly have
        doubted |= _is_odd((most - least) * UNITS[found], len(good), found, sure=sure)
        if found != unit or doubted:
            rates = ", ".join(
                f"as {_NAMES[each]} {_rate(least, most, len(good), each):,.3g} requests/s"
                for each in dict.fromkeys((found, unit, "s", "ms"))
            )
            records.guesses.append(
                f"{name!r} is taken as {_NAMES[found]} ({rates}): time_unit={'|'.join(UNITS)} says it"
            )
        unit = found
    records.clock = f"times in {told or unit}"
    per_s = round(1 / UNITS[told or unit])
    if least / per_s < LATE_S:
        return raw / per_s
    records.notes.append(f"times begin at {least / per_s:,.0f} s: the first request arrives at 0")
    records.absolute = True
    return np.where(records.bad, 0.0, raw - least) / per_s


def _unit(unit: str, least: float, most: float, count: int, *, sure: bool, whole: bool) -> str:
    """The unit that times from `least` to `most` have, where it is hardly the expected one."""
    # Where the unit has always been the same, days since some start are more likely than another unit.
    if least * UNITS[unit] >= (_UNIX_S[1] if sure else LATE_S):
        for other, factor in UNITS.items():
            if _UNIX_S[0] <= least * factor and most * factor <= _UNIX_S[1]:
                return other
    rate = _rate(least, most, count, unit)
    if not sure and unit == "ms" and rate >= _BUSY_RPS:
        return "s"
    if not sure and unit == "s" and whole and 0 < rate <= 1 / _BUSY_RPS:
        return "ms"
    return unit


def _refuse_strays(records: Records, name: str, raw: NDArray[np.float64], units: Iterable[str]) -> None:
    """Mark a few times near zero among Unix times: requests that were never sent, not long ago."""
    good = raw[~records.bad]
    usual = float(np.median(good)) if len(good) else 0.0
    early = ~records.bad & (raw < usual / 2)
    unix = any(_UNIX_S[0] <= usual * UNITS[unit] <= _UNIX_S[1] for unit in units)
    if unix and early.sum() <= len(good) / 10 and raw[early].max(initial=0.0) < usual / 1000:
        records.mark(early, lambda row: f"expected a Unix time as in other rows, found {raw[row]:g}", name)


def _is_odd(span_s: float, count: int, unit: str, *, sure: bool) -> bool:
    """Whether so many requests in such a time make another unit likely enough to be told."""
    if span_s <= 0:
        return False
    rate = (count - 1) / span_s
    if rate >= _BUSY_RPS or rate <= 1 / _BUSY_RPS:
        return True
    if sure:
        return False
    return rate < _SLOW_RPS if unit == "s" else rate >= _HASTY_RPS or span_s < _HASTY_S


def _rate(least: float, most: float, count: int, unit: str) -> float:
    """Requests per second, were the times in that unit."""
    return (count - 1) / ((most - least) * UNITS[unit]) if most > least else 0.0


def _of_day(raw: list[object]) -> bool:
    """Whether the first value that is there is a time of day, or more one than a number."""
    first = next((value for value in raw if value is not None and value != ""), None)
    return isinstance(first, str) and ("-" in first[1:] or ":" in first) and "e-" not in first.lower()


def _since_first(records: Records, name: str) -> NDArray[np.float64]:
    """float64[n], seconds since the earliest row; in ns until then, which float64 could not hold."""
    raw = records.values(name)
    bodies: list[str] = []
    offsets_ns = np.zeros(len(raw), np.int64)
    wrong = np.zeros(len(raw), bool)
    zoned = np.zeros(len(raw), bool)
    for row, value in enumerate(raw):
        match = _STAMP.fullmatch(str(value).strip())
        if match is None or not _is_time(match[1]):
            wrong[row] = True
            bodies.append("1970-01-01 00:00:00")
            continue
        bodies.append(match[1])
        zoned[row] = match[2] is not None
        if match[3]:
            minutes = int(match[4]) * 60 + int(match[5] or 0)
            offsets_ns[row] = (minutes if match[3] == "+" else -minutes) * 60_000_000_000
    records.mark(wrong, lambda row: f"{_EXPECTED}, found {raw[row]!r}", name)
    if zoned.any():
        records.mark(
            ~zoned & ~wrong, lambda row: f"expected a UTC offset as in other rows, found {raw[row]!r}", name
        )
        wrong |= ~zoned
    ns = np.array(bodies, dtype="datetime64[ns]").astype(np.int64) - offsets_ns
    usable = ~wrong & ~records.bad
    start = ns[usable].min() if usable.any() else 0
    records.absolute = True
    return np.where(usable, (ns - start) / 1e9, 0.0)


def _is_time(text: str) -> bool:
    """Whether a well-formed time exists; most days and hours do without asking numpy."""
    if text[8:10] <= "28" and text[8:10] != "00" and "01" <= text[5:7] <= "12":
        return text[11:13] <= "23" and text[14:16] <= "59" and text[17:19] <= "59"
    try:
        np.datetime64(text)
    except ValueError:
        return False
    return True
