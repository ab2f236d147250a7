"""Prefix blocks of a trace: ids from the file, or made from its token ids."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Block ids that the file gives itself, at most one for each started block of the prompt."""
    lists = _integer_lists(records, name)
    if lists is None:
        return None
    most = -(-prompt_tokens // block_tokens)
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    records.mark(
        counts > most,
        lambda row: f"has {counts[row]} blocks, {prompt_tokens[row]} tokens fill {most[row]}",
        name,
    )
    return Prefixes(block_tokens, lists)


def token_blocks(records: Records, name: str, prompt_tokens: NDArray[np.int64]) -> Prefixes | None:
    """Blocks of 16 token ids, numbered by first appearance; no last, partial block, as in vLLM's cache."""
    lists = _integer_lists(records, name)
    if lists is None:
        return None
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    records.mark(
        (counts > 0) & (counts != prompt_tokens),
        lambda row: f"has {counts[row]} token ids, the prompt {prompt_tokens[row]} tokens",
        name,
    )
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    blocks = []
    for tokens in lists:
        parent, path = -1, []
        for end in range(TOKEN_ID_BLOCK_TOKENS, len(tokens) + 1, TOKEN_ID_BLOCK_TOKENS):
            text = (parent, tuple(tokens[end - TOKEN_ID_BLOCK_TOKENS : end]))
            parent = known.setdefault(text, len(known))
            path.append(parent)
        blocks.append(path)
    return Prefixes(TOKEN_ID_BLOCK_TOKENS, blocks)


def _integer_lists(records: Records, name: str) -> list[list[int]] | None:
    """A column of integer lists, empty where a row has none; None if no row has one."""
    raw = records.values(name)
    if all(value is None for value in raw):
        return None
    wrong = np.array([value is not None and not _is_integers(value) for value in raw], bool)
    records.mark(wrong, "expected a list of integers", name)
    return [list(value) if _is_integers(value) else [] for value in raw]


def _is_integers(value: object) -> TypeGuard[Sequence[int]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return set(map(type, value)) <= {int} and (not value or (min(value) >= -(2**63) and max(value) < 2**63))
