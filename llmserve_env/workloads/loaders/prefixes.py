"""Prefix blocks of a trace: ids from the file, or made from its token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from llmserve_env.workloads.loaders.records import Records

TOKEN_ID_BLOCK_TOKENS = 16
"""vLLM's default block size, used where a trace gives token ids and no blocks."""


@dataclass(frozen=True)
class Prefixes:
    """Prefix blocks of n requests, as in `Workload`.

    Attributes:
        block_tokens: tokens in a block (0: there are none).
        blocks: n lists of block ids.
    """

    block_tokens: int
    blocks: list[list[int]]

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """int64[n + 1] offsets and int64[m] ids."""
        counts = np.fromiter(map(len, self.blocks), np.int64, len(self.blocks))
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
        return offsets, np.fromiter(chain.from_iterable(self.blocks), np.int64, int(offsets[-1]))


def hashed_blocks(
    records: Records, name: str, block_tokens: int, prompt_tokens: NDArray[np.int64]
) -> Prefixes | None:
    """Block ids that the file gives itself, at most one for each started block of the prompt.

    Args:
        records: rows of the file.
        name: name of the column.
        block_tokens: tokens of a block in files of this format. Where the file's own counts say another power
            of two, that is taken, as a guess; what the reader was told goes before both.
        prompt_tokens: int64[n].
    """
    lists = _lists(records, name, _is_ids, "expected a list of integers, or of texts")
    if lists is None:
        return None
    if not all(map(_is_integers, lists)):
        numbers: dict[object, int] = {}
        lists = [[numbers.setdefault(each, len(numbers)) for each in ids] for ids in lists]
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    block_tokens = records.hints.block_tokens or _block_tokens(records, counts, prompt_tokens, block_tokens)
    most = -(-prompt_tokens // block_tokens)
    records.mark(
        counts > most,
        lambda row: (
            f"has {counts[row]} blocks, {prompt_tokens[row]} tokens fill {most[row]} of {block_tokens}: "
            "block_tokens=N says how many tokens a block has"
        ),
        name,
    )
    return Prefixes(block_tokens, lists)


def _block_tokens(
    records: Records, counts: NDArray[np.int64], prompt_tokens: NDArray[np.int64], usual: int
) -> int:
    """The size of blocks by which every row has as many as its prompt starts, or fills."""
    rows = ~records.bad & (counts > 0)
    counts, prompt_tokens = counts[rows], prompt_tokens[rows]
    if not len(counts):
        return usual

    def fit(size: int) -> bool:
        started, filled = -(-prompt_tokens // size), prompt_tokens // size
        return bool((counts == started).all() or (counts == filled).all())

    if fit(usual):
        return usual
    sizes = [size for size in (1 << power for power in range(17)) if fit(size)]
    if not sizes:
        records.guesses.append(
            f"blocks of {usual} tokens, which their number does not say: block_tokens=N says it"
        )
        return usual
    records.guesses.append(
        f"blocks of {sizes[-1]} tokens, by their number (usually {usual}): block_tokens=N says it"
    )
    return sizes[-1]


def token_blocks(records: Records, name: str, prompt_tokens: NDArray[np.int64]) -> Prefixes | None:
    """Blocks of 16 token ids, numbered by first appearance; no last, partial block, as in vLLM's cache."""
    lists = _lists(records, name, _is_integers, "expected a list of integers")
    if lists is None:
        return None
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    records.mark(
        (counts > 0) & (counts != prompt_tokens),
        lambda row: f"has {counts[row]} token ids, the prompt {prompt_tokens[row]} tokens",
        name,
    )
    size = records.hints.block_tokens or TOKEN_ID_BLOCK_TOKENS
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    blocks = []
    for tokens in lists:
        parent, path = -1, []
        for end in range(size, len(tokens) + 1, size):
            text = (parent, tuple(tokens[end - size : end]))
            parent = known.setdefault(text, len(known))
            path.append(parent)
        blocks.append(path)
    return Prefixes(size, blocks)


def _lists(
    records: Records, name: str, good: Callable[[object], TypeGuard[Sequence[int]]], expected: str
) -> list[list[int]] | None:
    """A column of lists, empty where a row has none; None if no row has one."""
    raw = records.values(name)
    if records.kind == "table":
        raw = list(map(_list_of_cell, raw))
    if all(value is None for value in raw):
        return None
    wrong = np.array([value is not None and not good(value) for value in raw], bool)
    records.mark(wrong, expected, name)
    return [list(value) if good(value) else [] for value in raw]


def _list_of_cell(cell: object) -> object:
    """The list that a table's cell is as text; None of an empty one."""
    if not isinstance(cell, str) or not cell.strip():
        return None
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _is_integers(value: object) -> TypeGuard[Sequence[int]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return set(map(type, value)) <= {int} and (not value or (min(value) >= -(2**63) and max(value) < 2**63))


def _is_ids(value: object) -> TypeGuard[Sequence[int]]:
    """Names of blocks: integers of any size, as 64 bits without a sign, or hashes as text."""
    return isinstance(value, Sequence) and not isinstance(value, str) and set(map(type, value)) <= {int, str}
