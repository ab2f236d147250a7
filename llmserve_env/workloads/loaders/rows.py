"""From a file to its rows, whatever kind of text it is."""

from __future__ import annotations

from llmserve_env.workloads.loaders.hints import Hints
from llmserve_env.workloads.loaders.json_rows import read_json
from llmserve_env.workloads.loaders.reading import LINE_BYTES, read_text
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.tables import read_table


def read_records(path: str, hints: Hints = Hints()) -> Records:  # noqa: B008 - immutable
    """Read a table with a header row, JSON Lines, a JSON array or a JSON document.

    Args:
        path: path of the file, packed or not.
        hints: what the reader is told beside it.

    Raises:
        InputError: the file cannot be read as text, or holds none of these.
    """
    text = read_text(path, LINE_BYTES)
    records = (read_json if text.lstrip()[:1] in {"{", "["} else read_table)(text, path)
    records.hints = hints
    return records
