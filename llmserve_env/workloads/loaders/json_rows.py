"""Rows of JSON: one object a line, an array of objects, or a document with the rows somewhere within."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.workloads.loaders.records import Records

Row = dict[str, Any]

_NUMBERS = frozenset({int, float})
_KEYS_SHOWN = 8

ROWS_AT = (
    ("benchmarks", "requests", "successful"),
    ("experiments", "requests"),
)
"""Where known documents keep their rows: GuideLLM's, GenAI-Perf's. Lists on the way are walked through."""

_ROW_LISTS = frozenset({"conversations", "messages", "sub_requests"})
"""Lists of objects that are one row's, and no rows."""

_RESULT = ("input_lens", "output_lens")
"""What vLLM's and SGLang's benchmarks append to a file, a result a line: lists with an entry a request."""


def read_json(text: str, file: str) -> Records:
    """Rows of a text that begins with a brace or a bracket.

    Nested keys have names with dots: `metrics.output_sequence_length.value`. A row with a list of objects
    under `requests` stands for each of these, with the row's own keys and theirs as `requests.NAME`.

    Raises:
        InputError: it is no JSON, or has no rows.
    """
    if text.lstrip().startswith("["):
        return _of_rows(*_array(text, file), file)
    first = next(line for line in text.split("\n") if line.strip())
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        if "\n" not in text.strip():
            return _of_rows(*_lines(text), file)  # which says what is wrong
        try:
            return _document(text, file)
        except InputError:
            if not _is_object(next(line for line in text.strip().split("\n")[1:] if line.strip())):
                raise
        return _of_rows(*_lines(text), file)  # of which the first is damaged
    alone = "\n" not in text.strip()
    if (
        alone
        and isinstance(row, dict)
        and (_columns(row) or any(path[0] in row for path in ROWS_AT) or (len(row) == 1 and _rows_of(row)))
    ):
        return _document(text, file)
    return _of_rows(*_lines(text), file)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(text: str) -> tuple[list[Row], list[int], dict[int, str]]:
    """Rows, the line of each, and what is wrong with some."""
    rows: list[Row] = []
    lines: list[int] = []
    broken: dict[int, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fault = "" if isinstance(row, dict) else "expected a JSON object"
        except json.JSONDecodeError as error:
            row, fault = {}, f"not JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:
            row, fault = {}, f"not usable JSON: {error}"
        if fault:
            broken[len(rows)] = fault
        rows.append(row if isinstance(row, dict) else {})
        lines.append(number)
    return rows, lines, broken


def _array(text: str, file: str) -> tuple[list[Row], list[int], dict[int, str]]:
    """The same of an array: the line on which each of its objects begins."""
    decoder = json.JSONDecoder()
    rows: list[Row] = []
    lines: list[int] = []
    broken: dict[int, str] = {}
    at, line = _skipped(text, text.index("[") + 1, 1 + text.count("\n", 0, text.index("[")))
    while at < len(text) and text[at] != "]":
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON: {error.msg}", file=file, line=error.lineno) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"not usable JSON: {error}", file=file, line=line) from None
        if not isinstance(row, dict):
            broken[len(rows)] = "expected a JSON object"
        rows.append(row if isinstance(row, dict) else {})
        lines.append(line)
        line += text.count("\n", at, end)
        at, line = _skipped(text, end, line)
        if at < len(text) and text[at] == ",":
            at, line = _skipped(text, at + 1, line)
        elif at < len(text) and text[at] != "]":
            raise InputError("not JSON: expected a comma or the array's end", file=file, line=line)
    if at >= len(text):
        raise InputError("not JSON: the array does not end", file=file, line=line)
    if text[at + 1 :].strip():
        raise InputError("not JSON: something follows the array", file=file, line=line)
    return rows, lines, broken


def _skipped(text: str, at: int, line: int) -> tuple[int, int]:
    """Where the next character is that is no white space, and its line."""
    start = at
    while at < len(text) and text[at] in " \t\n":
        at += 1
    return at, line + text.count("\n", start, at)


def _document(text: str, file: str) -> Records:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}", file=file, line=error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not usable JSON: {error}", file=file) from None
    for path in ROWS_AT:
        if path[0] in document:
            rows = [row if isinstance(row, dict) else {} for row in _walked(document, path)]
            if rows:
                return _of_rows(rows, [1] * len(rows), {}, file)
    rows = _rows_of(document)
    if rows:
        return _of_rows(rows, [1] * len(rows), {}, file)
    columns = _columns(document)
    if not columns:
        keys = list(document)
        shown = ", ".join(keys[:_KEYS_SHOWN]) + (", ..." if len(keys) > _KEYS_SHOWN else "")
        raise InputError(
            f"a JSON document with the keys {shown}, and no rows: expected an object a line, an array of "
            "objects, or an object with a list for each column",
            file=file,
        )
    count = len(next(iter(columns.values())))
    return Records(
        file=file,
        names=frozenset(columns),
        lines=np.ones(count, np.int64),
        values=lambda name: list(columns.get(name) or [None] * count),
        number_types=_NUMBERS,
        bad=np.zeros(count, bool),
        kind="JSON document",
    )


