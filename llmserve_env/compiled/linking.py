"""Parts and wholes: what Numba is told, so that functions become one module of machine code.

Built on what Numba offers for this, `pipeline_class`: its own passes with another lowering.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding as llvm
from numba import _dynfunc, njit  # type: ignore[attr-defined] # the former is written in C
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering

_njit: Any = njit  # whose types know not all of its options
# The arrays belong to the caller for the length of a call, so their references need no counting; with it a
# decision costs ten times as much. Nothing is divided by zero; error_model "numpy" leaves out the checks.
_OPTIONS = {"error_model": "numpy", "_nrt": False}


class _PartLibrary(JITCodeLibrary):
    """Intermediate code of one function alone, linked into an entry and never run by itself."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def finalize(self) -> None:
        self._finalized = True


class _WholeLibrary(JITCodeLibrary):
    """An entry with all of its parts; these are known to nobody else."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def finalize(self) -> None:
        for library in self._linking_libraries:  # grows while it is walked
            if isinstance(library, _PartLibrary):
                known = set(self._linking_libraries)
                self._linking_libraries += [each for each in library._linking_libraries if each not in known]
        super().finalize()

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == llvm.Linkage.linkonce_odr:
                function.linkage = "internal"
        if not hasattr(llvm, "create_pipeline_tuning_options"):  # llvmlite before 0.45
            super()._optimize_final_module()
            return
        # One light round instead of Numba's two heavy ones: as fast when it runs, and compiled sooner.
        options = llvm.create_pipeline_tuning_options()
        options.speed_level = 1
        options.loop_unrolling = options.loop_interleaving = False
        options.loop_vectorization = options.slp_vectorization = False
        builder = llvm.create_pass_builder(self._codegen._tm, options)
        builder.getModulePassManager().run(self._final_module, builder)


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerPart(NativeLowering):
    _name = "llmserve_lower_part"

    def run_pass(self, state: Any) -> bool:
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        # Numba finds a callee by the object that Python would call. From Python it raises a TypeError.
        refusal = ctypes.cast(ctypes.pythonapi.PyErr_BadArgument, ctypes.c_void_p).value
        name = lowered.fndesc.qualname.split(".")[-1]
        handle = _dynfunc.make_function(
            lowered.fndesc.lookup_module(), name, "", refusal, lowered.env, (state.library,)
        )
        state.targetctx.insert_user_function(handle, lowered.fndesc, [state.library])
        state["cr"] = lowered._replace(cfunc=handle)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerWhole(NativeLowering):
    _name = "llmserve_lower_whole"

    def run_pass(self, state: Any) -> bool:
        state.library = _WholeLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return bool(super().run_pass(state))


def _passes(state: Any, lowering: type[NativeLowering]) -> list[Any]:
    """Numba's own passes, with another lowering."""
    manager = DefaultPassBuilder.define_nopython_pipeline(state)
    manager.passes = [(lowering if step is NativeLowering else step, text) for step, text in manager.passes]
    return [manager]


class _PartCompiler(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        return _passes(self.state, _LowerPart)


class _WholeCompiler(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        return _passes(self.state, _LowerWhole)


_PART = {**_OPTIONS, "pipeline_class": _PartCompiler, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
part = _njit(**_PART)
"""Decorates a function that entries are made of."""
hot = _njit(forceinline=True, **_PART)
"""As `part`, for a function whose code is to stand wherever it is called."""


def whole(function: Any, *, cache: bool) -> Any:
    """Numba's dispatcher of a function that Python calls, without the interpreter's lock."""
    return _njit(cache=cache, pipeline_class=_WholeCompiler, nogil=True, no_cfunc_wrapper=True, **_OPTIONS)(
        function
    )
