"""A trace under any names of columns, as the reader was told them."""

from __future__ import annotations

from llmserve_env.errors import InputError
from llmserve_env.workloads.loaders.hints import UNITS
from llmserve_env.workloads.loaders.parsed import Parsed
from llmserve_env.workloads.loaders.prefixes import hashed_blocks, token_blocks
from llmserve_env.workloads.loaders.records import Records
from llmserve_env.workloads.loaders.times import seconds
from llmserve_env.workloads.workload import Tenant

DEFAULT_BLOCK_TOKENS = 16
"""vLLM's default block size."""


def parse(records: Records) -> Parsed:
    """The columns that `Hints.columns` names.

    Raises:
        InputError: the file has no such column.
    """
    of = dict(records.hints.columns)
    for target, column in of.items():
        if column not in records.names:
            raise InputError(
                f"no such column or key; there are {shown_names(records.names)}",
                file=records.file,
                field=f"columns: {target}:{column}",
            )
    prompt_tokens = records.tokens(of["prompt_tokens"])
    said = _unit_of(of["arrival_s"])
    prefixes = None
    if "hash_ids" in of:
        prefixes = hashed_blocks(records, of["hash_ids"], DEFAULT_BLOCK_TOKENS, prompt_tokens)
    elif "token_ids" in of:
        prefixes = token_blocks(records, of["token_ids"], prompt_tokens)
    return Parsed(
        arrival_s=seconds(records, of["arrival_s"], said or "s", sure=said is not None),
        prompt_tokens=prompt_tokens,
        output_tokens=records.tokens(of["output_tokens"]),
        tenants=records.texts(of["tenant"], missing=Tenant().name) if "tenant" in of else None,
        request_ids=records.texts(of["request_id"]) if "request_id" in of else None,
        prefixes=prefixes,
    )


def shown_names(names: frozenset[str], most: int = 120) -> str:
    """Names of columns for a message."""
    text = ", ".join(sorted(names))
    return repr(text if len(text) <= most else f"{text[: most - 3]}...")


def _unit_of(column: str) -> str | None:
    """The unit that a column's name ends with."""
    return next((unit for unit in UNITS if column.lower().endswith(f"_{unit}")), None)