def _walked(value: Any, path: tuple[str, ...]) -> Iterator[Any]:
    """What lies at a path, through all lists on the way."""
    if isinstance(value, list):
        for each in value:
            yield from _walked(each, path)
    elif not path:
        yield value
    elif isinstance(value, dict) and path[0] in value:
        yield from _walked(value[path[0]], path[1:])


def _rows_of(document: Row) -> list[Row]:
    """The list of objects that a document wraps, if it is its only list of them; conversations are a row."""
    found = [
        value
        for name, value in document.items()
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    ]
    return found[0] if len(found) == 1 and not _ROW_LISTS & document.keys() else []


def _columns(document: Any) -> dict[str, list[Any]]:
    """An object's lists of one length, the commonest there: one for each column."""
    lists = {name: value for name, value in document.items() if isinstance(value, list) and value}
    lengths = [len(value) for value in lists.values()]
    most = max(lengths, key=lengths.count, default=0)
    alike = {name: value for name, value in lists.items() if len(value) == most}
    return alike if len(alike) > 1 else {}


def _of_rows(rows: list[Row], lines: list[int], broken: dict[int, str], file: str) -> Records:
    if any(type(row.get("requests")) is list for row in rows):
        rows, lines, broken = _divided(rows, lines, broken, _requests_of)
    elif any(type(row.get(name)) is list for row in rows for name in _RESULT):
        rows, lines, broken = _divided(rows, lines, broken, _results_of)
    kinds = {_shape(row): row for at, row in enumerate(rows) if at not in broken}
    records = Records(
        file=file,
        names=frozenset(name for row in kinds.values() for name in _names(row)),
        lines=np.array(lines, np.int64),
        values=lambda name: [_at(row, name) for row in rows],
        number_types=_NUMBERS,
        bad=np.zeros(len(rows), bool),
        kind="JSON",
    )
    records.mark_each(broken)
    return records


def _divided(
    rows: list[Row], lines: list[int], broken: dict[int, str], parts_of: Callable[[Row], list[Row] | str]
) -> tuple[list[Row], list[int], dict[int, str]]:
    """A row for each part of a row, on its line; `parts_of` gives them, or what is wrong with the row."""
    found: list[Row] = []
    found_lines: list[int] = []
    faults: dict[int, str] = {}
    for at, (row, line) in enumerate(zip(rows, lines, strict=True)):
        parts = broken[at] if at in broken else parts_of(row)
        if isinstance(parts, str):
            faults[len(found)], parts = parts, [{}]
        found += parts
        found_lines += [line] * len(parts)
    return found, found_lines, faults


def _requests_of(row: Row) -> list[Row] | str:
    """A row for each of a row's `requests`, with the row's own keys."""
    inner = row.get("requests")
    if not isinstance(inner, list) or not all(isinstance(each, dict) for each in inner):
        return "expected a list of objects in 'requests'"
    return [{**row, "requests": each} for each in inner]


def _results_of(row: Row) -> list[Row] | str:
    """A row for each request of a result that holds a list for each column."""
    columns = {name: value for name, value in row.items() if isinstance(value, list)}
    count = len(columns.get(_RESULT[0], ()))
    columns = {name: value for name, value in columns.items() if len(value) == count}
    if not set(_RESULT) <= set(columns):
        return f"expected lists of one length, {' and '.join(_RESULT)}"
    return [{name: value[i] for name, value in columns.items()} for i in range(count)]


def _shape(row: Row) -> tuple[Any, ...]:
    """The same for rows with the same keys, those of nested objects included."""
    return tuple((name, *value) if isinstance(value, dict) else name for name, value in row.items())


def _names(row: Row, prefix: str = "", depth: int = 3) -> Iterator[str]:
    for name, value in row.items():
        yield prefix + name
        if isinstance(value, dict) and depth > 1:
            yield from _names(value, f"{prefix}{name}.", depth - 1)


def _at(row: Row, name: str) -> Any:
    """A value by its name; one with dots is of a nested object, unless the row has that very key."""
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value
