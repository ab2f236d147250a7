"""What the reader of a trace is told beside the file: units, block size, names of columns."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve_env.errors import InputError

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""Units of time, in seconds."""

TARGETS = ("arrival_s", "prompt_tokens", "output_tokens", "tenant", "request_id", "hash_ids", "token_ids")
"""What a column can be read as."""

_NEEDED = TARGETS[:3]


@dataclass(frozen=True)
class Hints:
    """What goes before anything that is guessed from a file's content.

    Attributes:
        time_unit: unit of its times, see `UNITS`; None: the format's own.
        block_tokens: prompt tokens of a prefix block; None: the format's own.
        columns: (target, column) pairs that replace the recognition of a format, see `TARGETS`.

    Raises:
        InputError: names the parameter and what was expected.
    """

    time_unit: str | None = None
    block_tokens: int | None = None
    columns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.time_unit is not None and self.time_unit not in UNITS:
            raise InputError(
                f"expected one of {', '.join(UNITS)}, found {self.time_unit!r}", field="time_unit"
            )
        if self.block_tokens is not None and not 1 <= self.block_tokens <= 2**20:
            raise InputError(
                f"expected a whole number of tokens from 1 to {2**20:,}, found {self.block_tokens}",
                field="block_tokens",
            )
        targets = [target for target, _ in self.columns]
        for target in targets:
            if target not in TARGETS:
                raise InputError(f"expected one of {', '.join(TARGETS)}, found {target!r}", field="columns")
            if targets.count(target) > 1:
                raise InputError(f"{target} is named twice", field="columns")
        if self.columns and not set(_NEEDED) <= set(targets):
            missing = next(name for name in _NEEDED if name not in targets)
            raise InputError(f"expected {missing}:COLUMN, too", field="columns")


def parse_columns(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs of a text such as "arrival_s:created_at,prompt_tokens:ISL,output_tokens:OSL".

    A comma in a column's name is written as two.

    Raises:
        InputError: a part is no TARGET:COLUMN.
    """
    pairs = []
    for part in text.replace(",,", "\0").split(","):
        target, colon, column = part.replace("\0", ",").partition(":")
        if not colon or not column:
            raise InputError(
                f"expected TARGET:COLUMN,... with TARGET one of {', '.join(TARGETS)}, found {part!r}",
                field="columns",
            )
        pairs.append((target.strip(), column.strip()))
    return tuple(pairs)
