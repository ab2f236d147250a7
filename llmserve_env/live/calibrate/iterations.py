"""vLLM's log of its iterations (`--enable-logging-iteration-details`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.hardware.iteration_fit import Iterations

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LINE = re.compile(
    r"(?:Engine (?P<engine>\d+): )?Iteration\((?P<index>\d+)\): "
    r"(?P<prefills>\d+) context requests, (?P<prefill_tokens>\d+) context tokens, "
    r"(?P<decodes>\d+) generation requests, (?P<decode_tokens>\d+) generation tokens, "
    r"iteration elapsed time: (?P<ms>[\d.]+) ms(?! \(dummy\)).*?"
    r"(?:KV cache usage: (?P<kv>[\d.]+)%)?$"
)


class IterationLog:
    """A file to which a server logs, read from a mark on.

    Args:
        path: the file.
        kv_tokens: capacity of the KV cache.
        block_tokens: tokens in one of its blocks.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path, kv_tokens: float, block_tokens: int) -> None:
        self._path, self._kv_tokens, self._block_tokens = path, kv_tokens, block_tokens
        self._at = 0
        self.mark()

    def mark(self) -> None:
        """From here on."""
        try:
            self._at = self._path.stat().st_size
        except OSError as error:
            raise InputError(f"cannot be read: {error}", file=str(self._path)) from error

    def since_mark(self) -> Iterations:
        """What was logged since the mark.

        Raises:
            InputError: no iteration, or without the KV cache's usage.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                text = file.read().decode(errors="replace")
        except OSError as error:
            raise InputError(f"cannot be read: {error}", file=str(self._path)) from error
        return read_iterations(text, self._kv_tokens, self._block_tokens, str(self._path))


def read_iterations(text: str, kv_tokens: float, block_tokens: int, file: str) -> Iterations:
    """The iterations in a server's log.

    The usage that a line tells is of the iteration's end, less what finished in it: what the next one begins
    with. It is rounded to a thousandth; half a block of each sequence is taken as empty.

    Args:
        text: text of the log.
        kv_tokens: capacity of the KV cache.
        block_tokens: tokens in one of its blocks.
        file: what an InputError names.

    Raises:
        InputError: there is no iteration, or several engines, no usage of the KV cache, or speculation.
    """
    found = [match for match in map(_LINE.search, text.splitlines()) if match]
    if not found:
        raise InputError(
            "no iteration was logged: start vLLM with --enable-logging-iteration-details, and give the file "
            "that its output goes to",
            file=file,
        )
    if len({match["engine"] for match in found}) > 1:
        raise InputError("expected the iterations of one engine, found several", file=file)
    if any(match["kv"] is None for match in found):
        raise InputError("expected the KV cache's usage with every iteration", file=file)

    def column(name: str) -> NDArray[np.float64]:
        return np.array([float(match[name]) for match in found])

    decodes, usage = column("decodes"), column("kv") / 100 * kv_tokens
    if (column("decode_tokens") != decodes).any():
        raise InputError("expected one token for each decoding sequence, found speculation", file=file)
    consecutive = np.diff(column("index"), prepend=np.nan) == 1
    before = np.where(consecutive, np.roll(usage, 1), usage)
    kv = np.clip(before - decodes * (block_tokens - 1) / 2, decodes, kv_tokens)
    return Iterations(
        prefills=column("prefills"),
        prefill_tokens=column("prefill_tokens"),
        decodes=decodes,
        decode_kv=np.where(decodes > 0, kv, 0.0),
        elapsed_s=column("ms") / 1e3,
    )
