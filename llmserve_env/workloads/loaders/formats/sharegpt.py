"""Conversations as the ShareGPT file holds them: lengths of a question and its answer, by their text.

Source: https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered; vLLM's benchmarks take the
first turn and the answer to it, as here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from llmserve_env.errors import InputError
from llmserve_env.workloads.lengths.empirical import EmpiricalLengths
from llmserve_env.workloads.loaders.formats.results import CHARACTERS_A_TOKEN, estimated_tokens
from llmserve_env.workloads.loaders.records import Records

FIELD = "conversations"
_ASKS = frozenset({"human", "user"})
_ANSWERS = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})


def lengths(records: Records) -> EmpiricalLengths:
    """A pair of lengths for each conversation in which somebody asks and is answered; others are skipped.

    Raises:
        InputError: there is none.
    """
    found = [_first_pair(turns) for turns in records.values(FIELD)]
    pairs = np.array([pair for pair in found if pair is not None], np.int64).reshape(-1, 2)
    if not len(pairs):
        raise InputError("holds no question that is answered", file=records.file, field=FIELD)
    skipped = len(found) - len(pairs)
    records.guesses.append(
        f"tokens are taken as characters / {CHARACTERS_A_TOKEN:g}; {len(pairs):,} conversations, "
        f"{skipped:,} without a question and its answer skipped"
    )
    return EmpiricalLengths(pairs[:, 0], pairs[:, 1])


def _first_pair(turns: Any) -> tuple[int, int] | None:
    """Tokens of the first question and of the answer to it."""
    said = [_said(turn) for turn in turns] if isinstance(turns, list) else []
    for (who, question), (then, answer) in pairwise(said):
        if who in _ASKS and then in _ANSWERS and question and answer:
            return estimated_tokens(question), estimated_tokens(answer)
    return None


def _said(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        return "", ""
    who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    return (who, text) if isinstance(who, str) and isinstance(text, str) else ("", "")
