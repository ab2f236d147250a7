"""Digest of everything that jitted code is compiled from."""

from __future__ import annotations

import dis
import hashlib
import sys
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import llvmlite
import numba
import numpy as np
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic

if TYPE_CHECKING:
    from collections.abc import Iterator


def stamp(function: Any) -> int:
    """Digest of a function's code, of all it calls, and of all constants that they name (63 bits).

    Raises:
        TypeError: it names something of which no digest can be made.
    """
    versions = f"{sys.version_info[:2]} {numba.__version__} {llvmlite.__version__} {np.__version__}"
    found = hashlib.sha256(versions.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    for text in _sources(function, set()):
        found.update(text.encode())
    return int.from_bytes(found.digest()[:8], "big") >> 1


def _sources(function: Any, seen: set[int]) -> Iterator[str]:
    """Text of a function's code and of everything that it names, each once."""
    options = getattr(function, "targetoptions", {})
    function = getattr(function, "py_func", function)
    if id(function) in seen:
        return
    seen.add(id(function))
    if function.__closure__:
        raise TypeError(f"no digest can be made of what {function.__qualname__} closes over: name a constant")
    yield f"{sorted((name, repr(value)) for name, value in options.items() if name != 'pipeline_class')}"
    yield f"def {function.__module__}.{function.__qualname__} {function.__defaults__}"
    for code in _codes(function.__code__):
        constants = [each for each in code.co_consts if not isinstance(each, CodeType)]
        yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"
        for step in dis.get_instructions(code):
            if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
                continue
            name = step.argval
            if name not in function.__globals__:
                continue  # a builtin
            value = function.__globals__[name]
            if isinstance(value, (Dispatcher, FunctionType)):
                yield from _sources(value, seen)
            else:
                yield f"{name} = {_text(name, value)}"


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _text(name: str, value: Any) -> str:
    """Text of a constant, equal for equal ones and for no others."""
    if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in ("math", "numpy"):
        return value.__name__
    if isinstance(value, _Intrinsic) and value._defn.__module__ == f"{__package__}.atomic":
        return f"{value!r}"  # the file is in the digest
    if isinstance(value, type) and hasattr(value, "_fields"):
        return f"{value.__qualname__}{value._fields}"
    if isinstance(value, tuple):
        return f"({', '.join(_text(name, each) for each in value)})"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), np.generic, np.dtype)):
        return f"{type(value).__name__} {value!r}"
    raise TypeError(f"no digest can be made of {name}, a {type(value).__name__}: jitted code may not name it")
