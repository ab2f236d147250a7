"""Words of memory that threads share: what is read, written and added is seen by all, in one order."""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_ORDERING = "seq_cst"
_WORD_BYTES = 8
_GIVE_WAY = "SwitchToThread" if os.name == "nt" else "sched_yield"


def _pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Where the word stands whose array and index are the first two arguments."""
    kind = signature.args[0]
    words = context.make_array(kind)(context, builder, args[0])
    return cgutils.get_item_pointer(context, builder, kind, words, [args[1]], wraparound=False)


@intrinsic
def load(typing: Any, words: Any, index: Any) -> Any:
    """Value of the word at an index of int64[n]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, signature, args), _ORDERING, _WORD_BYTES)

    return types.int64(words, types.int64), generate


@intrinsic
def store(typing: Any, words: Any, index: Any, value: Any) -> Any:
    """Write a word at an index of int64[n]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _pointer(context, builder, signature, args), _ORDERING, _WORD_BYTES)
        return context.get_dummy_value()

    return types.void(words, types.int64, types.int64), generate


@intrinsic
def add(typing: Any, words: Any, index: Any, value: Any) -> Any:
    """Add to the word at an index of int64[n]; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(context, builder, signature, args), args[2], _ORDERING)

    return types.int64(words, types.int64, types.int64), generate


@intrinsic
def give_way(typing: Any) -> Any:
    """Let another thread have this core if one wants it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, _GIVE_WAY), [])
        return context.get_dummy_value()

    return types.void(), generate
