"""Tables with a header: CSV and TSV, and the semicolons of half of Europe's spreadsheets."""

from __future__ import annotations

import csv
import io

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.workloads.loaders.reading import LINE_BYTES
from llmserve_env.workloads.loaders.records import Records

_CELL = "\x1f"  # ASCII's own unit separator joins cells: a million small lists would be slow


def read_table(text: str, file: str) -> Records:
    """Rows of a CSV or TSV text with a header.

    Raises:
        InputError: it is none.
    """
    if _CELL in text:
        raise InputError("expected text, found a control character, 1F", file=file)
    first = next(line for line in text.split("\n") if line.strip())
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # as Excel takes and writes it
        delimiter, text = first[4], text.replace(first, "", 1)
        if not text.strip():
            raise InputError("holds no rows", file=file)
    else:
        delimiter = next((sign for sign in "\t,;|" if sign in first), ",")
    rows = _quoted_rows(text, delimiter, file) if '"' in text else _plain_rows(text, delimiter)
    if not rows:
        raise InputError("holds no rows", file=file)
    (header_line, header), *rows = rows
    names, lines = [name.strip() for name in header.split(_CELL)], [line for line, _ in rows]
    width = len(names)
    texts = [row for _, row in rows]
    too_wide: dict[int, str] = {}
    for at, found in enumerate(text.count(_CELL) + 1 for text in texts):
        if found < width:
            texts[at] += _CELL * (width - found)
        elif found > width:
            too_wide[at] = f"has {found} fields, the header names {width}"
            texts[at] = _CELL.join(texts[at].split(_CELL)[:width])
    cells = _CELL.join(texts).split(_CELL) if texts else []
    columns: dict[str, list[object]] = {name: list(cells[at::width]) for at, name in enumerate(names)}

    def values(name: str) -> list[object]:
        if names.count(name) > 1:
            raise InputError("is the name of two columns", file=file, line=header_line, field=name)
        return columns.get(name) or [None] * len(lines)

    records = Records(
        file=file,
        names=frozenset(names),
        lines=np.array(lines, np.int64),
        values=values,
        number_types=frozenset({str}),
        bad=np.zeros(len(lines), bool),
    )
    records.mark_each(too_wide)
    return records


def _plain_rows(text: str, delimiter: str) -> list[tuple[int, str]]:
    """Line number and cells of each row that is not blank."""
    blank = f"{delimiter} \t"
    lines = text.replace(delimiter, _CELL).split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip(_CELL + blank)]


def _quoted_rows(text: str, delimiter: str, file: str) -> list[tuple[int, str]]:
    """The same for a table with quoted fields, which may hold delimiters and line ends."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    limit = csv.field_size_limit(LINE_BYTES)  # a list of token ids in a cell is longer than the usual limit
    rows: list[tuple[int, str]] = []
    line = 0
    try:
        for row in reader:
            line = reader.line_num
            if any(cell.strip() for cell in row):
                rows.append((line, _CELL.join(row)))
        return rows
    except csv.Error as error:
        reason = "a quote that does not end" if "unexpected end" in str(error) else str(error)
        raise InputError(f"not a table: {reason}", file=file, line=line + 1) from error
    finally:
        csv.field_size_limit(limit)
